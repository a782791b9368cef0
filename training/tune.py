"""``python -m training.tune``: compare methods fairly, each under its own best weights."""

from training.errors import cli
from training.tuning.plan import parse


def main(argv: list[str]) -> int:
    """Work on a study until it is finished; a wrong command line ends before torch is imported."""
    plan = parse(argv)

    from training.tuning.work import work

    return work(plan)


if __name__ == "__main__":
    cli(main)
