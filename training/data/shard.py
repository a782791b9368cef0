"""What one WebDataset tar holds, and where: its index.

Made once (headers only), kept beside the shard as ``NAME.tar.index.npz`` or, when that place is
read-only, under the user's cache; made anew when the shard's size or time changed, or when it is
damaged. It lists the samples that can be used, counts the others by reason, and estimates how
many a damaged part has cost.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from cifd_clip.files import file_hash, writing
from training.data.decode import BadSample
from training.data.tar import BadTar, Member, members, open_regular
from training.errors import Failure, MachineFailure, UsageError

VERSION = 2
SUFFIX = ".index.npz"
IMAGES = ("jpg", "png", "jpeg", "webp")  # open_clip's order of preference within one sample
MEMBERS = {**dict.fromkeys(IMAGES, "image"), "txt": "text", "json": "json"}
REQUIRED = {"image": "no image", "text": "no caption"}
STRAY = "no image or caption (a key ends at its first dot)"
LOST = "lost in a damaged part of a shard (estimated)"
EMPTY = "holds no sample"
MAX_NAME = 1024
OPEN_SHARDS = 128  # files that a process keeps open
RECHECK = 64  # reads of an open shard, after which it is looked whether it is the same yet
ABSENT = (-1, 0)
EXAMPLES = 3  # keys that an index keeps of each reason to skip a sample
_META = {"stamp", "samples", "digest", "skipped", "examples", "problems", "content"}


@dataclass(frozen=True)
class Shard:
    """One indexed tar: what is known without opening its index again.

    Attributes:
        path, index: where it and its index are.
        bytes, modified: its size, and its time in nanoseconds.
        samples, skipped: usable samples, and others by reason.
        digest: SHA-256 of its records: keys, offsets and sizes of the usable samples.
        examples: keys of some of the others, by reason.
        problems: what is wrong with it as a whole, a sentence each.
        content: SHA-256 of the file as `training.check_data` found it, or None.
    """

    path: str
    index: str
    bytes: int
    samples: int
    digest: str
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    modified: int = 0
    content: str | None = None

    @property
    def records(self) -> np.ndarray:
        """(samples,) structured: ``key`` (bytes); ``image``, ``text``, ``json`` (offset, size).

        Raises:
            Failure: the shard is no longer the one that was indexed.
        """
        return _records(self.path, self.index, self.digest)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of a member.

        Raises:
            BadSample: it is cut short.
            Failure: the shard can't be read, or is no longer the one that was indexed.
        """
        try:
            return _open(self.path, self.bytes, self.modified).read(offset, size)
        except OSError as error:
            what = f"{self.path} can't be read any more: {error.strerror}"
            raise MachineFailure(what) from error


class NotAShard(Failure):
    """The file cannot be read as a plain tar at all."""


def index_shard(
    path: str, cache_dir: str | os.PathLike | None = None, *, check: bool = False
) -> Shard:
    """The index of one shard, made if need be.

    Args:
        path: the shard.
        cache_dir: where the index goes instead of beside the shard.
        check: make it in any case, with the hash of the content, which `verify` compares.

    Raises:
        NotAShard: the file is compressed, no tar, or cannot be read; or the index can't be written.
    """
    try:
        place, file = _index_path(path, cache_dir), os.stat(path)
    except OSError as error:
        raise NotAShard(f"{path}: {error.strerror}") from None
    stamp = [VERSION, file.st_size, file.st_mtime_ns]
    meta = _read_meta(place)
    if meta is not None and meta["stamp"] != stamp:
        meta = None
    if meta is None or check:
        records, built = build_index(path)
        built |= {"stamp": stamp, "content": file_hash(path) if check else None}
        if meta is not None and any(
            meta[name] not in (None, built[name]) for name in ("digest", "content")
        ):
            built["problems"].append("it, or its index, was altered at the same size and time")
        meta = built
        try:
            _write(place, records, meta)
        except OSError as error:
            raise NotAShard(f"{place} can't be written: {error.strerror}") from None
    return Shard(
        path=str(path),
        index=place,
        bytes=file.st_size,
        samples=meta["samples"],
        digest=meta["digest"],
        skipped=meta["skipped"],
        examples=meta["examples"],
        problems=tuple(meta["problems"]),
        modified=file.st_mtime_ns,
        content=meta["content"],
    )


def verify(shards: Iterable[Shard]) -> None:
    """Compare what shards and indexes hold with what `training.check_data` found (reads them all).

    Raises:
        UsageError: one was altered, or was never checked.
    """
    for shard in shards:
        if shard.content is None:
            raise UsageError(
                f"--verify-data: {shard.index} has no hash of the content of {shard.path}: run "
                "`python -m training.check_data` on the data first"
            )
        held = build_index(shard.path)[1]["digest"], file_hash(shard.path)
        if held != (shard.digest, shard.content):
            raise UsageError(
                f"--verify-data: {shard.path} or its index was altered after it was checked, at "
                "the same size and time: fetch it again"
            )


def build_index(path: str) -> tuple[np.ndarray, dict]:
    """Read a shard's headers -> (records of usable samples, meta).

    Members that share a key (the path up to the first dot of the file name: WebDataset's rule) are
    one sample, wherever they lie in the shard. Members outside the allow-list are never read, and
    counted where no sample has their key.

    Raises:
        NotAShard: the file is compressed, no tar, or cannot be read.
    """
    samples, latest, strays = [], {}, {}
    problems, skipped, examples, usable = [], Counter(), {}, []
    try:
        with open_regular(path) as file:
            end = os.fstat(file.fileno()).st_size
            for member in members(partial(os.pread, file.fileno()), end):
                part = split_name(member.name)
                if part is None or member.kind == "other":
                    continue
                key, kind, rank = part
                sample = latest.get(key)
                if kind is None:
                    if sample is None:
                        strays[member.name.rpartition(b".")[0]] = key
                    continue
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
        if samples:
            skipped[LOST] = max(1, -(-(end - error.position) * len(samples) // error.position))
    except OSError as error:
        raise NotAShard(f"{path}: {error.strerror}") from None
    if unlisted := [key for key in strays.values() if key not in latest]:
        skipped[STRAY], examples[STRAY] = len(unlisted), unlisted
    if not samples and not strays:
        problems.append(EMPTY)
    for sample in samples:
        fault = sample["fault"] or next(
            (name for kind, name in REQUIRED.items() if kind not in sample), None
        )
        if fault:
            skipped[fault] += 1
            examples.setdefault(fault, []).append(sample["key"])
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
        "examples": {
            reason: [key.decode("utf-8", "replace") for key in keys[:EXAMPLES]]
            for reason, keys in examples.items()
        },
        "problems": problems,
        "digest": _digest(records),
    }


def split_name(name: bytes) -> tuple[bytes, str | None, int] | None:
    """Member name -> (key, ``image`` | ``text`` | ``json`` | None, preference).

    None instead of all this: a hidden file, metadata, or a file without an extension.
    """
    slash = name.rfind(b"/") + 1
    stem, _, extension = name[slash:].partition(b".")
    if not stem or not extension:
        return None
    if stem.startswith(b"__") and stem.endswith(b"__"):  # WebDataset's metadata members
        return None
    extension = extension.decode("latin-1").lower()
    kind = MEMBERS.get(extension)
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


def _index_path(path: str, cache_dir) -> str:
    """Beside the shard if that place may be written to, else in the user's cache."""
    folder, name = os.path.split(os.path.abspath(path))
    if cache_dir is None:
        # the mode too: root may write anywhere, but a read-only folder is meant to stay as it is
        if os.access(folder, os.W_OK) and os.stat(folder).st_mode & 0o222:
            return os.path.join(folder, name + SUFFIX)
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        cache_dir = os.path.join(cache, "cifd_clip", "index")
    mark = hashlib.sha256(folder.encode()).hexdigest()[:16]
    return os.path.join(cache_dir, mark, name + SUFFIX)


def _read_meta(place: str) -> dict | None:
    meta = _read(place, "meta")
    try:
        meta = json.loads(meta.tobytes())
    except (AttributeError, ValueError):
        return None
    return meta if isinstance(meta, dict) and meta.keys() >= _META else None


def _read(place: str, name: str) -> np.ndarray | None:
    """An array of an index, or None: there is none, or it is damaged."""
    try:
        with np.load(place, allow_pickle=False) as index:
            return index[name]
    except Exception:  # a damaged zip raises whatever it likes
        return None


def _write(place: str, records: np.ndarray, meta: dict) -> None:
    with writing(Path(place)) as file:
        np.savez(file, records=records, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8))


@lru_cache(maxsize=128)
def _records(path: str, place: str, digest: str) -> np.ndarray:
    # the digest is part of the cache's key: a shard may change while the process lives
    records = _read(place, "records")
    if records is None or _digest(records) != digest:
        records, meta = build_index(path)  # the index is damaged, gone, or another shard's by now
        if meta["digest"] != digest:
            raise _changed(path)
    return records


def _digest(records: np.ndarray) -> str:
    return hashlib.sha256(records.tobytes()).hexdigest()


class _Opened:
    """An open shard, which must stay the file that was indexed."""

    def __init__(self, path: str, size: int, modified: int):
        self.path, self.stamp = path, (size, modified)
        self.file, self.reads = open_regular(path), 0

    def read(self, offset: int, size: int) -> bytes:
        if self.reads % RECHECK == 0:
            self.check()
        self.reads += 1
        data = os.pread(self.file.fileno(), size, offset)
        if len(data) < size:
            self.check()
            raise BadSample("truncated")
        return data

    def check(self) -> None:
        file = os.fstat(self.file.fileno())
        if (file.st_size, file.st_mtime_ns) != self.stamp:
            raise _changed(self.path)


# each process opens its own; a file is closed when it leaves the cache
_open = lru_cache(maxsize=OPEN_SHARDS)(_Opened)


def _changed(path: str) -> Failure:
    return MachineFailure(
        f"{path} was changed after it was indexed: put the old one back, or start again (--resume "
        "latest goes on where the content is the same)"
    )
