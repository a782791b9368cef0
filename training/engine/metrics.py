"""Metrics: averaged on the device, read when a line is due, written to every place."""

import json
import logging
import math
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cifd_clip import World
from cifd_clip.files import write_text
from training.engine.config import RunConfig

log = logging.getLogger(__name__)
T = TypeVar("T")


class Meter:
    """Running means of named tensors that stay on the device until they are read."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's values; nothing waits for the device."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def read(self, world: World) -> dict[str, float | list[float]]:
        """The means since the last reading, over all ranks (each must call)."""
        names = sorted(self._sums)
        flat = torch.cat([self._sums[name].reshape(-1) for name in names]) / self._count
        if world.size > 1:
            dist.all_reduce(flat)
            flat /= world.size
        means = flat.split([self._sums[name].numel() for name in names])
        shaped = {n: m.reshape(self._sums[n].shape).tolist() for n, m in zip(names, means)}
        self._sums, self._count = {}, 0
        return shaped


def flatten(values: Mapping[str, float | list[float]], rates: list[float]) -> dict[str, float]:
    """Spread per-rate lists: ``image/bits`` → ``image/R=1000/bits``, ``bits`` → ``bits/R=1000``.

    Adds the SNR of a CLIP bank's reconstructions, E‖X‖² / E‖X − X̂‖² in dB, with ‖X‖ = 1.
    """
    flat: dict[str, float] = {}
    for name, value in values.items():
        if not isinstance(value, list):
            flat[name] = value
            continue
        modality, _, quantity = name.rpartition("/")
        for rate, entry in zip(rates, value):
            where = f"{modality}/R={rate:g}/{quantity}" if modality else f"{name}/R={rate:g}"
            flat[where] = entry
            if modality and quantity == "distortion":
                snr = -10 * math.log10(entry) if entry > 0 else math.inf
                flat[f"{modality}/R={rate:g}/snr_db"] = snr
    return flat


class Sink(NamedTuple):
    """Another place for metrics."""

    log: Callable[[dict[str, float], int], None]
    close: Callable[[], None]


class MetricWriter:
    """``metrics.jsonl``, and TensorBoard and Weights & Biases where ``--report-to`` names them.

    Args:
        directory: the run directory.
        config: the run's flags.
        recorded: what W&B shows as the run's configuration.
        step: where the run starts or resumes; lines of later steps, which will be made again, go.
    """

    def __init__(
        self,
        directory: Path,
        config: RunConfig,
        recorded: dict[str, Any] | None = None,
        step: int = 0,
    ):
        path = directory / "metrics.jsonl"
        _forget_after(path, step)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115
        self._lock = threading.Lock()  # an evaluation beside the training writes too
        self._sinks: dict[str, Sink] = {}
        makers = {
            "tensorboard": partial(_tensorboard, directory, step),
            "wandb": partial(_wandb, directory, config, recorded),
        }
        for name, make in makers.items():
            if name in config.report_to and (sink := self._try(name, make)):
                self._sinks[name] = sink

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line: ``{"kind": kind, "step": step, **values}``; not a number becomes null."""
        line = {"kind": kind, "step": step, **{k: _finite(v) for k, v in values.items()}}
        scalars = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        named = {f"{kind}/{name}": value for name, value in scalars.items()}
        with self._lock:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            for name, sink in list(self._sinks.items()):
                self._try(name, partial(sink.log, named, step))

    def _try(self, name: str, act: Callable[[], T]) -> T | None:
        """Go on without a sink that fails: metrics.jsonl has everything."""
        try:
            return act()
        except Exception as error:  # of libraries, networks and disks
            log.warning("%s gets no more of this run's metrics: %s", name, error)
            self._sinks.pop(name, None)
        return None

    def sync(self) -> None:
        """Make the lines survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close every writer."""
        self.sync()
        self._file.close()
        for name, sink in list(self._sinks.items()):
            self._try(name, sink.close)


def _tensorboard(directory: Path, step: int) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def log_scalars(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Sink(log_scalars, writer.close)


def _wandb(directory: Path, config: RunConfig, recorded: dict[str, Any] | None) -> Sink:
    import wandb

    run = wandb.init(
        project=config.wandb_project_name,
        name=_wandb_name(directory),
        id=_wandb_id(directory),
        notes=config.wandb_notes,
        config=recorded,
        resume="allow",
        dir=str(directory),
    )
    # W&B's own step only grows, and an evaluation comes late: the curves are drawn over ours.
    run.define_metric("*", step_metric="step")
    return Sink(lambda values, step: run.log({**values, "step": step}), run.finish)


def _wandb_name(directory: Path) -> str:
    """The run's; of the bank that a student's run trains first, ``RUN/rdm``."""
    own_bank = directory.name == "rdm"
    return f"{directory.parent.name}/rdm" if own_bank else directory.name


def _wandb_id(directory: Path) -> str:
    """Made once and kept: one curve, whatever the number of jobs, and never another run's."""
    path = directory / "wandb_id"
    if not path.is_file():
        write_text(path, secrets.token_hex(8))
    return path.read_text()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _forget_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept, last = [], step
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            of = int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):  # cut short, or damaged
            continue
        last = max(last, of)
        if of <= step and line.endswith("\n"):
            kept.append(line)
    if last > step:
        log.warning(
            "steps %d to %d were logged, and there is no checkpoint of them: they are run again",
            *(step + 1, last),
        )
    write_text(path, "".join(kept))
