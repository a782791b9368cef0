"""Where results lie: their names, the gaps beside them, and the examples of retrieval.

The results themselves are `training.engine.result`'s, which training writes too.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from eval.datasets import Gap
from training.engine.result import Provenance, write
from training.errors import sentence


@dataclass(frozen=True, kw_only=True)
class GapRecord:
    """A data set that a model could not be evaluated on, and why (``gap``)."""

    dataset: str
    model: str
    weights: str
    gap: str = ""


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """An image that a model found for a caption (PNG, base64), and whether it is the right one."""

    image: str
    hit: bool


@dataclass(frozen=True, kw_only=True)
class Query:
    """A caption, its image (PNG, base64), and the nearest images, best first."""

    caption: str
    image: str
    retrieved: tuple[Retrieved, ...]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Some captions with the images that a model retrieves for them."""

    model: str
    queries: tuple[Query, ...]


def slug(text: str) -> str:
    """Text as part of a file name, not longer than a file system takes."""
    return re.sub(r"[^A-Za-z0-9._@+-]+", "-", text).strip("-")[-80:]


def file_name(parts: list[str], provenance: Provenance) -> str:
    """A name for readers (data set, split, model), shared by equal results alone."""
    key = json.dumps([parts, provenance.identity])
    digest = hashlib.sha256(key.encode()).hexdigest()[:10]
    return "_".join(slug(part) for part in [*parts, digest]) + ".json"


def attempt(folder: Path, split: str, gap: GapRecord, evaluate: Callable[[], str]) -> bool:
    """Evaluate a model on a data set, print a line, and keep a gap as a file while it is one.

    Args:
        folder, split: of the results, and of the data set.
        gap: data set and model; the reason is filled in.
        evaluate: returns the line, or raises `Gap`.

    Returns:
        Whether it could be evaluated.
    """
    stem = "_".join((slug(gap.dataset), split, slug(gap.model), gap.weights[:10]))
    path, title = folder / "gaps" / f"{stem}.json", f"{gap.model} on {gap.dataset}"
    try:
        line = evaluate()
    except Gap as error:
        reason = sentence(error)  # without the traceback of a loader's process
        write(path, replace(gap, gap=reason))
        print(f"{title}: not evaluated: {reason}", file=sys.stderr)
        return False
    path.unlink(missing_ok=True)
    print(f"{title}: {line}", flush=True)
    return True
