"""The two stages as tasks with one trainable module each (design: two stages, one loop).

The loop calls a task as a module (so that DDP sees every parameter), or, to accumulate gradients
over micro-batches, calls its two halves: `encode` on each micro-batch and `losses` once on the
whole batch. Losses are computed in float32, outside autocast.
"""

import torch
from torch import Tensor, nn

from cifd_clip.distributed import World
from cifd_clip.losses import Features
from cifd_clip.methods.base import Losses, Method, Report
from cifd_clip.noise import Noise
from cifd_clip.rdm import RDMBank
from cifd_clip.student import Pooled, Student


class Task(nn.Module):
    """What trains, and its losses.

    Attributes:
        world: this process's place in the global batch.
    """

    def __init__(self, world: World | None = None):
        super().__init__()
        self.world = world or World()

    def encode(self, images: Tensor | None, texts: Tensor | None) -> Pooled | None:
        """The per-row half of the forward pass, free of any interaction between rows."""
        raise NotImplementedError

    def losses(
        self, pooled: Pooled | None, teachers: list[Features], noise: Noise | None
    ) -> tuple[Losses, Report]:
        """The other half: losses of this rank's whole batch, under keys ending in ``_loss``."""
        raise NotImplementedError

    def forward(
        self,
        images: Tensor | None,
        texts: Tensor | None,
        teachers: list[Features],
        noise: Noise | None,
    ) -> tuple[Losses, Report]:
        """Both halves on one batch."""
        return self.losses(self.encode(images, texts), teachers, noise)


class DistillationTask(Task):
    """Stage 2, and plain training: a student under a method.

    Args:
        student: what ships.
        method: its losses and what else it trains.
        world: this process's place in the global batch.
    """

    def __init__(self, student: Student, method: Method, world: World):
        super().__init__(world)
        self.student, self.method = student, method

    def encode(self, images: Tensor, texts: Tensor) -> Pooled:
        """W of the student's towers."""
        return self.student(images, texts)

    def losses(
        self, pooled: Pooled, teachers: list[Features], noise: Noise | None
    ) -> tuple[Losses, Report]:
        # In evaluation (no noise) a batch is this process's own.
        world = World() if noise is None else self.world
        with torch.autocast(pooled.image.device.type, enabled=False):
            pooled = Pooled(*(w.float() for w in pooled))
            losses, report = self.method(self.student, pooled, teachers, world, noise)
        report["logit_scale"] = self.student.model.logit_scale.detach().exp()
        return losses, report


class RDMTask(Task):
    """Stage 1: the RDM bank on the first teacher's embeddings."""

    def __init__(self, bank: RDMBank):
        super().__init__()
        self.bank = bank

    def encode(self, images: None, texts: None) -> None:
        """Nothing: the bank reads embeddings only."""

    def losses(
        self, pooled: None, teachers: list[Features], noise: Noise | None
    ) -> tuple[Losses, Report]:
        teacher = teachers[0]
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return self.bank(teacher.image, teacher.text, noise)
