"""No distillation: OpenCLIP's contrastive loss."""

from cifd_clip.losses import contrastive_loss
from cifd_clip.methods import DECLARED
from cifd_clip.methods.base import Losses, Method, Report

DECLARATION = {"summary": "the contrastive loss alone, without a teacher", "assistants": False}


class Contrastive(Method):
    """The mean of both directions of eq. (10), as ``open_clip.ClipLoss``."""

    declaration = DECLARED["none"]

    def forward(self, student, pooled, teachers, world, noise) -> tuple[Losses, Report]:
        logits = world.logits(student.embed(pooled).features())
        return {"contrastive_loss": contrastive_loss(logits, world.labels(logits)) / 2}, {}
