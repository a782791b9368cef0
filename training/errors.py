"""Failure is loud: one clear sentence on stderr and a non-zero exit."""

import sys
from collections.abc import Callable


class Failure(Exception):
    """The run can't go on; the message is one sentence for the user."""

    exit_code = 1


class UsageError(Failure):
    """Wrong input. The message names the flag, file or value, what was expected and what to do."""

    exit_code = 2


class NonFinite(Failure):
    """Training diverged. The message names the loss term; the last good weights are on disk."""

    exit_code = 3


def cli(main: Callable[[list[str]], int | None]) -> None:
    """Run an entry point on ``sys.argv`` and exit; a `Failure` becomes one line and its code."""
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
