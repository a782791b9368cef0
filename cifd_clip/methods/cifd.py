"""Controlled Information Flow for CLIP (section 3.3, eq. 10–13)."""

from cifd_clip.methods import DECLARED
from cifd_clip.methods.base import Losses, Report
from cifd_clip.methods.fd import FeatureDistillation

DECLARATION = {
    "summary": "the paper's: match teacher and assistants through a bottleneck (eq. 13)",
    "options": {"lambda_cl": (0.0016, "λ_CL of eq. 13: weight of both directions' sum (eq. 11)")},
    "spans": {"lambda_cl": (1e-5, 1e-2)},
    "uses": ["projector", "reduction", "ibm", "ibm_branch", "contrastive"],
    "defaults": {"ibm": True, "lambda_i": 0.0008, "lambda_n": [1.4]},
    "one_modality": True,
}


class CIFD(FeatureDistillation):
    """Eq. (13): λ_CL·L_CL + L_CIFD,I + L_CIFD,L.

    L_CIFD of a modality (eq. 12) is feature distillation over ``[teacher, *assistants]``, the
    assistants being the frozen RDMs' reconstructions, plus the rate −λ_I log r(Ŵ) of the student's
    own bottleneck. ``loss_reduction`` says over what both are means or sums (docs/paper.md, "One
    weight").
    """

    declaration = DECLARED["cifd"]

    @property
    def uses_logit_scale(self) -> bool:
        return self.options["lambda_cl"] > 0

    def forward(self, student, pooled, teachers, world, noise) -> tuple[Losses, Report]:
        embedded = self.embed(student, pooled, noise)
        losses, pulls = self.embedding_losses(embedded.compared, teachers)
        losses |= embedded.losses
        embedded.report.update(pulls)
        if self.uses_logit_scale:
            features = embedded.contrastive.features()
            contrastive = world.contrastive(features, loss=self.contrastive)
            losses["contrastive_loss"] = self.options["lambda_cl"] * contrastive
            embedded.report["contrastive"] = contrastive.detach()  # before λ_CL
        return losses, embedded.report
