"""``python -m eval.bank``: what banks of RDMs keep of their teachers, of CLIP and of classifiers.

What is measured is in `eval.reconstruct`; this is the command.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eval.flags import add_data_flags, add_forward_flags, command, find_device
from eval.result import GapRecord, attempt, file_name
from training.engine import result
from training.errors import cli

if TYPE_CHECKING:
    from eval.reconstruct import Bank

DESCRIPTION = """\
What a bank of RDMs keeps of its teacher: metrics with every reconstruction in its place.

  python -m eval.bank logs/bank --data-root DATA --datasets imagenet1k flickr30k
  python -m eval.bank logs/classify/rdm --data cifar100

Every RDM stands where its teacher would, with rounding as in stage 2: the image embeddings go
through it, and of CLIP those of prompts and captions through the text RDM of the same rate. Of
CLIP the mean of teacher and RDMs is measured too. Written to RUN/results/bank, with each RDM's
bits and, for classification, a t-SNE map of ten classes; eval.report draws them."""


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    p = command(
        "eval.bank", "RUN [...] [--data-root DIR --datasets NAME ... | --data DIR]", DESCRIPTION
    )
    bank = p.add_argument_group("banks")
    bank.add_argument(
        "runs", nargs="+", metavar="RUN", type=Path, help="runs with a bank, or banks"
    )
    bank.add_argument(
        "--teacher", metavar="MODEL", help="of CLIP: a model folder or NAME:WEIGHTS [the run's]"
    )
    bank.add_argument(
        "--model-config", nargs="+", default=[], metavar="FILE", help="of a NAME OpenCLIP lacks"
    )
    add_data_flags(p.add_argument_group("data of a CLIP bank"), required=False)
    p.add_argument_group("data of a classifier's bank").add_argument(
        "--data", type=Path, metavar="DIR", help="the images, as for training.classify"
    )
    add_forward_flags(p.add_argument_group("computation"))
    p.add_argument_group("results").add_argument(
        "--out", type=Path, metavar="DIR", help="folder of results [RUN/results]"
    )
    return p.parse_args(argv)


def measure_once(bank: "Bank", dataset: str) -> str:
    """Write the result of a bank on a data set, unless it is there; a line about it.

    Raises:
        Gap: it can't be measured.
    """
    data = bank.open(dataset)
    parts = [data.name, data.split, bank.name]
    path = bank.out / "bank" / file_name(parts, bank.identity(data))
    if path.exists():
        return f"measured already, skipped ({path})"
    measured = bank.measure(data)
    result.write(path, measured)
    metric = next(iter(measured.teacher))
    figures = [f"R={one.rate:g} {one.metrics[metric]:.4f}" for one in measured.assistants]
    return f"{metric}: teacher {measured.teacher[metric]:.4f}, {', '.join(figures)} ({path})"


def main(argv: list[str]) -> int:
    """Entry point of ``python -m eval.bank``; 1 when a data set could not be evaluated."""
    args = parse(argv)

    from eval import models, reconstruct
    from eval.embed import Forward

    models.add_configs(args.model_config)
    device = find_device(args.device)
    forward = Forward(device, args.precision, args.batch_size, args.workers)
    gaps = 0
    for path in args.runs:
        bank = reconstruct.load(path, args, forward)
        for dataset in bank.datasets:
            gap = GapRecord(dataset=dataset, model=bank.name, weights=bank.weights)
            gaps += not attempt(bank.out, bank.split, gap, partial(measure_once, bank, dataset))
    if gaps:
        print(f"{gaps} evaluations are gaps; each is named above", file=sys.stderr)
    return 1 if gaps else 0


if __name__ == "__main__":
    cli(main)
