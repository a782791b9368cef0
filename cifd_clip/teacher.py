"""Teachers: frozen CLIP models in evaluation mode, never part of what trains."""

from collections.abc import Sequence
from contextlib import nullcontext
from hashlib import sha256

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifd_clip.losses import Features
from cifd_clip.noise import Noise
from cifd_clip.rdm import MODALITIES, RDMBank
from cifd_clip.student import embedding_dim
from cifd_clip.towers import compile_towers


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
        self.dtype = torch.float32

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

    def cast(self, dtype: torch.dtype) -> None:
        """Keep the towers' weights in another type: it is what they compute in, without autocast.

        Autocast would cast frozen weights anew at each use, and normalise in float32. The
        temperature and the bias, which no tower computes with, stay as they are.
        """
        self.dtype = dtype
        scalars = {id(self.model.logit_scale), id(self.model.logit_bias)}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if tensor.is_floating_point() and id(tensor) not in scalars:
                tensor.data = tensor.data.to(dtype)

    def compile(self) -> None:
        """Compile the towers in place, see `cifd_clip.towers.compile_towers`."""
        compile_towers(self.model)

    @torch.no_grad()
    def __call__(self, images: Tensor, texts: Tensor) -> Features:
        """Unit-norm float32 features of normalised images (b, 3, H, W) and tokens (b, context)."""
        bias = self.model.logit_bias
        whole = self.dtype == torch.float32
        images = images.to(self.dtype)
        context = nullcontext() if whole else torch.autocast(images.device.type, enabled=False)
        with context:
            image, text = self.model.encode_image(images), self.model.encode_text(texts)
        return Features(
            F.normalize(image.float(), dim=-1),
            F.normalize(text.float(), dim=-1),
            self.model.logit_scale.exp().float(),
            None if bias is None else bias.float(),
            self.space,
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
def with_assistants(
    bank: RDMBank,
    teachers: list[Features],
    weights: Sequence[float] = (1.0,),
    noise: Noise | None = None,
    output: str = "rounded",
    first_space: int | None = None,
    of: int = 0,
) -> list[Features]:
    """Teachers and, after them, one's assistants: its reconstructions, one for each rate.

    Args:
        bank: a frozen bank of the teacher.
        teachers: features of a batch; more assistants may follow the teachers.
        weights: λ_n of eq. (12), one for all assistants or one for each.
        noise: of this step, for noisy reconstructions; None (evaluation) rounds instead.
        output: what an assistant teaches: its ``rounded`` or its ``noisy`` reconstruction at unit
            norm, or the rounded one as it is (``raw``).
        first_space: space of the first assistant, each having one of its own; None: all of them
            share their teacher's.
        of: the teacher's number.

    Raises:
        ValueError: there are several weights, and not as many as assistants.
    """
    teacher, count = teachers[of], len(bank.rates)
    if len(weights) not in (1, count):
        raise ValueError(f"there are {len(weights)} weights for {count} assistants")
    images, texts = (
        getattr(bank, modality).reconstruct(
            features,
            bank.draws(noise, modality, features, of) if noise and output == "noisy" else None,
            unit_norm=output != "raw",
        )
        for modality, features in zip(MODALITIES, (teacher.image, teacher.text))
    )
    assistants = [
        teacher._replace(
            image=image,
            text=text,
            weight=weights[n % len(weights)],
            space=teacher.space if first_space is None else first_space + n,
        )
        for n, (image, text) in enumerate(zip(images, texts))
    ]
    return [*teachers, *assistants]
