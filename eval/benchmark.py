"""Zero-shot evaluation of models on data sets that are on this disk; nothing is downloaded.

  python -m eval.benchmark logs/cifd logs/clipkd --data-root DATA --datasets paper
  python -m eval.benchmark ViT-B-16:datacomp_xl_s13b_b90k --data-root DATA --datasets imagenetv2

Data sets are read in clip_benchmark's WebDataset layout (NAME/test/0.tar, ...) or as their authors
distribute them. What can't be evaluated is a named gap, and the exit code is 1. Results are
clip_benchmark's JSON; their names hold what was evaluated, so none is overwritten, and a repeated
evaluation is skipped. Processes of torchrun or srun share the work.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache, partial
from itertools import groupby, product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from eval import datacomp, datasets
from eval.flags import add_data_flags, add_forward_flags, forward_of
from eval.result import GapRecord, attempt, file_name
from training.engine import result
from training.engine.config import check_group
from training.engine.flags import CommandLine
from training.errors import cli

if TYPE_CHECKING:
    from eval.embed import Classifiers


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    usage = "MODEL [...] --data-root DIR --datasets NAME [...] [flags]"
    parser = CommandLine("eval.benchmark", __doc__, f"python -m eval.benchmark {usage}")
    add = parser.add_argument
    of = "a run, a checkpoint, a model folder, or NAME[:PRETRAINED] of OpenCLIP"
    add("models", nargs="+", metavar="MODEL", help=of)
    add_data_flags(parser, "data", required=True)
    images = "images of each data set at most, drawn by a fixed seed [all]"
    add("--samples", type=_positive, metavar="N", help=images)
    add_forward_flags(parser)
    add = parser.add_argument_group("models and results").add_argument
    add("--model-config", nargs="+", default=[], metavar="FILE", help="of NAMEs OpenCLIP lacks")
    add("--out", metavar="DIR", help="folder of results [RUN/results, or results]")
    add("--part", type=_part, default="1/1", metavar="I/N", help="only the I-th of N equal parts")
    add("--dry-run", action="store_true", help="only open the data sets: which can be evaluated?")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}': expected a whole number from 1")
    return int(text)


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}': expected I/N with 1 <= I <= N, e.g. 1/4")
    return int(match[1]), int(match[2])


class Place(NamedTuple):
    """Of this process among those that torchrun or srun started together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def of_process(cls) -> "Place":
        """Read it from the environment; an sbatch script itself is alone, whatever its job has."""
        check_group()
        torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        srun = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        for names in (torchrun, srun):
            if all(name in os.environ for name in names):
                return cls(*(int(os.environ[name]) for name in names))
        return cls()


def share(items: Sequence, number: int, of: int) -> Sequence:
    """The ``number``-th of ``of`` equal parts: neighbours stay together, and none is left out."""
    return items[len(items) * (number - 1) // of : len(items) * number // of]


def run(args: argparse.Namespace, place: Place) -> int:
    """Evaluate this process's share of models on data sets; how many could not be."""
    from eval import models
    from eval.embed import Classifiers

    models.add_configs(args.model_config)
    forward, root = forward_of(args, place.local_rank), datasets.check_root(Path(args.data_root))
    # Opened and fingerprinted once for all models.
    opened = cache(lambda name: datasets.open_folder(root, name, args.split, args.samples))
    wanted = datasets.wanted(args.datasets, root)
    pairs = list(product(dict.fromkeys(args.models), wanted))
    pairs = share(share(pairs, *args.part), place.rank + 1, place.size)
    gaps = 0
    for spec, of_model in groupby(pairs, key=lambda pair: pair[0]):
        model = models.load(spec, forward.device)
        classifiers = Classifiers(model, forward)
        out = Path(args.out or (model.run / "results" if model.run else "results"))
        for _, name in of_model:
            gap = GapRecord(dataset=name, model=model.name, weights=model.weights)
            evaluate = partial(evaluate_once, out, partial(opened, name), classifiers)
            gaps += not attempt(out, args.split, gap, evaluate)
        if "datacomp" in args.datasets and len(pairs) == len(wanted) * len(set(args.models)):
            found = (result.read(path) for path in sorted(out.glob("*.json")))
            own = [each for each in found if each.provenance.weights == model.weights]
            print(f"{model.name}: {datacomp.summary(own)}")
    return gaps


def check(args: argparse.Namespace) -> int:
    """Open the data sets, without a model; how many can't be evaluated."""
    root, gaps = datasets.check_root(Path(args.data_root)), 0
    for name in datasets.wanted(args.datasets, root):
        try:
            folder = datasets.open_folder(root, name, args.split, args.samples)
            print(f"{name}: {len(folder.samples)} images")
        except datasets.Gap as gap:
            print(f"{name}: {gap}", file=sys.stderr)
            gaps += 1
    return gaps


def evaluate_once(
    out: Path, open_folder: Callable[[], datasets.Folder], classifiers: "Classifiers"
) -> str:
    """Write the result of a model on a data set, unless it is there; a line about it.

    Raises:
        Gap: it can't be evaluated.
    """
    from eval import zeroshot

    folder, model = open_folder(), classifiers.model
    provenance = zeroshot.provenance(model, folder, classifiers.forward)
    path = out / file_name([folder.name, folder.split, model.name, model.weights[:10]], provenance)
    if path.exists():
        return f"evaluated already, skipped ({path})"
    evaluated, examples = zeroshot.evaluate(folder, classifiers, provenance)
    if examples:
        result.write(out / "examples" / path.name, examples)
    result.write(path, evaluated)
    line = ", ".join(f"{k} {v:.4f}" for k, v in evaluated.metrics.items() if v is not None)
    if differs := evaluated.provenance.shortfall:
        line += f"; not the published {folder.name}: {differs}"
    return f"{line} ({path})"


def main(argv: list[str]) -> int:
    """Entry point of ``python -m eval.benchmark``; 1 when a data set could not be evaluated."""
    args, place = parse(argv), Place.of_process()
    if args.dry_run:
        return 1 if check(args) else 0

    import torch.distributed as dist

    # torchrun, and srun --wait, end the others soon after one has ended: all wait for the last.
    wait = place.size > 1 and "MASTER_ADDR" in os.environ
    if wait:
        month = timedelta(days=30)
        dist.init_process_group("gloo", rank=place.rank, world_size=place.size, timeout=month)
    gaps = run(args, place)
    if gaps:
        print(f"{gaps} evaluations are gaps; each is named above", file=sys.stderr)
    if wait:
        dist.barrier()
        dist.destroy_process_group()
    return 1 if gaps else 0


if __name__ == "__main__":
    cli(main)
