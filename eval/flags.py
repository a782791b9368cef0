"""What the command lines of evaluation share. Nothing here imports torch before it is needed."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from eval.datasets import SUITES
from training.clip.flags import _Help, _Parser
from training.errors import UsageError

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "amp_bf16", "amp")


def command(module: str, usage: str, description: str) -> argparse.ArgumentParser:
    """The parser of ``python -m MODULE``, with the help page of every command here."""
    return _Parser(
        prog=f"python -m {module}",
        usage=f"python -m {module} {usage}",
        description=description,
        formatter_class=_Help,
        allow_abbrev=False,
    )


def add_data_flags(group, required: bool = True) -> None:
    """Which data sets are evaluated, and where they lie."""
    add, suites = group.add_argument, ", ".join(SUITES)
    add("--data-root", type=Path, metavar="DIR", required=required, help="folder of the data sets")
    add("--datasets", nargs="+", required=required, help=f"their folders, or suites: {suites}")
    add("--split", default="test", help="split folder to evaluate")


def add_forward_flags(group) -> None:
    """How models are run."""
    add = group.add_argument
    add("--precision", choices=PRECISIONS, default="fp32", help="of the towers' forward pass")
    add("--batch-size", type=int, default=256, help="images or texts at once")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--workers", type=int, default=min(4, cores or 1), help="processes that decode images")
    add("--device", help="cpu, cuda or cuda:N [a GPU, if there is one]")


def find_device(name: str | None, local_rank: int = 0) -> "torch.device":
    """The torch device of ``--device``; of several GPUs the one of this process.

    Raises:
        UsageError: there is no such device.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"--device '{name}': expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device '{name}': no GPU is to be seen here; use --device cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    return device
