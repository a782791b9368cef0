"""Who makes the figures: command, commit, versions and hardware of this process."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import cifd_clip
from training.masking import masked

ROOT = Path(__file__).resolve().parents[2]  # of the packages
DRIVER = Path("/proc/driver/nvidia/version")
PACKAGES = (
    "torch", "torchvision", "open_clip_torch", "webdataset", "timm", "transformers", "numpy",
    "clip-benchmark", "safetensors", "Pillow",
)  # fmt: skip


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def origin() -> dict[str, str | None]:
    """What makes this process's figures: its command and the checkout's commit."""
    command = shlex.join(["python", "-m", _entry_point(), *sys.argv[1:]])
    return {"command": masked(command), "commit": _commit()}


def versions(*packages: str) -> dict[str, str]:
    """Versions of this project and of packages that are installed."""
    ours = {"cifd_clip": cifd_clip.__version__}
    return ours | {name: importlib.metadata.version(name) for name in packages}


def environment() -> dict[str, Any]:
    """Command, commit, versions and hardware of this process."""
    import torch
    import torch.distributed as dist

    nccl = torch.cuda.nccl.version() if dist.is_nccl_available() else ()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **origin(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "packages": versions(*PACKAGES),
        "host": platform.node(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl)) or None,
        "driver": DRIVER.read_text().splitlines()[0] if DRIVER.is_file() else None,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _entry_point() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name


@cache
def _commit() -> str | None:
    """The checkout's commit, with ``-dirty`` when it has uncommitted changes, at the first look.

    None of an installed package: a repository around it, such as the user's own, is another's.
    """
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
