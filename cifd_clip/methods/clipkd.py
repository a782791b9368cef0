"""CLIP-KD (Yang et al. 2023): task + relational + interactive + feature distillation."""

import math

import torch
from torch import nn

from cifd_clip.losses import Features, contrastive_loss, element_weight, embedding_loss
from cifd_clip.methods import DECLARED
from cifd_clip.methods.base import Losses, Method, Report, total_weight

DECLARATION = {
    "summary": "CLIP-KD: task, relational, interactive and feature terms",
    "options": {
        "lambda_crd": (1.0, "weight of the relational term"),
        "lambda_icl": (1.0, "weight of the interactive term"),
        "lambda_fd": (2000.0, "weight of the feature term"),
        "interactive_scale": (
            "exp",
            "the interactive term's factor: its own temperature, exponentiated, or, as in the "
            "published code, the parameter itself",
            ("exp", "raw"),
        ),
    },
    "spans": {"lambda_crd": (0.1, 10.0), "lambda_icl": (0.1, 10.0), "lambda_fd": (100.0, 10000.0)},
    "uses": ["projector", "reduction", "ibm", "ibm_branch", "contrastive", "similarities"],
}


class CLIPKD(Method):
    """The combination its scripts recommend: CRD 1, ICL 1, FD 2000 beside the task loss.

    Two repairs to the published code: the interactive term's temperature is exponentiated
    (``interactive_scale`` raw: as published), and what trains (projectors, temperature) sits in
    this module, so that the optimizer, the checkpoint and every rank agree on it. Its scripts have
    a projector for each modality (``projector`` separate). The interactive term has a temperature
    of its own and no bias: with ``siglip`` it stays a softmax. With several teachers, the weighted
    mean of their terms.
    """

    declaration = DECLARED["clipkd"]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cross_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, student, pooled, teachers, world, noise) -> tuple[Losses, Report]:
        teachers = self.rescaled(teachers)
        embedded = self.embed(student, pooled, noise)
        task = embedded.contrastive.features()
        rows, columns = [task], [world.columns(task)]
        if embedded.compared is not embedded.contrastive:
            rows.append(embedded.compared.features())
            columns.append(world.columns(rows[-1]))
        own = len(rows)
        projected = self.projectors(embedded.compared, teachers)
        raw = self.options["interactive_scale"] == "raw"
        scale = self.cross_logit_scale if raw else self.cross_logit_scale.exp()
        feature, reduction = 0.0, self.options["loss_reduction"]
        for teacher in teachers:
            image, text = projected[teacher.space].values()
            # Student rows against the gathered teacher: no gradient has to cross ranks.
            rows += [Features(image, text, scale), teacher]
            columns += 2 * [world.columns(teacher)]
            weight = teacher.weight * element_weight(reduction, image.shape[-1])
            feature = feature + weight * embedding_loss(image, teacher.image)
            feature = feature + weight * embedding_loss(text, teacher.text)

        def terms(labels, *logits):
            compared, others = logits[own - 1], logits[own:]
            relational = interactive = 0.0
            for teacher, cross, taught in zip(teachers, others[::2], others[1::2]):
                relational = relational + teacher.weight * self.relational(teacher)(
                    compared, taught
                )
                interactive = interactive + teacher.weight * contrastive_loss(cross, labels) / 2
            return self.contrastive(logits[0], labels) / 2, relational, interactive

        contrastive, relational, interactive = world.over_rows(terms, rows, columns)
        options, total = self.options, total_weight(teachers)
        losses = {
            "contrastive_loss": contrastive,
            "relational_loss": options["lambda_crd"] * relational / total,
            "interactive_loss": options["lambda_icl"] * interactive / total,
            "embedding_loss": options["lambda_fd"] * feature / total,
            **embedded.losses,
        }
        return losses, embedded.report
