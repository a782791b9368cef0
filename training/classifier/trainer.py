"""A classifier's or its assistants' training: one step, the loop over steps, what is measured."""

import logging
import math
import time
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from cifd_clip import World
from cifd_clip.classification.methods import Report, TeacherOutput
from cifd_clip.entropy import FactorizedDensity
from cifd_clip.noise import Noise
from training.classifier.cifar import Batch, Batches, Table
from training.classifier.imagenet import PhotoBatches, PhotoTable
from training.classifier.teachers import EVALUATION_BATCH, CachedTeachers, LiveTeachers
from training.engine.checkpoint import Checkpoints
from training.engine.control import StopFlag
from training.engine.metrics import Meter, Sinks
from training.errors import NonFinite

log = logging.getLogger(__name__)
Source = LiveTeachers | CachedTeachers


class Trainer:
    """What trains, its optimizers, and one step of both.

    Densities learn under Adam whatever trains the rest: the weight of a rate term scales the
    density's gradient too, and under SGD a small λ_I would leave the density as it was drawn.

    Args:
        args: the command line.
        task: what trains.
        steps_per_epoch: of the data.
        world: this process's place among those that share a batch.
        device: where.
    """

    def __init__(
        self,
        args: Namespace,
        task: nn.Module,
        steps_per_epoch: int,
        world: World,
        device: torch.device,
    ):
        self.args, self.task, self.world, self.device = args, task, world, device
        self.model: nn.Module = task
        if world.size > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.model = DistributedDataParallel(task, device_ids=ids)
            # Buffers are rank 0's where they are read: in its checkpoints and in `evaluate`.
            # (Set here: the argument's name changes between versions of torch.)
            self.model.broadcast_buffers = False
        self.steps_per_epoch, self.total = steps_per_epoch, steps_per_epoch * args.epochs
        self.step_number, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        densities = [
            p for m in task.modules() if isinstance(m, FactorizedDensity) for p in m.parameters()
        ]
        known = {id(p) for p in densities}
        self.parameters = [p for p in task.parameters() if p.requires_grad and id(p) not in known]
        if args.opt == "sgd":
            main = torch.optim.SGD(
                self.parameters,
                lr=args.lr,
                momentum=args.momentum,
                weight_decay=args.wd,
                fused=True,
            )
        else:
            main = torch.optim.AdamW(self.parameters, lr=args.lr, weight_decay=args.wd, fused=True)
        self.optimizers: list[torch.optim.Optimizer] = [main]
        if densities:
            self.optimizers.append(torch.optim.Adam(densities, lr=args.density_lr, fused=True))
        self.peaks = [o.param_groups[0]["lr"] for o in self.optimizers]

    def step(self, batch: Batch, teachers: list[TeacherOutput]) -> Report:
        """One optimizer step; nothing waits for the device."""
        factor = schedule(self.args, self.step_number, self.steps_per_epoch)
        for optimizer, peak in zip(self.optimizers, self.peaks):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.zero_grad(set_to_none=True)
        first_row = self.world.rank * len(batch.labels)
        noise = Noise(self.args.seed, self.step_number, first_row)
        bf16 = self.args.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            losses, report = self.model(batch.images, batch.labels, teachers, noise)
        total = sum(losses.values())
        total.backward()
        if self.args.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.args.grad_clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step_number += 1
        return {**losses, **report, "loss": total}

    def payload(self) -> dict[str, Any]:
        """Everything a checkpoint holds."""
        return {
            "task": self.task.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step_number,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }

    def load(self, payload: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.task.load_state_dict(payload["task"])
        for optimizer, state in zip(self.optimizers, payload["optimizers"]):
            optimizer.load_state_dict(state)
        self.step_number = payload["step"]
        self.seconds, self.cpu_seconds = payload["seconds"], payload["cpu_seconds"]


def schedule(args: Namespace, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step as a share of its peak."""
    epoch = step / steps_per_epoch
    if epoch < args.warmup_epochs:
        return (epoch + 1 / steps_per_epoch) / args.warmup_epochs
    left = (args.epochs - epoch) / (args.epochs - args.warmup_epochs)
    if args.lr_schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    if args.lr_schedule == "linear":
        return left
    if args.lr_schedule == "multistep":
        return args.gamma ** sum(epoch >= m for m in args.milestones)
    return 1.0


def train(
    trainer: Trainer,
    batches: Batches | PhotoBatches,
    source: Source | None,
    validation: tuple[Table | PhotoTable, Tensor] | None,
    checkpoints: Checkpoints,
    sinks: Sinks | None,
    stop: StopFlag,
) -> bool:
    """Run a trainer to its last step, or until it is told to stop; a checkpoint each epoch.

    Args:
        trainer: what trains.
        batches: this process's share of each batch.
        source: its teachers.
        validation: held-out images, or None.
        checkpoints: where to save.
        sinks: where metrics go; None on all processes but the first, which alone writes.
        stop: whether to stop.

    Returns:
        Whether the results can be made; False after a stop, were it at the last step: the time
        that is left may be too short for them.
    """
    task, per_epoch, world = trainer.task, trainer.steps_per_epoch, trainer.world
    images = task.needs_images or (source is not None and source.needs_images)
    quiet = None if sinks is not None else True
    bar = tqdm(total=trainer.total, initial=trainer.step_number, unit="step", disable=quiet)
    before = (trainer.seconds, trainer.cpu_seconds)
    start = (time.monotonic(), time.process_time())
    stopped = False
    while trainer.step_number < trainer.total:
        task.train()
        meter, mark, first = Meter(), time.monotonic(), trainer.step_number
        for batch in batches.epoch(first // per_epoch, first % per_epoch, images):
            meter.add(trainer.step(batch, source(batch) if source else []))
            bar.update()
            if stop.agreed():
                break
        elapsed = time.monotonic() - mark
        values = _named(meter.read(world), trainer.args.rates)
        if not math.isfinite(values["loss"]):
            raise NonFinite(
                f"the loss became {values['loss']} ({values}); lower --lr, or set "
                "--grad-clip-norm or --warmup-epochs"
            )
        values["samples_per_s"] = (trainer.step_number - first) * batches.size / elapsed
        values["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        if sinks is not None:
            sinks.write("train", trainer.step_number, values)
        if validation is not None and trainer.step_number % per_epoch == 0:
            held_out = evaluate(task, *validation, source, world)
            held_out = _named(held_out, trainer.args.rates)
            if sinks is not None:
                sinks.write("val", trainer.step_number, held_out)
            values |= {f"held-out {k}": v for k, v in held_out.items()}
        trainer.seconds = before[0] + time.monotonic() - start[0]
        trainer.cpu_seconds = before[1] + time.process_time() - start[1]
        if sinks is not None:
            checkpoints.save(trainer.step_number, trainer.payload())
        shown = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
        log.info("epoch %.4g/%d | %s", trainer.step_number / per_epoch, trainer.args.epochs, shown)
        stop.agreed()  # whose answer is one question old: the next one knows of signals until here
        if stopped := stop.agreed():
            log.warning("%s: step %d is saved; stopping", stop.name, trainer.step_number)
            break
    bar.close()
    checkpoints.wait()
    return not stopped


@torch.no_grad()
def evaluate(
    task: nn.Module,
    table: Table | PhotoTable,
    rows: Tensor,
    source: Source | None,
    world: World,
) -> dict[str, float | list[float]]:
    """Means of the task's `measure` over some rows of a table, without noise or augmentation.

    Each process looks at its share of the rows, with the first one's batch statistics.
    """
    task.eval()
    if world.size > 1:
        for buffer in task.buffers():
            dist.broadcast(buffer, src=0)
    asks = not task.needs_images
    images = task.needs_images or source.needs_images
    meter: dict[str, Tensor] = {}
    # Few rows: the same for everybody, so that nobody is left without one.
    shared = len(rows) >= world.size
    mine = rows[world.rank :: world.size] if shared else rows
    for batch in table.in_order(mine, EVALUATION_BATCH, images):
        measured = task.measure(batch.images, batch.labels, source(batch) if asks else [])
        for name, value in measured.items():
            meter[name] = meter.get(name, 0) + value.sum(-1)
    if world.size > 1 and shared:
        for name in sorted(meter):
            dist.all_reduce(meter[name])
    return {name: (total / len(rows)).tolist() for name, total in meter.items()}


def _named(values: dict[str, float | list[float]], rates: list[float] | None) -> dict[str, float]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, list):
            flat |= {f"{name}/R={rate:g}": entry for rate, entry in zip(rates, value)}
        else:
            flat[name] = value
    return flat
