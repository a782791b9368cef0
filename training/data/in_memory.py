"""A data set in fixed views, made once and held on the run's device (``--in-memory``).

A batch is then a look-up there: nothing is decoded, and nothing crosses to the device but indices.
It has the loader's samples in the loader's order, bad ones replaced as the loader replaces them.
What was made may be kept on disk for the runs that follow (`training.data.kept`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.data import kept
from training.data.batch import Batch
from training.data.decode import BadSample
from training.data.index import Sources
from training.data.loader import (
    MAX_ATTEMPTS,
    Captions,
    Fetcher,
    Parts,
    Reader,
    Recipe,
    sequential,
    unusable,
)
from training.data.order import Order
from training.data.views import View
from training.errors import UsageError

READ = 256  # samples made at a time


class Held:
    """The samples, in the place of a `Reader` of their bytes.

    Args:
        reader: says why a sample that is not held can't be used; its fetchers have the extras.
        shape: rows of the data set, and views.
        room: how many samples there may be.
        device: where they are held.
    """

    def __init__(self, reader: Reader, shape: tuple[int, int], room: int, device: torch.device):
        self.reader, self.room, self.device = reader, room, device
        self.keys: list[str] = []
        self.samples: Batch | None = None  # all of them, images (N, H, W, 3)
        self.place = np.full(shape, -1)  # of (row, view) among them

    def add(self, batch: Batch) -> None:
        """Copy a batch to the device, with what the fetchers have of it."""
        batch = self._fetched(batch)
        if not len(batch):
            return
        batch.images = [image.permute(0, 2, 3, 1) for image in batch.images]
        if self.samples is None:
            self.samples = self._empty(batch)
        here = slice(len(self.keys), len(self.keys) + len(batch))
        for held, new in zip(_tensors(self.samples), _tensors(batch), strict=True):
            held[here].copy_(new)
        self.place[batch.rows.numpy(), batch.views.numpy()] = np.arange(here.start, here.stop)
        self.keys += batch.keys

    def _fetched(self, batch: Batch) -> Batch:
        fetchers = self.reader.fetchers
        usable = [
            i
            for i, (row, view) in enumerate(zip(batch.rows.tolist(), batch.views.tolist()))
            if _has(fetchers, row, view)
        ]
        batch = batch.select(usable)
        for fetcher in fetchers if usable else ():
            batch.extras |= fetcher(batch.rows, batch.views)
        return batch

    def _empty(self, like: Batch) -> Batch:
        try:
            return like.map(lambda t: t.new_empty((self.room, *t.shape[1:]), device=self.device))
        except RuntimeError as error:  # torch's, where memory is full
            size = self.room * sum(t[0].nbytes for t in _tensors(like)) / 2**30
            raise UsageError(
                f"--in-memory: {self.room} samples take {size:.1f} GiB on {self.device.type}, more "
                "than is free: leave it out, or train on fewer samples or views"
            ) from error

    def batch(
        self, rows: Sequence[int], views: Sequence[int], substitute: Callable[[int, int], int]
    ) -> Batch:
        """As `Reader.batch`, on the device."""
        places, skipped = self.place[rows, views], Counter()
        for i in np.flatnonzero(places < 0):
            row = int(rows[i])
            for attempt in range(1, MAX_ATTEMPTS + 1):
                skipped.update(self.reader.batch([row], [views[i]]).skipped)
                row = substitute(i, attempt)
                places[i] = self.place[row, views[i]]
                if places[i] >= 0:
                    break
            else:
                raise unusable(skipped)
        index = torch.from_numpy(places).to(self.device, non_blocking=True)
        batch = self.samples.map(lambda held: held[index])
        batch.images = [image.permute(0, 3, 1, 2) for image in batch.images]
        batch.keys, batch.skipped = [self.keys[place] for place in places], dict(skipped)
        return batch


def _has(fetchers: Sequence[Fetcher], row: int, view: int) -> bool:
    try:
        for fetcher in fetchers:
            fetcher.check(row, view)
    except BadSample:
        return False
    return True


def _tensors(batch: Batch) -> list[Tensor]:
    return [*batch.images, *batch.texts, batch.rows, batch.views, *batch.extras.values()]


class MemoryLoader:
    """Stands where `training.data.loader.Loader` would, for views that come again.

    Args:
        device: where the samples are held, all of them in each process.
        views: V, at least 1.
        folder: where rank 0 keeps the samples for other runs.
        recipe: what they depend on besides these arguments (JSON).
        workers: arguments of `sequential`, which makes the samples before the first batch.
        others: as of `Loader`.
    """

    def __init__(
        self,
        order: Order,
        sources: Sources,
        image_transforms: Sequence[View],
        tokenizers: Sequence[Callable],
        *,
        device: torch.device,
        seed: int,
        global_batch: int,
        views: int,
        captions: Captions = "first",
        rank: int = 0,
        world_size: int = 1,
        fetchers: Sequence[Fetcher] = (),
        folder: Path | None = None,
        recipe: Any = None,
        **workers: Any,
    ):
        rows = np.arange(sources.num_samples) if order.kept is None else order.kept
        made = {"seed": seed, "captions": captions}
        self._read = partial(
            sequential,
            *(sources, image_transforms, tokenizers),
            batch_size=READ,
            spans=[(rows, view) for view in range(views)],
            **made,
            **workers,
        )
        self._identity = {
            "data": sources.fingerprint(),
            "rows": sha256(np.asarray(rows, np.int64)).hexdigest(),
            "views": views,
            "recipe": recipe,
            **made,
        }
        self._folder = folder and kept.folder_of(folder, self._identity)
        self._keeps = folder and rank == 0
        reader = Reader(sources, Recipe(image_transforms, tokenizers, **made), fetchers)
        self._held = Held(reader, (sources.num_samples, views), len(rows) * views, device)
        local = global_batch // world_size
        self._steps = Parts(self._held, order, seed, views, local, local, rank, world_size)

    def batches(
        self,
        start_step: int,
        stop_step: int,
        stopping: Callable[[], bool] | None = None,
        timeout: float | None = None,
    ) -> Iterator[Batch]:
        """As `Loader.batches`; before the first one all samples are made."""
        stopped = stopping or bool  # which is False
        if self._held.samples is None:
            for batch in self._made(stopping=stopping, timeout=timeout):
                self._held.add(batch)
                if stopped():  # workers are ended by `sequential`
                    break
            if stopped():
                return
        yield from map(self._steps.__getitem__, range(start_step, stop_step))

    def _made(self, **waiting: Any) -> Iterator[Batch]:
        if self._folder and self._folder.is_dir():
            return kept.read(self._folder)
        batches = self._read(**waiting)
        if self._keeps:
            return kept.keep(self._folder, batches, self._held.room, self._identity)
        return batches

    def close(self) -> None:
        """Nothing is left open."""
