"""``python -m training.cache_teacher``: compute the teachers' embeddings once.

Takes the flags of `training.main` (so a recipe serves both): the data, the teachers, ``--views``,
``--captions``, ``--aug-cfg``, and ``--teacher-cache`` for where to write, one folder per teacher.
Shards are independent: ``--part I/N`` (an array job) or several processes (torchrun, srun) share
them, finished ones are skipped, and what was written is verified at the end.
"""

import json
import re
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from open_clip_train.precision import get_autocast
from tqdm import tqdm

from cifd_clip import Features, Teacher
from training.clip.cache import (
    check_config,
    file_hash,
    is_complete,
    own_temporary,
    read_config,
    shard_name,
    write_shard,
)
from training.clip.flags import check_teacher_weights, parser, teacher_names
from training.clip.models import add_model_configs, build_teachers, model_config
from training.clip.stages import Inputs
from training.data.index import Shard, Sources, index_shards
from training.data.loader import sequential
from training.data.views import ImageSpec, normalise, train_view
from training.engine.control import start_processes, wait_for_all
from training.errors import Failure, UsageError

#: How far a recomputed unit vector may lie from the stored float16 one (amp_bf16 is coarser).
TOLERANCE = {"fp32": 2e-3, "amp_bf16": 5e-2, "amp": 1e-2}


def main(argv: list[str]) -> int:
    """Write, then verify, the caches of every teacher named."""
    args = _parse(argv)
    world, device = start_processes(args)
    if args.precision is None:
        args.precision = "amp_bf16" if device.type == "cuda" else "fp32"
    add_model_configs(args.model_config)
    sources = index_shards(args.train_data, cache_dir=args.index_dir)
    mine = list(range(sources.counts.size))
    mine = mine[args.part[0] - 1 :: args.part[1]][world.rank :: world.size]
    directories = [Path(d) for d in args.teacher_cache.split(",")]
    teachers = build_teachers(args, device)
    if len(directories) != len(teachers):
        raise UsageError(
            f"--teacher-cache names {len(directories)} folders for {len(teachers)} teachers"
        )
    for teacher, directory in zip(teachers, directories):
        cache = Cache(args, teacher, directory, sources, device)
        if world.rank == 0:
            cache.begin()
        wait_for_all(world)
        cache.write(mine)
        cache.verify(mine)
    wait_for_all(world)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


class Cache:
    """One teacher's cache in the making.

    Args:
        args: the command line.
        teacher: on its device.
        directory: where it goes.
        sources: the data set.
        device: of the teacher.
    """

    def __init__(
        self,
        args: Namespace,
        teacher: Teacher,
        directory: Path,
        sources: Sources,
        device: torch.device,
    ):
        self.args, self.teacher, self.directory = args, teacher, directory
        self.sources, self.device = sources, device
        self.spec = ImageSpec.of(teacher.model.visual.preprocess_cfg)
        inputs = Inputs(args.aug_cfg)
        inputs.add_texts(teacher.name, model_config(teacher.name, "--distill-model"))
        self.tokenizer = inputs.tokenizers[0]
        self.autocast = get_autocast(args.precision, device.type)
        # With the first caption only, no view changes the text.
        self.text_views = args.views if args.captions == "all" else 1
        self.config = {
            "teacher": teacher.identity,
            "view_seed": args.view_seed,
            "views": args.views,
            "captions": args.captions,
            "aug_cfg": args.aug_cfg,
            "precision": args.precision,
        }

    def begin(self) -> None:
        """Write the configuration, or refuse a folder that holds another cache."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "config.json"
        config = json.loads(json.dumps(self.config))
        if path.is_file():
            check_config(self.directory, config)
            if read_config(self.directory)["views"] != config["views"]:
                raise UsageError(
                    f"--teacher-cache '{self.directory}' holds another number of views than "
                    f"--views {self.args.views}"
                )
            return
        temporary = own_temporary(path)
        # What the weights were called, for who reads the cache with a name.
        config["pretrained"] = teacher_names(self.args)[self.teacher.space][1]
        temporary.write_text(json.dumps(config, indent=2) + "\n")
        temporary.rename(path)

    def write(self, numbers: list[int]) -> None:
        """Compute and store the shards that are not there yet."""
        shards = self.sources.shards
        left = [n for n in numbers if not is_complete(self.directory, shards[n])]
        samples = sum(shards[n].samples for n in left)
        passes = samples * self.args.views
        size = samples * (self.args.views + self.text_views) * self.teacher.dim * 2
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
            manifest = json.loads((self.directory / f"{name}.json").read_text())
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
        for batch, features in self._features(rows[: self.args.batch_size], 0):
            places = (batch.rows - rows.start).numpy()
            worst = np.abs(stored[0, places] - features.image.cpu().numpy()).max()
            if not worst <= TOLERANCE[self.args.precision]:
                raise Failure(
                    f"{self.directory}: recomputed embeddings of {shard.path} differ by "
                    f"{worst:.3g} from the stored ones; the cache belongs to other software or data"
                )

    def _seconds_per_sample(self, number: int) -> float:
        rows = self.sources.rows_of(number)[: 2 * self.args.batch_size]
        next(self._features(rows[: self.args.batch_size], 0), None)  # warm up
        start = time.monotonic()
        count = sum(len(batch) for batch, _ in self._features(rows, 0))
        return (time.monotonic() - start) / max(count, 1)

    def _shard(self, number: int, bar: tqdm) -> dict[str, np.ndarray]:
        rows = self.sources.rows_of(number)
        shape = (len(rows), self.teacher.dim)
        images = np.full((self.args.views, *shape), np.nan, np.float16)
        texts = np.full((self.text_views, *shape), np.nan, np.float16)
        for view in range(self.args.views):
            for batch, features in self._features(rows, view):
                places = (batch.rows - rows.start).numpy()
                images[view, places] = features.image.cpu().numpy()
                if view < self.text_views:
                    texts[view, places] = features.text.cpu().numpy()
                bar.update(len(batch))
        return {"image": images, "text": texts}

    def _features(self, rows: range, view: int):
        """(batch, the teacher's features) of consecutive rows at one view."""
        batches = sequential(
            self.sources,
            [train_view(self.spec, self.args.aug_cfg)],
            [self.tokenizer],
            batch_size=self.args.batch_size,
            seed=self.args.view_seed,
            view=view,
            captions=self.args.captions,
            rows=rows,
            workers=self.args.workers,
            start_method=self.args.worker_start,
            pin_memory=self.device.type == "cuda",
        )
        for batch in batches:
            if len(batch):
                yield batch, self._run(batch.to(self.device))

    def _run(self, batch) -> Features:
        with self.autocast():
            return self.teacher(normalise(batch.images[0], self.spec), batch.texts[0])


def _parse(argv: list[str]) -> Namespace:
    p = parser()
    p.prog, p.description = "python -m training.cache_teacher", __doc__
    p.usage = (
        "python -m training.cache_teacher [@recipe.args] --train-data SHARDS --teacher-cache DIR\n"
        "           --views V --distill-model NAME --distill-pretrained TAG_OR_PATH [flags]"
    )
    p.add_argument("--part", default="1/1", metavar="I/N", help="only every N-th shard")
    args = p.parse_args(argv)
    for flag in ("train_data", "distill_model", "teacher_cache"):
        if not getattr(args, flag):
            raise UsageError(f"--{flag.replace('_', '-')} is missing")
    check_teacher_weights(args)
    if args.views < 1:
        raise UsageError("--views must be at least 1: how many augmentations of an image to store")
    match = re.fullmatch(r"(\d+)/(\d+)", args.part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--part '{args.part}': expected I/N with 1 <= I <= N, such as 1/4")
    args.part = (int(match[1]), int(match[2]))
    args.view_seed = args.seed if args.view_seed is None else args.view_seed
    return args


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.1f} min"
