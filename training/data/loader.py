"""Batches of a data set, the same whatever the number of ranks and workers.

A worker is handed a step number and nothing else: it works out the rows of its rank's part of that
global batch (`training.data.order`), reads their bytes by position, and builds the whole batch. No
state lives in a loader, so starting at step s gives what an uninterrupted run would have seen.
"""

import atexit
import os
import signal
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from training.data.decode import (
    BadSample,
    Caps,
    choose_caption,
    decode_caption,
    decode_captions,
    decode_image,
)
from training.data.draws import words
from training.data.index import Sources
from training.data.order import Order
from training.data.views import View, draw, private_randomness
from training.errors import Failure

MAX_ATTEMPTS = 64
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Batch:
    """One rank's part of a global batch.

    Attributes:
        images: per image transform, uint8 (B, 3, H, W), channels last in memory.
        texts: per tokenizer, int64 (B, context).
        rows: int64 (B,) global sample ids (-1 when streaming).
        views: int64 (B,) the view of each sample.
        keys: the samples' keys.
        extras: what the fetchers returned.
        skipped: samples replaced (or, in sequential reading, left out), by reason.
        shards: shards consumed up to here, when streaming.
    """

    images: list[Tensor]
    texts: list[Tensor]
    rows: Tensor
    views: Tensor
    keys: list[str]
    extras: dict[str, Tensor] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    shards: int = 0

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> "Batch":
        """A copy in pinned memory."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> "Batch":
        """A copy on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, parts: int) -> list["Batch"]:
        """``parts`` micro-batches of consecutive rows, which count no skipped samples."""
        size = len(self) // parts
        return [self._rows(slice(i * size, (i + 1) * size)) for i in range(parts)]

    def _rows(self, rows: slice) -> "Batch":
        return Batch(
            images=[t[rows] for t in self.images],
            texts=[t[rows] for t in self.texts],
            rows=self.rows[rows],
            views=self.views[rows],
            keys=self.keys[rows],
            extras={k: t[rows] for k, t in self.extras.items()},
        )

    def _map(self, fn: Callable[[Tensor], Tensor]) -> "Batch":
        def apply(value):
            if isinstance(value, Tensor):
                return fn(value)
            if isinstance(value, list):
                return [apply(v) for v in value]
            if isinstance(value, dict):
                return {k: apply(v) for k, v in value.items()}
            return value

        return replace(self, **{f.name: apply(getattr(self, f.name)) for f in fields(self)})


class Fetcher:
    """Reads something stored per (row, view), such as a teacher's embeddings. Must pickle."""

    def check(self, row: int, view: int) -> None:
        """Raise `BadSample` when nothing is stored; the sample is then replaced."""

    def __call__(self, rows: Tensor, views: Tensor) -> dict[str, Tensor]:
        """rows (B,), views (B,) -> named tensors (B, ...), which go to ``Batch.extras``."""
        raise NotImplementedError


@dataclass
class Recipe:
    """How a sample's members become tensors; arguments as of `Loader`."""

    image_transforms: Sequence[View]
    tokenizers: Sequence[Callable[[list[str]], Tensor]]
    seed: int = 0
    captions: str = "first"
    caps: Caps = field(default_factory=Caps)

    def sample(
        self, key: bytes, view: int, read: Callable[[str, int, str], bytes | None]
    ) -> tuple[str, list[Tensor]]:
        """(caption, one image per transform) of the sample ``key``.

        ``read(kind, limit, reason)`` returns the member ``image``, ``text`` or ``json`` (None: has
        none), or raises `BadSample` (reason) when it is over the limit.

        Raises:
            BadSample: the sample cannot be used.
        """
        caption = self._caption(key, view, read) if self.tokenizers else ""
        images = []
        if self.image_transforms:
            data = read("image", self.caps.max_bytes, "image: too many bytes")
            image = decode_image(data, self.caps)
            images = [draw(t, image, self.seed, view, key) for t in self.image_transforms]
        return caption, images

    def _caption(self, key: bytes, view: int, read) -> str:
        if self.captions == "all":
            data = read("json", self.caps.max_json, "json: too many bytes")
            captions = [] if data is None else decode_captions(data, self.caps)
            if captions:
                return choose_caption(captions, self.seed, view, key)
        return decode_caption(read("text", self.caps.max_caption, "caption: too long"), self.caps)


class Assembly:
    """A batch of at most ``size`` samples in the making."""

    def __init__(self, recipe: Recipe, size: int):
        self.recipe, self.size = recipe, size
        self.images: list[Tensor] = []
        self.keys, self.captions, self.index = [], [], []
        self.skipped = Counter()

    def add(self, key: bytes, row: int, view: int, caption: str, images: list[Tensor]) -> None:
        """Append one sample."""
        self.images = self.images or [_empty(self.size, image) for image in images]
        for batch, image in zip(self.images, images):
            batch[len(self.keys)] = image
        self.keys.append(key.decode("utf-8", "replace"))
        self.captions.append(caption)
        self.index.append((row, view))

    def finish(self) -> Batch:
        """The batch of what was added."""
        n = len(self.keys)
        rows, views = torch.tensor(self.index, dtype=torch.int64).reshape(n, 2).T.contiguous()
        return Batch(
            images=[batch[:n] for batch in self.images],
            texts=[tokenizer(self.captions) for tokenizer in self.recipe.tokenizers] if n else [],
            rows=rows,
            views=views,
            keys=self.keys,
            skipped=dict(self.skipped),
        )


@dataclass
class Memory:
    """Samples as they were made, for data that pass many times in the same few views.

    Which are held does not change: with passes that go round, throwing out the oldest would throw
    out what comes next.

    Attributes:
        limit: bytes of images it may hold.
    """

    limit: int = 0
    held: int = 0
    samples: dict[tuple[int, int], tuple[str, list[Tensor]]] = field(default_factory=dict)

    def recall(self, row: int, view: int, make: Callable) -> tuple[str, list[Tensor]]:
        """The caption and images of a sample, made by ``make()`` if they are not held."""
        if (row, view) in self.samples:
            return self.samples[row, view]
        made = make()
        size = sum(image.nbytes for image in made[1])
        if 0 < size <= self.limit - self.held:  # captions alone are cheap to make, and endless
            self.held += size
            self.samples[row, view] = made
        return made


@dataclass
class Reader:
    """Reads samples by row."""

    sources: Sources
    recipe: Recipe
    fetchers: Sequence[Fetcher] = ()
    memory: Memory = field(default_factory=Memory)

    def batch(
        self,
        rows: Sequence[int],
        views: Sequence[int],
        substitute: Callable[[int, int], int] | None = None,
    ) -> Batch:
        """Samples of ``rows`` at ``views``.

        A bad sample i is replaced by row ``substitute(i, attempt)``, attempt = 1, 2, ...; without
        a substitute it is left out.
        """
        assembly = Assembly(self.recipe, len(rows))
        with private_randomness():
            for i, view in enumerate(map(int, views)):
                row = int(rows[i])
                for attempt in range(1, MAX_ATTEMPTS + 1):
                    try:
                        assembly.add(*self._sample(row, view))
                        break
                    except BadSample as reason:
                        assembly.skipped[str(reason)] += 1
                        if substitute is None:
                            break
                        row = substitute(i, attempt)
                else:
                    raise Failure(
                        f"{MAX_ATTEMPTS} samples in a row cannot be used "
                        f"({dict(assembly.skipped)}); "
                        "run `python -m training.check_data --deep` on the data"
                    )
        batch = assembly.finish()
        for fetcher in self.fetchers:
            batch.extras |= fetcher(batch.rows, batch.views)
        return batch

    def _sample(self, row: int, view: int) -> tuple:
        shard, place = self.sources.locate(row)
        record = shard.records[place]
        for fetcher in self.fetchers:
            fetcher.check(row, view)

        def read(kind: str, limit: int, reason: str) -> bytes | None:
            offset, size = record[kind].tolist()
            return None if offset < 0 else _read(shard.path, offset, size, limit, reason)

        key = record["key"]
        made = self.memory.recall(row, view, lambda: self.recipe.sample(key, view, read))
        return key, row, view, *made


class Loader:
    """The training stream as batches.

    Args:
        order: the stream of rows.
        sources: where the rows lie.
        image_transforms: `View` per distinct image transform; empty: images are not read.
        tokenizers: per distinct tokenizer, list of str -> int64 (B, context); empty: captions are
            not read.
        seed: of the augmentation and of the choice of captions.
        views: V: a sample's view is its pass modulo V; None or 0: each pass is a new view.
        captions: ``first``: key.txt; ``all``: one of key.json's "captions" (key.txt without them).
        caps: limits of one sample.
        global_batch: samples per step over all ranks (and micro-batches).
        rank, world_size: this rank reads rows [rank * local, (rank + 1) * local) of each global
            batch, local = global_batch // world_size.
        workers: processes; 0: read in this one.
        start_method: ``fork``, ``spawn``, ``forkserver``, or None: Python's default.
        fetchers: `Fetcher` objects.
        memory: bytes of images that each process holds, to make each view once.
        pin_memory: hand out pinned batches.
        prefetch: batches each worker works ahead.

    The workers live until `close` and serve one `batches` at a time.
    """

    def __init__(
        self,
        order: Order,
        sources: Sources,
        image_transforms: Sequence[View],
        tokenizers: Sequence[Callable],
        *,
        seed: int,
        global_batch: int,
        views: int | None = None,
        captions: str = "first",
        caps: Caps | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        start_method: str | None = None,
        fetchers: Sequence[Fetcher] = (),
        memory: int = 0,
        pin_memory: bool = False,
        prefetch: int = 2,
    ):
        if global_batch % world_size:
            raise ValueError(f"global batch {global_batch} is no multiple of {world_size} ranks")
        recipe = Recipe(image_transforms, tokenizers, seed, captions, caps or Caps())
        reader = Reader(sources, recipe, fetchers, Memory(memory))
        self._steps = _Steps()
        batches = _StepBatches(reader, order, seed, views or 0, global_batch, rank, world_size)
        self._loader = data_loader(
            batches, self._steps, workers, start_method, pin_memory, prefetch, True
        )

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """This rank's part of the global batches ``start_step`` .. ``stop_step - 1``."""
        self._steps.range = range(start_step, stop_step)
        yield from iterate(self._loader)

    def close(self) -> None:
        """End the workers."""
        end(self._loader._iterator)
        self._loader._iterator = None


def sequential(
    sources: Sources,
    image_transforms: Sequence[View],
    tokenizers: Sequence[Callable],
    *,
    batch_size: int,
    seed: int = 0,
    view: int = 0,
    captions: str = "first",
    caps: Caps | None = None,
    rows: range | None = None,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    start_method: str | None = None,
    fetchers: Sequence[Fetcher] = (),
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Every sample once, in file order: validation, or (with a training view) a teacher's cache.

    Bad samples are left out and counted. The batches are those of one process, whatever the number
    of ranks: each reads consecutive ones of ``rows`` (default: all). Other arguments as of
    `Loader`.
    """
    rows = range(sources.num_samples) if rows is None else rows
    batches = -(-len(rows) // batch_size)
    first, last = (batches * r // world_size * batch_size for r in (rank, rank + 1))
    rows = rows[first:last]
    reader = Reader(
        sources, Recipe(image_transforms, tokenizers, seed, captions, caps or Caps()), fetchers
    )
    batches = _RowBatches(reader, rows, batch_size, view)
    loader = data_loader(batches, range(len(batches)), workers, start_method, pin_memory, 2, False)
    iterator = iterate(loader)
    try:
        yield from iterator
    finally:
        end(iterator)


@dataclass
class _StepBatches(Dataset):
    """Step number -> `Batch`."""

    reader: Reader
    order: Order
    seed: int
    views: int
    global_batch: int
    rank: int
    world_size: int

    def __getitem__(self, step: int) -> Batch:
        local = self.global_batch // self.world_size
        start = step * self.global_batch + self.rank * local
        rows, turns = self.order.rows(start, start + local).T
        total = np.uint64(self.reader.sources.num_samples)

        def substitute(i: int, attempt: int) -> int:
            return int(words(1, self.seed, "substitute", start + i, attempt)[0] % total)

        return self.reader.batch(rows, turns % self.views if self.views else turns, substitute)


@dataclass
class _RowBatches(Dataset):
    """Batch number -> `Batch` of consecutive rows."""

    reader: Reader
    rows: range
    batch_size: int
    view: int

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        rows = self.rows[number * self.batch_size : (number + 1) * self.batch_size]
        return self.reader.batch(rows, [self.view] * len(rows))


class _Steps(Sampler):
    """The step numbers that the loader serves next."""

    def __init__(self):
        self.range = range(0)

    def __iter__(self):
        return iter(self.range)

    def __len__(self) -> int:
        return len(self.range)


def data_loader(dataset, sampler, workers, start_method, pin_memory, prefetch, persistent):
    """torch's loader over a data set whose items are whole batches."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        collate_fn=_same,
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context=start_method if workers else None,
        worker_init_fn=start_worker,
        pin_memory=pin_memory,
        # without its own, the loader would draw its seed from torch's default generator
        generator=torch.Generator().manual_seed(0),
    )


def start_worker(_: int) -> None:
    """What each worker process does first.

    A signal to the whole job (SLURM's, or ctrl-C) is the main process's business: a worker that
    died of it, or ran the handler it inherited, would end the run before it can save. Workers end
    when the loader closes or the main process is gone.
    """
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.filterwarnings("ignore", module="PIL")  # broken EXIF and the like: not worth a line


def _same(batch: Batch) -> Batch:
    return batch


_running = weakref.WeakSet()


def iterate(loader: DataLoader) -> Iterator[Batch]:
    """Iterate over a loader whose workers end with this process, however it ends.

    They ignore SIGTERM, which is what torch and Python would otherwise end them with at exit.
    """
    # a signal that comes while workers start waits until they ignore it (`start_worker`)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if loader.num_workers:
        _running.add(iterator)
        # last registered is first run: before torch waits for each worker in turn
        atexit.unregister(_end_all)
        atexit.register(_end_all)
    return iterator


def end(iterator: Iterator[Batch] | None) -> None:
    """End an iterator's workers, if it has any."""
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        for worker in iterator._workers:
            if worker.is_alive():  # stuck in a read that does not return
                worker.kill()
        _running.discard(iterator)


def _end_all() -> None:
    for iterator in list(_running):
        end(iterator)


def _empty(n: int, image: Tensor) -> Tensor:
    """Room for ``n`` images like ``image`` (3, H, W), channels last as decoders make them."""
    channels, height, width = image.shape
    return torch.empty(n, height, width, channels, dtype=image.dtype).permute(0, 3, 1, 2)


@lru_cache(maxsize=128)
def _open(path: str):
    # closed when it leaves the cache; each process opens its own
    return open(path, "rb", buffering=0)


def _read(path: str, offset: int, size: int, limit: int, reason: str) -> bytes:
    """Bytes of one member, not read at all when over the limit."""
    if size > limit:
        raise BadSample(reason)
    data = os.pread(_open(path).fileno(), size, offset)
    if len(data) < size:
        raise BadSample("truncated")
    return data
