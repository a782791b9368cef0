"""The losses as pure functions, and the gather that contrastive ones need across ranks.

Shapes: b rows of this rank, B rows of the global batch, D and T embedding dimensions.
All arithmetic is float32: the callers leave autocast before they come here.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Features(NamedTuple):
    """Unit-norm embeddings of a batch and the temperature they were trained with."""

    image: Tensor
    """(b, D) unit-norm."""
    text: Tensor
    """(b, D) unit-norm."""
    logit_scale: Tensor
    """() the factor on cosine similarities, 1/τ, already exponentiated."""
    logit_bias: Tensor | None = None
    """() additive bias of SigLIP-type models."""
    space: int = 0
    """Which teacher's embedding space these live in; an assistant shares its teacher's, unless
    each of them gets a projector of its own."""
    weight: float = 1.0
    """λ_n of eq. (8) and (12): the weight of this teacher's embedding terms."""


class Logits(NamedTuple):
    """Scaled similarities of this rank's rows with the whole global batch."""

    image_to_text: Tensor
    """(b, B)"""
    text_to_image: Tensor
    """(b, B)"""


@dataclass(frozen=True)
class World:
    """This process's place among those that share a global batch.

    Contrastive terms compare local rows with gathered columns and send gradients back through
    the gather (OpenCLIP's ``--local-loss --gather-with-grad``): the mean over ranks of the
    gradients is then the gradient of the whole batch.
    """

    rank: int = 0
    size: int = 1

    def gather(self, rows: Tensor) -> Tensor:
        """(b, D) of every rank, concatenated in rank order: (B, D)."""
        if self.size == 1:
            return rows
        return _Gather.apply(rows, self.rank, self.size)

    def columns(self, features: Features) -> Features:
        """The same features with the rows of every rank."""
        return features._replace(image=self.gather(features.image), text=self.gather(features.text))

    def logits(self, features: Features, columns: Features | None = None) -> Logits:
        """Similarities of the local rows with the global batch, scaled and biased.

        Args:
            features: the rows, their scale and bias.
            columns: what they are compared with, gathered; by default the features' own.
        """
        columns = self.columns(features) if columns is None else columns
        bias = 0.0 if features.logit_bias is None else features.logit_bias
        return Logits(
            features.logit_scale * features.image @ columns.text.t() + bias,
            features.logit_scale * features.text @ columns.image.t() + bias,
        )

    def labels(self, logits: Logits) -> Tensor:
        """(b,) column of each local row's own pair."""
        rows = len(logits.image_to_text)
        device = logits.image_to_text.device
        return torch.arange(rows, device=device) + rows * self.rank


class _Gather(torch.autograd.Function):
    """All ranks' rows; backward gives each rank the sum of all ranks' gradients of its rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, rank: int, size: int) -> Tensor:
        ctx.rank, ctx.rows = rank, len(rows)
        gathered = rows.new_empty(size * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        if dist.get_backend() == "nccl":
            mine = grad.new_empty(ctx.rows, *grad.shape[1:])
            dist.reduce_scatter_tensor(mine, grad.contiguous())
        else:  # gloo has no reduce-scatter in the older versions of torch
            whole = grad.contiguous().clone()
            dist.all_reduce(whole)
            mine = whole.narrow(0, ctx.rank * ctx.rows, ctx.rows)
        return mine, None, None


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


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """‖Û − X‖² of eq. (8) and (12) as a mean over elements and batch.

    The paper takes its λ_CL from CLIP-KD, whose embedding term is a mean over elements
    (docs/paper.md, "Reductions").
    """
    return F.mse_loss(student, teacher)
