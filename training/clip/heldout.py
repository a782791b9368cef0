"""Held-out pairs: which they are, and their batches."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b

import numpy as np

from cifd_clip import World
from training.clip.config import Config
from training.clip.stages import ClipStage
from training.data.index import Sources, index_shards
from training.data.loader import Batch, sequential
from training.errors import UsageError

log = logging.getLogger(__name__)

#: Rows of a held-out batch: what is measured depends on it, and must not on the processes.
VALIDATION_BATCH = 256


@dataclass
class HeldOut:
    """Held-out batches, every some epochs; see `training.engine.loop.Validation`.

    Attributes:
        hash: of ``--val-data``.
    """

    every_epochs: int
    batches: partial
    hash: str | None = None

    def __call__(self, stopping: Callable[[], bool], timeout: float | None) -> Iterable[Batch]:
        return self.batches(stopping=stopping, timeout=timeout)


def split(sources: Sources, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on, and rows held out (``--val-fraction``).

    A pair is held out by the hash of its key, wherever it lies: a larger share holds a smaller one.

    Raises:
        UsageError: the share is of no pair.
    """
    limit = int(fraction * 2**64)
    keys = (key for shard in sources.shards for key in shard.records["key"].tolist())
    words = (int.from_bytes(blake2b(key, digest_size=8).digest(), "big") for key in keys)
    held = np.fromiter((word < limit for word in words), bool, sources.num_samples)
    if not held.any():
        raise UsageError(
            f"--val-fraction {fraction:g} holds out none of {sources.num_samples} samples: raise it"
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


def held_out(
    config: Config,
    stage: ClipStage,
    world: World,
    sources: Sources | None,
    rows: np.ndarray | None,
) -> HeldOut | None:
    """The batches of ``--val-data``, or those of the training data's held-out rows; or None."""
    fetchers = ()  # of rows that are training data, a cache has no view without augmentation
    digest = None
    if config.val_data:
        trained = {shard.digest for shard in sources.shards} if sources else set()
        sources = index_shards(config.val_data, cache_dir=config.index_dir, flag="--val-data")
        if seen := [shard.path for shard in sources.shards if shard.digest in trained]:
            log.warning(
                "--val-data: %d of %d shards are in --train-data too (one is %s): what is measured "
                "there says nothing of data that the student has not seen",
                *(len(seen), len(sources.shards), seen[0]),
            )
        rows = np.arange(sources.num_samples)
        fetchers = stage.source.fetchers(sources, held_out=True)
        digest = sources.fingerprint()["hash"]
    # A bank has nothing to measure where no teacher answers.
    if rows is None or (config.distill == "rdm" and config.caches and not fetchers):
        return None
    batches = partial(
        sequential,
        sources,
        stage.transforms.eval_views(),
        stage.transforms.tokenizers,
        batch_size=VALIDATION_BATCH,
        spans=[(rows, 0)],
        fetchers=fetchers,
        rank=world.rank,
        world_size=world.size,
        workers=config.workers,
        start_method=config.worker_start,
    )
    return HeldOut(config.val_frequency, batches, digest)
