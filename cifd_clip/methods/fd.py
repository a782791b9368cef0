"""Feature distillation: match the teachers' embeddings, nothing else."""

from cifd_clip.artefact import MODALITIES
from cifd_clip.losses import Features, element_weight, embedding_loss
from cifd_clip.methods import DECLARED
from cifd_clip.methods.base import Losses, Method, Report, total_weight
from cifd_clip.student import StudentEmbeddings

DECLARATION = {
    "summary": "feature distillation: match the teacher's embeddings, nothing else",
    "uses": ["projector", "reduction", "ibm"],
    "one_modality": True,
}


class FeatureDistillation(Method):
    """Σ over teachers of the image and text embedding terms, and the IBM's rate if it is on."""

    declaration = DECLARED["fd"]

    @property
    def uses_logit_scale(self) -> bool:
        return False

    def forward(self, student, pooled, teachers, world, noise) -> tuple[Losses, Report]:
        embedded = self.embed(student, pooled, noise)
        losses, pulls = self.embedding_losses(embedded.compared, teachers)
        return {**losses, **embedded.losses}, {**embedded.report, **pulls}

    def embedding_losses(
        self, student: StudentEmbeddings, teachers: list[Features]
    ) -> tuple[Losses, Report]:
        """Σ_n λ_n‖Û − X_n‖² of each modality, over teachers and assistants alike (eq. 8, 12).

        Of a modality, those count that have it. Of several teachers it reports how much each pulls:
        its part of both sums, its assistants' with it.
        """
        losses: Losses = {}
        pulls: Report = {}
        several = len({teacher.teacher for teacher in teachers}) > 1
        projected = self.projectors(student, teachers)
        reduction = self.options["loss_reduction"]
        whole = dict.fromkeys(MODALITIES, 1.0)
        if reduction == "relative":
            having = {m: [t for t in teachers if m in t.modalities] for m in MODALITIES}
            whole = {m: total_weight(some) for m, some in having.items()}
        for teacher in teachers:
            terms = []
            for modality, ours in projected[teacher.space].items():
                weight = teacher.weight * element_weight(reduction, ours.shape[-1])
                weight /= whole[modality]
                terms.append(weight * embedding_loss(ours, getattr(teacher, modality)))
                name = f"{modality}_embedding_loss"
                losses[name] = losses.get(name, 0.0) + terms[-1]
            if several:
                name = f"teacher{teacher.teacher}"
                pulls[name] = pulls.get(name, 0.0) + sum(terms).detach()
        return losses, pulls
