"""Teachers: frozen models in evaluation mode, never part of what trains."""

from collections.abc import Sequence
from contextlib import nullcontext
from hashlib import sha256
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifd_clip.artefact import MODALITIES
from cifd_clip.losses import Features
from cifd_clip.noise import Noise
from cifd_clip.rdm import RDMBank
from cifd_clip.student import embedding_dim
from cifd_clip.towers import compile_towers


class Teacher:
    """A frozen OpenCLIP model, or a model of one modality.

    It is not an ``nn.Module``: nothing can register it, so no optimizer, checkpoint, DDP wrapper
    or ``train()`` call reaches it.

    Args:
        model: any OpenCLIP model with ``encode_image`` and ``encode_text``; or, of one modality,
            what makes (b, T) of a batch's images (a timm model without classifier) or of its tokens
            (OpenCLIP's ``HFTextEncoder``).
        name: its architecture's name.
        space: its index among the teachers.
        weights: hash of its weights, if known already (see `weights_hash`).
        modality: ``image`` or ``text``, of a model that embeds nothing else.
        preprocess: how the inputs of such a model are prepared; an OpenCLIP model says so itself.

    Attributes:
        modalities: what it embeds.
        dim: T.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        space: int = 0,
        weights: str | None = None,
        modality: str | None = None,
        preprocess: dict[str, Any] | None = None,
    ):
        self.model = model.requires_grad_(False).eval()
        self.name = name
        self.space = space
        self.modalities = MODALITIES if modality is None else (modality,)
        self.preprocess = model.visual.preprocess_cfg if modality is None else preprocess or {}
        self.dim = embedding_dim(model)
        self.weights = weights or weights_hash(model)
        self.dtype = torch.float32

    @property
    def identity(self) -> dict:
        """What an RDM bank or an embedding cache made with this teacher must match."""
        identity = {
            "model": self.name,
            "weights": self.weights,
            "dim": self.dim,
            "preprocess": {k: v for k, v in self.preprocess.items() if v is not None},
        }
        if self.modalities != MODALITIES:
            return identity | {"modalities": list(self.modalities)}
        return identity | {
            "logit_scale": self.model.logit_scale.exp().item(),
            "logit_bias": None if self.model.logit_bias is None else self.model.logit_bias.item(),
        }

    def cast(self, dtype: torch.dtype) -> None:
        """Keep the towers' weights in another type: it is what they compute in, without autocast.

        Autocast would cast frozen weights anew at each use, and normalise in float32. The
        temperature and the bias, which no tower computes with, stay as they are.
        """
        self.dtype = dtype
        scalars = {id(getattr(self.model, f"logit_{name}", None)) for name in ("scale", "bias")}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if tensor.is_floating_point() and id(tensor) not in scalars:
                tensor.data = tensor.data.to(dtype)

    def compile(self) -> None:
        """Compile the towers in place, see `cifd_clip.towers.compile_towers`."""
        if self.modalities == ("image",):
            self.model.compile()
        else:
            compile_towers(self.model)

    @torch.no_grad()
    def __call__(self, images: Tensor | None, texts: Tensor | None) -> Features:
        """Unit-norm float32 features of normalised images (b, 3, H, W) and tokens (b, context).

        What a teacher of one modality does not read may be None.
        """
        inputs = {"text": texts}
        if "image" in self.modalities:
            inputs["image"] = images.to(self.dtype)
        whole, device = self.dtype == torch.float32, inputs[self.modalities[0]].device.type
        with nullcontext() if whole else torch.autocast(device, enabled=False):
            rows = {m: self._encode(m, inputs[m]) for m in self.modalities}
        units = {m: F.normalize(x.float(), dim=-1) for m, x in rows.items()}
        scale, bias = (getattr(self.model, f"logit_{name}", None) for name in ("scale", "bias"))
        return Features(
            units.get("image"),
            units.get("text"),
            None if scale is None else scale.exp().float(),
            None if bias is None else bias.float(),
            self.space,
            self.space,
        )

    def _encode(self, modality: str, inputs: Tensor) -> Tensor:
        """(b, T) of one tower."""
        if self.modalities != MODALITIES:
            return self.model(inputs)
        return getattr(self.model, f"encode_{modality}")(inputs)


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
    made = {}
    for modality in bank.modalities:
        features = getattr(teacher, modality)
        made[modality] = getattr(bank, modality).reconstruct(
            features,
            bank.draws(noise, modality, features, of) if noise and output == "noisy" else None,
            unit_norm=output != "raw",
        )
    assistants = [
        teacher._replace(
            **{modality: each[n] for modality, each in made.items()},
            weight=weights[n % len(weights)],
            space=teacher.space if first_space is None else first_space + n,
        )
        for n in range(count)
    ]
    return [*teachers, *assistants]
