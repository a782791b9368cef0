"""What every method shares: its contract and the projectors to the teachers' spaces."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifd_clip.losses import Features, World
from cifd_clip.noise import Noise
from cifd_clip.student import Pooled, Student, StudentEmbeddings

Losses = dict[str, Tensor]
Report = dict[str, Tensor]


class Projectors(nn.Module):
    """One linear map per teacher space, none where the dimensions agree.

    Shared, it serves both modalities: an image and a text that match the teacher's pair then match
    each other in the student's own space too, which is the one that ships. With a map for each
    modality the two may lie anywhere, and only a contrastive term brings them together
    (docs/paper.md, "One projector").

    Args:
        dim: D, the student's embedding dimension.
        teacher_dims: T of each teacher space.
        generator: draws the initial weights.
        shared: whether image and text embeddings go through one map.
    """

    def __init__(
        self,
        dim: int,
        teacher_dims: list[int],
        generator: torch.Generator | None,
        shared: bool = True,
    ):
        super().__init__()
        self.heads = nn.ModuleDict(
            {
                name: nn.ModuleList(_projector(dim, t, generator) for t in teacher_dims)
                for name in (("both",) if shared else Pooled._fields)
            }
        )

    def head(self, modality: str, space: int) -> nn.Module:
        """The map of a modality's embeddings to a teacher's space."""
        return self.heads["both" if "both" in self.heads else modality][space]

    def forward(self, student: StudentEmbeddings, space: int) -> tuple[Tensor, Tensor]:
        """The student's unit-norm image and text embeddings in a teacher's space, (b, T)."""
        return (
            F.normalize(self.head("image", space)(student.image), dim=-1),
            F.normalize(self.head("text", space)(student.text), dim=-1),
        )


def _projector(dim: int, teacher_dim: int, generator: torch.Generator | None) -> nn.Module:
    if dim == teacher_dim:
        return nn.Identity()
    linear = nn.Linear(dim, teacher_dim)
    with torch.no_grad():
        linear.weight.normal_(std=dim**-0.5, generator=generator)
        linear.bias.zero_()
    return linear


class Method(nn.Module):
    """A distillation method.

    Args:
        student: the model it trains; only its dimensions are read here.
        teacher_dims: T of each teacher space.
        weights: the weights of the method's terms, by name; those missing keep `defaults`.
        generator: draws the initial weights of what the method trains.
    """

    #: Weights of the terms and their defaults.
    defaults: dict[str, float] = {}

    def __init__(
        self,
        student: Student,
        teacher_dims: list[int],
        weights: dict[str, float] | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.weights = {**self.defaults, **(weights or {})}
        self.build(student, teacher_dims, generator)

    def build(
        self, student: Student, teacher_dims: list[int], generator: torch.Generator | None
    ) -> None:
        """Make what the method trains besides the student; nothing by default."""

    @property
    def uses_logit_scale(self) -> bool:
        """Whether the student's temperature gets a gradient."""
        return True

    def forward(
        self,
        student: Student,
        pooled: Pooled,
        teachers: list[Features],
        world: World,
        noise: Noise | None,
    ) -> tuple[Losses, Report]:
        """The losses of a batch.

        Args:
            student: projects W to embeddings.
            pooled: W of this rank's rows.
            teachers: every teacher's and assistant's features of the same rows.
            world: this rank's place in the global batch.
            noise: of this step; None in evaluation, where no noise is added.

        Returns:
            The weighted losses, each under a key ending in ``_loss`` (the total is their sum), and
            scalars worth logging.
        """
        raise NotImplementedError
