"""Knowledge distillation of the similarity matrix, as OpenCLIP does it."""

from cifd_clip.methods import DECLARED
from cifd_clip.methods.base import Losses, Method, Report, total_weight

DECLARATION = {
    "summary": "OpenCLIP's distillation: the teacher's similarities as soft targets",
    "uses": ["contrastive", "similarities"],
}


class KnowledgeDistillation(Method):
    """``open_clip.DistillClipLoss``; with several teachers, the weighted mean of their terms."""

    declaration = DECLARED["kd"]

    def forward(self, student, pooled, teachers, world, noise) -> tuple[Losses, Report]:
        teachers = self.rescaled(teachers)

        def terms(labels, logits, *taught):
            distill = sum(
                t.weight * self.mimicking(t)(logits, of) for t, of in zip(teachers, taught)
            )
            return self.contrastive(logits, labels) / 2, distill / (2 * total_weight(teachers))

        rows = [student.embed(pooled).features(), *teachers]
        contrastive, distill = world.over_rows(terms, rows)
        return {"contrastive_loss": contrastive, "distill_loss": distill}, {}
