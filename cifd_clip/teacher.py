"""Teachers: frozen CLIP models in evaluation mode, never part of what trains."""

from hashlib import sha256

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifd_clip.losses import Features
from cifd_clip.noise import Noise
from cifd_clip.rdm import MODALITIES, RDMBank
from cifd_clip.student import embedding_dim


class Teacher:
    """A frozen OpenCLIP model.

    It is not an ``nn.Module``: nothing can register it, so no optimizer, checkpoint, DDP wrapper
    or ``train()`` call reaches it.

    Args:
        model: any OpenCLIP model with ``encode_image`` and ``encode_text``.
        name: its architecture's name.
        space: its index among the teachers.
        weights: hash of its weights, if known already (see `weights_hash`).
    """

    def __init__(self, model: nn.Module, name: str, space: int = 0, weights: str | None = None):
        self.model = model.requires_grad_(False).eval()
        self.name = name
        self.space = space
        self.dim = embedding_dim(model)
        self.weights = weights or weights_hash(model)

    @property
    def identity(self) -> dict:
        """What an RDM bank or an embedding cache made with this teacher must match."""
        preprocess = {k: v for k, v in self.model.visual.preprocess_cfg.items() if v is not None}
        return {
            "model": self.name,
            "weights": self.weights,
            "dim": self.dim,
            "preprocess": preprocess,
            "logit_scale": self.model.logit_scale.exp().item(),
            "logit_bias": None if self.model.logit_bias is None else self.model.logit_bias.item(),
        }

    @torch.no_grad()
    def __call__(self, images: Tensor, texts: Tensor) -> Features:
        """Unit-norm float32 features of normalised images (b, 3, H, W) and tokens (b, context)."""
        bias = self.model.logit_bias
        return Features(
            F.normalize(self.model.encode_image(images).float(), dim=-1),
            F.normalize(self.model.encode_text(texts).float(), dim=-1),
            self.model.logit_scale.exp().float(),
            None if bias is None else bias.float(),
            self.space,
        )


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of a model's ``state_dict``."""
    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name}:{tuple(array.shape)}:{array.dtype};".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def assistants(
    bank: RDMBank,
    teacher: Features,
    weight: float = 1.0,
    noise: Noise | None = None,
    unit_norm: bool = True,
    first_space: int | None = None,
) -> list[Features]:
    """The bank's reconstructions of a teacher's features: one assistant per rate.

    Args:
        bank: a frozen bank of this teacher.
        teacher: features of a batch.
        weight: λ_n of eq. (12).
        noise: of this step, in place of rounding.
        unit_norm: whether reconstructions are normalised.
        first_space: of the first assistant, each having a space of its own; None: the teacher's.
    """
    images, texts = (
        getattr(bank, modality).reconstruct(
            features, noise and bank.draws(noise, modality, features), unit_norm
        )
        for modality, features in zip(MODALITIES, (teacher.image, teacher.text))
    )
    return [
        teacher._replace(
            image=image,
            text=text,
            weight=weight,
            space=teacher.space if first_space is None else first_space + n,
        )
        for n, (image, text) in enumerate(zip(images, texts))
    ]
