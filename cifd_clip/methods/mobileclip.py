"""MobileCLIP's ensemble distillation (Vasu et al. 2024, section 3), without stored captions."""

from cifd_clip.losses import Features, World, contrastive_loss, relational_kl
from cifd_clip.methods.base import Losses, Method, Report
from cifd_clip.noise import Noise
from cifd_clip.student import Pooled, Student


class MobileCLIP(Method):
    """(1 − λ)·L_CLIP + λ·L_Distill, where L_Distill is the mean over teachers of the KL terms."""

    defaults = {"lambda_kd": 1.0}

    def forward(
        self,
        student: Student,
        pooled: Pooled,
        teachers: list[Features],
        world: World,
        noise: Noise | None,
    ) -> tuple[Losses, Report]:
        share = self.weights["lambda_kd"]
        logits = world.logits(student.embed(pooled).features())
        distill = sum(relational_kl(logits, world.logits(t)) for t in teachers)
        losses = {
            "contrastive_loss": (1 - share) * contrastive_loss(logits, world.labels(logits)) / 2,
            "distill_loss": share * distill / len(teachers),
        }
        return losses, {}
