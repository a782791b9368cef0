"""``python -m training.classify``: train or distil a classifier."""

from training.classifier.run import main
from training.errors import cli

if __name__ == "__main__":
    cli(main)
