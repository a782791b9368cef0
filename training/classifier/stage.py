"""A classifier, its assistants or a paraphraser as the engine trains them."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from cifd_clip import World
from cifd_clip.classification.methods import Targets
from training.classifier.cifar import Batches, ImageBatch, Table
from training.classifier.config import ClassifierOptim
from training.classifier.imagenet import PhotoBatches, PhotoTable
from training.classifier.teachers import EVALUATION_BATCH, TeacherNetworks, TeacherTable
from training.engine.optim import density_parameters, with_adam_for_densities
from training.engine.stage import Stage
from training.errors import UsageError

Source = TeacherNetworks | TeacherTable


class ClassifierStage(Stage[ImageBatch]):
    """What trains, under its teachers.

    Args:
        task: what trains.
        source: its teachers; None without any.
        rates: R of the RDMs that train.
        ema: decay of the average of weights; None: no average.
    """

    def __init__(
        self,
        task: nn.Module,
        source: Source | None,
        rates: Iterable[float] = (),
        ema: float | None = None,
    ):
        self.task, self.source, self.rates = task, source, list(rates)
        if ema is not None:
            self.average = copy.deepcopy(task).requires_grad_(False).eval()

    @property
    def needs_images(self) -> bool:
        """Whether anyone looks at the images."""
        return self.task.needs_images or (self.source is not None and self.source.needs_images)

    def optimizers(self, config: ClassifierOptim) -> list[Optimizer]:
        return with_adam_for_densities(config, self.task, config.momentum)

    def clipped(self) -> list[nn.Parameter]:
        """All but the densities'."""
        densities = {id(p) for p in density_parameters(self.task)}
        return [p for p in super().clipped() if id(p) not in densities]

    def inputs(self, batch: ImageBatch) -> tuple[Tensor | None]:
        return (batch.images,)

    def targets(self, batch: ImageBatch) -> Targets:
        """The labels, and what teachers and assistants say."""
        return Targets(batch.labels, self.source(batch) if self.source else [])

    def concatenate(self, parts: list[Targets]) -> Targets:
        return Targets.concatenate(parts)

    def measure(self, batch: ImageBatch) -> dict[str, Tensor]:
        asks = not self.task.needs_images
        targets = self.targets(batch) if asks else Targets(batch.labels, [])
        values = self.shipped.measure(batch.images, targets)
        return {name: value.sum(-1) for name, value in values.items()}

    def payload(self) -> dict[str, Any]:
        """``task`` is what ships; with an average, what trains lies under ``training``."""
        content = {"task": self.shipped.state_dict()}
        if self.average is not None:
            content["training"] = self.task.state_dict()
        return content

    def load(self, payload: dict[str, Any]) -> None:
        self.shipped.load_state_dict(payload["task"])
        if self.average is not None:
            self.task.load_state_dict(payload["training"])


@dataclass
class EpochLoader:
    """Epochs of a table's batches as one stream; see `training.engine.loop.Loader`.

    Args:
        epochs: of the training images.
        images: whether anyone looks at them.
    """

    epochs: Batches | PhotoBatches
    images: bool

    def batches(self, start_step: int, stop_step: int) -> Iterator[ImageBatch]:
        """This process's part of the batches of some steps."""
        per_epoch, step = self.epochs.per_epoch, start_step
        while step < stop_step:
            epoch, first = divmod(step, per_epoch)
            yield from self.epochs.epoch(epoch, first, self.images)
            step += per_epoch - first


@dataclass
class Rows:
    """Some rows of a table, in order and without augmentation: this process's share of them.

    See `training.engine.loop.Validation`.
    """

    table: Table | PhotoTable
    rows: Tensor
    stage: ClassifierStage
    world: World
    every_epochs: int = 1

    def __call__(self) -> Iterator[ImageBatch]:
        mine = self.rows[self.world.rank :: self.world.size]
        return self.table.in_order(mine, EVALUATION_BATCH, self.stage.needs_images)


def check_accumulation(accum_freq: int, name: str, task: nn.Module) -> None:
    """Refuse micro-batches of a model with batch normalisation."""
    norms = (m for m in task.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    if accum_freq > 1 and any(norms):
        raise UsageError(
            f"--accum-freq {accum_freq} with --model {name}: batch normalisation over "
            "micro-batches differs from the whole batch; use more processes, or a model without"
        )
