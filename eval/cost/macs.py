"""Multiply–accumulates of the models, counted from their architectures without any weights.

Models are built on torch's meta device: shapes and no storage. A MAC is half of what torch's
``FlopCounterMode`` counts: convolutions and matrix products (attention's among them), as published
figures have it; biases, norms, activations and look-ups are left out.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cifd_clip import METHODS, RDMBank, Student, World
from cifd_clip.losses import Features
from cifd_clip.student import Pooled, embedding_dim
from training.clip.models import model_config, quiet
from training.errors import UsageError

#: Rows of the batches that are counted.
BATCH = 2
#: Name and value of each.
Options = tuple[tuple[str, Any], ...]


class Count(NamedTuple):
    """Anything that runs: forward MACs per sample, and parameters."""

    macs: float
    params: int


class Clip(NamedTuple):
    """A CLIP model's towers; the token table and the temperature are the text tower's."""

    name: str
    dim: int
    image: Count
    text: Count

    @property
    def macs(self) -> float:
        return self.image.macs + self.text.macs

    @property
    def params(self) -> int:
        return self.image.params + self.text.params


def count_macs(function: Callable[..., Any], *inputs: Any) -> float:
    """Forward MACs of one call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops() / 2


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def build_clip(name: str, flag: str = "--model", **options: Any) -> nn.Module:
    """An OpenCLIP model on the meta device, with ``force_*`` options of ``create_model``.

    Raises:
        UsageError: there is no such model; names the ``flag``.
    """
    model_config(name, flag)
    try:
        with quiet(), torch.device("meta"):  # OpenCLIP warns of missing weights
            return open_clip.create_model(name, device="meta", load_weights=False, **options)
    except (RuntimeError, OSError, ValueError) as error:
        raise UsageError(f"{flag} '{name}' could not be made: {error}") from error


@lru_cache
def clip(name: str, flag: str = "--model", forced: Options = ()) -> Clip:
    """Count a CLIP model; ``forced`` are options of `build_clip`."""
    model = build_clip(name, flag, **dict(forced)).requires_grad_(False)
    images, texts = _inputs(model, BATCH)
    image = Count(count_macs(model.encode_image, images) / BATCH, parameters(model.visual))
    rest = parameters(model) - image.params
    text = Count(count_macs(model.encode_text, texts) / BATCH, rest)
    return Clip(name, embedding_dim(model), image, text)


@lru_cache
def head(
    method: str,
    student: str,
    teacher_dims: tuple[int, ...],
    rows: int,
    rdms: int = 0,
    options: Options = (),
    forced: Options = (),
) -> Count:
    """What a method adds to the student's towers: projectors, bottlenecks, similarities.

    Args:
        method, options: a name of `cifd_clip.METHODS`, and its options.
        student, forced: the student's architecture, as of `clip`.
        teacher_dims: T of each teacher.
        rows: of the global batch, whose similarities contrastive terms compute.
        rdms: RDMs beside the first teacher.
    """
    with torch.device("meta"):
        cut = Student(build_clip(student, **dict(forced)).requires_grad_(False))
        own = rdms if dict(options).get("projector") == "each" else 0
        dims = [*teacher_dims, *teacher_dims[:1] * own]
        module = METHODS[method](cut, dims, dict(options)).requires_grad_(False)
        pooled = Pooled(*(torch.empty(rows, cut.widths[m]) for m in Pooled._fields))
        teachers = [_features(rows, dim, space) for space, dim in enumerate(dims)]
        teachers += teachers[:1] * (rdms - own)
        macs = count_macs(module, cut, pooled, teachers, World(), None)
        macs -= count_macs(cut.embed, pooled)  # the towers' own projections, counted with them
    return Count(macs / rows, parameters(module))


@lru_cache
def bank(rates: int, dim: int, hidden: tuple[int, ...] = (), channels: int | None = None) -> Count:
    """An RDM bank, both modalities and all rates: forward MACs per pair of embeddings."""
    with torch.device("meta"):
        outer = hidden[0] if hidden else dim
        widths = hidden if len(hidden) == 3 else (outer, channels or dim, outer)
        module = RDMBank({}, [1.0] * rates, dim, widths).requires_grad_(False)
        embeddings = torch.empty(BATCH, dim)
        macs = count_macs(module, embeddings, embeddings, None)
    return Count(macs / BATCH, parameters(module))


def _inputs(model: nn.Module, rows: int) -> tuple[Tensor, Tensor]:
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.empty(rows, 3, height, width, device="meta")
    return images, torch.zeros(rows, model.context_length, dtype=torch.long, device="meta")


def _features(rows: int, dim: int, space: int) -> Features:
    return Features(torch.empty(rows, dim), torch.empty(rows, dim), torch.empty(()), None, space)
