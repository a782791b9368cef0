"""``python -m benchmarks.cache``: what the teacher cache saves, through the real loop.

Stage 2 with a full cache against ``--distill none`` and against the live teacher (images/s), and
stage 1 from the cache against the live teacher (samples/s). All take the same batches, in turn, in
blocks of steps; each has a loader of its own.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.harness import paired, ratios, record
from benchmarks.step import random_teacher
from cifd_clip import World
from training.cache_teacher import main as write_cache
from training.clip.config import parse_args
from training.clip.models import add_model_configs
from training.clip.run import adopt_cache, epoch_steps, make_loader
from training.clip.stages import RDMStage, StudentStage
from training.data.index import index_shards
from training.engine.trainer import Trainer


class Run:
    """A run of ``training.main`` that is taken a block of steps at a time."""

    def __init__(self, flags: list[str], block: int):
        args = parse_args(flags)
        adopt_cache(args)
        device = torch.device(args.device)
        sources = index_shards(args.train_data, cache_dir=args.index_dir)
        stage = (
            RDMStage(args, device) if args.distill == "rdm" else StudentStage(args, device, World())
        )
        steps = epoch_steps(args, sources, args.batch_size)
        self.trainer = Trainer(args, stage, World(), device, steps)
        self.loader = make_loader(args, sources, self.trainer, args.batch_size)
        self.batches = self.loader.batches(0, self.trainer.total_steps)
        self.block = block

    def __call__(self) -> None:
        """One block of steps, loading included."""
        for _ in range(self.block):
            self.trainer.step(next(self.batches).to(self.trainer.device))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--train-data", required=True, help="shards")
    parser.add_argument("--index-dir")
    parser.add_argument("--teacher", default="ViT-L-14" if on_gpu else "ViT-B-32")
    parser.add_argument("--student", default="ViT-B-16" if on_gpu else "ViT-S-32-alt")
    parser.add_argument("--model-config", nargs="+", default=[])
    parser.add_argument("--batch-size", type=int, default=256 if on_gpu else 16)
    parser.add_argument("--block", type=int, default=4, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--precision", default="amp_bf16" if on_gpu else "fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="save the figures here")
    args = parser.parse_args()
    add_model_configs(args.model_config)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher = random_teacher(args, folder)
        common = ["--train-data", args.train_data, "--model", args.student, "--epochs", "1000"]
        common += ["--batch-size", str(args.batch_size), "--workers", str(args.workers)]
        common += ["--device", args.device, "--precision", args.precision, "--warmup", "1"]
        common += ["--seed", str(args.seed), "--views", "1"]
        if args.index_dir:
            common += ["--index-dir", args.index_dir]
        live = ["--distill-model", teacher]
        cached = ["--teacher-cache", str(folder / "cache")]
        write_cache([*common, *live, *cached])
        runs = {
            "none": Run([*common], args.block),
            "fd, cached": Run([*common, "--distill", "fd", *cached], args.block),
            "fd, live": Run([*common, "--distill", "fd", *live], args.block),
            "rdm, cached": Run([*common, "--distill", "rdm", *cached], args.block),
            "rdm, live": Run([*common, "--distill", "rdm", *live], args.block),
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
        print(f"{name}: {ratio['median']:.3f} (min {ratio['min']:.3f}, max {ratio['max']:.3f})")
    settings = json.loads(json.dumps(vars(args), default=str))
    data = index_shards(args.train_data, cache_dir=args.index_dir).fingerprint()
    record(
        "cache", {"seconds": seconds, "ratios": figures, "settings": settings, "data": data},
        args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
