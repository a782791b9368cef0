"""Initial weights from a larger model: TinyCLIP's manual inheritance (Wu et al. 2023, section 3.2).

Of N layers a tower of n takes every ⌊N/n⌋-th, beginning with the first, and of every tensor what
comes first: the first channels, heads and hidden units. Towers are OpenCLIP's own transformers.
"""

import re
from typing import NamedTuple

import torch
from open_clip.model import resize_pos_embed
from torch import Tensor, nn

_LAYER = re.compile(r"(transformer\.resblocks\.)(\d+)(\..*)")


class Tower(NamedTuple):
    """A transformer of an OpenCLIP model."""

    tensors: dict[str, Tensor]
    """Its parameters by their names in the tower; they share the model's memory."""
    layers: int
    heads: int
    width: int


def tower(model: nn.Module, modality: str) -> Tower | None:
    """A model's image or text tower; None where it is no transformer of OpenCLIP's own."""
    module = model.visual if modality == "image" else getattr(model, "text", model)
    blocks = getattr(getattr(module, "transformer", None), "resblocks", None)
    if not blocks:
        return None
    tensors = module.state_dict()
    if module is model:  # a CLIP, whose text tower is the rest of it
        other = ("visual.", "logit_")
        tensors = {name: t for name, t in tensors.items() if not name.startswith(other)}
    attention = blocks[0].attn
    return Tower(tensors, len(blocks), attention.num_heads, len(tensors["positional_embedding"][0]))


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Overwrite a student's transformers and temperature with parts of a larger model's.

    Args:
        student, teacher: OpenCLIP models.

    Returns:
        For each tower a sentence on what it took; one that is no transformer takes nothing.

    Raises:
        ValueError: a tower of the student is no part of the teacher's, or neither can inherit.
    """
    taken = []
    for modality in ("image", "text"):
        own, other = tower(student, modality), tower(teacher, modality)
        if own is None or other is None:
            taken.append(f"{modality} tower: nothing, it is no transformer of OpenCLIP's in both")
            continue
        if modality == "image":
            key = "visual.positional_embedding"
            resized = {key: other.tensors["positional_embedding"]}
            resize_pos_embed(resized, student)
            other.tensors["positional_embedding"] = resized[key]
        taken.append(f"{modality} tower: {_inherit(own, other, modality)}")
    if all("nothing" in sentence for sentence in taken):
        raise ValueError("neither tower is a transformer of OpenCLIP's own in both models")
    for name in ("logit_scale", "logit_bias"):
        values = getattr(student, name), getattr(teacher, name)
        if None not in values:
            values[0].copy_(values[1])
    return taken


def _inherit(own: Tower, other: Tower, modality: str) -> str:
    if own.layers > other.layers:
        raise ValueError(f"its {modality} tower has {other.layers} layers, the student's more")
    if own.width // own.heads != other.width // other.heads:
        raise ValueError(
            f"a head of its {modality} tower is {other.width // other.heads} wide, of the "
            f"student's {own.width // own.heads}"
        )
    step = other.layers // own.layers
    for name, tensor in own.tensors.items():
        source = _LAYER.sub(lambda match: f"{match[1]}{int(match[2]) * step}{match[3]}", name)
        if source not in other.tensors:
            raise ValueError(f"its {modality} tower has no {source}")
        tensor.copy_(_first(other.tensors[source], tensor.shape, name, modality))
    layers = ", ".join(str(step * i) for i in range(own.layers))
    return (
        f"layers {layers} of {other.layers}, the first {own.width} of {other.width} channels, "
        f"{own.heads} of {other.heads} heads"
    )


def _first(tensor: Tensor, shape: torch.Size, name: str, modality: str) -> Tensor:
    """What comes first in every dimension; of queries, keys and values in each of the three."""
    stacked = ".in_proj_" in name
    have, wanted = list(tensor.shape), list(shape)
    kernel = 2 if name == "conv1.weight" else len(have)  # patches are as large or no part
    larger = len(have) == len(wanted) and all(h >= w for h, w in zip(have, wanted))
    if not larger or have[kernel:] != wanted[kernel:]:
        raise ValueError(f"{name} of its {modality} tower is {have}, of the student's {wanted}")
    if stacked:
        tensor, wanted = tensor.unflatten(0, (3, -1)), [3, wanted[0] // 3, *wanted[1:]]
    part = tensor[tuple(slice(n) for n in wanted)]
    return part.flatten(0, 1) if stacked else part
