"""What the command lines of evaluation share; nothing here imports torch before it is needed."""

from argparse import Namespace
from typing import TYPE_CHECKING

from eval.datasets import SUITES
from training.engine.environment import cores
from training.engine.flags import CommandLine
from training.errors import UsageError

if TYPE_CHECKING:
    from eval.embed import Forward


def add_data_flags(parser: CommandLine, title: str, required: bool) -> None:
    """Which data sets a model is evaluated on."""
    add, suites = parser.add_argument_group(title).add_argument, ", ".join(SUITES)
    add("--data-root", required=required, metavar="DIR", help="folder of the data sets")
    add("--datasets", nargs="+", required=required, help=f"their folders, or suites: {suites}")
    add("--split", default="test", help="split to evaluate")


def add_forward_flags(parser: CommandLine) -> None:
    """How models are run."""
    add = parser.add_argument_group("computation").add_argument
    precisions = ("fp32", "amp_bf16", "amp")
    add("--precision", choices=precisions, default="fp32", help="of the towers' forward pass")
    add("--batch-size", type=int, default=256, help="images or texts at once")
    add("--workers", type=int, default=min(4, cores()), help="processes that decode images")
    add("--device", help="cpu, cuda or cuda:N [a GPU where there is one]")


def forward_of(args: Namespace, local_rank: int = 0) -> "Forward":
    """How a command line runs models; of several GPUs on the one of this process.

    Raises:
        UsageError: there is no such device.
    """
    import torch

    from eval.embed import Forward

    if args.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {args.batch_size}")
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device '{name}': expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device '{name}': no GPU is to be seen here; use --device cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    return Forward(device, args.precision, args.batch_size, args.workers)
