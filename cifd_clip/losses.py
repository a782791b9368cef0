"""The losses as pure functions of features and logits.

Shapes: b rows of this rank, B rows of the global batch, D and T embedding dimensions.
All arithmetic is float32: the callers leave autocast before they come here.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from cifd_clip.artefact import MODALITIES

#: T of the teacher (ViT-B/16) for which CLIP-KD published its weights.
REFERENCE_DIM = 512


class Features(NamedTuple):
    """Unit-norm embeddings of a batch and the temperature they were trained with."""

    image: Tensor | None
    """(b, D) unit-norm; None of a teacher that embeds texts alone."""
    text: Tensor | None
    """(b, D) unit-norm; None of a teacher that embeds images alone."""
    logit_scale: Tensor | None
    """() the factor on cosine similarities, 1/τ, already exponentiated; None of a teacher that
    embeds one modality."""
    logit_bias: Tensor | None = None
    """() additive bias of SigLIP-type models."""
    space: int = 0
    """Which teacher's embedding space these live in; an assistant shares its teacher's, unless
    each of them gets a projector of its own."""
    teacher: int = 0
    """Its number among the teachers; an assistant has its teacher's."""
    weight: float = 1.0
    """λ_n of eq. (8) and (12): how much this teacher or assistant counts among the others."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those whose embeddings are there."""
        return tuple(m for m in MODALITIES if getattr(self, m) is not None)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Features":
        """The same features with other embeddings: a function of each that is there."""
        return self._replace(**{m: function(getattr(self, m)) for m in self.modalities})


class Logits(NamedTuple):
    """Scaled similarities of this rank's rows with the whole global batch."""

    image_to_text: Tensor
    """(b, B)"""
    text_to_image: Tensor
    """(b, B)"""


def contrastive_loss(logits: Logits, labels: Tensor) -> Tensor:
    """Eq. (10) and (11): L_CL = L_{I→L} + L_{L→I}, the *sum* of both directions.

    OpenCLIP's ``ClipLoss`` is their mean: half of this.
    """
    return F.cross_entropy(logits.image_to_text, labels) + F.cross_entropy(
        logits.text_to_image, labels
    )


def soft_contrastive_loss(student: Logits, teacher: Logits) -> Tensor:
    """Cross-entropy of the student's rows to the teacher's, the sum of both directions.

    Affinity mimicking (TinyCLIP, eq. 1); half of it is the distillation term of OpenCLIP's
    ``DistillClipLoss``. A teacher's bias cancels in the softmax.
    """
    return F.cross_entropy(
        student.image_to_text, teacher.image_to_text.softmax(-1)
    ) + F.cross_entropy(student.text_to_image, teacher.text_to_image.softmax(-1))


def relational_kl(student: Logits, teacher: Logits) -> Tensor:
    """KL(teacher ‖ student) of the rows' distributions, the mean of both directions.

    Contrastive relational distillation of CLIP-KD (its section 3.2, ``DistillKL`` at T = 1).
    """
    return 0.5 * sum(
        F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True)
        for s, t in zip(student, teacher)
    )


def sigmoid_loss(logits: Logits, labels: Tensor) -> Tensor:
    """SigLIP's loss (Zhai et al. 2023, eq. 1), the *sum* of both directions.

    Each pair of the global batch is a decision of its own. OpenCLIP's ``SigLipLoss`` is half of it.
    """
    return sum(F.softplus(x).sum(-1).mean() - x.gather(1, labels[:, None]).mean() for x in logits)


def soft_sigmoid_loss(student: Logits, teacher: Logits) -> Tensor:
    """`soft_contrastive_loss` of decisions: cross-entropy to the teacher's probability of each."""
    return sum((F.softplus(s) - t.sigmoid() * s).sum(-1).mean() for s, t in zip(student, teacher))


def sigmoid_kl(student: Logits, teacher: Logits) -> Tensor:
    """`relational_kl` of decisions: KL(teacher ‖ student) of pairs, the mean of both directions."""
    return 0.5 * (soft_sigmoid_loss(student, teacher) - soft_sigmoid_loss(teacher, teacher))


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """‖Û − X‖² of eq. (8) and (12) as a mean over elements and batch; see `element_weight`."""
    return F.mse_loss(student, teacher)


def element_weight(reduction: str, dim: int) -> float:
    """What multiplies a mean over ``dim`` elements to make another reduction of it.

    Args:
        reduction: ``mean``, as CLIP-KD has it, from which the paper takes its λ_CL; ``sum``, as
            eq. (12) is printed; ``relative``: as if there were `REFERENCE_DIM` elements
            (docs/paper.md, "One weight for every size").
        dim: T.
    """
    return {"mean": 1.0, "sum": float(dim), "relative": dim / REFERENCE_DIM}[reduction]
