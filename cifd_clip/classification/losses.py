"""The losses of supervised distillation as pure functions; all arithmetic is float32.

Shapes: B samples, T embedding dimension.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cifd_clip.noise import Noise

#: ‖U − X‖² of eq. (8) as a mean over elements; the smooth L1 loss is A.2's choice for ImageNet.
EMBEDDING_LOSSES = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}


def kl_per_sample(teacher: Tensor, student: Tensor, tau: float) -> Tensor:
    """τ²·KL(teacher ‖ student) of distributions softened by τ.

    τ² keeps the gradient's size independent of τ (Hinton et al. 2015).

    Args:
        teacher, student: (..., B, classes) logits.
        tau: τ.

    Returns:
        (..., B), in nats times τ².
    """
    p = F.log_softmax(teacher / tau, -1)
    q = F.log_softmax(student.float() / tau, -1)
    return tau**2 * F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def kd_dropout_mask(noise: Noise | None, like: Tensor, probability: float) -> Tensor | None:
    """Which teachers each sample listens to (DGKD, Son et al. 2021, section 3.3).

    Args:
        noise: of this step; None in evaluation, where nothing is dropped.
        like: (K, B) KL terms of K teachers and assistants.
        probability: of dropping a term, for each sample and teacher by itself.

    Returns:
        (K, B) of zeros and ones; None when nothing is dropped. Terms that stay are not scaled up.
    """
    if noise is None or not probability:
        return None
    teachers, batch = like.shape
    draws = noise.uniform("kd_dropout", batch, teachers, like.device)
    return (draws + 0.5 >= probability).t().to(like.dtype)


def kd_drop_mask(noise: Noise | None, like: Tensor, count: int) -> Tensor | None:
    """Which teachers a batch listens to, where so many are left out of it (DGKD's own code).

    Args:
        noise: of this step; None in evaluation, where nothing is dropped.
        like: (K, B) KL terms of K teachers and assistants.
        count: of the terms that are dropped, fewer than K.

    Returns:
        (K, 1) of zeros and ones, the same for every row of the global batch; None when nothing is
        dropped. Terms that stay are not scaled up.
    """
    if noise is None or not count:
        return None
    draws = replace(noise, start=0).uniform("kd_drop", 1, len(like), like.device)
    mask = torch.ones(len(like), 1, dtype=like.dtype, device=like.device)
    return mask.index_fill(0, draws[0].topk(count).indices, 0.0)


def factor_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Factor transfer: L1 between unit-norm factors, a mean over elements (Kim et al. 2018, eq. 4).

    Args:
        teacher, student: (B, F) factors.
    """
    return F.l1_loss(F.normalize(student.float(), dim=-1), F.normalize(teacher, dim=-1))
