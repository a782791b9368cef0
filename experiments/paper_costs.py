"""The paper's arithmetic, counted again.

Appendix D.2, Figure 1(b) and Table 1's costs. Settings that the paper does not print are inferred;
docs/cost.md says which and why.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torchvision
from torchvision.models.resnet import BasicBlock, ResNet

from cifd_clip import RDMBank
from cifd_clip.classification.models import SIMPLE_CNNS, simple_cnn
from cifd_clip.files import write_json
from eval.cost import macs
from eval.cost.macs import Count
from eval.cost.report import short, table
from eval.cost.stages import FROZEN, TRAINED
from training.engine.environment import environment
from training.engine.flags import CommandLine
from training.errors import cli

#: Appendix D.2's settings.
IMAGES, RDM_EPOCHS, STUDENT_EPOCHS, KD_EPOCHS = 1_280_000, 30, 88, 100
#: Figure 1(b), relative to KD, and Table 1's costs (section 4.3), relative to CIFD.
FIGURE_1B = {"kd": 1.0, "cifd": 1.08, "takd": 3.5, "dgkd": 4.5}
TABLE_1 = {"takd": 2, "dgkd": 5}
#: FFCV's schedule (the paper's [62], ``rn18_88_epochs.yaml``): epochs by the side of their images.
FFCV = {160: 71, 192: 17}


@lru_cache
def classifier(name: str, size: int) -> Count:
    """Forward MACs of ``size`` × ``size`` pixels in a model of torchvision's or of Table 8's."""
    with torch.device("meta"):
        if name in SIMPLE_CNNS:
            model = simple_cnn(name)
        elif name == "resnet26":  # between ResNet-18 and ResNet-34: an assistant
            model = ResNet(BasicBlock, [3, 3, 3, 3])
        else:
            model = torchvision.models.get_model(name)
        forward = macs.count_macs(model.eval().requires_grad_(False), torch.empty(1, 3, size, size))
    return Count(forward, macs.parameters(model))


@lru_cache
def classifying_rdm(dim: int, classes: int, form: str) -> Count:
    """One RDM with its classifier: forward MACs per embedding."""
    with torch.device("meta"):
        bank = RDMBank({}, [1.0], dim, classes=classes, form=form, scale=1.0)
        module = bank.image.requires_grad_(False)
        forward = macs.count_macs(module, torch.empty(1, dim), None)
    return Count(forward, macs.parameters(module))


def chain_macs(
    models: Sequence[float],
    rdm: float = 0,
    rdm_epochs: float = 0,
    passes: int = FROZEN,
    live: bool = True,
) -> dict[str, float]:
    """MACs per image of an epoch, by method; every model is trained for the same epochs.

    Args:
        models, rdm: forward MACs of teacher, assistants and student, and of all RDMs.
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


def appendix_d2() -> list[tuple[str, str, float, float]]:
    """Appendix D.2: quantity, how it is counted, MACs as printed, MACs as counted."""
    teacher, student = (classifier(n, 224).macs for n in ("resnet34", "resnet18"))
    rdm = classifying_rdm(512, 1000, "reconstruct").macs
    stage1, stage2 = RDM_EPOCHS * IMAGES, STUDENT_EPOCHS * IMAGES
    ffcv = IMAGES * sum(
        epochs * (classifier("resnet34", side).macs + classifier("resnet18", side).macs)
        for side, epochs in FFCV.items()
    )
    fitting = 3 * 5 * 512**2  # what 1.31 M per RDM amounts to
    forward = (teacher + fitting) * (stage1 + stage2) + student * stage2
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
        ("total", "forward only", 762e15, forward),
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
    return relative(ways, "kd")


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
    return relative(ways, "cifd")


def relative(ways: dict[str, dict[str, float]], to: str) -> dict[str, dict[str, float]]:
    """Costs over that of one method."""
    return {way: {m: v / costs[to] for m, v in costs.items()} for way, costs in ways.items()}


def ways_table(title: str, ways: dict[str, dict[str, float]]) -> str:
    """Methods as rows, ways of counting as columns; the last way has every method."""
    methods = [*ways.values()][-1]
    rows = [
        [method, *(f"{costs[method]:.3f}" if method in costs else "" for costs in ways.values())]
        for method in methods
    ]
    return table([title, *ways], rows)


def si(value: float) -> str:
    """Four significant digits and M, G, T or P."""
    power = max(2, min(5, int(math.log10(value)) // 3))
    return f"{short(value / 1000**power)} {' kMGTP'[power]}"


def main(argv: list[str]) -> None:
    """Print the paper's figures beside ours."""
    parser = CommandLine("experiments.paper_costs", __doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON too")
    args = parser.parse_args(argv)
    values = {"appendix_d2": appendix_d2(), "figure_1b": figure_1b(), "table_1": table_1()}
    head = ["appendix D.2", "counted as", "printed", "counted", "ratio"]
    rows = [[what, how, si(p), si(c), f"{c / p:.3f}"] for what, how, p, c in values["appendix_d2"]]
    print(
        table(head, rows, words=2),
        ways_table("Figure 1(b), × KD", values["figure_1b"]),
        ways_table("Table 1, × CIFD", values["table_1"]),
        sep="\n",
        end="",
    )
    if args.json:
        write_json(args.json, {**values, "environment": environment()})


if __name__ == "__main__":
    cli(main)
