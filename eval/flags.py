"""What the command lines of evaluation share; nothing here imports torch before it is needed."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from eval.datasets import SUITES
from training.engine.environment import cores
from training.engine.flags import flag
from training.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DataConfig:
    """Which data sets a model is evaluated on."""

    data_root: str = flag("", "folder of the data sets", metavar="DIR")
    datasets: tuple[str, ...] = flag((), f"their folders, or suites: {', '.join(SUITES)}")
    split: str = flag("test", "split to evaluate")

    def check(self) -> None:
        """Refuse a command line that does not say what to evaluate on."""
        if not (self.data_root and self.datasets):
            raise UsageError("--data-root DIR and --datasets NAME are needed: what to evaluate on")


@dataclass(frozen=True)
class ForwardConfig:
    """How models are run."""

    precision: str = flag(
        "fp32", "of the towers' forward pass", choices=("fp32", "amp_bf16", "amp")
    )
    batch_size: int = flag(256, "images or texts at once", least=1)
    workers: int = flag(min(4, cores()), "processes that decode images", least=0)
    device: str | None = flag(None, "cpu, cuda or cuda:N [a GPU where there is one]")


def find_device(name: str | None, local_rank: int = 0) -> "torch.device":
    """The device of ``--device``; of several GPUs the one of this process.

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
