"""What methods share: the contract, the projectors to the teachers' spaces, the bottlenecks."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifd_clip.artefact import MODALITIES
from cifd_clip.bottleneck import InformationBottleneck
from cifd_clip.distributed import World
from cifd_clip.losses import (
    Features,
    Logits,
    contrastive_loss,
    relational_kl,
    sigmoid_kl,
    sigmoid_loss,
    soft_contrastive_loss,
    soft_sigmoid_loss,
)
from cifd_clip.methods.options import Declaration
from cifd_clip.noise import Noise
from cifd_clip.student import Pooled, Student, StudentEmbeddings

Losses = dict[str, Tensor]
Report = dict[str, Tensor]


class Projectors(nn.Module):
    """One linear map per teacher space, none where the dimensions agree.

    Shared, it serves both modalities: an image and a text that match the teacher's pair then match
    each other in the student's own space too, which is the one that ships. With a map for each
    modality the two may lie anywhere, and only a contrastive term brings them together
    (docs/paper.md, "One projector").

    Args:
        dim: D, the student's embedding dimension.
        teacher_dims: T of each teacher space.
        generator: draws the initial weights.
        shared: whether image and text embeddings go through one map.
        modalities: of each teacher space; both of all of them where it is not given.
    """

    def __init__(
        self,
        dim: int,
        teacher_dims: list[int],
        generator: torch.Generator | None,
        shared: bool = True,
        modalities: Sequence[Sequence[str]] | None = None,
    ):
        super().__init__()
        modalities = modalities or [MODALITIES] * len(teacher_dims)
        self.heads = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    # what no loss would reach is not made: DDP would wait for its gradient
                    _projector(dim, t if shared or name in there else dim, generator)
                    for t, there in zip(teacher_dims, modalities)
                )
                for name in (("both",) if shared else MODALITIES)
            }
        )

    def head(self, modality: str, space: int) -> nn.Module:
        """The map of a modality's embeddings to a teacher's space."""
        return self.heads["both" if "both" in self.heads else modality][space]

    def forward(
        self, student: StudentEmbeddings, teachers: list[Features]
    ) -> dict[int, dict[str, Tensor]]:
        """The student's unit-norm embeddings, (b, T), in each teacher's space, by modality."""
        return {
            space: {
                modality: F.normalize(
                    self.head(modality, space)(getattr(student, modality)), dim=-1
                )
                for modality in modalities
            }
            for space, modalities in {t.space: t.modalities for t in teachers}.items()
        }


def _projector(dim: int, teacher_dim: int, generator: torch.Generator | None) -> nn.Module:
    if dim == teacher_dim:
        return nn.Identity()
    linear = nn.Linear(dim, teacher_dim)
    with torch.no_grad():
        linear.weight.normal_(std=dim**-0.5, generator=generator)
        linear.bias.zero_()
    return linear


class Bottlenecks(nn.ModuleDict):
    """The Information Bottleneck Module of both towers (section 3.2).

    Args:
        widths: of W, by modality.
        generator: draws the initial weights.
    """

    def __init__(self, widths: dict[str, int], generator: torch.Generator | None):
        super().__init__(
            {name: InformationBottleneck(width, generator) for name, width in widths.items()}
        )

    def forward(self, pooled: Pooled, noise: Noise) -> tuple[Pooled, dict[str, Tensor]]:
        """Ŵ of both modalities, and each one's information (b, C), in nats."""
        noisy, nats = {}, {}
        for modality, clean in zip(Pooled._fields, pooled):
            draws = noise.uniform(f"ibm/{modality}", *clean.shape, clean.device)
            noisy[modality], nats[modality] = self[modality](clean, draws)
        return Pooled(**noisy), nats


class Embedded(NamedTuple):
    """The student's embeddings of a batch, and what its bottleneck costs."""

    compared: StudentEmbeddings
    """What is compared with the teachers: in training, after the bottleneck's noise."""
    contrastive: StudentEmbeddings
    """What the contrastive term reads: the same, or without noise (``ibm_branch``)."""
    losses: Losses
    """λ_I times the rate of each modality (eq. 12): a mean over elements, or their sum."""
    report: Report
    """The rates in bits."""


class Method(nn.Module):
    """A distillation method.

    A subclass names its declaration, which says what is built here: projectors to the teachers'
    spaces where it has the option ``projector``, bottlenecks where ``ibm`` is on.

    Args:
        student: the model it trains; only its dimensions are read here.
        teacher_dims: T of each teacher space.
        options: values of declared options; the others keep their defaults.
        generator: draws the initial weights of what the method trains.
        modalities: of each teacher space, where one has a single one.

    Raises:
        ValueError: an option that the method doesn't declare, or a value that is none of its
            choices.
    """

    declaration: Declaration

    def __init__(
        self,
        student: Student,
        teacher_dims: list[int],
        options: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        modalities: Sequence[Sequence[str]] | None = None,
    ):
        super().__init__()
        self.options = self.declaration.resolve(options or {})
        if projector := self.options.get("projector"):
            shared = projector != "separate"
            self.projectors = Projectors(student.dim, teacher_dims, generator, shared, modalities)
        has_ibm = self.options.get("ibm", False)
        self.bottlenecks = Bottlenecks(student.widths, generator) if has_ibm else None

    @property
    def uses_logit_scale(self) -> bool:
        """Whether the student's temperature gets a gradient."""
        return True

    def embed(self, student: Student, pooled: Pooled, noise: Noise | None) -> Embedded:
        """The student's embeddings, through the bottleneck if there is one and noise for it.

        Args:
            student: projects W to embeddings.
            pooled: W of this rank's rows.
            noise: of this step; None in evaluation.
        """
        noisy, losses, report = pooled, {}, {}
        if self.bottlenecks is not None and noise is not None:
            noisy, nats = self.bottlenecks(pooled, noise)
            summed = self.options["loss_reduction"] == "sum"
            for modality, rate in nats.items():
                weight = self.options["lambda_i"] * (rate.shape[-1] if summed else 1)
                losses[f"{modality}_rate_loss"] = weight * rate.mean()
                report[f"{modality}_bits"] = rate.detach().sum(-1).mean() / math.log(2)
        compared = contrastive = student.embed(noisy)
        if self.options.get("ibm_branch") == "distill" and noisy is not pooled:
            contrastive = student.embed(pooled)
        return Embedded(compared, contrastive, losses, report)

    @property
    def contrastive(self) -> Callable[[Logits, Tensor], Tensor]:
        """The contrastive loss of logits and labels, the sum of both directions."""
        return sigmoid_loss if self.options["siglip"] else contrastive_loss

    def mimicking(self, teacher: Features) -> Callable[[Logits, Logits], Tensor]:
        """Cross-entropy of the student's logits to this teacher's, the sum of both directions."""
        return soft_sigmoid_loss if self._decides(teacher) else soft_contrastive_loss

    def relational(self, teacher: Features) -> Callable[[Logits, Logits], Tensor]:
        """KL(teacher ‖ student) of logits, the mean of both directions."""
        return sigmoid_kl if self._decides(teacher) else relational_kl

    def _decides(self, teacher: Features) -> bool:
        """Whether student and teacher say of each pair by itself how likely it belongs together."""
        return self.options["siglip"] and teacher.logit_bias is not None

    def rescaled(self, teachers: list[Features]) -> list[Features]:
        """The teachers at the temperatures that ``distill_logit_scale`` gives, if it does.

        Assistants have their teacher's.
        """
        if not (scales := self.options["distill_logit_scale"]):
            return teachers
        return [
            teacher._replace(logit_scale=teacher.logit_scale.new_full((), scales[teacher.teacher]))
            for teacher in teachers
        ]

    def forward(
        self,
        student: Student,
        pooled: Pooled,
        teachers: list[Features],
        world: World,
        noise: Noise | None,
    ) -> tuple[Losses, Report]:
        """The losses of a batch.

        Args:
            student: projects W to embeddings.
            pooled: W of this rank's rows.
            teachers: every teacher's and assistant's features of the same rows.
            world: this rank's place in the global batch.
            noise: of this step; None in evaluation, where no noise is added.

        Returns:
            The weighted losses, each under a key ending in ``_loss`` (the total is their sum), and
            scalars worth logging.
        """
        raise NotImplementedError


def total_weight(teachers: list[Features]) -> float:
    """Σ λ_n over teachers and assistants: what a weighted mean of their terms is divided by."""
    return sum(teacher.weight for teacher in teachers)
