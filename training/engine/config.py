"""What every training run is told, whatever it trains: optimisation, run directory, processes.

Each field is a flag of both commands with one meaning (OpenCLIP's, where OpenCLIP has it). The
classes are narrow on purpose: a part of the engine takes the one it reads.
"""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from training.engine.flags import Given, check_ranges, flag
from training.errors import UsageError

MAX_NAME = 200  # a file's may have 255 bytes
FORMAT = 1  # of config.json and of every other JSON file of a run directory
SCHEDULERS = ("cosine", "const", "const-cooldown", "linear", "multistep")
PRECISIONS = ("fp32", "amp", "amp_bf16", "amp_bfloat16")


@dataclass(frozen=True)
class OptimConfig:
    """Steps, optimizer and learning rate."""

    batch_size: int = flag(64, "samples of each process and micro-batch", least=1, free=True)
    global_batch: int | None = flag(
        None,
        "samples per step over all processes; sets --batch-size to each one's share",
        least=1,
    )
    accum_freq: int = flag(
        1, "micro-batches per step; the loss is that of the whole batch", least=1, free=True
    )
    epochs: int = flag(32, "epochs in all", least=1)
    opt: str = flag("adamw", "the optimizer", choices=("adamw",))
    lr: float = flag(1e-3, "peak learning rate", above=0)
    beta1: float = flag(0.9, "of AdamW", least=0, below=1)
    beta2: float = flag(0.98, "of AdamW [0.98 for ViT, else 0.999]", least=0, below=1)
    eps: float = flag(1e-6, "of AdamW [1e-6 for ViT, else 1e-8]", above=0)
    wd: float = flag(0.2, "weight decay", least=0)
    density_lr: float = flag(10.0, "learning rate of the densities, in multiples of --lr", above=0)
    lr_scheduler: str = flag("cosine", "after warm-up", choices=SCHEDULERS)
    warmup: int | None = flag(None, "warm-up steps [1/6 of all]", least=0)
    warmup_epochs: float | None = flag(None, "warm-up in epochs instead of steps", least=0)
    epochs_cooldown: float | None = flag(None, "const-cooldown: epochs of cooling down", least=0)
    lr_cooldown_end: float = flag(0.0, "const-cooldown: last learning rate", least=0)
    lr_cooldown_power: float = flag(1.0, "const-cooldown: power of the decay", above=0)
    milestones: tuple[int, ...] = flag((150, 180, 210), "multistep: epochs", least=0)
    gamma: float = flag(0.1, "multistep: factor at each milestone", least=0)
    grad_clip_norm: float | None = flag(None, "clip the gradient's norm", above=0)
    ema: float | None = flag(
        None,
        "average the weights over steps, such as 0.9999: the average ships, is validated and is a "
        "checkpoint's state_dict; the weights that train lie beside it",
        metavar="DECAY",
        above=0,
        below=1,
    )
    max_nonfinite_steps: int = flag(
        5, "stop after this many steps in a row with a non-finite gradient", least=1
    )
    seed: int = flag(0, "of weights, order, noise and views")


@dataclass(frozen=True)
class RunConfig:
    """The run directory, its checkpoints and logs, and patience: nothing that changes a result."""

    logs: str = flag("./logs", "parent of the run directory")
    name: str = flag("", "the run directory's name [from method, model and seed]")
    resume: str | None = flag(
        None,
        "latest: go on from the newest intact checkpoint, if any; PATH: go back to this one of the "
        "run: later ones move to checkpoints/superseded",
        metavar="latest|PATH",
    )
    save_frequency: int = flag(1, "epochs between checkpoints", least=0)
    save_every_n_steps: int = flag(
        0, "steps between checkpoints; 0: by epochs and minutes", metavar="N", least=0
    )
    save_every_n_minutes: float = flag(30.0, "minutes between checkpoints", metavar="N", least=0)
    keep: int = flag(3, "newest checkpoints kept; 0: all", least=0)
    log_every_n_steps: int = flag(
        50, "steps between log lines; 0: at the ends of epochs", metavar="N", least=0
    )
    data_timeout: float = flag(
        600.0, "seconds to wait for a batch before giving up; 0: for ever", least=0
    )
    report_to: str = flag("", "more places for metrics", metavar="tensorboard,wandb")
    wandb_project_name: str = flag("open-clip", "as OpenCLIP")
    wandb_notes: str = flag("", "as OpenCLIP", lines=True)


@dataclass(frozen=True)
class ProcessConfig:
    """Processes, devices and precision."""

    device: str | None = flag(None, "cpu, cuda or cuda:N [a GPU where there is one]")
    precision: str = flag("fp32", "[amp_bf16 on a GPU, fp32 on a CPU]", choices=PRECISIONS)
    dist_url: str | None = flag(None, "where the processes meet [env://]")
    dist_backend: str | None = flag(None, "[nccl on GPUs, gloo on CPUs]")
    deterministic: bool = flag(
        False, "deterministic kernels on a GPU (slower), where torch has them", free=True
    )
    no_set_device_rank: bool = flag(False, "one GPU is visible per process")


def check_group() -> None:
    """Refuse an environment in which this process has no place among those launched together.

    Each would wait long for a process that never comes, or do the work of none.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "" if size != "1" else "0"))
    if not (size.isdecimal() and rank.isdecimal() and (int(rank) < int(size) or size == "1")):
        raise UsageError(
            f"WORLD_SIZE is '{size}' and RANK '{rank}' in the environment, which is no place among "
            "processes: launch with torchrun or srun, or unset both"
        )


def free_to_change(config: Any) -> set[str]:
    """Fields that may differ between a run and its resumption: they change nothing it computes."""
    whole = {f.name for cls in (RunConfig, ProcessConfig) for f in fields(cls)} - {"precision"}
    return whole | {f.name for f in fields(config) if f.metadata.get("free")}


def moved(config: Any, before: Mapping[str, Any]) -> set[str]:
    """Fields whose content a hash decides, where the run had them: they may name another place."""
    moves = {f.name for f in fields(config) if f.metadata.get("moves")}
    return {name for name in moves if bool(before.get(name)) == bool(getattr(config, name))}


def share_batch(given: Given, default: int, world_size: int) -> dict[str, int]:
    """``batch_size`` and ``global_batch`` that go together.

    Args:
        given: flags of a command line.
        default: of ``--batch-size``.
        world_size: number of processes.

    Raises:
        UsageError: the global batch can't be shared evenly.
    """
    accum_freq, whole = given.get("accum_freq", 1), given.get("global_batch")
    parts = world_size * max(accum_freq, 1)
    if whole is None:
        size = given.get("batch_size", default)
        return {"batch_size": size, "global_batch": size * parts}
    if whole < parts or whole % parts:
        raise UsageError(
            f"--global-batch {whole} can't be shared by {world_size} processes with --accum-freq "
            f"{accum_freq}: use a number of processes that divides it"
        )
    return {"batch_size": whole // parts, "global_batch": whole}


def default_precision(given: Given, device_type: str) -> str:
    """``--precision``, which hangs on the device where it is not given.

    Raises:
        UsageError: the device has no such precision.
    """
    precision = given.get("precision") or ("amp_bf16" if device_type == "cuda" else "fp32")
    if precision == "amp" and device_type != "cuda":
        raise UsageError("--precision amp (float16) needs a GPU; use amp_bf16 or fp32")
    return "amp_bf16" if precision == "amp_bfloat16" else precision


def check(config: Any) -> None:
    """What can be checked of any run's configuration without data and models.

    Args:
        config: an `OptimConfig` that is a `RunConfig` and a `ProcessConfig` too.

    Raises:
        UsageError: a value is out of range, or contradicts another.
    """
    check_ranges(config)
    if config.lr_scheduler == "const-cooldown" and config.epochs_cooldown is None:
        raise UsageError("--lr-scheduler const-cooldown needs --epochs-cooldown")
    if config.warmup is not None and config.warmup_epochs is not None:
        raise UsageError("--warmup and --warmup-epochs say the same in two ways: give one")
    if (config.warmup_epochs or 0) >= config.epochs:
        raise UsageError(
            f"--warmup-epochs {config.warmup_epochs:g} leaves nothing of --epochs {config.epochs}"
        )
    for sink in filter(None, config.report_to.split(",")):
        if sink not in ("tensorboard", "wandb"):
            raise UsageError(f"--report-to '{sink}': expected tensorboard, wandb or both")
        if importlib.util.find_spec(sink) is None:
            raise UsageError(f"--report-to {sink}: the package is missing: pip install {sink}")


def check_place(name: str, logs: str | Path) -> None:
    """Refuse a run directory or a study that is none, or lies elsewhere than in ``--logs``.

    Raises:
        UsageError: see above.
    """
    parts, folder = Path(name).parts, Path(logs).absolute()
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise UsageError(f"--name '{name}': expected the name of a folder in --logs")
    if any(len(os.fsencode(part)) > MAX_NAME for part in parts):
        raise UsageError(f"--name {name[:20]}...: longer than {MAX_NAME} bytes")
    if file := next((place for place in (folder, *folder.parents) if place.is_file()), None):
        raise UsageError(f"--logs {logs}: {file} is a file, expected a folder")


def record(config: Any) -> dict[str, Any]:
    """A configuration as flat JSON values, for ``config.json``; a method's options by name."""
    values = asdict(config)
    options: Mapping[str, Any] = values.pop("options", {})
    flat = {**values, **options}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in flat.items()}
