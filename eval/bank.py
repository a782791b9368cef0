"""``python -m eval.bank``: what banks of RDMs keep of their teachers, CLIPs and classifiers."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eval.flags import DataConfig, ForwardConfig
from eval.result import GapRecord, attempt, file_name
from training.engine import result
from training.engine.flags import Parser, check_ranges, construct, flag
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


@dataclass(frozen=True)
class BankConfig:
    """Which banks, and where results go."""

    runs: tuple[str, ...] = ()
    teacher: str = flag("", "of CLIP: a model folder or NAME:WEIGHTS [the run's]", metavar="MODEL")
    model_config: tuple[str, ...] = flag((), "of a NAME that OpenCLIP lacks", metavar="FILE.json")
    out: str = flag("", "folder of results [RUN/results]", metavar="DIR")


@dataclass(frozen=True)
class ImagesConfig:
    """What a classifier's bank is measured on."""

    data: str = flag("", "its images, as for training.classify", metavar="DIR")


@dataclass(frozen=True)
class Config(BankConfig, DataConfig, ImagesConfig, ForwardConfig):
    """The command line."""


GROUPS = (
    ("banks and results", BankConfig),
    ("data of a CLIP bank", DataConfig),
    ("data of a classifier's bank", ImagesConfig),
    ("computation", ForwardConfig),
)


def parse(argv: Sequence[str]) -> Config:
    """What a command line says.

    Raises:
        UsageError: a flag is wrong.
    """
    usage = "RUN [...] [--data-root DIR --datasets NAME [...]] [--data DIR] [flags]"
    parser = Parser("eval.bank", DESCRIPTION, f"python -m eval.bank {usage}", GROUPS)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs with banks, or banks")
    config = construct(Config, parser.given(argv))
    check_ranges(config)
    return config


def measure_once(bank: "Bank", dataset: str) -> str:
    """Write the result of a bank on a data set, unless it is there; a line about it.

    Raises:
        Gap: it can't be measured.
    """
    data = bank.open(dataset)
    name = file_name([data.name, data.split, bank.name], bank.identity(data))
    path = bank.out / "bank" / name
    if path.exists():
        return f"measured already, skipped ({path})"
    measured = bank.measure(data)
    result.write(path, measured)
    metric = next(iter(measured.teacher))
    figures = [f"R={one.rate:g} {one.metrics[metric]:.4f}" for one in measured.assistants]
    return f"{metric}: teacher {measured.teacher[metric]:.4f}, {', '.join(figures)} ({path})"


def main(argv: list[str]) -> int:
    """Entry point of ``python -m eval.bank``; 1 when a data set could not be evaluated."""
    config = parse(argv)

    from eval import models, reconstruct

    models.add_configs(config.model_config)
    gaps = 0
    for run in config.runs:
        bank = reconstruct.load(Path(run), config)
        for dataset in bank.datasets:
            gap = GapRecord(dataset=dataset, model=bank.name, weights=bank.weights)
            gaps += not attempt(bank.out, bank.split, gap, partial(measure_once, bank, dataset))
    if gaps:
        print(f"{gaps} evaluations are gaps; each is named above", file=sys.stderr)
    return 1 if gaps else 0


if __name__ == "__main__":
    cli(main)
