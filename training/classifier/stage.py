"""A classifier, its assistants or a paraphraser as the engine trains them."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cifd_clip import RDMBank, World
from cifd_clip.classification.methods import (
    Distillation,
    Paraphraser,
    RDMTraining,
    Targets,
    Weights,
)
from cifd_clip.classification.models import build
from cifd_clip.noise import derive_seed
from cifd_clip.rdm import unit_scale
from training.classifier.cifar import VIEWS, Batches, ImageBatch, Table, split_rows
from training.classifier.config import STAGE1, ClassifierOptim, Config
from training.classifier.imagenet import PhotoBatches, PhotoTable
from training.classifier.teachers import (
    EVALUATION_BATCH,
    TeacherNetworks,
    TeacherRun,
    TeacherTable,
    load_paraphraser,
    load_rdms,
)
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
        """In float32, whatever the precision of training: what others find of what ships."""
        with torch.autocast(batch.labels.device.type, enabled=False):
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

    def batches(
        self, start_step: int, stop_step: int, stopping=None, timeout=None
    ) -> Iterator[ImageBatch]:
        """This process's part of the batches of some steps."""
        per_epoch, step = self.epochs.per_epoch, start_step
        while step < stop_step and not (stopping and stopping()):
            epoch, first = divmod(step, per_epoch)
            yield from self.epochs.epoch(epoch, first, self.images, stopping, timeout)
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

    def __call__(self, stopping=None, timeout=None) -> Iterator[ImageBatch]:
        mine = self.rows[self.world.rank :: self.world.size]
        if not len(mine):  # fewer rows than processes
            return iter(())
        images = self.stage.needs_images
        return self.table.in_order(mine, EVALUATION_BATCH, images, stopping, timeout)


def assemble(
    config: Config, teachers: list[TeacherRun], table: Table | PhotoTable
) -> tuple[TeacherNetworks | None, Source | None, nn.Module]:
    """The teachers, live and as training reads them, and what trains."""
    device = table.labels.device
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "init"))
    live, source = _teachers(config, teachers, table)
    weights = Weights(
        ce=config.lambda_ce,
        kl=config.lambda_kl,
        embedding=config.lambda_emb,
        information=config.lambda_i,
        factor=config.lambda_ft,
        tau=config.tau,
        kd_dropout=config.kd_dropout,
        kd_drop=config.kd_drop,
        label_smoothing=config.label_smoothing,
        embedding_loss=config.embedding_loss,
    )
    task: nn.Module
    if config.method in STAGE1:
        width = teachers[0].model.width
        scale = unit_scale(_some_embeddings(source, table))
        if config.method == "paraphraser":
            task = Paraphraser(width, config.factors or width // 2, scale, generator)
        else:
            bank = RDMBank(
                teachers[0].identity,
                config.rates,
                width,
                config.rdm_hidden or None,
                classes=table.classes,
                form=config.rdm_form,
                scale=scale,
                generator=generator,
            )
            task = RDMTraining(bank, weights)
    else:
        student = build(config.model, table.classes, table.side, generator)
        paraphraser = None
        if config.method == "ft":
            paraphraser = load_paraphraser(Path(config.paraphraser), teachers[0], config.holdout)
        dims = live.dims if live else []
        task = Distillation(student, dims, weights, config.ibm, paraphraser, generator)
    _check_accumulation(config, task)
    return live, source, task.to(device, memory_format=torch.channels_last)


def _teachers(
    config: Config, teachers: list[TeacherRun], table: Table | PhotoTable
) -> tuple[TeacherNetworks | None, Source | None]:
    """The teachers with their assistants, live and as training reads them."""
    rdms = None
    selected: list[int] = []
    if config.rdm_bank:
        rdms = load_rdms(Path(config.rdm_bank), teachers[0], config.holdout)
        selected = [rdms.rates.index(rate) for rate in config.rates]
    if not teachers:
        return None, None
    teaching = teachers[-1:] if config.method == "takd" else teachers
    lambdas = list(config.lambda_n) * (len(selected) if len(config.lambda_n) == 1 else 1)
    embeddings = config.method in ("ft", "rdm", "paraphraser") or config.lambda_emb > 0
    live = TeacherNetworks([t.model for t in teaching], rdms, selected, lambdas, embeddings).to(
        table.labels.device, memory_format=torch.channels_last
    )
    if isinstance(table, Table) and VIEWS[config.augment]:
        hashes = [t.hash for t in teaching]
        folder = Path(config.teacher_cache) if config.teacher_cache else None
        return live, TeacherTable(live, table, config.augment, hashes, folder)
    if config.teacher_cache:
        raise UsageError(
            "--teacher-cache keeps what teachers say about each view, and there are too many "
            "views: expected CIFAR-100 with --augment none or flip"
        )
    return live, live


def _some_embeddings(source: Source, table: Table | PhotoTable) -> Tensor:
    """The first teacher's embeddings of the images, or of some hundred, which tell their scale."""
    if isinstance(source, TeacherTable):
        return source.embedding
    rows = torch.from_numpy(split_rows(len(table), min(EVALUATION_BATCH, len(table)))[1])
    return source(next(table.in_order(rows.to(table.labels.device), len(rows))))[0].embedding


def _check_accumulation(config: Config, task: nn.Module) -> None:
    """Refuse micro-batches of a model with batch normalisation."""
    norms = (m for m in task.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    if config.accum_freq > 1 and any(norms):
        raise UsageError(
            f"--accum-freq {config.accum_freq} with --model {config.model}: batch normalisation "
            "over micro-batches differs from the whole batch; use more processes, or a model "
            "without"
        )
