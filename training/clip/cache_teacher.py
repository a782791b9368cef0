"""The teachers' embeddings, computed once (``python -m training.cache_teacher``).

Shards are independent: ``--part I/N`` (an array job) or several processes (torchrun, srun) share
them, finished ones are skipped, and what was written is verified at the end.
"""

import copy
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from glob import escape
from typing import TYPE_CHECKING

import numpy as np
import torch
from open_clip_train.precision import get_autocast
from torch import Tensor
from tqdm import tqdm

from cifd_clip import Features, World
from training.clip.cache import (
    begin_cache,
    is_complete,
    read_embeddings,
    shard_name,
    verify_shard,
    view_path,
    write_shard,
)
from training.clip.config import CacheConfig
from training.clip.flags import cache_config
from training.clip.live import LiveTeachers, Transforms
from training.clip.models import add_model_configs, build_teachers, model_config, student_config
from training.data.index import Sources, index_shards
from training.data.loader import Batch, Reader, Recipe, sequential
from training.data.shard import Shard
from training.data.stored import SUBSAMPLING, StoredViews, ViewWriter
from training.data.views import height_width, train_view
from training.data.workers import data_loader, end, iterate
from training.engine.config import ProcessConfig
from training.engine.control import barrier, end_processes, start_logging, start_processes
from training.engine.flags import Given, construct
from training.engine.lease import held
from training.errors import Failure, UsageError

if TYPE_CHECKING:
    from training.clip.coded import Coder

EXAMPLES = 5  # of samples, to show
#: How far a recomputed unit vector may lie from the stored float16 one (amp_bf16 is coarser).
TOLERANCE = {"fp32": 2e-3, "amp_bf16": 5e-2, "amp": 1e-2}


def start(given: Given) -> int:
    """Write, then verify, the caches of every teacher named."""
    world, device = start_processes(construct(ProcessConfig, given))
    start_logging(world)
    config = cache_config(given, device.type)
    add_model_configs(config.model_config)
    caches = Caches(config, world, device)
    data = [caches, caches.of_held_out()] if config.val_data else [caches]
    for each in data:
        each.describe_work()
    if not config.dry_run:
        if world.rank == 0:
            caches.begin()
        barrier(world)
        # Tasks share the folders; a part has one writer.
        part, parts = config.parts
        with held(config.caches[0] / f"part-{part}-of-{parts}.lease", world, wait=True):
            for each in data:
                each.write()
                each.verify()
            barrier(world)
    end_processes()
    return 0


def without_infinite(embeddings: dict[str, Tensor], placed: Tensor) -> np.ndarray:
    """Make NaN of every row that holds an infinity or a NaN, as of samples that can't be used.

    Args:
        embeddings: of a shard, (V or 1, samples, T) each.
        placed: (V, samples) which of them were computed.

    Returns:
        (samples,) the samples of which a computed row is not finite.
    """
    bad = torch.zeros(placed.shape[1], dtype=torch.bool)
    for rows in embeddings.values():
        finite = rows.isfinite().all(dim=-1)
        bad |= (placed[: len(rows)] & ~finite).any(dim=0)
        rows[~finite] = torch.nan
    return bad.numpy()


class Caches:
    """The caches of some teachers in the making, one folder each, in one pass over the images.

    Args:
        config: what to write.
        world, device: of this process.
    """

    def __init__(self, config: CacheConfig, world: World, device: torch.device):
        self.config, self.world, self.device, self.held_out = config, world, device, False
        self._read(config.train_data, "--train-data")
        # The teachers, and the images and tokens that they read.
        names = config.teachers
        if len(config.caches) != len(names):
            raise UsageError(
                f"--teacher-cache names {len(config.caches)} folders for {len(names)} teachers"
            )
        configs = [model_config(name, "--distill-model") for name, _ in names]
        self.transforms = Transforms(config.aug_cfg, config.image_backend)
        live = build_teachers(config, device)
        self.teachers = LiveTeachers(live, configs, self.transforms)
        self.coder = self._coder() if config.code_with else None
        self.autocast = get_autocast(config.precision, device.type)
        # With the first caption only, no view changes the text.
        self.text_views = 1 if config.captions == "first" else config.views
        self.writer = self._view_writer() if config.store_views else None

    def of_held_out(self) -> "Caches":
        """``--val-data`` in the same folders: one view, not augmented and not stored."""
        other = copy.copy(self)
        other.config = replace(self.config, views=1, captions="first")
        other.text_views, other.writer, other.held_out = 1, None, True
        other._read(self.config.val_data, "--val-data")
        return other

    def _read(self, urls: str, flag: str) -> None:
        """Index the data; this process's share of the shards, and what they are called."""
        self.sources = index_shards(urls, cache_dir=self.config.index_dir, flag=flag)
        shards, (part, parts) = self.sources.shards, self.config.parts
        self.names = [shard_name(shard, self.held_out) for shard in shards]
        self.numbers = list(range(len(shards)))[part - 1 :: parts]
        self.numbers = self.numbers[self.world.rank :: self.world.size]

    def _coder(self) -> "Coder":
        from training.clip.coded import Coder

        if len(self.teachers.teachers) > 1:
            raise UsageError("--code-with: a bank codes one teacher's embeddings, name one teacher")
        return Coder(self.config.code_with, self.teachers.identities[0], self.device)

    def _view_writer(self) -> ViewWriter:
        """What stores views, by default as large as who wants the most of them."""
        config, specs = self.config, self.transforms.specs
        if self.transforms.normalised:
            raise UsageError(
                "--store-views: this --aug-cfg works on normalised images (random erasing), and "
                "they can't be stored as pixels: leave one of them out"
            )
        student = student_config(config)["vision_cfg"].get("image_size", 224)
        sizes = [height_width(size) for size in (*(spec.size for spec in specs), student)]
        size = height_width(config.view_size) if config.view_size else max(sizes, key=max)
        view = train_view(replace(specs[0], size=size), config.aug_cfg, config.image_backend)
        self.transforms.stored, self.view_size = True, size
        reader = Reader(self.sources, Recipe([view], [], config.view_seed))
        return ViewWriter(reader, [], config.view_quality)

    @property
    def left(self) -> list[int]:
        """The shards that are not there yet."""
        folders = self.config.caches
        return [n for n in self.numbers if not all(is_complete(f, self.names[n]) for f in folders)]

    def bytes_of(self, dim: int) -> int:
        """What embeddings of this width take that are not there yet."""
        samples = int(self.sources.counts[self.left].sum())
        return samples * (self.config.views + self.text_views) * dim * 2

    def describe_work(self) -> None:
        """Say what is left to do, and what it takes on the disk."""
        views, left = self.config.views, self.left
        samples = int(self.sources.counts[left].sum())
        size = sum(map(self.bytes_of, self.teachers.dims))
        print(
            f"{len(self.numbers) - len(left)} of {len(self.numbers)} "
            f"{'held-out ' if self.held_out else ''}shards are there; "
            f"{samples * views:,} image passes and {'far less than ' * bool(self.coder)}"
            f"{size / 2**30:.2f} GiB of embeddings to go",
            flush=True,
        )
        if self.writer and left:
            each = self.writer.bytes_of(self.sources.rows_of(left[0])[:32])
            print(f"and about {samples * views * each / 2**30:.2f} GiB of stored views", flush=True)

    def begin(self) -> None:
        """Write the configurations, or refuse folders that hold other caches."""
        stored = self.writer and {
            "size": self.view_size,
            "quality": self.writer.quality,
            "subsampling": SUBSAMPLING,
        }
        teachers = zip(self.teachers.teachers, self.teachers.dims, self.config.caches)
        for teacher, dim, folder in teachers:
            folder.mkdir(parents=True, exist_ok=True)
            size, free = self.bytes_of(dim), shutil.disk_usage(folder).free
            if size > free and not self.coder:  # a code's size is not known beforehand
                raise UsageError(
                    f"--teacher-cache '{folder}': {size / 2**30:.2f} GiB of embeddings, and "
                    f"{free / 2**30:.2f} GiB are free there: make room, or lower --views"
                )
            description = {
                "teacher": teacher.identity,
                "view_seed": self.config.view_seed,
                "views": self.config.views,
                "captions": self.config.captions,
                "aug_cfg": self.config.aug_cfg,
                "image_backend": self.config.image_backend,
                "precision": self.config.precision,
                "distill_precision": self.config.distill_precision,
                "stored_views": stored,
                "code": self.coder and self.coder.begin(folder),
            }
            begin_cache(folder, description, self.config.teachers[teacher.space].weights)

    def write(self) -> None:
        """Compute and store the shards that are not there yet, each while the next is computed."""
        left = self.left
        views = self.store_views(left) if self.writer else {}
        sources = StoredViews(self.sources, views) if self.writer else self.sources
        start, last = time.monotonic(), None
        with ThreadPoolExecutor(max_workers=1) as background:
            for number, *embeddings in self._embeddings(sources, left):
                if last is None:
                    each = (time.monotonic() - start) / int(sources.counts[number])
                    print(f"about {sources.counts[left].sum() * each / 3600:.1f} hours", flush=True)
                else:
                    last.result()
                last = background.submit(self._store, number, *embeddings, views.get(number, ()))
            if last is not None:
                last.result()

    def _store(
        self,
        number: int,
        embeddings: list[dict[str, Tensor]],
        placed: Tensor,
        views: Sequence[Shard],
    ) -> None:
        shard = self.sources.shards[number]
        for folder, on_device in zip(self.config.caches, embeddings):
            own = {modality: rows.cpu() for modality, rows in on_device.items()}
            bad = without_infinite(own, placed)
            keys = [key.decode("utf-8", "replace") for key in shard.records["key"][bad]]
            if keys:
                shown = ", ".join(keys[:EXAMPLES])
                print(f"{folder}: {len(keys)} features of {shard.path} are not finite: {shown}")
            stored = views if folder == self.config.caches[0] else ()
            own = self.coder.pack(folder, own) if self.coder else own
            write_shard(folder, self.names[number], own, stored, keys)

    def store_views(self, numbers: list[int]) -> dict[int, list[Shard]]:
        """The tars of shards' views, by number and view; those that are not there are written."""
        config, folder = self.config, self.config.caches[0]
        jobs = [
            (n, view, view_path(folder, self.sources.shards[n], view))
            for n in numbers
            for view in range(config.views)
        ]
        writer = replace(self.writer, jobs=jobs)
        order = range(len(jobs))
        loader = data_loader(writer, order, config.workers, config.worker_start, False, 2, False)
        tars = iterate(loader, name=self.sources.path_of)
        stored: dict[int, list[Shard]] = {}
        try:
            bar = tqdm(tars, "views", len(jobs), unit="tar", disable=None, dynamic_ncols=True)
            for (number, _, _), tar in zip(jobs, bar):
                stored.setdefault(number, []).append(tar)
        finally:
            end(tars)
        return stored

    def _embeddings(
        self, sources: Sources, numbers: list[int]
    ) -> Iterator[tuple[int, list[dict[str, Tensor]], Tensor]]:
        """(shard number, every teacher's embeddings, (V, samples) which there are), by shard."""
        views = range(self.config.views)
        spans = [(sources.rows_of(n), view) for n in numbers for view in views]
        total = sum(len(rows) for rows, _ in spans)
        bar = tqdm(total=total, unit="image", disable=None, dynamic_ncols=True)
        batches = self._features(sources, spans)
        batch, features = next(batches, (None, []))
        with closing(bar), closing(batches):
            for number in numbers:
                rows = sources.rows_of(number)
                placed = torch.zeros(len(views), len(rows), dtype=torch.bool)
                # on the device until the shard is done: no batch waits for a copy
                room = partial(torch.full, fill_value=torch.nan, dtype=torch.float16)
                of_shard = [
                    {
                        "image": room((len(views), len(rows), dim), device=self.device),
                        "text": room((self.text_views, len(rows), dim), device=self.device),
                    }
                    for dim in self.teachers.dims
                ]
                while batch is not None and int(batch.rows[0]) in rows:
                    view, places = int(batch.views[0]), batch.rows - rows.start
                    placed[view, places] = True
                    places = places.to(self.device, non_blocking=True)
                    for own, teacher in zip(of_shard, features):
                        own["image"][view].index_copy_(0, places, teacher.image.half())
                        if view < self.text_views:
                            own["text"][view].index_copy_(0, places, teacher.text.half())
                    bar.update(len(batch))
                    batch, features = next(batches, (None, []))
                yield number, of_shard, placed

    def _features(self, sources: Sources, spans: list) -> Iterator[tuple[Batch, list[Features]]]:
        """(batch, every teacher's features) of spans of rows, see `sequential`."""
        held_out, transforms = self.held_out, self.transforms
        batches = sequential(
            sources,
            transforms.eval_views() if held_out else transforms.train_views(),
            transforms.tokenizers,
            batch_size=self.config.batch_size,
            spans=spans,
            seed=self.config.view_seed,
            captions=self.config.captions,
            workers=self.config.workers,
            start_method=self.config.worker_start,
            pin_memory=self.device.type == "cuda",
        )
        for batch in batches:
            if len(batch):
                with self.autocast():
                    features = self.teachers.features(batch.to(self.device))
                yield batch, features

    def verify(self) -> None:
        """Re-read every file's hash, and recompute the first samples of the first shard.

        Raises:
            Failure: what is stored is not what it should be.
        """
        for folder in self.config.caches:
            for name in (self.names[n] for n in self.numbers):
                try:
                    verify_shard(folder, name, anew=True)
                except Failure:
                    for path in folder.glob(f"{escape(name)}.*"):
                        path.unlink()
                    raise
        if self.numbers:
            self._recompute(self.numbers[0])
        print(f"{self.config.teacher_cache}: {len(self.numbers)} shards verified", flush=True)
        if self.coder:
            self._describe_code()

    def _describe_code(self) -> None:
        """Say how many bits an embedding takes."""
        (folder,), (dim,) = self.config.caches, self.teachers.dims
        sizes = ((folder / f"{self.names[n]}.safetensors").stat().st_size for n in self.numbers)
        count = int(self.sources.counts[self.numbers].sum()) * (self.config.views + self.text_views)
        bits = 8 * sum(sizes) / max(1, count)
        print(f"{bits:.0f} bits an embedding, of {16 * dim} in float16", flush=True)

    def _recompute(self, number: int) -> None:
        rows = self.sources.rows_of(number)
        sources = self.sources
        if self.writer:
            sources = StoredViews(sources, self.store_views([number]))
        for batch, features in self._features(sources, [(rows[: self.config.batch_size], 0)]):
            places = (batch.rows - rows.start).numpy()
            for folder, own in zip(self.config.caches, features):
                stored = read_embeddings(folder / f"{self.names[number]}.safetensors")["image"]
                image = own.image.cpu().numpy()
                if self.coder:
                    image = self.coder.decoded(folder, "image", own.image.half())
                away = abs(stored[0, places] - image).max(axis=-1)
                # Of coded rows some have a value between two integers: the median row has none.
                worst = np.median(away) if self.coder else away.max()
                if not worst <= TOLERANCE[self.config.precision]:
                    raise Failure(
                        f"{folder}: recomputed embeddings of {self.sources.shards[number].path} "
                        f"differ by {worst:.3g} from the stored ones; the cache belongs to other "
                        "software or data"
                    )
