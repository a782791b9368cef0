"""``python -m eval.report``."""

from eval.report import main
from training.errors import cli

if __name__ == "__main__":
    cli(main)
