"""No distillation: OpenCLIP's contrastive loss."""

from cifd_clip.distributed import World
from cifd_clip.losses import Features, contrastive_loss
from cifd_clip.methods import DECLARED
from cifd_clip.methods.base import Losses, Method, Report
from cifd_clip.noise import Noise
from cifd_clip.student import Pooled, Student

DECLARATION = {"summary": "the contrastive loss alone, without a teacher", "assistants": False}


class Contrastive(Method):
    """The mean of both directions of eq. (10), as ``open_clip.ClipLoss``."""

    declaration = DECLARED["none"]

    def forward(
        self,
        student: Student,
        pooled: Pooled,
        teachers: list[Features],
        world: World,
        noise: Noise | None,
    ) -> tuple[Losses, Report]:
        logits = world.logits(student.embed(pooled).features())
        return {"contrastive_loss": contrastive_loss(logits, world.labels(logits)) / 2}, {}
