"""Relational knowledge distillation (Park et al. 2019): the geometry of a batch, in any dimension.

Shapes: b rows of this rank, B rows of the global batch, D embedding dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cifd_clip.methods import DECLARED
from cifd_clip.methods.base import Losses, Method, Report, total_weight

DECLARATION = {
    "summary": "relational KD: distances and angles within a batch; work grows as its cube",
    "uses": ["contrastive"],
    "options": {
        "lambda_distance": (12.0, "weight of the distances between pairs (its authors': 25)"),
        "lambda_angle": (155.0, "weight of the angles of triplets (its authors': 50)"),
    },
    "spans": {"lambda_distance": (1.0, 250.0), "lambda_angle": (2.0, 500.0)},
}

#: Rows closer than this are duplicates: they have no direction to match, and no gradient from it.
CLOSEST = 1e-3
# Angles held at a time: 64 MiB of float32.
ANGLES = 2**24


class RelationalDistillation(Method):
    """The contrastive loss beside the relations among images and those among texts.

    Its terms are means over the two modalities and weighted means over teachers; no projector is
    needed, since distances and angles don't depend on the dimension.
    """

    declaration = DECLARED["rkd"]

    def forward(self, student, pooled, teachers, world, noise) -> tuple[Losses, Report]:
        rows = student.embed(pooled).features()
        columns = world.columns(rows)
        labels = world.labels(rows)
        distance = angle = 0.0
        for teacher in teachers:
            taught = world.columns(teacher)
            for ours, theirs in ((columns.image, taught.image), (columns.text, taught.text)):
                weight = teacher.weight / (2 * total_weight(teachers))
                distance = distance + weight * distance_loss(ours, theirs, labels)
                angle = angle + weight * angle_loss(ours, theirs, labels)
        losses = {
            "contrastive_loss": world.contrastive(rows, columns, self.contrastive) / 2,
            "distance_loss": self.options["lambda_distance"] * distance,
            "angle_loss": self.options["lambda_angle"] * angle,
        }
        return losses, {}


def distance_loss(student: Tensor, teacher: Tensor, anchors: Tensor) -> Tensor:
    """Huber loss of pairwise distances, each in units of its batch's mean (eq. 4–6 of RKD).

    Args:
        student: (B, D) unit-norm rows.
        teacher: (B, T) unit-norm rows of the same samples.
        anchors: (b,) rows whose distances to all others count here.
    """
    return F.smooth_l1_loss(_distances(student)[anchors], _distances(teacher)[anchors])


def _distances(rows: Tensor) -> Tensor:
    """(B, B) Euclidean distances of unit-norm rows, over the mean of those between two rows."""
    others = 1 - torch.eye(len(rows), device=rows.device)
    distances = (2 - 2 * rows @ rows.t()).clamp(min=CLOSEST**2).sqrt() * others
    return distances * others.sum() / distances.sum()


def angle_loss(student: Tensor, teacher: Tensor, anchors: Tensor) -> Tensor:
    """Huber loss of the cosines of the angles that two rows make at an anchor (eq. 7–8 of RKD).

    Args:
        student: (B, D) unit-norm rows.
        teacher: (B, T) unit-norm rows of the same samples.
        anchors: (b,) rows at which angles count here. A few are taken at a time, and computed
            anew in backward: (b, B, B) angles would not fit in memory.
    """
    at_once = max(1, ANGLES // len(student) ** 2)
    total = sum(
        checkpoint(
            _angle_error, student, teacher, few, use_reentrant=False, preserve_rng_state=False
        )
        for few in anchors.split(at_once)
    )
    return total / (len(anchors) * len(student) ** 2)


def _angle_error(student: Tensor, teacher: Tensor, anchors: Tensor) -> Tensor:
    return F.smooth_l1_loss(_angles(student, anchors), _angles(teacher, anchors), reduction="sum")


def _angles(rows: Tensor, anchors: Tensor) -> Tensor:
    """(b, B, B) cosines of the angles between two rows as seen from each anchor."""
    directions = F.normalize(rows - rows[anchors, None], dim=-1, eps=CLOSEST)
    return directions @ directions.transpose(1, 2)
