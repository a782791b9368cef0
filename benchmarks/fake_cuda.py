"""CUDA without a GPU: what torch asks of it before it computes on fake tensors."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifd_clip import Student, World
from training.clip.stages import ClipStage
from training.data.views import _statistics
from training.engine.config import OptimConfig
from training.engine.trainer import Trainer


def stub(folder: Path) -> dict[str, str] | None:
    """The environment in which a new process finds an idle H100; None where there can't be one.

    Fake tensors have shapes and a device but no data, so nothing is ever computed there. It takes
    a torch that was built with CUDA, and a C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if torch.version.cuda is None or compiler is None or not sys.platform.startswith("linux"):
        return None
    library, source = folder / "libcuda.so.1", Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-w", "-shared", "-fPIC", "-o", library, source], check=True)
    return {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(folder)}


def starts_kernel(function: Any) -> bool:
    """Whether an operation of torch's starts a kernel: all that are no views or allocations."""
    returns, name = function._schema.returns, function.__name__.partition(".")[0]
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    free = view or "empty" in name or name == "_unsafe_view"
    return function.namespace == "aten" and not free


def on_fake_cuda(stage: ClipStage, config: OptimConfig, precision: str) -> Trainer:
    """The trainer of a stage of the host's, under FakeTensorMode, whose models move to the device.

    Args:
        stage: its models may be on the meta device.
        config, precision: of the trainer.
    """
    device = torch.device("cuda")
    _statistics.cache_clear()  # another mode's

    def moved(tensor: Tensor) -> Tensor:
        size, stride = tensor.shape, tensor.stride()
        return torch.empty_strided(size, stride, dtype=tensor.dtype, device=device)

    teachers = [teacher.model for teacher in getattr(stage.source, "teachers", ())]
    frozen = [
        bank for bank in stage.banks.values() if bank is not getattr(stage.task, "bank", None)
    ]
    for module in filter(None, (*teachers, stage.task, stage.average, *frozen)):
        module._apply(moved)
    for task in filter(None, (stage.task, stage.average)):
        if hasattr(task, "student"):  # cut anew: the halves hold parameters
            task.student = Student(task.student.model, task.student.site)
    return Trainer(stage, config, 100, World(), device, precision)
