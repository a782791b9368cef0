"""TinyCLIP's affinity mimicking (Wu et al. 2023, eq. 1) beside the contrastive loss."""

from cifd_clip.methods import DECLARED
from cifd_clip.methods.base import Losses, Method, Report, total_weight

DECLARATION = {
    "summary": "TinyCLIP's affinity mimicking; its weight inheritance is --init-from",
    "uses": ["contrastive", "similarities"],
}


class TinyCLIP(Method):
    """The distillation half of TinyCLIP, without pruning (the CIFD paper, appendix D.4).

    With several teachers, the weighted mean of their terms.
    """

    declaration = DECLARED["tinyclip"]

    def forward(self, student, pooled, teachers, world, noise) -> tuple[Losses, Report]:
        teachers = self.rescaled(teachers)

        def terms(labels, logits, *taught):
            mimicking = sum(
                t.weight * self.mimicking(t)(logits, of) for t, of in zip(teachers, taught)
            )
            return self.contrastive(logits, labels), mimicking / total_weight(teachers)

        rows = [student.embed(pooled).features(), *teachers]
        contrastive, affinity = world.over_rows(terms, rows)
        return {"contrastive_loss": contrastive, "affinity_loss": affinity}, {}
