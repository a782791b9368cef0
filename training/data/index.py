"""What a data set of plain WebDataset tars holds, and where: one small index per shard.

Made once per shard (headers only), kept beside it as ``NAME.tar.index.npz`` or, when that place is
read-only, under the user's cache; made anew when the shard's size or time changed. The index lists
the samples that can be used and counts the others by reason.
"""

import glob
import hashlib
import json
import multiprocessing
import os
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand

from training.data.tar import BadTar, Member, members
from training.errors import UsageError

VERSION = 1
IMAGES = ("jpg", "png", "jpeg", "webp")  # open_clip's order of preference within one sample
MEMBERS = {**dict.fromkeys(IMAGES, "image"), "txt": "text", "json": "json"}
MAX_NAME = 1024
ABSENT = (-1, 0)
_REMOTE = re.compile(r"^(pipe:|[A-Za-z][A-Za-z0-9+.-]*://)")


@dataclass(frozen=True)
class Shard:
    """One indexed tar: what is known without opening its index again."""

    path: str
    index: str
    bytes: int
    samples: int
    digest: str
    skipped: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def records(self) -> np.ndarray:
        """(samples,) structured: ``key`` (bytes); ``image``, ``text``, ``json`` (offset, size)."""
        return _records(self.index, self.digest)


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
        """Samples that cannot be used, by reason (they are in no row)."""
        return dict(sum((Counter(shard.skipped) for shard in self.shards), Counter()))

    def locate(self, row: int) -> tuple[Shard, int]:
        """The shard that holds a row, and the row's place in it."""
        number = int(np.searchsorted(self.first_row, row, side="right")) - 1
        return self.shards[number], row - int(self.first_row[number])

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
    """Whether any source must be streamed (``pipe:``, ``https://``, ``s3://``, ...)."""
    return any(_REMOTE.match(url) for url in urls.split("::"))


def expand(urls: str, flag: str = "--train-data") -> list[list[str]]:
    """Shard paths per source. A source is a path, a brace pattern, a glob or a directory.

    Raises:
        UsageError: a source names nothing, or names files that do not exist.
    """
    sources = []
    for source in urls.split("::"):
        try:
            paths = [os.path.expanduser(path) for path in braceexpand(source)]
        except UnbalancedBracesError:
            raise UsageError(f"{flag} {source!r}: unbalanced braces") from None
        found = []
        for path in paths:
            if os.path.isdir(path):
                found += sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
            elif any(c in path for c in "*?[") and not os.path.exists(path):
                found += sorted(glob.glob(path))
            else:
                found.append(path)
        if not found:
            raise UsageError(
                f"{flag} {source!r}: no shard found; expected a .tar, a pattern such as "
                "'data/{00000..00014}.tar', or a directory of .tar files"
            )
        sources.append(found)
    return sources


def index_shards(
    urls: str,
    *,
    weights: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    workers: int = 0,
    flag: str = "--train-data",
    progress: Callable = iter,
) -> Sources:
    """Index a data set, reusing the indexes that are there.

    Args:
        urls: sources joined by ``::``, each a path, brace pattern, glob or directory.
        weights: upsampling factors joined by ``::``, one per source (OpenCLIP's
            ``--train-data-upsampling-factors``).
        cache_dir: where indexes go instead of beside the shards.
        workers: processes that build missing indexes; 0: this one.
        flag: the flag to name in errors.
        progress: wraps the iterator over shards (`tqdm`).

    Raises:
        UsageError: a shard is missing or no plain tar, or no sample is usable.
    """
    sources = expand(urls, flag)
    paths = [path for source in sources for path in source]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UsageError(f"{flag}: {missing[0]}{more}: no such file")
    factors = _factors(weights, len(sources))
    try:
        shards = list(progress(_indexed(paths, cache_dir, workers)))
    except NotAShard as error:
        raise UsageError(f"{flag}: {error}") from None
    found = Sources(shards, np.repeat(np.arange(len(sources)), [len(s) for s in sources]), factors)
    if not found.num_samples:
        raise UsageError(
            f"{flag} {urls!r}: no usable sample in {len(shards)} shard(s): "
            f"{found.skipped or 'empty'}; expected members KEY.jpg (or .png, .jpeg, .webp) and "
            "KEY.txt; run `python -m training.check_data` on it"
        )
    return found


class NotAShard(Exception):
    """The file cannot be read as a plain tar at all."""


def index_shard(path: str, cache_dir: str | os.PathLike | None = None) -> Shard:
    """The index of one shard, made if need be.

    Raises:
        NotAShard: the file is compressed, no tar, or cannot be read.
    """
    place = _index_path(path, cache_dir)
    try:
        stat = os.stat(path)
        stamp = [VERSION, stat.st_size, stat.st_mtime_ns]
        meta = _read_meta(place)
        if meta is None or meta["stamp"] != stamp:
            records, meta = build_index(path)
            _write(place, records, meta | {"stamp": stamp})
    except OSError as error:
        raise NotAShard(f"{error.filename or path}: {error.strerror}") from None
    return Shard(
        path=str(path),
        index=place,
        bytes=stat.st_size,
        samples=meta["samples"],
        digest=meta["digest"],
        skipped=meta["skipped"],
        problems=tuple(meta["problems"]),
    )


def build_index(path: str) -> tuple[np.ndarray, dict]:
    """Read a shard's headers -> (records of usable samples, meta).

    Members that share a key (the path up to the first dot of the file name: WebDataset's rule) are
    one sample, wherever they lie in the shard. Members outside the allow-list are never read.
    """
    samples, latest = [], {}
    problems = []
    with open(path, "rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        try:
            for member in members(partial(os.pread, file.fileno()), end):
                part = split_name(member.name)
                if part is None or (member.kind == "other"):
                    continue
                key, kind, rank = part
                sample = latest.get(key)
                if sample is None or (kind in sample and sample[kind][2] == rank):
                    sample = {"key": key, "fault": "duplicate key" if sample else None}
                    samples.append(sample)
                    latest[key] = sample
                fault = fault_of(member, kind, end)
                if fault:
                    sample["fault"] = sample["fault"] or fault
                elif kind not in sample or rank < sample[kind][2]:
                    sample[kind] = (member.offset, member.size, rank)
        except BadTar as error:
            if not samples and end:
                raise NotAShard(f"{path}: {error}") from None
            problems.append(str(error))
    skipped, usable = Counter(), []
    for sample in samples:
        fault = sample["fault"] or next(
            (name for kind, name in REQUIRED.items() if kind not in sample), None
        )
        if fault:
            skipped[fault] += 1
        else:
            usable.append(
                (sample["key"], *(sample.get(k, ABSENT)[:2] for k in ("image", "text", "json")))
            )
    width = max((len(key) for key, *_ in usable), default=1)
    span = ("<i8", (2,))
    dtype = [("key", f"S{width}"), ("image", *span), ("text", *span), ("json", *span)]
    records = np.array(usable, dtype=dtype)
    return records, {
        "samples": len(records),
        "skipped": dict(skipped),
        "problems": problems,
        "digest": hashlib.sha256(records.tobytes()).hexdigest(),
    }


REQUIRED = {"image": "no image", "text": "no caption"}


def split_name(name: bytes) -> tuple[bytes, str, int] | None:
    """Member name -> (key, ``image`` | ``text`` | ``json``, preference), or None if not for us."""
    slash = name.rfind(b"/") + 1
    stem, _, extension = name[slash:].partition(b".")
    kind = MEMBERS.get(extension.decode("latin-1").lower())
    if not stem or kind is None:
        return None
    if stem.startswith(b"__") and stem.endswith(b"__"):  # WebDataset's metadata members
        return None
    extension = extension.decode().lower()
    rank = IMAGES.index(extension) if kind == "image" else 0
    return name[:slash] + stem, kind, rank


def fault_of(member: Member, kind: str, end: int | None = None) -> str | None:
    """Why a member cannot be used."""
    if member.kind == "link":
        return "link member"
    parts = member.name.split(b"/")
    if len(member.name) > MAX_NAME or b".." in parts or not parts[0] or b"\0" in member.name:
        return "unsafe name"
    if end is not None and member.offset + member.size > end:
        return "truncated"
    if not member.size and kind != "json":
        return f"empty {'image' if kind == 'image' else 'caption'}"
    return None


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


def _indexed(paths: Sequence[str], cache_dir, workers: int):
    index = partial(index_shard, cache_dir=cache_dir)
    if workers < 2 or len(paths) < 2:
        yield from map(index, paths)
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(min(workers, len(paths)), mp_context=context) as pool:
        yield from pool.map(index, paths, chunksize=4)


def _index_path(path: str, cache_dir) -> str:
    """Beside the shard if that place may be written to, else in the user's cache."""
    folder, name = os.path.split(os.path.abspath(path))
    if cache_dir is None:
        # the mode too: root may write anywhere, but a read-only folder is meant to stay as it is
        if os.access(folder, os.W_OK) and os.stat(folder).st_mode & 0o222:
            return os.path.join(folder, name + ".index.npz")
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        cache_dir = os.path.join(cache, "cifd_clip", "index")
    mark = hashlib.sha256(folder.encode()).hexdigest()[:16]
    return os.path.join(cache_dir, mark, name + ".index.npz")


def _read_meta(place: str) -> dict | None:
    try:
        with np.load(place, allow_pickle=False) as index:
            return json.loads(index["meta"].tobytes())
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        return None


def _write(place: str, records: np.ndarray, meta: dict) -> None:
    """Write whole or not at all: several ranks may index the same shard at once."""
    folder = os.path.dirname(place)
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".index.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o644)
            meta_bytes = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
            np.savez(file, records=records, meta=meta_bytes)
        os.replace(temporary, place)
    except BaseException:
        os.unlink(temporary)
        raise


@lru_cache(maxsize=128)
def _records(place: str, digest: str) -> np.ndarray:
    # the digest is part of the cache's key: a shard may change while the process lives
    with np.load(place, allow_pickle=False) as index:
        return index["records"]
