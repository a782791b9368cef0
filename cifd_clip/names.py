"""Names that nothing goes by, answered with the known ones that they may stand for.

What a function gives is the end of a message, empty where nothing is near.
"""

import difflib
from collections.abc import Collection, Iterable
from itertools import takewhile
from pathlib import Path


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Known words that are near."""
    close = difflib.get_close_matches(word, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def nearby(path: str | Path) -> str:
    """What lies beside a path that is not there, or beside the first of its folders that is not."""
    path = Path(path)
    if not path.parent.is_dir():
        return nearby(path.parent)
    return "" if path.exists() else did_you_mean(path.name, (p.name for p in path.parent.iterdir()))


def unknown_flag(words: Iterable[str], known: Collection[str]) -> str:
    """The first flag of a command line that is not known, and what is near; empty without one."""
    words = takewhile(lambda word: word != "--", words)
    flags = (word.partition("=")[0] for word in words if word.startswith("--"))
    return next((f"{flag}{did_you_mean(flag, known)}" for flag in flags if flag not in known), "")
