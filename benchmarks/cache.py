"""``python -m benchmarks.cache``: what the teacher cache saves, through the real loop.

Stage 2 with a full cache against --distill none and against the live teacher (images/s), and stage
1 from the cache against the live teacher (samples/s). All take the same batches, in turn, in blocks
of steps; each has a loader of its own.
"""

import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.contestants import add_flags, common_flags, random_teacher
from benchmarks.harness import command_line, paired, ratios, record, spelled
from cifd_clip import World
from training.cache_teacher import main as write_cache
from training.clip.flags import named_files, parse, resolve
from training.clip.run import epoch_steps, make_loader
from training.clip.stages import RDMStage, StudentStage
from training.data.index import index_shards
from training.engine.trainer import Trainer
from training.errors import cli


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
    add("--train-data", required=True, metavar="SHARDS", help="as for training.main")
    add("--index-dir", metavar="DIR", help="where shard indexes go [beside the shards]")
    add("--block", type=int, default=4, help="steps a turn")
    add("--workers", type=int, default=1, help="processes that decode, of each run")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        common = [*common_flags(args), f"--train-data={args.train_data}", "--views=1"]
        common.append(f"--workers={args.workers}")
        if args.index_dir:
            common.append(f"--index-dir={args.index_dir}")
        live, cached = [f"--distill-model={random_teacher(args, folder)}"], []
        cached.append(f"--teacher-cache={folder / 'cache'}")
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
