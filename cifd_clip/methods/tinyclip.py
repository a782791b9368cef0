"""TinyCLIP's affinity mimicking (Wu et al. 2023, eq. 1) beside the contrastive loss."""

from cifd_clip.losses import Features, World, contrastive_loss, soft_contrastive_loss
from cifd_clip.methods.base import Losses, Method, Report
from cifd_clip.noise import Noise
from cifd_clip.student import Pooled, Student


class TinyCLIP(Method):
    """The distillation half of TinyCLIP, without pruning (the CIFD paper, appendix D.4)."""

    def forward(
        self,
        student: Student,
        pooled: Pooled,
        teachers: list[Features],
        world: World,
        noise: Noise | None,
    ) -> tuple[Losses, Report]:
        logits = world.logits(student.embed(pooled).features())
        mimicking = sum(soft_contrastive_loss(logits, world.logits(t)) for t in teachers)
        losses = {
            "contrastive_loss": contrastive_loss(logits, world.labels(logits)),
            "affinity_loss": mimicking / len(teachers),
        }
        return losses, {}
