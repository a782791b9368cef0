"""``python -m training.main``: train a CLIP model, an RDM bank, or a distilled student."""

from training.clip.run import main
from training.errors import cli

if __name__ == "__main__":
    cli(main)
