"""CLIP-KD (Yang et al. 2023): task + relational + interactive + feature distillation."""

import math

import torch
from torch import nn

from cifd_clip.losses import (
    Features,
    World,
    contrastive_loss,
    embedding_loss,
    relational_kl,
)
from cifd_clip.methods.base import Losses, Method, Projectors, Report
from cifd_clip.noise import Noise
from cifd_clip.student import Pooled, Student


class CLIPKD(Method):
    """The combination its scripts recommend: CRD 1, ICL 1, FD 2000 beside the task loss.

    Two repairs to the published code: the interactive term's temperature is exponentiated, and
    what trains (projectors, temperature) sits in this module, so that the optimizer, the
    checkpoint and every rank agree on it. Its scripts have a projector for each modality
    (``shared_projector`` 0).
    """

    defaults = {"lambda_crd": 1.0, "lambda_icl": 1.0, "lambda_fd": 2000.0, "shared_projector": 1.0}

    def build(self, student, teacher_dims, generator) -> None:
        shared = bool(self.weights["shared_projector"])
        self.projectors = Projectors(student.dim, teacher_dims, generator, shared)
        self.cross_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(
        self,
        student: Student,
        pooled: Pooled,
        teachers: list[Features],
        world: World,
        noise: Noise | None,
    ) -> tuple[Losses, Report]:
        embeddings = student.embed(pooled)
        logits = world.logits(embeddings.features())
        labels = world.labels(logits)
        relational = interactive = feature = 0.0
        for teacher in teachers:
            columns = world.columns(teacher)
            image, text = self.projectors(embeddings, teacher.space)
            # Student rows against the gathered teacher: no gradient has to cross ranks.
            cross = world.logits(Features(image, text, self.cross_logit_scale.exp()), columns)
            relational = relational + relational_kl(logits, world.logits(teacher, columns))
            interactive = interactive + contrastive_loss(cross, labels) / 2
            feature = feature + embedding_loss(image, teacher.image)
            feature = feature + embedding_loss(text, teacher.text)
        count = len(teachers)
        losses = {
            "contrastive_loss": contrastive_loss(logits, labels) / 2,
            "relational_loss": self.weights["lambda_crd"] * relational / count,
            "interactive_loss": self.weights["lambda_icl"] * interactive / count,
            "embedding_loss": self.weights["lambda_fd"] * feature / count,
        }
        return losses, {}
