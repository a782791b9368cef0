"""What the engine asks of a stage: what trains, on what, and what it leaves behind."""

from collections import Counter
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from cifd_clip import Noise
from training.engine.config import OptimConfig

Losses = dict[str, Tensor]
Report = dict[str, Tensor]


class Batch(Protocol):
    """One rank's rows of a global batch."""

    skipped: dict[str, int]
    """Samples that could not be used and were replaced, by reason."""

    def __len__(self) -> int: ...

    def to(self, device) -> "Batch":
        """A copy on a device."""

    def split(self, parts: int) -> list["Batch"]:
        """Micro-batches of consecutive rows."""


B = TypeVar("B", bound=Batch)


class Stage(Generic[B]):
    """What trains, and what it learns from.

    A step is ``task(*inputs, targets, noise)``. A task has two halves, so that gradients can be
    accumulated over micro-batches: ``task.encode(*inputs)`` row by row, and ``task.losses(encoded,
    targets, noise)`` once on the whole batch.

    Attributes:
        task: the one trainable module.
        average: a copy of it that holds the moving average of its weights (``--ema``), or None.
        rates: R of each RDM that trains here.
    """

    task: nn.Module
    average: nn.Module | None = None
    rates: list[float] = []

    @property
    def shipped(self) -> nn.Module:
        """What is validated and shipped: the task, or the average of its weights."""
        return self.task if self.average is None else self.average

    def optimizers(self, config: OptimConfig) -> list[Optimizer]:
        """The optimizers; each group's ``lr_scale`` is its share of the learning rate."""
        raise NotImplementedError

    def clipped(self) -> list[nn.Parameter]:
        """The parameters whose gradient's norm ``--grad-clip-norm`` bounds: all that train."""
        return [p for p in self.task.parameters() if p.requires_grad]

    def inputs(self, batch: B) -> tuple:
        """The arguments of ``task.encode``."""
        raise NotImplementedError

    def targets(self, batch: B) -> Any:
        """What the teachers say of a batch or micro-batch."""
        raise NotImplementedError

    def bad_samples(self) -> Counter[str]:
        """Samples that `targets` had to replace since this was last called; reads the device."""
        return Counter()

    def concatenate(self, parts: list[Any]) -> Any:
        """The targets of a batch from those of its micro-batches."""
        raise NotImplementedError

    def with_assistants(self, targets: Any, noise: Noise | None) -> Any:
        """The targets of a whole batch, its assistants' among them."""
        return targets

    def measure(self, batch: B) -> dict[str, Tensor]:
        """Sums over a held-out batch's rows of what is logged, of what ships, without noise."""
        raise NotImplementedError

    def payload(self) -> dict[str, Any]:
        """The stage's part of a checkpoint."""
        raise NotImplementedError

    def load(self, payload: dict[str, Any]) -> None:
        """Take `payload` back."""
        raise NotImplementedError
