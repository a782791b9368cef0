"""Multiply–accumulates of the models, counted from their architectures without any weights, and
what the paper's classification methods come to by them.

Models are built on torch's meta device: shapes and no storage. A MAC is half of what torch's
``FlopCounterMode`` counts: convolutions and matrix products (attention's among them), as published
figures have it; biases, norms, activations and look-ups are left out.
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import open_clip
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, ResNet

from cifd_clip import METHODS, RDMBank, Student, World
from cifd_clip.classification.models import SIMPLE_CNNS, simple_cnn
from cifd_clip.classification.rdm import ClassifyingRDMs
from cifd_clip.losses import Features
from cifd_clip.student import Pooled, embedding_dim
from training.errors import UsageError

#: A sample's cost in forwards: a part that trains has the backward's two products besides.
FROZEN, TRAINED = 1, 3
#: Rows of the batches that are counted.
BATCH = 2
#: Blocks per stage of ResNets between ResNet-18 and ResNet-34, possible assistants.
RESNETS = {
    "resnet20": [2, 2, 3, 2],
    "resnet22": [2, 3, 3, 2],
    "resnet24": [2, 3, 4, 2],
    "resnet26": [3, 3, 3, 3],
    "resnet28": [3, 3, 4, 3],
    "resnet30": [3, 4, 4, 3],
    "resnet32": [3, 4, 5, 3],
}


class Clip(NamedTuple):
    """A CLIP model: forward MACs per sample, and parameters of its towers."""

    name: str
    dim: int
    image_macs: float
    text_macs: float
    image_params: int
    text_params: int

    @property
    def macs(self) -> float:
        """Of an image and a text, forward."""
        return self.image_macs + self.text_macs

    @property
    def params(self) -> int:
        """Of both towers, with the token table and the temperature."""
        return self.image_params + self.text_params


class Module(NamedTuple):
    """Anything else that runs: forward MACs per sample, and parameters."""

    macs: float
    params: int


def count_macs(function: Callable[..., Any], *inputs: Any) -> float:
    """Forward MACs of one call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops() / 2


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def build_clip(name: str, flag: str = "--model", **options: Any) -> nn.Module:
    """An OpenCLIP model on the meta device.

    Args:
        name: of OpenCLIP, of an added config, ``local-dir:`` or ``hf-hub:``.
        flag: where the name comes from, for the message.
        options: ``force_*`` arguments of ``open_clip.create_model``.

    Raises:
        UsageError: there is no such model.
    """
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # OpenCLIP warns of missing weights, which are not wanted
    try:
        with torch.device("meta"):
            return open_clip.create_model(name, device="meta", load_weights=False, **options)
    except (RuntimeError, OSError, ValueError) as error:
        raise UsageError(f"{flag} '{name}' could not be made: {error}") from error
    finally:
        root.setLevel(level)


@lru_cache
def clip(name: str, flag: str = "--model", options: tuple[tuple[str, Any], ...] = ()) -> Clip:
    """Count a CLIP model; ``options`` as in `build_clip`, as pairs."""
    model = build_clip(name, flag, **dict(options)).requires_grad_(False)
    images, texts = _inputs(model, BATCH)
    image_params = parameters(model.visual)
    return Clip(
        name,
        embedding_dim(model),
        count_macs(model.encode_image, images) / BATCH,
        count_macs(model.encode_text, texts) / BATCH,
        image_params,
        parameters(model) - image_params,
    )


def head(
    method: str,
    student: str,
    teacher_dims: tuple[int, ...],
    rows: int,
    assistants: int = 0,
    options: tuple[tuple[str, Any], ...] = (),
) -> Module:
    """What a method adds to the student's towers: projectors, bottlenecks, similarities.

    Args:
        method: a name of `cifd_clip.METHODS`.
        student: the student's architecture.
        teacher_dims: T of each teacher.
        rows: of the global batch, whose similarities contrastive terms compute.
        assistants: RDMs beside the first teacher.
        options: of the student, as in `clip`.
    """
    return _head(method, clip(student, "--model", options), teacher_dims, rows, assistants, options)


@lru_cache
def _head(method, student: Clip, dims, rows, assistants, options) -> Module:
    with torch.device("meta"):
        cut = Student(build_clip(student.name, **dict(options)).requires_grad_(False))
        module = METHODS[method](cut, list(dims)).requires_grad_(False)
        widths = cut.widths
        pooled = _pooled(rows, widths)
        teachers = [_features(rows, dim, space) for space, dim in enumerate(dims)]
        teachers += teachers[:1] * assistants
        macs = count_macs(module, cut, pooled, teachers, World(), None)
        macs -= count_macs(cut.embed, pooled)  # the towers' own projections, counted with them
    return Module(macs / rows, parameters(module))


@lru_cache
def bank(rates: int, dim: int, hidden: int | None = None, channels: int | None = None) -> Module:
    """An RDM bank, both modalities and all rates: forward MACs per pair of embeddings."""
    with torch.device("meta"):
        module = RDMBank({}, [1.0] * rates, dim, hidden, channels).requires_grad_(False)
        embeddings = torch.empty(BATCH, dim)
        macs = count_macs(module, embeddings, embeddings, None)
    return Module(macs / BATCH, parameters(module))


@lru_cache
def classifier(name: str, size: int) -> Module:
    """A classifier: forward MACs of an image of ``size`` × ``size`` pixels.

    Args:
        name: of torchvision, ``resnetN`` of `RESNETS`, or a CNN of the paper's Table 8.
        size: in pixels.
    """
    with torch.device("meta"):
        if name in SIMPLE_CNNS:
            model = simple_cnn(name)
        elif name in RESNETS:
            model = ResNet(BasicBlock, RESNETS[name])
        else:
            model = torchvision.models.get_model(name)
        macs = count_macs(model.eval().requires_grad_(False), torch.empty(1, 3, size, size))
    return Module(macs, parameters(model))


@lru_cache
def classifying_rdm(dim: int, classes: int, form: str) -> Module:
    """One RDM with its classifier: forward MACs per embedding."""
    with torch.device("meta"):
        module = ClassifyingRDMs([1.0], dim, classes, form).requires_grad_(False)
        macs = count_macs(module, torch.empty(1, dim), None)
    return Module(macs, parameters(module))


def _inputs(model: nn.Module, rows: int) -> tuple[Tensor, Tensor]:
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.empty(rows, 3, height, width, device="meta")
    return images, torch.zeros(rows, model.context_length, dtype=torch.long, device="meta")


def _pooled(rows: int, widths: dict[str, int]):
    return Pooled(*(torch.empty(rows, widths[m]) for m in Pooled._fields))


def _features(rows: int, dim: int, space: int) -> Features:
    return Features(torch.empty(rows, dim), torch.empty(rows, dim), torch.empty(()), None, space)


# -- the paper's classifiers -----------------------------------------------------------------------

#: Appendix D.2's settings.
IMAGES, RDM_EPOCHS, STUDENT_EPOCHS, KD_EPOCHS = 1_280_000, 30, 88, 100
#: Figure 1(b), relative to KD, and Table 1's costs (section 4.3), relative to CIFD.
FIGURE_1B = {"kd": 1.0, "cifd": 1.08, "takd": 3.5, "dgkd": 4.5}
TABLE_1 = {"takd": 2, "dgkd": 5}


def chain_macs(
    models: Sequence[float],
    rdm: float = 0,
    rdm_epochs: float = 0,
    passes: int = FROZEN,
    live: bool = True,
) -> dict[str, float]:
    """MACs per image of an epoch, by method; every model is trained for the same epochs.

    Args:
        models: forward MACs of teacher, assistants and student.
        rdm: forward MACs of all RDMs.
        rdm_epochs: of stage 1, as a share of the student's.
        passes: forwards' worth of what trains: 3 with the backward, 1 without.
        live: whether frozen models run on every image, or their outputs are stored.
    """
    teacher, student = live * models[0], passes * models[-1]
    pairs = [(models[:i], passes * models[i]) for i in range(1, len(models))]
    return {
        "kd": teacher + student,
        "cifd": teacher + live * rdm + student + rdm_epochs * (teacher + passes * rdm),
        "takd": sum(live * larger[-1] + trained for larger, trained in pairs),
        "dgkd": sum(live * sum(larger) + trained for larger, trained in pairs),
    }


def ffcv_pixels(epoch: int) -> int:
    """Side of FFCV's training images, its ``rn18_88_epochs.yaml`` (the paper's [62])."""
    ramp = min(max((epoch - 65) / (76 - 65), 0), 1)
    return round((160 + ramp * (192 - 160)) / 32) * 32


def appendix_d2() -> list[tuple[str, str, float, float]]:
    """Appendix D.2: quantity, how it is counted, MACs as printed, MACs as counted."""
    teacher, student = (classifier(n, 224).macs for n in ("resnet34", "resnet18"))
    rdm = classifying_rdm(512, 1000, "reconstruct").macs
    stage1, stage2 = RDM_EPOCHS * IMAGES, STUDENT_EPOCHS * IMAGES
    ffcv = sum(
        classifier(name, ffcv_pixels(epoch)).macs * IMAGES
        for name in ("resnet34", "resnet18")
        for epoch in range(STUDENT_EPOCHS)
    )
    fitting = 3 * 5 * 512**2  # what 1.31 M per RDM amounts to
    both = chain_macs([teacher, student], 3 * rdm, RDM_EPOCHS / STUDENT_EPOCHS, TRAINED)["cifd"]
    return [
        ("an RDM, an image", "512-512-512-512-512 and 1000 classes", 1.31e6, rdm),
        ("", "five layers of 512 × 512", 1.31e6, fitting / 3),
        ("three RDMs, stage 1", "those, forward only", 151e12, fitting * stage1),
        ("", "with classifier and backward", 151e12, 3 * TRAINED * rdm * stage1),
        ("teacher, stage 1", "30 epochs of 1.28 M images at 224 px", 142e15, teacher * stage1),
        ("", "one epoch, then cached", 4.7e15, teacher * IMAGES),
        ("RDMs, stage 2", "those, 88 epochs", 0.38e15, fitting * stage2),
        ("stage 2", "forward only, 88 epochs, 224 px", 619e15, (teacher + student) * stage2),
        ("", "and the student's backward", 619e15, (teacher + TRAINED * student) * stage2),
        ("", "forward only, at FFCV's 160 and 192 px", 619e15, ffcv),
        (
            "total",
            "forward only",
            762e15,
            (teacher + fitting) * stage1 + (teacher + student + fitting) * stage2,
        ),
        ("", "with classifier and backward", 762e15, both * stage2),
    ]


def figure_1b() -> dict[str, dict[str, float]]:
    """Figure 1(b), relative to KD: ``{way of counting: {method: cost}}``; one ResNet-26 assists."""
    sizes = [classifier(n, 224).macs for n in ("resnet34", "resnet26", "resnet18")]
    rdm = 3 * classifying_rdm(512, 1000, "reconstruct").macs
    forward = chain_macs(sizes, rdm, RDM_EPOCHS / STUDENT_EPOCHS)
    backward = chain_macs(sizes, rdm, RDM_EPOCHS / STUDENT_EPOCHS, TRAINED)
    spared = (RDM_EPOCHS - 1) / STUDENT_EPOCHS * sizes[0]
    ways = {
        "printed": FIGURE_1B,
        "forward, KD for 100 epochs": {
            "kd": forward["kd"] * KD_EPOCHS / STUDENT_EPOCHS,
            "cifd": forward["cifd"],
        },
        "forward, equal epochs": forward,
        "with backward": backward,
        "and stage 1 cached": {**backward, "cifd": backward["cifd"] - spared},
    }
    return {way: {m: v / found["kd"] for m, v in found.items()} for way, found in ways.items()}


def assistants_that_fit() -> list[str]:
    """Which single assistant, trained for how long, gives the 3.5 and 4.5 of Figure 1(b)."""
    teacher, student = (classifier(n, 224).macs for n in ("resnet34", "resnet18"))
    found = []
    for name in (*RESNETS, "resnet34"):
        costs = chain_macs([teacher, classifier(name, 224).macs, student])
        for epochs in range(80, 260, 10):
            scale = epochs / KD_EPOCHS / costs["kd"]
            if all(abs(costs[m] * scale - FIGURE_1B[m]) < 0.05 for m in ("takd", "dgkd")):
                found.append(f"{name} for {epochs} epochs")
    return found


def table_1() -> dict[str, dict[str, float]]:
    """Costs of Table 1's methods, relative to CIFD with one RDM: ``{way: {method: cost}}``."""
    models = [classifier(f"cnn{n}", 32).macs for n in (10, 8, 6, 4, 2)]
    rdm = classifying_rdm(512, 100, "classify").macs
    ways = {
        "printed": {"cifd": 1.0, **TABLE_1},
        "forward": chain_macs(models, rdm, 1.0),
        "with backward": chain_macs(models, rdm, 1.0, TRAINED),
        "and frozen models cached": chain_macs(models, rdm, 1.0, TRAINED, live=False),
    }
    return {way: {m: v / found["cifd"] for m, v in found.items()} for way, found in ways.items()}
