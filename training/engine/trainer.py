"""A stage, its optimizer and its place in the data: one step at a time."""

import math
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from open_clip_train.precision import get_autocast
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cifd_clip import Features, Noise, World
from cifd_clip.noise import derive_seed
from cifd_clip.student import Pooled
from training.clip.stages import Stage
from training.data.loader import Batch
from training.engine.control import gathered
from training.engine.metrics import flatten
from training.engine.optim import MovingAverage, make_optimizer, make_schedule
from training.errors import NonFinite


@dataclass
class Progress:
    """Where a run is: all the loop's state besides the tensors."""

    step: int = 0
    samples: int = 0
    shards: int = 0  # consumed, where remote shards are streamed
    seconds: float = 0.0
    skipped: Counter = field(default_factory=Counter)
    nonfinite_steps: int = 0

    def state(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "skipped": dict(self.skipped)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Progress":
        """From `state`."""
        return cls(**{**state, "skipped": Counter(state["skipped"])})


class Trainer:
    """A stage, its optimizer and its place in the data.

    Args:
        args: the command line.
        stage: what trains.
        world, device: of this process.
        steps_per_epoch: optimizer steps in an epoch.
    """

    def __init__(
        self,
        args: Namespace,
        stage: Stage,
        world: World,
        device: torch.device,
        steps_per_epoch: int,
    ):
        self.args, self.stage, self.world, self.device = args, stage, world, device
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = steps_per_epoch * args.epochs
        self.progress = Progress()
        self.newly_skipped: Counter = Counter()  # on this rank, since the ranks last agreed
        self.parameters = [p for p in stage.task.parameters() if p.requires_grad]
        self.temperatures = [
            p
            for name, p in stage.task.named_parameters()
            if name.endswith("logit_scale") and p.requires_grad
        ]
        self.optimizer = make_optimizer(args, stage.task)
        self.schedule = make_schedule(args, self.optimizer, steps_per_epoch)
        self.average: MovingAverage | None = None
        if stage.average is not None:
            self.average = MovingAverage(stage.average, stage.task, args.ema)
        self.autocast = get_autocast(args.precision, device.type)
        scaled = args.precision == "amp"
        self.scaler = torch.amp.GradScaler(device.type) if scaled else None
        # With accumulation the gradient is complete only after the last micro-batch, and is
        # averaged over ranks once, by `_average_gradients`.
        self.overlap = world.size > 1 and args.accum_freq == 1
        self.model: nn.Module = stage.task
        if self.overlap:
            ids = [device.index] if device.type == "cuda" else None
            self.model = DistributedDataParallel(stage.task, device_ids=ids)
            # Buffers are rank 0's where they are read: in its checkpoints and in `validate`.
            # (Set here: the argument's name changes between versions of torch.)
            self.model.broadcast_buffers = False
        self.bad_streak = torch.zeros((), device=device)
        self.bad_total = torch.zeros((), device=device)
        self.bad_terms: Tensor | None = None
        self.terms: list[str] = []

    # -- state ---------------------------------------------------------------------------------

    def payload(self) -> dict[str, Any]:
        """Everything a checkpoint holds."""
        self.progress.nonfinite_steps = int(self.bad_total.item())
        if self.world.size == 1:  # several ranks agree when a line is due, all together
            self.agree_on_skipped()
        return {
            "epoch": self.progress.step // self.steps_per_epoch,
            "name": self.args.name,
            **self.stage.payload(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "progress": self.progress.state(),
        }

    def load(self, payload: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.stage.load(payload)
        self.optimizer.load_state_dict(payload["optimizer"])
        if self.scaler:
            self.scaler.load_state_dict(payload["scaler"])
        self.progress = Progress.of(payload["progress"])
        self.bad_total.fill_(self.progress.nonfinite_steps)

    # -- one step ------------------------------------------------------------------------------

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimizer step on this rank's rows of a global batch; nothing waits for the device.

        Returns:
            Losses and report of the batch, on the device.
        """
        lr = self.schedule(self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        noise = Noise(self.args.seed, self.progress.step, self.world.rank * len(batch))
        self.optimizer.zero_grad(set_to_none=True)
        if self.args.accum_freq == 1:
            losses, report = self._forward_backward(batch, noise)
        else:
            losses, report = self._accumulate(batch, noise)
        report["grad_norm"] = self._update(losses)
        if self.average is not None:
            self.average.update(self.progress.step)
        self.progress.step += 1
        self.progress.samples += len(batch) * self.world.size
        self.newly_skipped.update(batch.skipped)
        return {**losses, **report, "loss": sum(losses.values()).detach()}

    def _forward_backward(self, batch: Batch, noise: Noise):
        self._seed_dropout(0)
        with self.autocast():
            teachers = self.stage.assisted(self.stage.teachers(batch), noise)
            losses, report = self.model(*self.stage.student_inputs(batch), teachers, noise)
        self._backward(sum(losses.values()))
        return losses, report

    def _accumulate(self, batch: Batch, noise: Noise):
        """The whole batch's loss and gradient at a micro-batch's memory.

        The rows of W are computed without a graph, the losses once on all of them; each
        micro-batch is then run again and given its rows of the gradient (GradCache, Gao et al.
        2021). Contrastive terms, IBM noise and rates are those of the whole batch.
        """
        task, micro = self.stage.task, list(split(batch, self.args.accum_freq))
        with torch.no_grad(), self.autocast():
            teachers = [concatenate(f) for f in zip(*(self.stage.teachers(m) for m in micro))]
            teachers = self.stage.assisted(teachers, noise)
            parts = [self._encode(m, i) for i, m in enumerate(micro)]
        if parts[0] is None:
            losses, report = task.losses(None, teachers, noise)
            self._backward(sum(losses.values()))
        else:
            leaves = Pooled(*(torch.cat(w).requires_grad_() for w in zip(*parts)))
            losses, report = task.losses(leaves, teachers, noise)
            self._backward(sum(losses.values()))
            gradients = zip(*(w.grad.chunk(len(micro)) for w in leaves))
            for i, (m, rows) in enumerate(zip(micro, gradients)):
                with self.autocast():
                    pooled = self._encode(m, i)
                wanted = [(w, g) for w, g in zip(pooled, rows) if w.requires_grad]
                torch.autograd.backward(*zip(*wanted))
        if self.world.size > 1:
            self._average_gradients()
        return losses, report

    def _encode(self, batch: Batch, micro: int) -> Pooled | None:
        self._seed_dropout(micro)
        return self.stage.task.encode(*self.stage.student_inputs(batch))

    def _seed_dropout(self, micro: int) -> None:
        """Dropout and patch dropout read torch's global generators: make them functions too."""
        step, rank = self.progress.step, self.world.rank
        seed = derive_seed(self.args.seed, step, "dropout", rank, micro)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _backward(self, loss: Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def _average_gradients(self) -> None:
        gradients = [p.grad for p in self.parameters]
        for grad in gradients:
            grad.div_(self.world.size)
        flat = torch._utils._flatten_dense_tensors(gradients)
        dist.all_reduce(flat)
        whole = torch._utils._unflatten_dense_tensors(flat, gradients)
        torch._foreach_copy_(gradients, list(whole))

    def _update(self, losses: dict[str, Tensor]) -> Tensor:
        """Clip and update, unless the gradient is not finite; nothing waits for the device.

        The gradient's norm, unlike the loss, is the same on every rank, so all of them skip
        together. AdamW's fused kernel does the skipping, as it does for a GradScaler.
        """
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.args.grad_clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.args.grad_clip_norm, norm)
        bad = (~torch.isfinite(norm)).float()
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.grad_scale = None
            self.optimizer.found_inf = bad
            self.optimizer.step()
        self._clamp_temperatures()
        self._remember(bad, losses)
        return norm.detach()

    def _clamp_temperatures(self) -> None:
        with torch.no_grad():
            for logit_scale in self.temperatures:
                logit_scale.clamp_(0, math.log(100))  # as OpenCLIP

    def _remember(self, bad: Tensor, losses: dict[str, Tensor]) -> None:
        self.terms = list(losses)
        values = torch.stack([v.detach().float() for v in losses.values()])
        last = values if self.bad_terms is None else self.bad_terms
        self.bad_terms = torch.where(bad > 0, values, last)
        self.bad_streak = (self.bad_streak + 1) * bad
        self.bad_total = self.bad_total + bad

    def agree_on_skipped(self) -> None:
        """Add what every rank has skipped to the progress, which is the same on all of them."""
        for part in gathered(self.world, self.newly_skipped):
            self.progress.skipped.update(part)
        self.newly_skipped = Counter()

    def check_finite(self) -> None:
        """Raise `NonFinite` after too many bad steps in a row; reads the device."""
        # A GradScaler skips steps while it finds its scale, from 2¹⁶ down.
        patience = self.args.max_nonfinite_steps + (16 if self.scaler else 0)
        if self.bad_streak.item() < patience:
            return
        if self.world.size > 1:
            dist.all_reduce(self.bad_terms)  # another rank's term may be the cause
        named = [
            f"{term} = {value}"
            for term, value in zip(self.terms, self.bad_terms.tolist())
            if not math.isfinite(value)
        ]
        raise NonFinite(
            f"{int(self.bad_streak.item())} steps in a row had a non-finite gradient "
            f"({', '.join(named) or 'all losses are finite: the backward pass overflowed'}) at "
            f"step {self.progress.step}; they were skipped and the weights are intact. Lower --lr "
            "or set --grad-clip-norm"
        )

    # -- validation ----------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Mean losses of held-out data over all ranks' parts, without noise, of what ships."""
        task = self.stage.shipped.eval()
        if self.world.size > 1:
            for buffer in task.buffers():  # batch statistics: each rank has its own
                dist.broadcast(buffer, src=0)
        world, task.world = task.world, World()
        sums: dict[str, Tensor] = {}
        rows = torch.zeros((), device=self.device)
        for batch in batches:
            if not len(batch):  # none of its samples could be used
                continue
            batch = batch.to(self.device)
            with self.autocast():
                teachers = self.stage.assisted(self.stage.teachers(batch), None)
                losses, report = task(*self.stage.student_inputs(batch), teachers, None)
            for name, value in {**losses, **report}.items():
                sums[name] = sums.get(name, 0) + value.float() * len(batch)
            rows += len(batch)
        task.world = world
        self.stage.task.train()
        # As objects: a rank may have had no sample, and then knows no name either.
        parts = gathered(self.world, ({k: v.cpu() for k, v in sums.items()}, rows.cpu()))
        names = next((list(part) for part, _ in parts if part), [])
        total = sum(count for _, count in parts)
        means = {k: (sum(p[k] for p, _ in parts if p) / total).tolist() for k in names}
        return flatten(means, self.stage.rates)


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    """A batch as ``parts`` micro-batches of consecutive rows."""
    size = len(batch) // parts
    for i in range(parts):
        rows = slice(i * size, (i + 1) * size)
        yield Batch(
            images=[t[rows] for t in batch.images],
            texts=[t[rows] for t in batch.texts],
            rows=batch.rows[rows],
            views=batch.views[rows],
            keys=batch.keys[rows],
            extras={k: t[rows] for k, t in batch.extras.items()},
        )


def concatenate(parts: tuple[Features, ...]) -> Features:
    """One teacher's features of all micro-batches."""
    return parts[0]._replace(
        image=torch.cat([p.image for p in parts]), text=torch.cat([p.text for p in parts])
    )
