"""MobileCLIP's ensemble distillation (Vasu et al. 2024, section 3), without stored captions."""

from cifd_clip.losses import contrastive_loss, relational_kl
from cifd_clip.methods import DECLARED
from cifd_clip.methods.base import Losses, Method, Report, total_weight

DECLARATION = {
    "summary": "MobileCLIP's ensemble distillation: KL to the mean over teachers",
    "options": {"lambda_kd": (1.0, "share of distillation, beside 1 − that of the task loss")},
    "uses": ["similarities"],
    "spans": {"lambda_kd": (0.3, 1.0)},
}


class MobileCLIP(Method):
    """(1 − λ)·L_CLIP + λ·L_Distill; L_Distill is the weighted mean over teachers of the KL terms.

    Of its ensemble every teacher counts the same there, λ_n = 1.
    """

    declaration = DECLARED["mobileclip"]

    def forward(self, student, pooled, teachers, world, noise) -> tuple[Losses, Report]:
        teachers = self.rescaled(teachers)
        share = self.options["lambda_kd"]
        logits = world.logits(student.embed(pooled).features())
        distill = sum(t.weight * relational_kl(logits, world.logits(t)) for t in teachers)
        losses = {
            "contrastive_loss": (1 - share) * contrastive_loss(logits, world.labels(logits)) / 2,
            "distill_loss": share * distill / total_weight(teachers),
        }
        return losses, {}
