"""TinyCLIP's affinity mimicking (Wu et al. 2023, eq. 1) beside the contrastive loss."""

from cifd_clip.distributed import World
from cifd_clip.losses import Features, contrastive_loss, soft_contrastive_loss
from cifd_clip.methods import DECLARED
from cifd_clip.methods.base import Losses, Method, Report, total_weight
from cifd_clip.noise import Noise
from cifd_clip.student import Pooled, Student

DECLARATION = {"summary": "TinyCLIP's affinity mimicking, without its pruning"}


class TinyCLIP(Method):
    """The distillation half of TinyCLIP, without pruning (the CIFD paper, appendix D.4).

    With several teachers, the weighted mean of their terms.
    """

    declaration = DECLARED["tinyclip"]

    def forward(
        self,
        student: Student,
        pooled: Pooled,
        teachers: list[Features],
        world: World,
        noise: Noise | None,
    ) -> tuple[Losses, Report]:
        logits = world.logits(student.embed(pooled).features())
        mimicking = sum(t.weight * soft_contrastive_loss(logits, world.logits(t)) for t in teachers)
        losses = {
            "contrastive_loss": contrastive_loss(logits, world.labels(logits)),
            "affinity_loss": mimicking / total_weight(teachers),
        }
        return losses, {}
