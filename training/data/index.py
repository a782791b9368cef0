"""What a data set of plain WebDataset tars holds: its shards' indexes, as one numbered list."""

import glob
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from cifd_clip.names import nearby
from training.data.shard import LOST, SUFFIX, NotAShard, Shard, index_shard
from training.errors import UsageError

MAX_SHARDS = 1_000_000  # of one brace pattern
_REMOTE = re.compile(r"^(pipe:|[A-Za-z][A-Za-z0-9+.-]*://)")
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")


class Sources:
    """The indexed shards of one data set, in order, grouped by source.

    Attributes:
        shards: list of `Shard`.
        source: (shards,) number of the source (``::``) each shard belongs to.
        weights: upsampling factor per source, or None.
        counts: (shards,) usable samples per shard.
        first_row: (shards + 1,) global row of each shard's first sample; the last is the total.
    """

    def __init__(
        self, shards: Sequence[Shard], source=None, weights: Sequence[float] | None = None
    ):
        self.shards = list(shards)
        self.source = np.zeros(len(shards), dtype=np.int64) if source is None else np.array(source)
        self.weights = None if weights is None else list(weights)
        self.counts = np.array([shard.samples for shard in shards], dtype=np.int64)
        self.first_row = np.concatenate([[0], np.cumsum(self.counts)])

    @property
    def num_samples(self) -> int:
        """Usable samples."""
        return int(self.first_row[-1])

    @property
    def skipped(self) -> dict[str, int]:
        """Samples that cannot be used, by reason (they are in no row).

        A damaged shard has lost at least what it lacks to the median of its source's whole shards.
        """
        skipped = sum((Counter(shard.skipped) for shard in self.shards), Counter())
        listed = self.counts + [sum(shard.skipped.values()) for shard in self.shards]
        damaged = np.array([LOST in shard.skipped for shard in self.shards], dtype=bool)
        for source in np.unique(self.source[damaged]):
            mine = self.source == source
            if (whole := listed[mine & ~damaged]).size:
                lacks = int(np.median(whole)) - listed[mine & damaged]
                skipped[LOST] += int(lacks.clip(min=0).sum())
        return dict(skipped)

    @property
    def problems(self) -> list[str]:
        """What is wrong with shards as a whole, a sentence each: what `check_data` finds too."""
        return [f"{shard.path}: {problem}" for shard in self.shards for problem in shard.problems]

    def place(self, row: int) -> tuple[int, int]:
        """The number of the shard that holds a row, and the row's place in it."""
        number = int(np.searchsorted(self.first_row, row, side="right")) - 1
        return number, row - int(self.first_row[number])

    def record(self, row: int, view: int) -> tuple[Shard, np.void]:
        """Where the members of a row lie: a shard, and one of its records."""
        number, place = self.place(row)
        return self.shards[number], self.shards[number].records[place]

    def path_of(self, row: int) -> str:
        """The path of the shard that holds a row."""
        return self.shards[self.place(row)[0]].path

    def rows_of(self, number: int) -> range:
        """Rows of shard ``number``."""
        return range(int(self.first_row[number]), int(self.first_row[number + 1]))

    def fingerprint(self) -> dict:
        """What a run records of its data (JSON): counts and a hash.

        The hash covers each shard's name, size and the keys, offsets and sizes of its samples, so
        it tells other data apart without reading images.
        """
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{Path(shard.path).name} {shard.bytes} {shard.digest}\n".encode())
        skipped = self.skipped
        return {
            "shards": len(self.shards),
            "samples": self.num_samples + sum(skipped.values()),
            "usable": self.num_samples,
            "skipped": skipped,
            "bytes": sum(shard.bytes for shard in self.shards),
            "hash": digest.hexdigest(),
        }


def is_remote(urls: str) -> bool:
    """Whether any source must be streamed (``pipe:``, ``https://``, ...)."""
    return any(_REMOTE.match(url) for url in urls.split("::"))


def expand(urls: str, flag: str = "--train-data") -> list[list[str]]:
    """Shard paths per source. A source is a path, a brace pattern, a glob or a directory.

    Raises:
        UsageError: a source names nothing, or names files that do not exist.
    """
    sources = []
    for source in urls.split("::"):
        paths = []
        for path in map(os.path.expanduser, expand_braces(source, flag)):
            if os.path.isdir(path):
                paths += sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
            elif any(c in path for c in "*?[") and not os.path.exists(path):
                paths += sorted(name for name in glob.glob(path) if SUFFIX not in name)
            else:
                paths.append(path)
        if not paths:
            raise UsageError(
                f"{flag} {source!r}: no shard found; expected a .tar, a pattern such as "
                "'data/{00000..00014}.tar', or a directory of .tar files"
            )
        sources.append(paths)
    return sources


def expand_braces(source: str, flag: str) -> list[str]:
    """The names that a pattern such as ``{00000..01241}.tar`` stands for.

    Raises:
        UsageError: unbalanced braces, or more names than `MAX_SHARDS`.
    """
    try:
        ranges = [[int(number or 1) for number in numbers] for numbers in _RANGE.findall(source)]
        names = math.prod(abs(last - first) // max(1, abs(by)) + 1 for first, last, by in ranges)
        if names <= MAX_SHARDS:  # counted first: they would not fit into memory
            return list(braceexpand(source))
    except ValueError:
        raise UsageError(f"{flag} {source!r}: unbalanced braces") from None
    raise UsageError(
        f"{flag} {source!r} names {names:,} shards, more than {MAX_SHARDS:,}: is a digit of its "
        "braces too many?"
    )


def index_shards(
    urls: str,
    *,
    weights: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    flag: str = "--train-data",
) -> Sources:
    """Index a data set, reusing the indexes that are there.

    Args:
        urls: sources joined by ``::``, each a path, brace pattern, glob or directory.
        weights: upsampling factors joined by ``::``, one per source (OpenCLIP's
            ``--train-data-upsampling-factors``).
        cache_dir: where indexes go instead of beside the shards.
        flag: the flag to name in errors.

    Raises:
        UsageError: a shard is missing or no plain tar, or no sample is usable.
    """
    sources = expand(urls, flag)
    paths = [path for source in sources for path in source]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        why = "not a regular file" if os.path.exists(missing[0]) else "no such file"
        raise UsageError(f"{flag}: {missing[0]}{more}: {why}{nearby(missing[0])}")
    factors = _factors(weights, len(sources))
    try:
        shards = [index_shard(path, cache_dir) for path in paths]
    except NotAShard as error:
        raise UsageError(f"{flag}: {error}") from None
    of_source = np.repeat(np.arange(len(sources)), [len(source) for source in sources])
    indexed = Sources(shards, of_source, factors)
    if not indexed.num_samples:
        raise UsageError(
            f"{flag} {urls!r}: no usable sample in {len(shards)} shard(s): "
            f"{indexed.skipped or 'empty'}; expected members KEY.jpg (or .png, .jpeg, .webp) and "
            "KEY.txt; run `python -m training.check_data` on it"
        )
    return indexed


def _factors(weights: str | None, n: int) -> list[float] | None:
    if weights is None:
        return None
    try:
        factors = [float(weight) for weight in weights.split("::")]
    except ValueError:
        factors = []
    if len(factors) != n or not all(0 < factor < float("inf") for factor in factors):
        raise UsageError(
            f"--train-data-upsampling-factors {weights!r}: expected {n} positive number(s) joined "
            "by '::', one per source of --train-data"
        )
    return factors
