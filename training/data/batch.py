"""A batch, as it travels from the workers to the step."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice, takewhile

import torch
from torch import Tensor


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
        return self.map(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> "Batch":
        """A copy on ``device``."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, parts: int) -> list["Batch"]:
        """``parts`` micro-batches of consecutive rows, which count no skipped samples."""
        size = len(self) // parts
        return [self._rows(slice(i * size, (i + 1) * size)) for i in range(parts)]

    @classmethod
    def joined(cls, parts: Sequence["Batch"]) -> "Batch":
        """One batch of the rows of several."""
        if len(parts) == 1:
            return parts[0]
        skipped = sum((Counter(part.skipped) for part in parts), Counter())
        return cls(
            images=[torch.cat(images) for images in zip(*(part.images for part in parts))],
            texts=[torch.cat(texts) for texts in zip(*(part.texts for part in parts))],
            rows=torch.cat([part.rows for part in parts]),
            views=torch.cat([part.views for part in parts]),
            keys=[key for part in parts for key in part.keys],
            extras={k: torch.cat([part.extras[k] for part in parts]) for k in parts[0].extras},
            skipped=dict(skipped),
        )

    def select(self, places: Sequence[int]) -> "Batch":
        """Some of the samples."""
        index = torch.tensor(places, dtype=torch.int64)
        return replace(self.map(lambda t: t[index]), keys=[self.keys[i] for i in places])

    def _rows(self, rows: slice) -> "Batch":
        return replace(self.map(lambda tensor: tensor[rows]), keys=self.keys[rows], skipped={})

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Batch":
        def apply(value):
            if isinstance(value, Tensor):
                return fn(value)
            if isinstance(value, list):
                return [apply(v) for v in value]
            if isinstance(value, dict):
                return {k: apply(v) for k, v in value.items()}
            return value

        return replace(self, **{f.name: apply(getattr(self, f.name)) for f in fields(self)})


@dataclass
class Chunks:
    """A batch on its way to a device: rows in pinned memory, put together when they are there."""

    parts: list[Batch]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on ``device``."""
        return Batch.joined([part.to(device) for part in self.parts])


def assembled(chunks: Iterator[Batch], count: int, pinned: bool) -> Iterator[Batch | Chunks]:
    """Batches of ``count`` chunks each, as long as there are whole ones."""
    groups = iter(lambda: list(islice(chunks, count)), [])
    whole = takewhile(lambda parts: len(parts) == count, groups)
    return map(Chunks if pinned else Batch.joined, whole)  # which holds none while it waits


def chunk_rows(rows: int) -> int:
    """How many of a batch's rows are made at a time: what waits for the step is a few such chunks.

    A number that divides them, so that all chunks are equal; all of them where there is none.
    """
    return next((size for size in range(128, 257) if rows % size == 0), rows)
