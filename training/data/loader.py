"""Batches of a data set, the same whatever the number of ranks and workers.

A worker is handed a number and nothing else: it works out the rows of that chunk of its rank's part
of a global batch (`training.data.order`), reads their bytes by position, and makes them tensors. No
state lives in a loader, so starting at step s gives what an uninterrupted run would have seen.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from training.data.batch import Batch, Chunks, assembled, chunk_rows
from training.data.decode import (
    BadSample,
    Caps,
    choose_caption,
    decode_captions,
    decode_image,
    decode_text,
)
from training.data.index import Sources
from training.data.order import Order
from training.data.pixels import decode_pixels
from training.data.views import View, draw, private_randomness, seed_generators
from training.data.workers import check_limits, data_loader, end, iterate, reads
from training.errors import Failure

MAX_ATTEMPTS = 64


class Fetcher:
    """Reads something stored per (row, view), such as a teacher's embeddings. Must pickle."""

    def check(self, row: int, view: int) -> None:
        """Raise `BadSample` when nothing is stored; the sample is then replaced."""

    def __call__(self, rows: Tensor, views: Tensor) -> dict[str, Tensor]:
        """rows (B,), views (B,) -> named tensors (B, ...), which go to ``Batch.extras``."""
        raise NotImplementedError


#: Which captions: see `Loader`.
Captions = str | dict[str, float]


@dataclass
class Recipe:
    """How a sample's members become tensors; arguments as of `Loader`."""

    image_transforms: Sequence[View]
    tokenizers: Sequence[Callable[[list[str]], Tensor]]
    seed: int = 0
    captions: Captions = "first"
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
            least, caps = max(transform.least for transform in self.image_transforms), self.caps
            image = decode_pixels(data, caps, least) if least else decode_image(data, caps)
            images = [draw(t, image, self.seed, view, key) for t in self.image_transforms]
        return caption, images

    def _caption(self, key: bytes, view: int, read) -> str:
        if self.captions == "first":
            return self._text(read)[0]
        weights = {"json:captions": 1.0} if self.captions == "all" else self.captions
        names = [name.removeprefix("json:") for name in weights if name != "txt"]
        data = read("json", self.caps.max_json, "json: too many bytes") if names else None
        known = {} if data is None else decode_captions(data, self.caps, names)
        fields = {f"json:{name}": captions for name, captions in known.items() if captions}
        if "txt" in weights or not fields:
            fields["txt"] = self._text(read)
        return choose_caption(fields, weights, self.seed, view, key)

    def _text(self, read) -> list[str]:
        return decode_text(read("text", self.caps.max_caption, "caption: too long"), self.caps)

    def tokens(self, captions: list[str], keys: list[str], views: list[int]) -> list[Tensor]:
        """Per tokenizer, (B, context); one that masks at random draws from each sample's seed."""
        return [self._tokens(tokenizer, captions, keys, views) for tokenizer in self.tokenizers]

    def _tokens(self, tokenizer, captions, keys, views) -> Tensor:
        if getattr(tokenizer, "reduction_fn", None) is None:  # OpenCLIP's name of CLIPA's masks
            return tokenizer(captions)
        rows = []
        for caption, key, view in zip(captions, keys, views):
            seed_generators(self.seed, "tokens", view, key)
            rows.append(tokenizer([caption]))
        return torch.cat(rows)

    def sample_bytes(self) -> int:
        """Of one sample's images (of its text, there is little)."""
        return sum(transform.example().nbytes for transform in self.image_transforms)


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
            texts=self.recipe.tokens(self.captions, self.keys, views.tolist()) if n else [],
            rows=rows,
            views=views,
            keys=self.keys,
            skipped=dict(self.skipped),
        )


@dataclass
class Reader:
    """Reads samples by row."""

    sources: Sources
    recipe: Recipe
    fetchers: Sequence[Fetcher] = ()

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
                    raise unusable(assembly.skipped)
            batch = assembly.finish()
        for fetcher in self.fetchers:
            batch.extras |= fetcher(batch.rows, batch.views)
        return batch

    def _sample(self, row: int, view: int) -> tuple:
        for fetcher in self.fetchers:
            fetcher.check(row, view)
        key, read = self.members(row, view)
        return key, row, view, *self.recipe.sample(key, view, read)

    def members(self, row: int, view: int) -> tuple[bytes, Callable]:
        """A sample's key, and ``read`` as `Recipe.sample` takes it."""
        reads(row)
        shard, record = self.sources.record(row, view)

        def read(kind: str, limit: int, reason: str) -> bytes | None:
            offset, size = record[kind].tolist()
            if size > limit:
                raise BadSample(reason)
            return None if offset < 0 else shard.read(offset, size)

        return record["key"], read


def unusable(skipped: Counter) -> Failure:
    """`MAX_ATTEMPTS` samples in a row were bad."""
    return Failure(
        f"{MAX_ATTEMPTS} samples in a row cannot be used ({dict(skipped)}); "
        "run `python -m training.check_data --deep` on the data"
    )


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
        captions: ``first``: key.txt; ``all``: one of key.json's "captions"; or weights of fields,
            ``txt`` and ``json:NAME``. Key.txt where there is none of them.
        caps: limits of one sample.
        global_batch: samples per step over all ranks (and micro-batches).
        rank, world_size: this rank reads rows [rank * local, (rank + 1) * local) of each global
            batch, local = global_batch // world_size.
        workers: processes; 0: read in this one.
        start_method: ``fork``, ``spawn``, ``forkserver``, or None: Python's default.
        fetchers: `Fetcher` objects.
        pin_memory: hand out pinned batches.
        prefetch: chunks each worker works ahead, or more of them: all together a batch.

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
        captions: Captions = "first",
        caps: Caps | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        start_method: str | None = None,
        fetchers: Sequence[Fetcher] = (),
        pin_memory: bool = False,
        prefetch: int = 2,
    ):
        if global_batch % world_size:
            raise ValueError(f"global batch {global_batch} is no multiple of {world_size} ranks")
        recipe = Recipe(image_transforms, tokenizers, seed, captions, caps or Caps())
        local = global_batch // world_size
        rows = chunk_rows(local)
        self._per_batch, self._pinned = local // rows, pin_memory
        if workers:
            prefetch = max(prefetch, -(-self._per_batch // workers))  # a batch, all together
            check_limits(recipe.sample_bytes() * rows, workers, prefetch)
        reader = Reader(sources, recipe, fetchers)
        self._sources, self._numbers, self._batches = sources, _Numbers(), None
        chunks = Parts(reader, order, seed, views or 0, rows, local, rank, world_size)
        self._loader = data_loader(
            chunks, self._numbers, workers, start_method, pin_memory, prefetch, True
        )

    def batches(
        self,
        start_step: int,
        stop_step: int,
        stopping: Callable[[], bool] | None = None,
        timeout: float | None = None,
    ) -> Iterator[Batch | Chunks]:
        """This rank's part of the global batches ``start_step`` .. ``stop_step - 1``.

        Where batches are waited for, they end when ``stopping()``, and fail after ``timeout``
        seconds: see `training.data.workers.iterate`.
        """
        if self._batches is not None and not self._batches.exhausted:
            self.close()  # left on the way: its workers still have to do what they were given
        self._numbers.range = range(start_step * self._per_batch, stop_step * self._per_batch)
        self._batches = iterate(self._loader, stopping, timeout, self._sources.path_of)
        yield from assembled(self._batches, self._per_batch, self._pinned)

    def close(self) -> None:
        """End the workers."""
        end(self._batches)
        self._loader._iterator = None


def sequential(
    sources: Sources,
    image_transforms: Sequence[View],
    tokenizers: Sequence[Callable],
    *,
    batch_size: int,
    spans: Sequence[tuple[Sequence[int], int]] | None = None,
    seed: int = 0,
    captions: Captions = "first",
    caps: Caps | None = None,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    start_method: str | None = None,
    fetchers: Sequence[Fetcher] = (),
    pin_memory: bool = False,
    stopping: Callable[[], bool] | None = None,
    timeout: float | None = None,
) -> Iterator[Batch]:
    """Samples in order: validation, or (with training views) a teacher's cache.

    Bad samples are left out and counted. The batches are those of one process, whatever the number
    of ranks, each of which reads consecutive ones.

    Args:
        spans: (rows, view), of which batches are parts; default: all rows at view 0.
        others: as of `Loader` and its `batches`; who hands in ``stopping`` asks it once more when
            the batches end.
    """
    parts = [
        (rows[first : first + batch_size], view)
        for rows, view in ([(range(sources.num_samples), 0)] if spans is None else spans)
        for first in range(0, len(rows), batch_size)
    ]
    parts = parts[len(parts) * rank // world_size : len(parts) * (rank + 1) // world_size]
    recipe = Recipe(image_transforms, tokenizers, seed, captions, caps or Caps())
    if workers:
        check_limits(recipe.sample_bytes() * batch_size, workers)
    reader = Reader(sources, recipe, fetchers)
    items = _RowBatches(reader, parts)
    loader = data_loader(items, range(len(parts)), workers, start_method, pin_memory, 2, False)
    batches = iterate(loader, stopping, timeout, sources.path_of)
    try:
        yield from batches
    finally:
        end(batches)


@dataclass
class Parts(Dataset):
    """Number of a part, counted from this rank's first -> `Batch` of its ``size`` rows."""

    reader: Reader
    order: Order
    seed: int
    views: int
    size: int
    local: int
    rank: int
    world_size: int

    def __getitem__(self, number: int) -> Batch:
        step, first = divmod(number * self.size, self.local)
        start = (step * self.world_size + self.rank) * self.local + first
        rows, turns = self.order.rows(start, start + self.size).T

        def substitute(i: int, attempt: int) -> int:
            return self.order.any_row(self.seed, "substitute", start + i, attempt)

        return self.reader.batch(rows, turns % self.views if self.views else turns, substitute)


@dataclass
class _RowBatches(Dataset):
    """Batch number -> `Batch` of consecutive rows at one view."""

    reader: Reader
    parts: list[tuple[Sequence[int], int]]

    def __getitem__(self, number: int) -> Batch:
        rows, view = self.parts[number]
        return self.reader.batch(rows, [view] * len(rows))


class _Numbers(Sampler):
    """The numbers of the chunks that the loader serves next."""

    def __init__(self):
        self.range = range(0)

    def __iter__(self):
        return iter(self.range)

    def __len__(self) -> int:
        return len(self.range)


def _empty(n: int, image: Tensor) -> Tensor:
    """Room for ``n`` images like ``image`` (3, H, W), channels last as decoders make them."""
    channels, height, width = image.shape
    return torch.empty(n, height, width, channels, dtype=image.dtype).permute(0, 3, 1, 2)
