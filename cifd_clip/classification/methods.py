"""What trains: a student under its teachers, the RDMs of a teacher, a paraphraser.

An assistant is a teacher: every student method takes a list of `TeacherOutput`, and differs only
in who is on the list and which terms have a weight.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifd_clip import artefact
from cifd_clip.bottleneck import InformationBottleneck
from cifd_clip.classification.losses import (
    EMBEDDING_LOSSES,
    factor_loss,
    kd_drop_mask,
    kd_dropout_mask,
    kl_per_sample,
)
from cifd_clip.classification.models import Classifier
from cifd_clip.noise import Noise
from cifd_clip.rdm import RDMBank, classifier_loss

PARAPHRASER_WEIGHTS = "paraphraser.safetensors"
Losses = dict[str, Tensor]
Report = dict[str, Tensor]


class TeacherOutput(NamedTuple):
    """What a teacher or an assistant says about a batch."""

    logits: Tensor
    """(B, classes)"""
    embedding: Tensor | None = None
    """(B, T), where the method reads it."""
    space: int = 0
    """Which embedding space it lives in; a reconstruction shares its teacher's."""
    weight: float = 1.0
    """λ_n of eq. (9)."""


class Targets(NamedTuple):
    """What a batch is taught: labels, and what the teacher and its assistants say."""

    labels: Tensor
    """(B,) class indices."""
    teachers: list[TeacherOutput]

    @classmethod
    def concatenate(cls, parts: "Sequence[Targets]") -> "Targets":
        """The targets of a batch from those of its micro-batches."""
        teachers = [
            outputs[0]._replace(
                logits=torch.cat([o.logits for o in outputs]),
                embedding=None
                if outputs[0].embedding is None
                else torch.cat([o.embedding for o in outputs]),
            )
            for outputs in zip(*(part.teachers for part in parts))
        ]
        return cls(torch.cat([part.labels for part in parts]), teachers)


class Embedded(NamedTuple):
    """W of a batch, (B, C): what the losses are computed from."""

    features: Tensor


class ClassifierTask(nn.Module):
    """What trains under the targets of a batch, in two halves as `cifd_clip.task.Task`.

    Attributes:
        needs_images: whether it looks at images, or at what teachers say of them alone.
    """

    needs_images = False

    def encode(self, images: Tensor | None) -> Embedded | None:
        """The half that handles each row by itself; nothing by default.

        Args:
            images: (B, 3, H, W).
        """

    def losses(
        self, embedded: Embedded | None, targets: Targets, noise: Noise | None
    ) -> tuple[Losses, Report]:
        """The half that compares with the targets: weighted losses (the total is their sum).

        Args:
            embedded: of the whole batch.
            targets: of the whole batch.
            noise: of this step; None for none.

        Returns:
            The losses, and scalars worth logging.
        """
        raise NotImplementedError

    def forward(
        self, images: Tensor | None, targets: Targets, noise: Noise | None
    ) -> tuple[Losses, Report]:
        """Both halves on one batch."""
        return self.losses(self.encode(images), targets, noise)

    def measure(self, images: Tensor | None, targets: Targets) -> Report:
        """Per-sample values (..., B) of what is evaluated, without noise."""
        raise NotImplementedError


@dataclass(frozen=True)
class Weights:
    """The weights of eq. (9) and their company."""

    ce: float = 1.0
    """λ_CE."""
    kl: float = 1.0
    """λ_KL, on the KL of the teacher and of every assistant."""
    embedding: float = 0.0
    """On the embedding terms, each a mean over elements."""
    information: float = 0.0
    """λ_I, on the mean rate per element of Ŵ, in nats."""
    factor: float = 0.0
    """Of factor transfer."""
    tau: float = 4.0
    """τ."""
    kd_dropout: float = 0.0
    """Probability of dropping a teacher's KL for a sample."""
    kd_drop: int = 0
    """How many teachers' KL a batch leaves out."""
    label_smoothing: float = 0.0
    """Of the cross-entropy."""
    embedding_loss: str = "mse"
    """A key of `EMBEDDING_LOSSES`."""


class Distillation(ClassifierTask):
    """A student under its teachers: eq. (9), of which KD, TAKD and DGKD are special cases.

    λ_CE·CE + λ_KL Σ_n λ_n·KL_n + λ_emb Σ_n λ_n‖Û − X_n‖² − λ_I log r(Ŵ)

    The sums run over the teacher (λ = 1) and its assistants. KD has one teacher and no embedding
    term; TAKD's one teacher is the last assistant; DGKD adds up teacher and assistants with KD
    dropout. With the IBM, logits and Û are those of the noisy Ŵ (Figure 8).

    Args:
        student: what is trained.
        dims: T of each embedding space, for the projectors; none without embedding terms.
        weights: of the terms.
        ibm: whether noise is added to W and its rate weighed.
        paraphraser: a teacher's frozen one, for factor transfer.
        generator: draws the initial weights of what trains besides the student.
    """

    needs_images = True

    def __init__(
        self,
        student: Classifier,
        dims: list[int],
        weights: Weights,
        ibm: bool = False,
        paraphraser: "Paraphraser | None" = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.student, self.weights = student, weights
        width = student.width
        self.projectors = nn.ModuleList()
        if weights.embedding:
            self.projectors.extend(_projector(width, dim, generator) for dim in dims)
        self.bottleneck = InformationBottleneck(width, generator) if ibm else None
        self.paraphraser = paraphraser
        if paraphraser is not None:
            self.translator = _mlp([width, paraphraser.factors, paraphraser.factors], generator)

    def encode(self, images: Tensor) -> Embedded:
        return Embedded(self.student.features(images))

    def losses(
        self, embedded: Embedded, targets: Targets, noise: Noise | None
    ) -> tuple[Losses, Report]:
        w, losses, report = self.weights, {}, {}
        (features,), (labels, teachers) = embedded, targets
        if self.bottleneck is not None and noise is not None:
            draws = noise.uniform("ibm", *features.shape, features.device)
            features, nats = self.bottleneck(features, draws)
            losses["rate_loss"] = w.information * nats.mean()
            report["bits"] = nats.detach().sum(-1).mean() / math.log(2)
        logits = self.student.classify(features).float()
        losses["ce_loss"] = w.ce * F.cross_entropy(
            logits, labels, label_smoothing=w.label_smoothing
        )
        if teachers and w.kl:
            kl = torch.stack([t.weight * kl_per_sample(t.logits, logits, w.tau) for t in teachers])
            masks = kd_dropout_mask(noise, kl, w.kd_dropout), kd_drop_mask(noise, kl, w.kd_drop)
            kl = math.prod((mask for mask in masks if mask is not None), start=kl)
            losses["kl_loss"] = w.kl * kl.sum(0).mean()
        if w.embedding:
            losses["embedding_loss"] = w.embedding * self._embedding_terms(features, teachers)
        if self.paraphraser is not None:
            factors = self.paraphraser.factors_of(teachers[0].embedding)
            losses["factor_loss"] = w.factor * factor_loss(factors, self.translator(features))
        report["acc1"] = (logits.detach().argmax(-1) == labels).float().mean()
        return losses, report

    def _embedding_terms(self, features: Tensor, teachers: list[TeacherOutput]) -> Tensor:
        projected = [projector(features).float() for projector in self.projectors]
        compare = EMBEDDING_LOSSES[self.weights.embedding_loss]
        return sum(t.weight * compare(projected[t.space], t.embedding) for t in teachers)

    def measure(self, images: Tensor, targets: Targets) -> Report:
        """(B,): whether the label is the first and among the first five."""
        return accuracy(self.student(images), targets.labels)


class RDMTraining(ClassifierTask):
    """Stage 1: all assistants of a teacher at once; they share no parameter.

    Args:
        bank: the assistants of a classifier.
        weights: λ_CE, λ_KL and τ of eq. (22), and the kind of embedding loss.
    """

    def __init__(self, bank: RDMBank, weights: Weights):
        super().__init__()
        self.bank, self.weights = bank, weights

    def losses(self, embedded: None, targets: Targets, noise: Noise) -> tuple[Losses, Report]:
        """Sums over assistants of eq. (22)'s terms."""
        w, (labels, (teacher,)) = self.weights, targets
        output = self.bank.image(
            teacher.embedding, self.bank.draws(noise, "image", teacher.embedding)
        )
        terms = classifier_loss(
            self.bank.image,
            output,
            teacher.embedding,
            teacher.logits,
            labels,
            lambda_ce=w.ce,
            lambda_kl=w.kl,
            tau=w.tau,
            smooth_l1=w.embedding_loss == "smooth_l1",
        )
        report = {
            "bits": output.nats.detach().mean(-1) / math.log(2),
            "acc1": (output.logits.detach().argmax(-1) == labels).float().mean(-1),
        }
        return {name: term.sum() for name, term in terms.items()}, report

    def measure(self, images: Tensor | None, targets: Targets) -> Report:
        """(K, B): accuracy, and bits with rounding."""
        output = self.bank.image(targets.teachers[0].embedding, None)
        return {**accuracy(output.logits, targets.labels), "bits": output.nats / math.log(2)}


class Paraphraser(ClassifierTask):
    """Factor transfer's auto-encoder (Kim et al. 2018) on a teacher's embedding.

    Args:
        dim: T, the teacher's embedding dimension.
        factors: F, width of the factors.
        scale: 1 / root mean square of the embedding.
        generator: draws the initial weights.
    """

    def __init__(
        self, dim: int, factors: int, scale: float, generator: torch.Generator | None = None
    ):
        super().__init__()
        self.dim, self.factors, self.scale = dim, factors, scale
        self.encoder = _mlp([dim, dim, factors], generator)
        self.decoder = _mlp([factors, dim, dim], generator)

    def factors_of(self, embeddings: Tensor) -> Tensor:
        """The factors (B, F) of teacher embeddings (B, T)."""
        return self.encoder(embeddings.float() * self.scale)

    def losses(
        self, embedded: None, targets: Targets, noise: Noise | None
    ) -> tuple[Losses, Report]:
        """The reconstruction loss of a batch, on embeddings of unit variance."""
        target = targets.teachers[0].embedding.float() * self.scale
        return {"distortion_loss": F.mse_loss(self.decoder(self.encoder(target)), target)}, {}

    def measure(self, images: Tensor | None, targets: Targets) -> Report:
        """The distortion (B,), on embeddings of unit variance."""
        target = targets.teachers[0].embedding.float() * self.scale
        reconstruction = self.decoder(self.encoder(target))
        return {"distortion": (reconstruction - target).square().mean(-1)}

    def save(self, folder: Path, teacher: dict[str, Any]) -> None:
        """Write ``config.json`` and ``paraphraser.safetensors``, see `cifd_clip.artefact`.

        Args:
            folder: where.
            teacher: identity of the teacher: ``model``, a name, and ``weights``, their hash.
        """
        shape = {"dim": self.dim, "factors": self.factors, "scale": self.scale}
        artefact.save(self, {"teacher": teacher, **shape}, folder, PARAPHRASER_WEIGHTS)

    @classmethod
    def load(cls, folder: Path, teacher: dict[str, Any]) -> "Paraphraser":
        """A frozen paraphraser.

        Raises:
            FileNotFoundError: there is none in the folder.
            BadFile: a file of it is damaged, or its weights are not finite.
            ValueError: it belongs to another teacher than ``teacher``.
        """
        checks = {
            "teacher": artefact.is_teacher,
            "dim": artefact.is_width,
            "factors": artefact.is_width,
            "scale": artefact.is_positive,
        }
        config = artefact.read_config(folder, "paraphraser", PARAPHRASER_WEIGHTS, checks)
        artefact.check_teacher(f"the paraphraser in {folder}", config.pop("teacher"), teacher)
        return artefact.load(lambda: cls(**config), folder / PARAPHRASER_WEIGHTS)


def accuracy(logits: Tensor, labels: Tensor) -> Report:
    """``acc1`` and ``acc5`` (..., B), zeros and ones, of logits (..., B, classes)."""
    hits = logits.topk(min(5, logits.shape[-1]), -1).indices == labels[:, None]
    return {"acc1": hits[..., 0].float(), "acc5": hits.any(-1).float()}


def _projector(width: int, dim: int, generator: torch.Generator | None) -> nn.Module:
    return nn.Identity() if width == dim else _linear(width, dim, 1.0, generator)


def _mlp(widths: list[int], generator: torch.Generator | None) -> nn.Sequential:
    first = _linear(widths[0], widths[1], math.sqrt(2), generator)
    return nn.Sequential(first, nn.LeakyReLU(0.1), _linear(widths[1], widths[2], 1.0, generator))


@torch.no_grad()
def _linear(fan_in: int, fan_out: int, gain: float, generator: torch.Generator | None) -> nn.Linear:
    linear = nn.Linear(fan_in, fan_out)
    linear.weight.normal_(std=gain / math.sqrt(fan_in), generator=generator)
    linear.bias.zero_()
    return linear
