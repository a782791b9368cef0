"""The run directory: everything that is needed to understand a run and to go on with it."""

import importlib.metadata
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch

from training.errors import UsageError

log = logging.getLogger(__name__)

#: Flags that may differ between a run and its resumption: none of them changes what is computed.
FREE_TO_CHANGE = frozenset(
    "batch_size accum_freq workers worker_start resume logs log_every_n_steps report_to "
    "save_frequency save_every_n_steps save_every_n_minutes keep device dist_url dist_backend "
    "no_set_device_rank wandb_notes wandb_project_name cache_dir index_dir local_loss "
    "gather_with_grad val_frequency view_memory final".split()
)
#: What a run did that is older than a flag, where that is not the flag's default.
BEFORE = {"projector": "separate"}
PACKAGES = (
    "torch", "torchvision", "open_clip_torch", "webdataset", "timm", "transformers", "numpy",
    "clip-benchmark", "safetensors", "Pillow",
)  # fmt: skip


class RunDirectory:
    """One run's directory, opened by rank 0 or read by the others.

    Args:
        path: the directory.
        config: every flag, resolved, as JSON values.
        parser: of those flags. One that is younger than the run counts as its default, or as what
            was done before there was the flag (`BEFORE`).
        resume: whether an existing run is to be continued.

    Raises:
        UsageError: the run exists and is not to be resumed, or its configuration differs.
    """

    def __init__(self, path: Path, config: dict[str, Any], parser: ArgumentParser, resume: bool):
        self.path = path
        existing = path / "config.json"
        if existing.is_file():
            if not resume:
                raise UsageError(
                    f"{path} holds a run already: choose another --name, or continue it with "
                    "--resume latest"
                )
            before = json.loads(existing.read_text())
            younger = {k: parser.get_default(k) for k in config.keys() - before.keys()}
            younger |= {k: BEFORE[k] for k in younger.keys() & BEFORE.keys()}
            before |= json.loads(json.dumps(younger))
            _check_same(path, _comparable(path, before), _comparable(path, config))
        path.mkdir(parents=True, exist_ok=True)
        self.config = config

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints go."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the run has done all its steps."""
        return (self.path / "finished.json").is_file()

    def open(self) -> None:
        """Write config and environment and start logging to ``out.log`` (rank 0)."""
        self.write_json("config.json", self.config)
        environments = self.read_json("environment.json", [])
        self.write_json("environment.json", [*environments, environment()])
        handler = logging.FileHandler(self.path / "out.log")
        handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s"))
        logging.getLogger().addHandler(handler)

    def close(self) -> None:
        """Stop logging to ``out.log``."""
        root = logging.getLogger()
        for handler in [h for h in root.handlers if isinstance(h, logging.FileHandler)]:
            if Path(handler.baseFilename).parent == self.path.resolve():
                root.removeHandler(handler)
                handler.close()

    def read_json(self, name: str, default: Any = None) -> Any:
        """The content of one of its JSON files."""
        path = self.path / name
        return json.loads(path.read_text()) if path.is_file() else default

    def write_json(self, name: str, content: Any) -> None:
        """Write one of its JSON files; it appears whole or not at all."""
        temporary = self.path / f"{name}.tmp"
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        temporary.rename(self.path / name)


def resolved_config(args: Namespace, world_size: int) -> dict[str, Any]:
    """Every flag and the global batch it amounts to."""
    config = dict(vars(args))
    config["global_batch"] = args.batch_size * args.accum_freq * world_size
    return json.loads(json.dumps(config))


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def origin() -> dict[str, str | None]:
    """What makes this process's figures: its command and the checkout's commit."""
    command = shlex.join(["python", "-m", _entry_point(), *sys.argv[1:]])
    return {"command": command, "commit": _commit()}


def environment() -> dict[str, Any]:
    """Command, commit, versions and hardware of this process."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **origin(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "packages": {p: importlib.metadata.version(p) for p in PACKAGES},
        "host": platform.node(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
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


def _commit() -> str | None:
    """The checkout's commit, with ``-dirty`` when it has uncommitted changes."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _comparable(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration for comparison: a run's own bank is its own wherever the run lies.

    A method without RDMs has no rates, whatever an older version or a shared recipe wrote down.
    """
    method, bank = config.get("distill"), config.get("rdm_bank")
    if method not in (None, "rdm", "cifd"):
        return {**config, "rates": None}
    if method is None or not bank:  # of a classifier's bank --rates picks a part
        return config
    own = bank.endswith(f"{path.name}/rdm/bank")
    return {**config, "rdm_bank": "its own" if own else bank, "rates": "the bank's"}


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [
        f"--{key.replace('_', '-')} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted({*before, *now} - FREE_TO_CHANGE)
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise UsageError(
            f"{path} can't be resumed with another configuration: {'; '.join(changed)}. "
            "Use the old values, or another --name"
        )
