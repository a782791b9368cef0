"""The student: a stock OpenCLIP model whose towers can be cut before their final projection.

The cut is where the Information Bottleneck adds its noise: W is the pooled feature, the tower's own
projection the decoder (section 3.2). Every tower OpenCLIP 3.x builds is taken apart with its own
public parts; where the projection can't be separated (the attention pool of a ModifiedResNet, an
MLP head), the cut falls on the embedding itself.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from open_clip import CLIP
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer, text_global_pool
from torch import Tensor, nn

from cifd_clip.losses import Features

SITES = ("projection", "embedding")


class Pooled(NamedTuple):
    """W of both towers: the pooled features before the cut's projection."""

    image: Tensor
    """(b, C_I)"""
    text: Tensor
    """(b, C_L)"""


class StudentEmbeddings(NamedTuple):
    """The student's output before normalisation, and its temperature."""

    image: Tensor
    """(b, D)"""
    text: Tensor
    """(b, D)"""
    logit_scale: Tensor
    """() exponentiated."""
    logit_bias: Tensor | None = None

    def features(self) -> Features:
        """The unit-norm features that ship."""
        return Features(
            F.normalize(self.image, dim=-1),
            F.normalize(self.text, dim=-1),
            self.logit_scale,
            self.logit_bias,
        )


class Cut(NamedTuple):
    """A tower in two halves: ``project(pool(inputs))`` is what the tower computes."""

    pool: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Tensor]
    width: int


class Student(nn.Module):
    """An OpenCLIP model, cut for the bottleneck.

    Args:
        model: ``CLIP`` or ``CustomTextCLIP``; its ``state_dict`` is what ships.
        site: where the cut falls: before the final ``projection`` wherever the tower has a
            separable one, or at the ``embedding`` before normalisation.
    """

    def __init__(self, model: nn.Module, site: str = "projection"):
        super().__init__()
        self.model, self.site = model, site
        self.dim = embedding_dim(model)
        whole = site == "embedding"
        self._image = _whole(model.encode_image, self.dim) if whole else _cut_image(model, self.dim)
        self._text = _whole(model.encode_text, self.dim) if whole else _cut_text(model, self.dim)

    def __deepcopy__(self, memo: dict) -> "Student":
        # The halves hold parts of one model: a copy (an average of weights) is cut anew.
        return Student(copy.deepcopy(self.model, memo), self.site)

    @property
    def widths(self) -> dict[str, int]:
        """Width of W by modality."""
        return {"image": self._image.width, "text": self._text.width}

    def forward(self, images: Tensor, texts: Tensor) -> Pooled:
        """W of a batch of normalised images (b, 3, H, W) and tokens (b, context)."""
        return Pooled(self._image.pool(images), self._text.pool(texts))

    def embed(self, pooled: Pooled) -> StudentEmbeddings:
        """The embeddings that W projects to, in float32."""
        bias = self.model.logit_bias
        return StudentEmbeddings(
            self._image.project(pooled.image).float(),
            self._text.project(pooled.text).float(),
            self.model.logit_scale.exp().float(),
            None if bias is None else bias.float(),
        )


def embedding_dim(model: nn.Module) -> int:
    """D of an OpenCLIP model, or of one tower: of OpenCLIP, or a timm model without classifier."""
    visual = getattr(model, "visual", model)
    if isinstance(visual, TimmModel):
        head = [m for m in visual.head.modules() if hasattr(m, "out_features")]
        return (
            head[-1].out_features if head else visual.trunk.num_classes or visual.trunk.num_features
        )
    return visual.output_dim if hasattr(visual, "output_dim") else visual.head_hidden_size


def _whole(encode: Callable[[Tensor], Tensor], dim: int) -> Cut:
    return Cut(encode, lambda embedding: embedding, dim)


def _matmul(weight: nn.Parameter) -> Callable[[Tensor], Tensor]:
    return lambda pooled: pooled.to(weight.dtype) @ weight


def _linear(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda pooled: layer(pooled.to(layer.weight.dtype))


def _projection(weight: nn.Module | nn.Parameter) -> Callable[[Tensor], Tensor]:
    return _linear(weight) if isinstance(weight, nn.Linear) else _matmul(weight)


def _cut_image(model: nn.Module, dim: int) -> Cut:
    visual = model.visual
    if isinstance(visual, VisionTransformer) and visual.proj is not None:

        def pool(images: Tensor) -> Tensor:
            return visual._pool(visual.transformer(visual._embeds(images)))[0]

        return Cut(pool, _matmul(visual.proj), visual.proj.shape[0])
    if isinstance(visual, TimmModel) and isinstance(getattr(visual.head, "proj", None), nn.Linear):
        layers = list(visual.head.children())

        def pool(images: Tensor) -> Tensor:
            x = visual.trunk(images)
            for layer in layers[:-1]:
                x = layer(x)
            return x

        return Cut(pool, _linear(layers[-1]), layers[-1].in_features)
    return _whole(model.encode_image, dim)


def _cut_text(model: nn.Module, dim: int) -> Cut:
    if isinstance(model, CLIP) and model.text_projection is not None:

        def pool(texts: Tensor) -> Tensor:
            dtype = model.transformer.get_cast_dtype()
            x = model.token_embedding(texts).to(dtype) + model.positional_embedding.to(dtype)
            x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
            return text_global_pool(x, texts, model.text_pool_type, eos_token_id=model.text_eos_id)

        return Cut(pool, _projection(model.text_projection), _fan_in(model.text_projection))
    text = getattr(model, "text", None)
    if isinstance(text, TextTransformer) and text.text_projection is not None:

        def pool(texts: Tensor) -> Tensor:
            x, mask = text._embeds(texts)
            x = text.transformer(x, attn_mask=mask)
            if text.cls_emb is not None:
                return text.ln_final(text_global_pool(x, pool_type="last"))
            x = text.ln_final(x)
            return text_global_pool(x, texts, text.pool_type, eos_token_id=text.eos_id)

        return Cut(pool, _projection(text.text_projection), _fan_in(text.text_projection))
    if isinstance(text, HFTextEncoder) and isinstance(text.proj, nn.Linear):

        def pool(texts: Tensor) -> Tensor:
            mask = (texts != text.config.pad_token_id).long()
            return text.pooler(text.transformer(input_ids=texts, attention_mask=mask), mask)

        return Cut(pool, _linear(text.proj), text.proj.in_features)
    return _whole(model.encode_text, dim)


def _fan_in(projection: nn.Module | nn.Parameter) -> int:
    return projection.in_features if isinstance(projection, nn.Linear) else projection.shape[0]
