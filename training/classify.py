"""``python -m training.classify``: train or distil a classifier."""

from training.classifier.config import bank_rates, parse, resolve
from training.errors import cli


def main(argv: list[str]) -> int:
    """Run a command line; a wrong one ends before torch is imported."""
    given = parse(argv)
    bank = bank_rates(given)
    resolve(given, device_type="cuda", bank=bank)  # what some device allows

    from training.classifier.run import start

    return start(given, bank)


if __name__ == "__main__":
    cli(main)
