"""``python -m eval.classifier_bank`` is `eval.bank` now."""

from training.errors import UsageError, cli


def main(argv: list[str]) -> None:
    """Say so."""
    raise UsageError(f"eval.classifier_bank is eval.bank now: python -m eval.bank {' '.join(argv)}")


if __name__ == "__main__":
    cli(main)
