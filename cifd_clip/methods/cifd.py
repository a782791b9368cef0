"""Controlled Information Flow for CLIP (section 3.3, eq. 10–13)."""

import math

from torch import nn

from cifd_clip.bottleneck import InformationBottleneck
from cifd_clip.losses import Features, World, contrastive_loss
from cifd_clip.methods.base import Losses, Report
from cifd_clip.methods.fd import FeatureDistillation
from cifd_clip.noise import Noise
from cifd_clip.student import Pooled, Student


class CIFD(FeatureDistillation):
    """Eq. (13): λ_CL·L_CL + L_CIFD,I + L_CIFD,L.

    L_CIFD of a modality (eq. 12) is feature distillation over ``[teacher, *assistants]``, the
    assistants being the frozen RDMs' reconstructions, plus the rate −λ_I log r(Ŵ) of the student's
    own bottleneck. Embedding terms and rate are both means over elements (docs/paper.md,
    "Reductions").

    Weights:
        lambda_cl: λ_CL of eq. (13), on the sum of both directions (eq. 11).
        lambda_i: λ_I of eq. (12), on the mean rate per element, in nats.
        ibm: 1 with the Information Bottleneck Module, 0 without.
        ibm_contrastive: 1 when the contrastive term sees the noisy embedding, as eq. (10) reads;
            0 when only the feedback of teacher and assistants passes through the noise
            ("present only when there is feedback to the student", section 3.2).
    """

    defaults = FeatureDistillation.defaults | {
        "lambda_cl": 0.0005, "lambda_i": 1e-4, "ibm": 1.0, "ibm_contrastive": 1.0,
    }  # fmt: skip

    def build(self, student, teacher_dims, generator) -> None:
        super().build(student, teacher_dims, generator)
        if self.weights["ibm"]:
            self.bottlenecks = nn.ModuleDict(
                {
                    modality: InformationBottleneck(width, generator)
                    for modality, width in student.widths.items()
                }
            )

    @property
    def uses_logit_scale(self) -> bool:
        return self.weights["lambda_cl"] > 0

    def forward(
        self,
        student: Student,
        pooled: Pooled,
        teachers: list[Features],
        world: World,
        noise: Noise | None,
    ) -> tuple[Losses, Report]:
        clean, losses, report = pooled, {}, {}
        if self.weights["ibm"] and noise is not None:
            pooled, losses, report = self._bottleneck(pooled, noise)
        embeddings = student.embed(pooled)
        losses = {**self.embedding_losses(embeddings, teachers), **losses}
        if self.uses_logit_scale:
            if not self.weights["ibm_contrastive"]:
                embeddings = student.embed(clean)
            logits = world.logits(embeddings.features())
            contrastive = contrastive_loss(logits, world.labels(logits))
            losses["contrastive_loss"] = self.weights["lambda_cl"] * contrastive
        return losses, report

    def _bottleneck(self, pooled: Pooled, noise: Noise) -> tuple[Pooled, Losses, Report]:
        """Ŵ of both modalities, the rate terms of eq. (12), and the rates in bits."""
        noisy, losses, report = {}, {}, {}
        for modality, clean in zip(Pooled._fields, pooled):
            draws = noise.uniform(f"ibm/{modality}", *clean.shape, clean.device)
            noisy[modality], nats = self.bottlenecks[modality](clean, draws)
            losses[f"{modality}_rate_loss"] = self.weights["lambda_i"] * nats.mean()
            report[f"{modality}_bits"] = nats.detach().sum(-1).mean() / math.log(2)
        return Pooled(**noisy), losses, report
