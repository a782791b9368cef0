"""Remote or piped shards (``pipe:``, ``https://``, ``s3://``): read once through, front to back.

The streams are opened by `webdataset`; the tar in them is read by the same rules and limits as a
local one. What cannot be had without positions: resuming is by shard, not by sample, and the order
depends on the number of ranks and workers.
"""

import hashlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls

from training.data.decode import BadSample, Caps
from training.data.draws import permutation, words
from training.data.index import REQUIRED, fault_of, split_name
from training.data.loader import Assembly, Batch, Recipe, data_loader, end, iterate
from training.data.tar import BadTar, members
from training.data.views import View, private_randomness
from training.errors import Failure

log = logging.getLogger(__name__)


def stream_fingerprint(urls: str) -> dict:
    """What a run records of shards it can't look into beforehand: their names."""
    names = expand_urls(urls)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return {"shards": len(names), "samples": None, "usable": None, "skipped": {}, "hash": digest}


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
        captions: str = "first",
        caps: Caps | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        start_method: str | None = None,
        pin_memory: bool = False,
        prefetch: int = 2,
        shuffle: int = 1000,
    ):
        if global_batch % world_size:
            raise ValueError(f"global batch {global_batch} is no multiple of {world_size} ranks")
        recipe = Recipe(image_transforms, tokenizers, seed, captions, caps or Caps())
        data = _Stream(
            expand_urls(urls),
            recipe,
            global_batch // world_size,
            views or 0,
            shards_consumed,
            rank * max(1, workers),
            world_size * max(1, workers),
            shuffle,
        )
        if rank == 0:
            log.warning(
                "%d remote shard(s) are streamed: runs resume at a shard, not at a sample, and "
                "their order depends on ranks and workers; local tars have no such limit",
                len(data.urls),
            )
        self.shards_consumed = shards_consumed
        self._latest = deque([shards_consumed], maxlen=max(1, workers))
        self._loader = data_loader(data, None, workers, start_method, pin_memory, prefetch, False)
        self._batches = None

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """The next ``stop_step - start_step`` batches of this rank."""
        if self._batches is None:
            self._batches = iterate(self._loader)
        for batch in itertools.islice(self._batches, stop_step - start_step):
            self._latest.append(batch.shards)
            self.shards_consumed = min(self._latest)
            yield batch

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
        while True:
            assembly = Assembly(self.recipe, self.batch_size)
            with private_randomness():
                while len(assembly.keys) < self.batch_size:
                    number, sample = next(samples)
                    if isinstance(sample, str):
                        assembly.skipped[sample] += 1
                        continue
                    turn = number // len(self.urls)
                    view = turn % self.views if self.views else turn
                    key = sample["key"]
                    try:
                        assembly.add(key, -1, view, *self.recipe.sample(key, view, _from(sample)))
                    except BadSample as reason:
                        assembly.skipped[str(reason)] += 1
            batch = assembly.finish()
            batch.shards = number
            yield batch

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
        barren = 0
        for number in itertools.count(self.first + consumer, self.consumers):
            turn, place = divmod(number, len(self.urls))
            url = self.urls[permutation(len(self.urls), self.recipe.seed, "shards", turn)[place]]
            good = 0
            try:
                for sample in read_shard(url, self.recipe.caps):
                    good += not isinstance(sample, str)
                    yield number, sample
            except (BadTar, OSError) as error:
                log.warning("%s: %s", url, error)
                yield number, "shard: damaged or unreadable"
            barren = 0 if good else barren + 1
            if barren == min(len(self.urls), 100):
                raise Failure(f"{barren} shards in a row without a usable sample, last {url}")


def read_shard(url: str, caps: Caps) -> Iterator[dict | str]:
    """Samples of one streamed tar: {key, image, text[, json]}, or the reason one cannot be used.

    Raises:
        BadTar, OSError: the stream ends, or its tar is damaged.
    """
    with gopen(url) as stream:
        read = _forward(stream)
        limits = {"image": caps.max_bytes, "text": caps.max_caption, "json": caps.max_json}
        sample, ranks = {}, {}
        for member in members(read):
            part = split_name(member.name)
            if part is None or member.kind == "other":
                continue
            key, kind, rank = part
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
