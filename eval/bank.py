"""What a bank of RDMs keeps of its teacher: metrics with every reconstruction in its place.

  python -m eval.bank logs/bank --data-root DATA --datasets imagenet1k flickr30k
  python -m eval.bank logs/classify/rdm --data cifar100

Every RDM stands where its teacher would, with rounding as in stage 2: the image embeddings go
through it, and of CLIP those of prompts and captions through the text RDM of the same rate. Of
CLIP the mean of teacher and RDMs is measured too. Written to RUN/results/bank, with each RDM's
bits and, for classification, a t-SNE map of ten classes; eval.report draws them.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eval.flags import add_data_flags, add_forward_flags, forward_of
from eval.result import GapRecord, attempt, file_name
from training.engine import result
from training.engine.flags import CommandLine
from training.errors import cli

if TYPE_CHECKING:
    from eval.reconstruct import Bank


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    usage = "RUN [...] [--data-root DIR --datasets NAME [...]] [--data DIR] [flags]"
    parser = CommandLine("eval.bank", __doc__, f"python -m eval.bank {usage}")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="runs with banks, or banks")
    add("--out", metavar="DIR", help="folder of results [RUN/results]")
    add_data_flags(parser, "of a CLIP bank", required=False)
    add = parser.add_argument_group("its teacher, where the run names none").add_argument
    add("--teacher", metavar="MODEL", help="a model folder, or NAME:WEIGHTS")
    add("--model-config", nargs="+", default=[], metavar="FILE", help="of a NAME OpenCLIP lacks")
    add = parser.add_argument_group("of a classifier's bank").add_argument
    add("--data", type=Path, metavar="DIR", help="its images, as for training.classify")
    add_forward_flags(parser)
    return parser.parse_args(argv)


def measure_once(bank: "Bank", dataset: str) -> str:
    """Write the result of a bank on a data set, unless it is there; a line about it.

    Raises:
        Gap: it can't be measured.
    """
    data = bank.open(dataset)
    provenance = bank.provenance(data)
    path = bank.out / "bank" / file_name([data.name, data.split, bank.name], provenance)
    if path.exists():
        return f"measured already, skipped ({path})"
    measured = bank.result(data, provenance)
    result.write(path, measured)
    metric = next(iter(measured.teacher))
    figures = [f"R={one.rate:g} {one.metrics[metric]:.4f}" for one in measured.assistants]
    return f"{metric}: teacher {measured.teacher[metric]:.4f}, {', '.join(figures)} ({path})"


def main(argv: list[str]) -> int:
    """Entry point of ``python -m eval.bank``; 1 when a data set could not be evaluated."""
    args = parse(argv)

    from eval import models, reconstruct

    models.add_configs(args.model_config)
    forward, gaps = forward_of(args), 0
    for run in args.runs:
        bank = reconstruct.load(run, args, forward)
        for dataset in bank.datasets:
            gap = GapRecord(dataset=dataset, model=bank.name, weights=bank.weights)
            gaps += not attempt(bank.out, bank.split, gap, partial(measure_once, bank, dataset))
    if gaps:
        print(f"{gaps} evaluations are gaps; each is named above", file=sys.stderr)
    return 1 if gaps else 0


if __name__ == "__main__":
    cli(main)
