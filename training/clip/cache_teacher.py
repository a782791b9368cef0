"""The teachers' embeddings, computed once (``python -m training.cache_teacher``).

Shards are independent: ``--part I/N`` (an array job) or several processes (torchrun, srun) share
them, finished ones are skipped, and what was written is verified at the end.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from open_clip_train.precision import get_autocast
from tqdm import tqdm

from cifd_clip import Features, Teacher
from cifd_clip.files import file_hash, read_json, write_json
from training.clip.cache import check_config, is_complete, shard_name, write_shard
from training.clip.config import CACHE_FORMAT, CacheConfig, read_cache_config
from training.clip.flags import cache_config
from training.clip.models import add_model_configs, build_teachers, model_config
from training.clip.stages import Transforms
from training.data.index import Shard, Sources, index_shards
from training.data.loader import Batch, sequential
from training.data.views import ImageSpec, normalise, train_view
from training.engine.config import ProcessConfig
from training.engine.control import barrier, end_processes, start_logging, start_processes
from training.engine.flags import Given, construct
from training.errors import Failure, UsageError

#: How far a recomputed unit vector may lie from the stored float16 one (amp_bf16 is coarser).
TOLERANCE = {"fp32": 2e-3, "amp_bf16": 5e-2, "amp": 1e-2}


def start(given: Given) -> int:
    """Write, then verify, the caches of every teacher named."""
    world, device = start_processes(construct(ProcessConfig, given))
    start_logging(world)
    config = cache_config(given, device.type)
    add_model_configs(config.model_config)
    # This process's share of the shards.
    sources = index_shards(config.train_data, cache_dir=config.index_dir)
    part, parts = config.parts
    shards = list(range(sources.counts.size))[part - 1 :: parts][world.rank :: world.size]
    teachers = build_teachers(config, device)
    if len(config.caches) != len(teachers):
        raise UsageError(
            f"--teacher-cache names {len(config.caches)} folders for {len(teachers)} teachers"
        )
    for teacher, directory in zip(teachers, config.caches):
        cache = Cache(config, teacher, directory, sources, device)
        if world.rank == 0:
            cache.begin()
        barrier(world)
        cache.write(shards)
        cache.verify(shards)
    barrier(world)
    end_processes()
    return 0


class Cache:
    """One teacher's cache in the making.

    Args:
        config: what to write.
        teacher: on its device.
        directory: where it goes.
        sources: the data set.
        device: of the teacher.
    """

    def __init__(
        self,
        config: CacheConfig,
        teacher: Teacher,
        directory: Path,
        sources: Sources,
        device: torch.device,
    ):
        self.config, self.teacher, self.directory = config, teacher, directory
        self.sources, self.device = sources, device
        self.spec = ImageSpec.of(teacher.model.visual.preprocess_cfg)
        transforms = Transforms(config.aug_cfg)
        transforms.add_texts(teacher.name, model_config(teacher.name, "--distill-model"))
        self.tokenizer = transforms.tokenizers[0]
        self.autocast = get_autocast(config.precision, device.type)
        # With the first caption only, no view changes the text.
        self.text_views = config.views if config.captions == "all" else 1
        self.description = {
            "teacher": teacher.identity,
            "view_seed": config.view_seed,
            "views": config.views,
            "captions": config.captions,
            "aug_cfg": config.aug_cfg,
            "precision": config.precision,
            "distill_precision": config.distill_precision,
        }

    def begin(self) -> None:
        """Write the configuration, or refuse a folder that holds another cache."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "config.json"
        description = json.loads(json.dumps(self.description))
        if path.is_file():
            check_config(self.directory, description)
            if read_cache_config(self.directory)["views"] != description["views"]:
                raise UsageError(
                    f"--teacher-cache '{self.directory}' holds another number of views than "
                    f"--views {self.config.views}"
                )
            return
        # What the weights were called, for who reads the cache with a name.
        description["pretrained"] = self.config.teachers[self.teacher.space].weights
        write_json(path, description, CACHE_FORMAT)

    def write(self, numbers: list[int]) -> None:
        """Compute and store the shards that are not there yet."""
        shards = self.sources.shards
        left = [n for n in numbers if not is_complete(self.directory, shards[n])]
        samples = sum(shards[n].samples for n in left)
        passes = samples * self.config.views
        size = samples * (self.config.views + self.text_views) * self.teacher.dim * 2
        print(
            f"{self.directory}: {len(numbers) - len(left)} of {len(numbers)} shards are there; "
            f"{passes:,} image passes of {self.teacher.name} and {size / 2**30:.2f} GiB to go",
            flush=True,
        )
        if not left:
            return
        seconds = self._seconds_per_sample(left[0])
        print(f"about {_duration(seconds * passes)} at {1 / seconds:.0f} images/s", flush=True)
        with tqdm(total=passes, unit="image", disable=None, dynamic_ncols=True) as bar:
            for number in left:
                write_shard(self.directory, shards[number], self._shard(number, bar))

    def verify(self, numbers: list[int]) -> None:
        """Re-read every file's hash, and recompute the first samples of the first shard.

        Raises:
            Failure: what is stored is not what it should be.
        """
        for number in numbers:
            name = shard_name(self.sources.shards[number])
            manifest = read_json(self.directory / f"{name}.json", CACHE_FORMAT)
            for file, entry in manifest["files"].items():
                if file_hash(self.directory / file) != entry["sha256"]:
                    (self.directory / f"{name}.json").unlink()
                    raise Failure(
                        f"{self.directory / file} is damaged; its shard is marked as missing: run "
                        "the same command again"
                    )
        if numbers:
            self._recompute(self.sources.shards[numbers[0]], self.sources.rows_of(numbers[0]))
        print(f"{self.directory}: {len(numbers)} shards verified", flush=True)

    def _recompute(self, shard: Shard, rows: range) -> None:
        stored = np.load(self.directory / f"{shard_name(shard)}.image.npy", mmap_mode="r")
        for batch, features in self._features(rows[: self.config.batch_size], 0):
            places = (batch.rows - rows.start).numpy()
            worst = np.abs(stored[0, places] - features.image.cpu().numpy()).max()
            if not worst <= TOLERANCE[self.config.precision]:
                raise Failure(
                    f"{self.directory}: recomputed embeddings of {shard.path} differ by "
                    f"{worst:.3g} from the stored ones; the cache belongs to other software or data"
                )

    def _seconds_per_sample(self, number: int) -> float:
        rows = self.sources.rows_of(number)[: 2 * self.config.batch_size]
        next(self._features(rows[: self.config.batch_size], 0), None)  # warm up
        start = time.monotonic()
        count = sum(len(batch) for batch, _ in self._features(rows, 0))
        return (time.monotonic() - start) / max(count, 1)

    def _shard(self, number: int, bar: tqdm) -> dict[str, np.ndarray]:
        rows = self.sources.rows_of(number)
        shape = (len(rows), self.teacher.dim)
        images = np.full((self.config.views, *shape), np.nan, np.float16)
        texts = np.full((self.text_views, *shape), np.nan, np.float16)
        for view in range(self.config.views):
            for batch, features in self._features(rows, view):
                places = (batch.rows - rows.start).numpy()
                images[view, places] = features.image.cpu().numpy()
                if view < self.text_views:
                    texts[view, places] = features.text.cpu().numpy()
                bar.update(len(batch))
        return {"image": images, "text": texts}

    def _features(self, rows: range, view: int) -> Iterator[tuple[Batch, Features]]:
        """(batch, the teacher's features) of consecutive rows at one view."""
        batches = sequential(
            self.sources,
            [train_view(self.spec, self.config.aug_cfg)],
            [self.tokenizer],
            batch_size=self.config.batch_size,
            seed=self.config.view_seed,
            view=view,
            captions=self.config.captions,
            rows=rows,
            workers=self.config.workers,
            start_method=self.config.worker_start,
            pin_memory=self.device.type == "cuda",
        )
        for batch in batches:
            if len(batch):
                yield batch, self._run(batch.to(self.device))

    def _run(self, batch) -> Features:
        with self.autocast():
            return self.teacher(normalise(batch.images[0], self.spec), batch.texts[0])


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.1f} min"
