"""Real but tiny OpenCLIP models, batches for them, and embeddings with structure."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from cifd_clip import METHODS, DistillationTask, RDMBank, Student, Teacher, World, with_assistants

MODELS = Path(__file__).parent / "models"
VOCABULARY, CONTEXT, SIZE = 64, 16, 32

SIGLIP = {
    "embed_dim": 40,
    "init_logit_bias": -10,
    "vision_cfg": {
        "image_size": SIZE,
        "layers": 1,
        "width": 40,
        "head_width": 20,
        "patch_size": 16,
        "pool_type": "avg",
        "final_ln_after_pool": True,
        "no_ln_pre": True,
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": 24,
        "heads": 2,
        "layers": 1,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}


def config(name: str) -> dict:
    """``tiny-student`` or ``tiny-teacher`` with a vocabulary that costs nothing."""
    cfg = json.loads((MODELS / f"{name}.json").read_text())
    cfg["text_cfg"]["vocab_size"] = VOCABULARY
    return cfg


def clip(cfg: dict | str, seed: int = 0, custom: bool = False) -> nn.Module:
    """An OpenCLIP model of a configuration, its weights a function of the seed."""
    cfg = copy.deepcopy(config(cfg) if isinstance(cfg, str) else cfg)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return (CustomTextCLIP if custom or "init_logit_bias" in cfg else CLIP)(**cfg)


def teacher(cfg: dict | str = "tiny-teacher", seed: int = 1, space: int = 0) -> Teacher:
    model = clip(cfg, seed)
    model.visual.preprocess_cfg = {"size": SIZE}
    return Teacher(model, "tiny", space)


def pairs(rows: int, seed: int = 0, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Normalised images (rows, 3, size, size) and tokens (rows, context), padded after the end."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 3, size, size, generator=generator)
    texts = torch.randint(1, VOCABULARY - 1, (rows, CONTEXT), generator=generator)
    ends = torch.randint(3, CONTEXT, (rows, 1), generator=generator)
    place = torch.arange(CONTEXT)
    texts = torch.where(place < ends, texts, torch.where(place == ends, VOCABULARY - 1, 0))
    return images, texts


def embeddings(rows: int, dim: int = 48, seed: int = 0, classes: int = 6, rank: int = 12) -> Tensor:
    """Unit vectors (rows, dim) with the structure of a teacher's: classes on a low-rank subspace.

    The subspace and the classes are the same for every seed.
    """
    world = torch.Generator().manual_seed(1234)
    basis = torch.randn(rank, dim, generator=world)
    centres = 2 * torch.randn(classes, rank, generator=world)
    offset = torch.randn(dim, generator=world)  # the cone that CLIP embeddings live in
    generator = torch.Generator().manual_seed(seed)
    chosen = centres[torch.randint(classes, (rows,), generator=generator)]
    spread = torch.randn(rows, rank, generator=generator)
    noise = torch.randn(rows, dim, generator=generator)
    return F.normalize((chosen + spread) @ basis + 4 * offset + 0.3 * noise, dim=-1)


def bank(owner: Teacher, rates: tuple[float, ...] = (1000.0, 30.0), seed: int = 2) -> RDMBank:
    """A frozen bank of a teacher, untrained."""
    generator = torch.Generator().manual_seed(seed)
    made = RDMBank(owner.identity, list(rates), owner.dim, generator=generator)
    return made.requires_grad_(False).eval()


def task(
    method: str,
    student: nn.Module,
    teacher_dims: list[int],
    site: str = "projection",
    world: World | None = None,
    **options: Any,
) -> DistillationTask:
    """A student under a method with some of its options."""
    cut = Student(student, site)
    generator = torch.Generator().manual_seed(3)
    head = METHODS[method](cut, teacher_dims, options, generator)
    return DistillationTask(cut, head, world or World())


def lessons(teachers: list[Teacher], batch: tuple[Tensor, Tensor], made: RDMBank | None = None):
    """What the teachers and the first one's assistants make of a batch."""
    features = [t(*batch) for t in teachers]
    return features if made is None else with_assistants(made, features)


def total(losses: dict[str, Tensor]) -> Tensor:
    assert all(name.endswith("_loss") for name in losses), f"the total would miss one of {losses}"
    return sum(losses.values())
