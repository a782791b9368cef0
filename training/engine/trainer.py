"""A stage, its optimizers and its place in the data: one step at a time."""

import logging
import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from open_clip_train.precision import get_autocast
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cifd_clip import Noise, World
from cifd_clip.noise import derive_seed
from training.engine.config import OptimConfig
from training.engine.control import all_gather_object
from training.engine.metrics import flatten
from training.engine.optim import MovingAverage, make_schedule
from training.engine.stage import Batch, Losses, Report, Stage
from training.errors import Failure, NonFinite

log = logging.getLogger(__name__)

#: Steps after which is looked whether one was skipped: by then the device has long counted it.
LOOK_BACK = 4
#: Largest share of steps that may be skipped.
MAX_NONFINITE_SHARE = 0.1
#: Steps that a GradScaler may skip while it finds its scale, from 2¹⁶ down.
SCALER_PATIENCE = 16


@dataclass
class Progress:
    """Where a run is: all the loop's state besides the tensors.

    Attributes:
        step: optimizer steps taken.
        samples: consumed by all ranks.
        shards: consumed, where remote shards are streamed.
        seconds, cpu_seconds: of wall time, and of this process's processor time.
        skipped: samples that could not be used, by reason.
        nonfinite_steps: skipped because the gradient was not finite.
    """

    step: int = 0
    samples: int = 0
    shards: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    skipped: Counter = field(default_factory=Counter)
    nonfinite_steps: int = 0

    def state(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "skipped": dict(self.skipped)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Progress":
        """From `state`."""
        return cls(**{**state, "skipped": Counter(state["skipped"])})


def _emulates_bfloat16() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


class Trainer:
    """A stage, its optimizers and its place in the data.

    Args:
        stage: what trains.
        config: how.
        steps_per_epoch: optimizer steps in an epoch.
        world, device: of this process.
        precision: ``fp32``, ``amp`` (float16 with a scaler) or ``amp_bf16``.
        name: of the run, for its checkpoints.
    """

    def __init__(
        self,
        stage: Stage,
        config: OptimConfig,
        steps_per_epoch: int,
        world: World | None = None,
        device: torch.device | None = None,
        precision: str = "fp32",
        name: str = "",
    ):
        self.stage, self.config, self.name = stage, config, name
        self.world, self.device = world or World(), device or torch.device("cpu")
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = steps_per_epoch * config.epochs
        self.progress = Progress()
        self.newly_skipped: Counter = Counter()  # on this rank, since the ranks last agreed
        self.parameters = [p for p in stage.task.parameters() if p.requires_grad]
        self.clipped = stage.clipped()
        among_clipped = {id(p) for p in self.clipped}
        self.unclipped = [p for p in self.parameters if id(p) not in among_clipped]
        self.temperatures = [
            p
            for name, p in stage.task.named_parameters()
            if name.endswith("logit_scale") and p.requires_grad
        ]
        self.optimizers = stage.optimizers(config)
        self.schedule = make_schedule(config, self.optimizers[0], steps_per_epoch)
        self.average: MovingAverage | None = None
        if stage.average is not None:
            self.average = MovingAverage(stage.average, stage.task, config.ema)
        self.autocast = get_autocast(precision, self.device.type)
        if precision == "amp_bf16" and self.device.type == "cpu" and _emulates_bfloat16():
            log.warning(
                "--precision amp_bf16: this processor has no instructions for bfloat16, and a step "
                "may take ten times as long as with fp32"
            )
        self.scaler = torch.amp.GradScaler(self.device.type) if precision == "amp" else None
        # With accumulation the gradient is complete only after the last micro-batch, and is
        # averaged over ranks once, by `_average_gradients`.
        self.model: nn.Module = stage.task
        if self.world.size > 1 and config.accum_freq == 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.model = DistributedDataParallel(
                stage.task, device_ids=ids, gradient_as_bucket_view=True
            )
            # Buffers are rank 0's where they are read: in its checkpoints and in `validate`.
            # (Set here: the argument's name changes between versions of torch.)
            self.model.broadcast_buffers = False
        self.bad_streak = torch.zeros((), device=self.device)
        self.bad_total = torch.zeros((), device=self.device)
        self.bad_counts: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self.bad_terms: Tensor | None = None
        self.terms: list[str] = []

    # -- state ---------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Whole epochs trained."""
        return self.progress.step // self.steps_per_epoch

    def payload(self) -> dict[str, Any]:
        """Everything a checkpoint holds."""
        self.progress.nonfinite_steps = int(self.bad_total.item())
        return {
            "epoch": self.epoch,
            "name": self.name,
            **self.stage.payload(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "progress": self.progress.state(),
        }

    def load(self, payload: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.stage.load(payload)
        for optimizer, state in zip(self.optimizers, payload["optimizers"], strict=True):
            optimizer.load_state_dict(state)
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
        # The learning rate of this step, and its noise.
        lr = self.schedule(self.progress.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            optimizer.zero_grad(set_to_none=True)
        noise = Noise(self.config.seed, self.progress.step, self.world.rank * len(batch))
        # Losses and gradients of the whole batch.
        try:
            losses, report = self.gradients(batch, noise)
        except torch.OutOfMemoryError as error:
            rows, reason = len(batch) // self.config.accum_freq, str(error).partition(". ")[0]
            raise Failure(
                f"the GPU's memory is too small for {rows} rows at a time: --accum-freq 4 takes a "
                "quarter of them at a time for the same loss (a step takes about 1.2 times as "
                "long), --grad-checkpointing keeps about a sixth of the towers' activations (about "
                f"1.1 times as long); {reason}"
            ) from error
        # The update, and the average of weights.
        report["grad_norm"] = self._update(losses)
        if self.average is not None:
            self.average.update(self.progress.step)
        # The place in the data.
        self.progress.step += 1
        self.progress.samples += len(batch) * self.world.size
        self.newly_skipped.update(batch.skipped)
        return {**losses, **report, "loss": sum(losses.values()).detach()}

    def gradients(self, batch: Batch, noise: Noise) -> tuple[Losses, Report]:
        """Losses and report of a batch, whose gradient is left at the parameters."""
        if self.config.accum_freq > 1:
            return self._accumulate(batch, noise)
        self._seed_dropout(0)
        with self.autocast():
            targets = self.stage.with_assistants(self.stage.targets(batch), noise)
            losses, report = self.model(*self.stage.inputs(batch), targets, noise)
        self._backward(losses)
        return losses, report

    def _accumulate(self, batch: Batch, noise: Noise) -> tuple[Losses, Report]:
        """The whole batch's loss and gradient at a micro-batch's memory.

        The encoded rows are computed without a graph, the losses once on all of them; each
        micro-batch is then run again and given its rows of the gradient (GradCache, Gao et al.
        2021). Contrastive terms, IBM noise and rates are those of the whole batch.
        """
        stage, micro = self.stage, batch.split(self.config.accum_freq)
        # All rows without a graph.
        with torch.no_grad(), self.autocast():
            targets = stage.concatenate([stage.targets(m) for m in micro])
            targets = stage.with_assistants(targets, noise)
            parts = [self._encode(m, i) for i, m in enumerate(micro)]
        # The losses, down to the rows.
        rows = parts[0] and type(parts[0])(*(torch.cat(w).requires_grad_() for w in zip(*parts)))
        losses, report = stage.task.losses(rows, targets, noise)
        self._backward(losses)
        # From the rows down, micro-batch by micro-batch.
        if rows:
            gradients = zip(*(w.grad.chunk(len(micro)) for w in rows))
            for i, (m, of_rows) in enumerate(zip(micro, gradients)):
                with self.autocast():
                    encoded = self._encode(m, i)
                wanted = [(w, g) for w, g in zip(encoded, of_rows) if w.requires_grad]
                torch.autograd.backward(*zip(*wanted))
        if self.world.size > 1:
            self._average_gradients()
        return losses, report

    def _encode(self, batch: Batch, micro: int) -> tuple[Tensor, ...] | None:
        self._seed_dropout(micro)
        return self.stage.task.encode(*self.stage.inputs(batch))

    def _seed_dropout(self, micro: int) -> None:
        """Dropout and patch dropout read torch's global generators: make them functions too."""
        step, rank = self.progress.step, self.world.rank
        seed = derive_seed(self.config.seed, step, "dropout", rank, micro)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _backward(self, losses: Losses) -> None:
        loss = sum(losses.values())
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def _average_gradients(self) -> None:
        gradients = [p.grad for p in self.parameters]
        for grad in gradients:
            grad.div_(self.world.size)
        flat = torch._utils._flatten_dense_tensors(gradients)
        dist.all_reduce(flat)
        whole = torch._utils._unflatten_dense_tensors(flat, gradients)
        torch._foreach_copy_(gradients, list(whole))

    def _update(self, losses: Losses) -> Tensor:
        """Clip and update, unless the gradient is not finite; nothing waits for the device.

        The gradient's norm, unlike the loss, is the same on every rank, so all of them skip
        together. The optimizers' fused kernels do the skipping, as they do for a GradScaler.

        Returns:
            The norm of the clipped parameters' gradient, before clipping.
        """
        if self.scaler:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        norm = _gradient_norm(self.clipped)
        if self.config.grad_clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.clipped, self.config.grad_clip_norm, norm)
        finite = torch.isfinite(norm)
        if self.unclipped:
            finite = finite & torch.isfinite(_gradient_norm(self.unclipped))
        bad = (~finite).float()
        for optimizer in self.optimizers:
            if self.scaler:
                self.scaler.step(optimizer)
            else:
                optimizer.grad_scale, optimizer.found_inf = None, bad
                optimizer.step()
        if self.scaler:
            self.scaler.update()
        self._clamp_temperatures()
        self._remember(bad, losses)
        return norm.detach()

    def _clamp_temperatures(self) -> None:
        with torch.no_grad():
            for logit_scale in self.temperatures:
                logit_scale.clamp_(0, math.log(100))  # as OpenCLIP

    def _remember(self, bad: Tensor, losses: Losses) -> None:
        self.terms = list(losses)
        values = torch.stack([v.detach().float() for v in losses.values()])
        last = values if self.bad_terms is None else self.bad_terms
        self.bad_terms = torch.where(bad > 0, values, last)
        self.bad_streak = (self.bad_streak + 1) * bad
        self.bad_total = self.bad_total + bad
        # On the host some time later, without waiting for the device.
        counts, event = torch.stack([self.bad_streak, self.bad_total]), None
        if counts.is_cuda:
            event = torch.cuda.Event()
            counts = torch.empty(2, pin_memory=True).copy_(counts, non_blocking=True)
            event.record()
        self.bad_counts.append((self.progress.step + 1, counts, event))

    def agree_on_skipped(self) -> None:
        """Add what every rank has skipped to the progress, which is the same on all of them."""
        self.newly_skipped.update(self.stage.bad_samples())
        for part in all_gather_object(self.world, self.newly_skipped):
            self.progress.skipped.update(part)
        self.newly_skipped = Counter()

    def check_finite(self, look_back: int = 0) -> None:
        """Raise `NonFinite` after too many bad steps, in a row or of all.

        Args:
            look_back: newest steps to leave for later; 0 waits for the device.
        """
        while len(self.bad_counts) > look_back:
            step, counts, event = self.bad_counts.popleft()
            if event is not None:
                event.synchronize()
            self._check_counts(step, *map(int, counts.tolist()))

    def _check_counts(self, step: int, streak: int, total: int) -> None:
        patience = self.config.max_nonfinite_steps + (SCALER_PATIENCE if self.scaler else 0)
        most = max(patience, MAX_NONFINITE_SHARE * step)
        if step == self.total_steps:  # a run of few steps may end sooner
            most = min(most, step // 2)
        if streak < patience and total <= most:
            return
        if self.world.size > 1:
            dist.all_reduce(self.bad_terms)  # another rank's term may be the cause
        named = [
            f"{term} = {value}"
            for term, value in zip(self.terms, self.bad_terms.tolist())
            if not math.isfinite(value)
        ]
        how = f"{streak} steps in a row" if streak >= patience else f"{total} of {step} steps"
        raise NonFinite(
            f"{how} had a non-finite gradient "
            f"({', '.join(named) or 'all losses are finite: the backward pass overflowed'}) at "
            f"step {step}; they were skipped and the weights are intact. Lower --lr "
            "or set --grad-clip-norm"
        )

    # -- validation ----------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, float | list[float]]:
        """Means over the rows of held-out batches of all ranks, without noise, of what ships."""
        shipped = self.stage.shipped.eval()
        if self.world.size > 1:
            for buffer in shipped.buffers():  # batch statistics: each rank has its own
                dist.broadcast(buffer, src=0)
        sums: dict[str, Tensor] = {}
        rows = torch.zeros((), device=self.device)
        for batch in batches:
            if not len(batch):  # none of its samples could be used
                continue
            with self.autocast():
                values = self.stage.measure(batch.to(self.device))
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value
            rows += len(batch)
        self.stage.task.train()
        # As objects: a rank may have had no sample, and then knows no name either.
        own = {name: value.cpu() for name, value in sums.items()}, rows.cpu()
        parts = all_gather_object(self.world, own)
        names = next((list(part) for part, _ in parts if part), [])
        total = sum(count for _, count in parts)
        return {k: (sum(p[k] for p, _ in parts if p) / total).tolist() for k in names}

    def flat(self, values: dict[str, float | list[float]]) -> dict[str, float]:
        """Values by name, those of RDMs spread over their rates."""
        return flatten(values, self.stage.rates)


def _gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
