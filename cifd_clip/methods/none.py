"""No distillation: OpenCLIP's contrastive loss."""

from cifd_clip.methods import DECLARED
from cifd_clip.methods.base import Losses, Method, Report

DECLARATION = {
    "summary": "the contrastive loss alone, without a teacher",
    "uses": ["contrastive"],
    "assistants": False,
}


class Contrastive(Method):
    """The mean of both directions of eq. (10), as ``open_clip.ClipLoss``; or ``SigLipLoss``."""

    declaration = DECLARED["none"]

    def forward(self, student, pooled, teachers, world, noise) -> tuple[Losses, Report]:
        loss = world.contrastive(student.embed(pooled).features(), loss=self.contrastive)
        return {"contrastive_loss": loss / 2}, {}
