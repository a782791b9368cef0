"""Feature distillation: match the teachers' embeddings, nothing else."""

from cifd_clip.losses import Features, element_weight, embedding_loss
from cifd_clip.methods import DECLARED
from cifd_clip.methods.base import Losses, Method, Report, total_weight
from cifd_clip.student import StudentEmbeddings

DECLARATION = {
    "summary": "feature distillation: match the teacher's embeddings, nothing else",
    "uses": ["projector", "reduction", "ibm"],
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

        Of several teachers it reports how much each pulls: its part of both sums, its assistants'
        with it.
        """
        image_loss = text_loss = 0.0
        pulls: Report = {}
        several = len({teacher.teacher for teacher in teachers}) > 1
        projected = self.projectors(student, teachers)
        reduction = self.options["loss_reduction"]
        whole = total_weight(teachers) if reduction == "relative" else 1.0
        for teacher in teachers:
            image, text = projected[teacher.space]
            weight = teacher.weight * element_weight(reduction, image.shape[-1]) / whole
            of_image = weight * embedding_loss(image, teacher.image)
            of_text = weight * embedding_loss(text, teacher.text)
            image_loss, text_loss = image_loss + of_image, text_loss + of_text
            if several:
                name = f"teacher{teacher.teacher}"
                pulls[name] = pulls.get(name, 0.0) + (of_image + of_text).detach()
        losses = {"image_embedding_loss": image_loss, "text_embedding_loss": text_loss}
        return losses, pulls
