"""Feature distillation: match the teachers' embeddings, nothing else."""

from cifd_clip.losses import Features, World, embedding_loss
from cifd_clip.methods.base import Losses, Method, Projectors, Report
from cifd_clip.noise import Noise
from cifd_clip.student import Pooled, Student, StudentEmbeddings


class FeatureDistillation(Method):
    """Σ over teachers of the image and text embedding terms.

    Weights:
        shared_projector: whether one projector serves both modalities, see `Projectors`.
    """

    defaults = {"shared_projector": 1.0}

    @property
    def uses_logit_scale(self) -> bool:
        return False

    def build(self, student, teacher_dims, generator) -> None:
        shared = bool(self.weights["shared_projector"])
        self.projectors = Projectors(student.dim, teacher_dims, generator, shared)

    def forward(
        self,
        student: Student,
        pooled: Pooled,
        teachers: list[Features],
        world: World,
        noise: Noise | None,
    ) -> tuple[Losses, Report]:
        return self.embedding_losses(student.embed(pooled), teachers), {}

    def embedding_losses(self, student: StudentEmbeddings, teachers: list[Features]) -> Losses:
        """Σ_n λ_n‖Û − X_n‖² of each modality, over teachers and assistants alike (eq. 8, 12)."""
        image_loss = text_loss = 0.0
        spaces = dict.fromkeys(teacher.space for teacher in teachers)
        projected = {space: self.projectors(student, space) for space in spaces}
        for teacher in teachers:
            image, text = projected[teacher.space]
            image_loss = image_loss + teacher.weight * embedding_loss(image, teacher.image)
            text_loss = text_loss + teacher.weight * embedding_loss(text, teacher.text)
        return {"image_embedding_loss": image_loss, "text_embedding_loss": text_loss}
