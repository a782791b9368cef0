"""Failure is loud: one clear sentence on stderr and a non-zero exit."""

import sys
from collections.abc import Callable

USAGE_EXIT = 2


class UsageError(Exception):
    """Wrong input. The message names the flag, file or value, what was expected and what to do."""


def cli(main: Callable[[list[str]], int | None]) -> None:
    """Run an entry point on ``sys.argv`` and exit; a `UsageError` becomes one line and code 2."""
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE_EXIT)
