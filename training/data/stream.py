"""Remote or piped shards (``pipe:``, ``https://``, ``gs://``): read once through, front to back.

The streams are opened by `webdataset`, which calls ``curl`` and the like (`check_urls`); the tar in
them is read by the same rules and limits as a local one. What cannot be had without positions:
resuming is by shard, not by sample, and the order depends on the number of ranks and workers.
"""

import hashlib
import itertools
import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.gopen import gopen, gopen_schemes, rewrite_url

from training.data.batch import Batch, assembled, chunk_rows
from training.data.decode import BadSample, Caps
from training.data.draws import permutation, words
from training.data.index import expand_braces, is_remote
from training.data.loader import Assembly, Captions, Recipe
from training.data.shard import REQUIRED, STRAY, fault_of, split_name
from training.data.tar import BadTar, members, open_regular
from training.data.views import View, private_randomness
from training.data.workers import check_limits, data_loader, end, iterate, reads
from training.errors import Failure, UsageError
from training.masking import masked

log = logging.getLogger(__name__)

MAX_BAD, MAX_BARREN = 20_000, 100  # samples and shards in a row without a usable one
_PROGRAMS = {"gs": "gsutil", "ais": "ais"}  # that webdataset calls; for other schemes it is curl


def check_urls(urls: str, flag: str = "--train-data") -> list[str]:
    """The shards' URLs, all of which can be opened here as far as their schemes tell.

    Raises:
        UsageError: a scheme that `webdataset` doesn't know, or whose program isn't there.
    """
    names = [name for source in urls.split("::") for name in expand_braces(source, flag)]
    remote = {rewrite_url(url).partition(":")[0]: url for url in names if is_remote(url)}
    for scheme in remote.keys() - {"file", "pipe"}:
        what = f"{flag} {masked(remote[scheme])}: {scheme}:"
        if scheme not in gopen_schemes:
            known = ", ".join(sorted(gopen_schemes.keys() - {"__default__"}))
            raise UsageError(
                f"{what} can't be opened, only {known}; the command of another tool can be "
                "(pipe:aws s3 cp s3://BUCKET/KEY.tar -)"
            )
        program = _PROGRAMS.get(scheme, "curl")
        if shutil.which(program) is None:
            raise UsageError(f"{what} needs the program {program}, which is not here")
    return names


def stream_fingerprint(urls: str) -> dict:
    """What a run records of shards it can't look into beforehand: their names, see `masked`."""
    names = [masked(name) for name in check_urls(urls)]
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    counts = dict.fromkeys(("samples", "usable"), "not counted")
    return {"shards": len(names), **counts, "skipped": {}, "hash": digest}


class StreamLoader:
    """The training stream of remote shards as batches: `training.data.loader.Loader` by shard.

    The shards of all passes form one sequence, each pass a permutation by (seed, pass). Rank r's
    worker w takes every C-th of them, C = ranks x workers.

    Args:
        urls: sources joined by ``::``, with braces.
        shards_consumed: where to start: the attribute of this name when the run was saved.
        shuffle: samples in a worker's shuffle buffer.
        others: as of `Loader`; ``rows`` of its batches are -1.

    Attributes:
        shards_consumed: all shards of the sequence before this one were read (by this rank's
            workers) up to the batches handed out. Starting there repeats or leaves out at most
            the shards then open and the samples in the shuffle buffers.
    """

    def __init__(
        self,
        urls: str,
        image_transforms: Sequence[View],
        tokenizers: Sequence[Callable],
        *,
        seed: int,
        global_batch: int,
        shards_consumed: int = 0,
        views: int | None = None,
        captions: Captions = "first",
        caps: Caps | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 1,
        start_method: str | None = None,
        pin_memory: bool = False,
        prefetch: int = 2,
        shuffle: int = 1000,
    ):
        if global_batch % world_size:
            raise ValueError(f"global batch {global_batch} is no multiple of {world_size} ranks")
        workers = max(1, workers)  # only what another process reads can be given up
        recipe = Recipe(image_transforms, tokenizers, seed, captions, caps or Caps())
        local = global_batch // world_size
        size = chunk_rows(local)
        self._per_batch, self._pinned = local // size, pin_memory
        prefetch = max(prefetch, -(-self._per_batch // workers))
        check_limits(recipe.sample_bytes() * size, workers, prefetch)
        data = _Stream(
            check_urls(urls),
            recipe,
            size,
            views or 0,
            shards_consumed,
            rank * workers,
            world_size * workers,
            shuffle,
        )
        if rank == 0:
            log.warning(
                "%d remote shard(s) are streamed: runs resume at a shard, not at a sample, and "
                "their order depends on ranks and workers; local tars have no such limit",
                len(data.urls),
            )
        self.shards_consumed, self._name = shards_consumed, data.name
        self._latest = deque([shards_consumed], maxlen=workers)
        self._loader = data_loader(data, None, workers, start_method, pin_memory, prefetch, False)
        self._batches = None

    def batches(
        self,
        start_step: int,
        stop_step: int,
        stopping: Callable[[], bool] | None = None,
        timeout: float | None = None,
    ) -> Iterator[Batch]:
        """The next ``stop_step - start_step`` batches of this rank; see `Loader.batches`."""
        if self._batches is None:
            self._batches = iterate(self._loader, name=self._name)
        self._batches.stopping, self._batches.timeout = stopping, timeout
        batches = assembled(self._noted(), self._per_batch, self._pinned)
        yield from itertools.islice(batches, stop_step - start_step)

    def _noted(self) -> Iterator[Batch]:
        for chunk in self._batches:
            self._latest.append(chunk.shards)
            self.shards_consumed = min(self._latest)
            yield chunk

    def close(self) -> None:
        """End the workers."""
        end(self._batches)
        self._batches = None


@dataclass
class _Stream(IterableDataset):
    """One worker's endless sequence of batches."""

    urls: list[str]
    recipe: Recipe
    batch_size: int
    views: int
    first: int
    consumer: int
    consumers: int
    shuffle: int

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        consumer = self.consumer + (info.id if info else 0)
        samples = self._shuffled(consumer)
        bad, last_good = 0, self.first + consumer  # samples in a row, and the shard before them
        while True:
            assembly = Assembly(self.recipe, self.batch_size)
            with private_randomness():
                while len(assembly.keys) < self.batch_size:
                    number, sample = next(samples)
                    try:
                        self._add(assembly, number, sample)
                        bad, last_good = 0, number
                    except BadSample as reason:
                        assembly.skipped[str(reason)] += 1
                        bad += 1
                        shards = (number - last_good) // self.consumers
                        if shards > min(len(self.urls), MAX_BARREN) or bad == MAX_BAD:
                            raise Failure(
                                f"{shards} shards in a row without a usable sample, up to "
                                f"{self.name(number)} ({dict(assembly.skipped)}); run `python -m "
                                "training.check_data --deep` on a copy"
                            ) from None
                batch = assembly.finish()
            batch.shards = number
            yield batch

    def _add(self, assembly: Assembly, number: int, sample: dict | str) -> None:
        if isinstance(sample, str):
            raise BadSample(sample)
        turn = number // len(self.urls)
        view = turn % self.views if self.views else turn
        key = sample["key"]
        assembly.add(key, -1, view, *self.recipe.sample(key, view, _from(sample)))

    def name(self, number: int) -> str:
        """Of a shard of the sequence, to show."""
        return masked(self._url(number))

    def _url(self, number: int) -> str:
        turn, place = divmod(number, len(self.urls))
        return self.urls[permutation(len(self.urls), self.recipe.seed, "shards", turn)[place]]

    def _shuffled(self, consumer: int):
        """(shard in reading, sample or reason) in shuffled order."""
        buffer, drawn, room = [], 0, self.shuffle
        for number, sample in self._samples(consumer):
            if number > self.first + consumer:  # hold no more than the first shard held
                room = min(room, len(buffer))
            if isinstance(sample, str):
                yield number, sample
                continue
            buffer.append(sample)
            if len(buffer) > room:
                u = int(words(1, self.recipe.seed, "buffer", self.first, consumer, drawn)[0])
                drawn += 1
                place = u % len(buffer)
                buffer[place], buffer[-1] = buffer[-1], buffer[place]
                yield number, buffer.pop()

    def _samples(self, consumer: int):
        """(shard in reading, sample or reason) of this consumer's shards, pass after pass."""
        for number in itertools.count(self.first + consumer, self.consumers):
            url, empty = self._url(number), True
            reads(number)
            try:
                for sample in read_shard(url, self.recipe.caps):
                    empty = False
                    yield number, sample
            except (BadTar, OSError) as error:
                log.warning("%s: %s", masked(url), masked(str(error)))
                yield number, "shard: damaged or unreadable"
            else:
                if empty:
                    yield number, "shard: empty"


def read_shard(url: str, caps: Caps) -> Iterator[dict | str]:
    """Samples of one streamed tar: {key, image, text[, json]}, or the reason one cannot be used.

    Raises:
        BadTar, OSError: the stream ends, or its tar is damaged.
    """
    remote = is_remote(url) and not url.startswith("file:")
    with gopen(url) if remote else open_regular(url.removeprefix("file://")) as stream:
        read = _forward(stream)
        limits = {"image": caps.max_bytes, "text": caps.max_caption, "json": caps.max_json}
        sample, ranks, keys, strays = {}, {}, set(), {}
        for member in members(read):
            part = split_name(member.name)
            if part is None or member.kind == "other":
                continue
            key, kind, rank = part
            if kind is None:
                strays[member.name.rpartition(b".")[0]] = key
                continue
            keys.add(key)
            if sample and (sample["key"] != key or ranks.get(kind) == rank):
                yield _whole(sample)
                sample, ranks = {}, {}
            sample.setdefault("key", key)
            fault = fault_of(member, kind)
            if not fault and member.size > limits[kind]:
                fault = f"{kind}: too many bytes"
            if fault:
                sample.setdefault("fault", fault)
            elif kind not in ranks or rank < ranks[kind]:
                data = read(member.size, member.offset)
                if len(data) < member.size:
                    raise BadTar("truncated in the data of a member")
                sample[kind] = data
                ranks[kind] = rank
        if sample:
            yield _whole(sample)
        yield from (STRAY for key in strays.values() if key not in keys)


def _whole(sample: dict) -> dict | str:
    missing = (reason for kind, reason in REQUIRED.items() if kind not in sample)
    return sample.get("fault") or next(missing, None) or sample


def _from(sample: dict) -> Callable:
    return lambda kind, limit, reason: sample.get(kind)


def _forward(stream) -> Callable[[int, int], bytes]:
    """``read(size, position)`` on a stream that only goes forward."""
    at = 0

    def read(size: int, position: int) -> bytes:
        nonlocal at
        while at < position:
            skipped = len(stream.read(min(position - at, 1 << 20)))
            if not skipped:
                return b""
            at += skipped
        parts = []
        while size and (part := stream.read(size)):
            parts.append(part)
            size -= len(part)
            at += len(part)
        return b"".join(parts)

    return read
