"""MobileCLIP's ensemble distillation (Vasu et al. 2024, section 3), without stored captions."""

from cifd_clip.methods import DECLARED
from cifd_clip.methods.base import Losses, Method, Report, total_weight

DECLARATION = {
    "summary": "MobileCLIP's ensemble distillation: KL to the mean over teachers",
    "options": {"lambda_kd": (1.0, "share of distillation, beside 1 − that of the task loss")},
    "uses": ["contrastive", "similarities"],
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

        def terms(labels, logits, *taught):
            distill = sum(
                t.weight * self.relational(t)(logits, of) for t, of in zip(teachers, taught)
            )
            contrastive = (1 - share) * self.contrastive(logits, labels) / 2
            return contrastive, share * distill / total_weight(teachers)

        rows = [student.embed(pooled).features(), *teachers]
        contrastive, distill = world.over_rows(terms, rows)
        return {"contrastive_loss": contrastive, "distill_loss": distill}, {}
