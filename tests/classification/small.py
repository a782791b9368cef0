"""Small batches, teachers and RDMs for the tests of classification."""

import numpy as np
import torch

from cifd_clip import RateDistortionModules, RDMBank
from cifd_clip.classification.methods import TeacherOutput
from training.classifier.cifar import Table

BATCH = 6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(seed)
    return torch.randn(BATCH, 3, 32, 32, generator=g), torch.randint(100, (BATCH,), generator=g)


def teacher_outputs(*weights: float) -> list[TeacherOutput]:
    """A teacher and assistants with spaces of 5, 6, ... dimensions."""
    g = generator(2)
    return [
        TeacherOutput(
            3 * torch.randn(BATCH, 100, generator=g), torch.randn(BATCH, 5 + i, generator=g), i, w
        )
        for i, w in enumerate((1.0, *weights))
    ]


def bank(form: str, rates=(1.0, 10.0), dim: int = 12, **options) -> RDMBank:
    """Of a classifier with 100 classes, untrained."""
    settings = {"classes": 100, "scale": 1.0, "generator": generator()} | options
    return RDMBank({"model": "cnn2", "weights": "a" * 64}, rates, dim, form=form, **settings)


def rdms(form: str, rates=(1.0, 10.0), dim: int = 12, **options) -> RateDistortionModules:
    """The modules of such a bank."""
    return bank(form, rates, dim, **options).image


def table(samples: int) -> Table:
    """Random images of CIFAR-100's size and classes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (samples, 32, 32, 3), dtype=np.uint8)
    return Table(torch.from_numpy(images), torch.from_numpy(rng.integers(0, 100, samples)), "h")
