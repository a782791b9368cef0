"""Training: data, the loop, checkpoints and the command lines."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def distill(method: str = "fd", **flags: Any) -> Path:
    """Train a student as `training.main` does, with a progress bar in a notebook.

    Args:
        method: its ``--distill``.
        flags: its others by name: a value, a list of them, True for a flag without, a dict for
            ``KEY=VALUE``; None leaves one out.

    Returns:
        The run directory; ``student/`` in it is what OpenCLIP loads.

    Raises:
        UsageError: a flag is unknown, or its value wrong.
        Stopped: interrupted and saved; with ``resume="latest"`` it goes on.
        Failure: training diverged, or the data or the machine failed.
    """
    from training.clip.flags import parse, parser, resolved
    from training.engine.config import RunConfig
    from training.errors import Stopped
    from training.main import main

    words = list(_words({"distill": method, **flags}, parser()._option_string_actions))
    values = resolved(parse(words))
    run = Path(values.get("logs", RunConfig.logs)) / values["name"]
    if main(words):
        raise Stopped(f'{run} was interrupted and is saved: resume="latest" goes on')
    return run


def _words(flags: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    """The command line that flags stand for."""
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            off = flag.replace("--", "--no-", 1)
            if value or off in known:
                yield flag if value else off
        elif isinstance(value, dict):
            yield from (flag, *(f"{key}={each}" for key, each in value.items()))
        elif isinstance(value, list | tuple):
            yield from (flag, *map(str, value))
        elif value is not None:
            yield f"{flag}={value}"
