"""``python -m benchmarks.cache``: what the teacher cache saves, and what feeds it.

A cache is written, of generated 512-pixel images where no --train-data are given: how fast, against
the bare teacher. Then runs of training.main take turns, of plain CLIP, of feature distillation and
of stage 1, from the cache and beside the live teacher: samples per second, and the share of time
that they wait for data.
"""

import argparse
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
from training.clip.cache_teacher import Caches
from training.clip.flags import cache_config, parse_args, parse_cache
from training.clip.models import add_model_configs, build_student, save_student, student_config
from training.data.index import index_shards
from training.engine.run import read_metrics
from training.errors import cli
from training.main import main as train

RUNS = ("none", "fd, cached", "fd, live", "rdm, cached", "rdm, live")
#: The run whose samples per second are divided by another's.
COMPARED = {
    "stage 2: cached / none": ("fd, cached", "none"),
    "stage 2: cached / live": ("fd, cached", "fd, live"),
    "stage 1: cached / live": ("rdm, cached", "rdm, live"),
}


def writing(args: argparse.Namespace, common: list[str]) -> dict[str, float]:
    """Images per second of the writing of a cache, and of its teacher on a batch at hand."""
    device, size = torch.device(args.device), args.batch_size
    caches = Caches(cache_config(parse_cache(common), device.type), World(), device)
    caches.begin()
    samples, figures = caches.sources.num_samples, {}
    if args.store_views:
        stored = clocked(lambda: caches.store_views(caches.numbers))
        figures["views stored per s"] = samples / stored
    figures["embedded per s"] = samples / clocked(caches.write)
    batch = random_batch(caches.transforms, size, args.seed).to(device)

    def bare() -> None:
        with caches.autocast():
            caches.teachers.features(batch)

    (seconds,) = paired({"teacher": bare}, 5, 2, device).values()
    figures["bare teacher per s"] = size / statistics.median(seconds)
    figures["embedded / bare teacher"] = figures["embedded per s"] / figures["bare teacher per s"]
    return figures


def reading(args: argparse.Namespace, flags: list[str]) -> dict[str, float]:
    """Samples per second of a run, and the share of time that it waits for data."""
    samples, every = args.steps * args.batch_size, max(1, args.steps // 10)
    with tempfile.TemporaryDirectory() as logs:
        train([
            *flags, "--epochs=1", f"--train-num-samples={samples}", f"--logs={logs}", "--name=run",
            f"--log-every-n-steps={every}",
        ])  # fmt: skip
        lines = [line for line in read_metrics(Path(logs) / "run") if line["kind"] == "train"][1:]
    names = ("samples_per_s", "data_wait")
    return {name: statistics.median(line[name] for line in lines) for name in names}


def clocked(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(argv: list[str]) -> None:
    """Measure and print."""
    parser = command_line("cache", __doc__, rounds=3)
    add_flags(parser, "ViT-B-32", "ViT-S-32-alt")
    add = parser.add_argument
    add("--train-data", metavar="SHARDS", help="as for training.main [generated]")
    add("--index-dir", metavar="DIR", help="where shard indexes go [beside the shards]")
    add("--workers", type=int, default=1, help="processes that decode, of each run")
    add("--store-views", action="store_true", help="keep the images in the cache, small")
    add("--images", type=int, default=8192, help="to generate without --train-data")
    add("--steps", type=int, default=100, help="of each run")
    add("--runs", nargs="+", default=RUNS, choices=RUNS, metavar="NAME", help="which of them")
    args = parser.parse_args(argv)
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
        cached = [*live, f"--teacher-cache={folder / 'cache'}"]
        views = ["--store-views"] if args.store_views else []
        figures = writing(args, [*common, *cached, *views])
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.runs}
        for _ in range(args.rounds):
            for name, measured in runs.items():
                method, _, way = name.partition(", ")
                taught = {"": [], "cached": cached, "live": live}[way]
                measured.append(reading(args, [*common, f"--distill={method}", *taught]))
        data = index_shards(urls, cache_dir=args.index_dir).fingerprint()
    print(f"{args.teacher} -> {args.student}, batch {args.batch_size}, {args.precision}")
    for name, figure in figures.items():
        print(f"{name:24} {figure:9.3f}")
    for name, measured in runs.items():
        rate, wait = (statistics.median(one[k] for one in measured) for k in measured[0])
        print(f"{name:12} {rate:9.1f} samples/s, {100 * wait:.1f} % of the time waiting for data")
    seconds = {name: [1 / one["samples_per_s"] for one in own] for name, own in runs.items()}
    compared = {
        what: ratios(seconds, than, name)
        for what, (name, than) in COMPARED.items()
        if {name, than} <= seconds.keys()
    }
    for what, ratio in compared.items():
        print(f"{what}: {spelled(ratio)}")
    record("cache", args, {"written": figures, "runs": runs, "ratios": compared, "data": data})


if __name__ == "__main__":
    cli(main)
