"""``python -m benchmarks.cache``: what the teacher cache saves, and what feeds it.

Through the real loop, stage 2 with a full cache against --distill none and against the live teacher
(images/s), and stage 1 from the cache against the live teacher (samples/s). All take the same
batches, in turn, in blocks of steps; each has a loader of its own.

``--end-to-end``: one cache with stored views, of generated 512-pixel images where no --train-data
are given: how fast it is written, against the bare teacher, and how fast `training.main` reads it,
with the share of time that it waits for data.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import add_flags, common_flags, random_batch
from benchmarks.harness import command_line, paired, ratios, record, spelled
from benchmarks.loader import generate
from cifd_clip import World
from training.cache_teacher import main as write_cache
from training.clip.cache_teacher import Caches
from training.clip.flags import cache_config, named_files, parse, parse_args, parse_cache, resolve
from training.clip.models import add_model_configs, build_student, save_student, student_config
from training.clip.run import epoch_steps, make_loader
from training.clip.stages import RDMStage, StudentStage
from training.data.index import index_shards
from training.engine.trainer import Trainer
from training.errors import UsageError, cli
from training.main import main as train


def writing(args: argparse.Namespace, common: list[str]) -> dict[str, float]:
    """Images per second of the writing of a cache, and of its teacher on a batch at hand."""
    device, size = torch.device(args.device), args.batch_size
    caches = Caches(cache_config(parse_cache(common), device.type), World(), device)
    caches.begin()
    samples = caches.sources.num_samples
    figures = {"views stored per s": samples / clocked(lambda: caches.store_views(caches.numbers))}
    figures["embedded per s"] = samples / clocked(caches.write)
    batch = random_batch(caches.transforms, size, args.seed).to(device)

    def bare() -> None:
        with caches.autocast():
            caches.teachers.features(batch)

    (seconds,) = paired({"teacher": bare}, 5, 2, device).values()
    figures["bare teacher per s"] = size / statistics.median(seconds)
    figures["embedded / bare teacher"] = figures["embedded per s"] / figures["bare teacher per s"]
    return figures


def reading(args: argparse.Namespace, common: list[str], folder: Path) -> dict[str, float]:
    """Samples per second of a run of feature distillation, and the share of time it waits."""
    samples = args.steps * args.batch_size
    run = ["--distill=fd", "--epochs=1", f"--train-num-samples={samples}", "--name=run"]
    run += [f"--logs={folder}", f"--log-every-n-steps={max(1, args.steps // 10)}"]
    train([*common, *run])
    rows = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    rows = [row for row in rows if row["kind"] == "train"][1:]
    shown = {"samples_per_s": "trained per s", "data_wait": "data wait"}
    return {what: statistics.median(row[name] for row in rows) for name, what in shown.items()}


def clocked(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Blocks:
    """A run of `training.main` that is taken a block of steps at a time."""

    def __init__(self, flags: list[str], block: int):
        given = parse(flags)
        config = resolve(given, **named_files(given))
        device = torch.device(config.device)
        sources = index_shards(config.train_data, cache_dir=config.index_dir)
        rdm = config.distill == "rdm"
        stage = RDMStage(config, device) if rdm else StudentStage(config, device, World())
        steps = epoch_steps(config, sources)
        self.trainer = Trainer(stage, config, steps, None, device, config.precision)
        self.loader = make_loader(config, sources, self.trainer)
        self.batches = self.loader.batches(0, self.trainer.total_steps)
        self.block = block

    def __call__(self) -> None:
        """One block of steps, loading included."""
        for _ in range(self.block):
            self.trainer.step(next(self.batches).to(self.trainer.device))


def main(argv: list[str]) -> None:
    """Measure and print."""
    parser = command_line("cache", __doc__, rounds=6)
    add_flags(parser, "ViT-B-32", "ViT-S-32-alt")
    add = parser.add_argument
    add("--train-data", metavar="SHARDS", help="as for training.main")
    add("--index-dir", metavar="DIR", help="where shard indexes go [beside the shards]")
    add("--block", type=int, default=4, help="steps a turn")
    add("--workers", type=int, default=1, help="processes that decode, of each run")
    add("--end-to-end", action="store_true", help="write a cache of stored views, and read it")
    add("--images", type=int, default=8192, help="--end-to-end: to generate without --train-data")
    add("--steps", type=int, default=200, help="--end-to-end: of the run that reads it")
    args = parser.parse_args(argv)
    if not (args.train_data or args.end_to_end):
        raise UsageError("--train-data is missing: name a directory or pattern of WebDataset tars")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        urls = args.train_data or generate(folder / "data", args.images, 512, 512)
        common = [*common_flags(args), f"--train-data={urls}", "--views=1"]
        common.append(f"--workers={args.workers}")
        if args.index_dir:
            common.append(f"--index-dir={args.index_dir}")
        add_model_configs(args.model_config)
        teacher = parse_args([*common, f"--model={args.teacher}"])
        save_student(build_student(teacher, args.seed), student_config(teacher), folder / "teacher")
        live = [f"--distill-model=local-dir:{folder / 'teacher'}"]
        cached = [f"--teacher-cache={folder / 'cache'}"]
        if args.end_to_end:
            figures = writing(args, [*common, *live, *cached, "--store-views"])
            figures |= reading(args, [*common, *live, *cached], folder)
            for name, figure in figures.items():
                print(f"{name:24} {figure:9.3f}")
            record("cache", args, figures)
            return
        write_cache([*common, *live, *cached])
        runs = {"none": Blocks(common, args.block)} | {
            f"{method}, {way}": Blocks([*common, f"--distill={method}", *flags], args.block)
            for method in ("fd", "rdm")
            for way, flags in {"cached": cached, "live": live}.items()
        }
        seconds = paired(runs, args.rounds, 1, torch.device(args.device))
        for run in runs.values():
            run.loader.close()
    samples = args.block * args.batch_size
    print(f"{args.teacher} -> {args.student}, batch {args.batch_size}, {args.precision}")
    for name, times in seconds.items():
        print(f"{name:12} {samples / statistics.median(times):9.1f} samples/s")
    figures = {
        "stage 2: cached / none, samples per s": ratios(seconds, "none", "fd, cached"),
        "stage 2: cached / live": ratios(seconds, "fd, live", "fd, cached"),
        "stage 1: cached / live": ratios(seconds, "rdm, live", "rdm, cached"),
    }
    for name, ratio in figures.items():
        print(f"{name}: {spelled(ratio)}")
    data = index_shards(args.train_data, cache_dir=args.index_dir).fingerprint()
    record("cache", args, {"seconds": seconds, "ratios": figures, "data": data})


if __name__ == "__main__":
    cli(main)
