"""Knowledge distillation of the similarity matrix, as OpenCLIP does it."""

from cifd_clip.losses import Features, World, contrastive_loss, soft_contrastive_loss
from cifd_clip.methods.base import Losses, Method, Report
from cifd_clip.noise import Noise
from cifd_clip.student import Pooled, Student


class KnowledgeDistillation(Method):
    """``open_clip.DistillClipLoss``; with several teachers, the mean of their terms."""

    def forward(
        self,
        student: Student,
        pooled: Pooled,
        teachers: list[Features],
        world: World,
        noise: Noise | None,
    ) -> tuple[Losses, Report]:
        logits = world.logits(student.embed(pooled).features())
        distill = sum(soft_contrastive_loss(logits, world.logits(t)) for t in teachers)
        losses = {
            "contrastive_loss": contrastive_loss(logits, world.labels(logits)) / 2,
            "distill_loss": distill / (2 * len(teachers)),
        }
        return losses, {}
