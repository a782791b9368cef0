"""``python -m training.classify``: train or distil a classifier."""

from training.classifier.config import parse, resolve
from training.errors import cli


def main(argv: list[str]) -> int:
    """Run a command line; a wrong one ends before torch is imported."""
    given = parse(argv)
    resolve(given)

    from training.classifier.run import start

    return start(given)


if __name__ == "__main__":
    cli(main)
