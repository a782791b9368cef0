"""Knowledge distillation of the similarity matrix, as OpenCLIP does it."""

from cifd_clip.losses import contrastive_loss, soft_contrastive_loss
from cifd_clip.methods import DECLARED
from cifd_clip.methods.base import Losses, Method, Report, total_weight

DECLARATION = {
    "summary": "OpenCLIP's distillation: the teacher's similarities as soft targets",
    "uses": ["similarities"],
}


class KnowledgeDistillation(Method):
    """``open_clip.DistillClipLoss``; with several teachers, the weighted mean of their terms."""

    declaration = DECLARED["kd"]

    def forward(self, student, pooled, teachers, world, noise) -> tuple[Losses, Report]:
        teachers = self.rescaled(teachers)
        logits = world.logits(student.embed(pooled).features())
        distill = sum(t.weight * soft_contrastive_loss(logits, world.logits(t)) for t in teachers)
        losses = {
            "contrastive_loss": contrastive_loss(logits, world.labels(logits)) / 2,
            "distill_loss": distill / (2 * total_weight(teachers)),
        }
        return losses, {}
