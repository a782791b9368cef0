"""Trainers as `training.main` makes them, from a command line, without its data and directories."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import open_clip
import torch
from torch import Tensor

from cifd_clip import DECLARED, RDMBank, Teacher, World
from training.clip.flags import named_files, parse, resolve
from training.clip.models import add_model_configs
from training.clip.stages import RDMStage, StudentStage
from training.data.loader import Batch
from training.engine.trainer import Trainer

MODELS = Path(__file__).parent / "models"
CPU = torch.device("cpu")
SIZE = 32

#: Flags of some methods under which every term matters; those of the others are their defaults.
MATTER = {
    "clipkd": ["--lambda-fd", "20"],
    "cifd": ["--lambda-cl", "0.3", "--lambda-i", "0.05"],
}
#: Every method, and some in more than one way.
CASES = {
    **{name: [name, *MATTER.get(name, [])] for name in DECLARED if name != "mobileclip"},
    "mobileclip, two teachers": ["mobileclip", "--lambda-kd", "0.7"],
    "cifd, embedding, clean": [
        *["cifd", *MATTER["cifd"]],
        *["--ibm-site", "embedding", "--ibm-branch", "distill", "--rdm-output", "noisy"],
    ],
    "rdm": ["rdm", "--rates", "1000", "30"],
}
CAPTIONS = [
    f"a {colour} {number} {where} a blue seven"
    for colour in ("red", "green", "dark yellow", "white")
    for number in ("three", "four", "nine")
    for where in ("above", "to the left of", "under")
]


def prepare(directory: Path) -> Path:
    """Weights of a teacher, and its bank, where `trainer` looks for them."""
    add_model_configs([str(MODELS / "tiny-teacher.json")])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = open_clip.create_model("tiny-teacher")
    torch.save(model.state_dict(), directory / "teacher.pt")
    owner = Teacher(model, "tiny-teacher")
    generator = torch.Generator().manual_seed(2)
    RDMBank(owner.identity, [1000.0, 30.0], owner.dim, generator=generator).save(directory / "bank")
    return directory


def trainer(case: str, directory: Path, *flags: str, world: World | None = None) -> Trainer:
    """The trainer of a case; ``flags`` come last and win."""
    method, *own = CASES[case]
    weights = str(directory / "teacher.pt")
    argv = ["--train-data", "none", "--distill", method, *own, "--precision", "fp32"]
    argv += ["--model", "tiny-student", "--warmup", "2", "--epochs", "1"]
    argv += ["--model-config", *(str(MODELS / f"tiny-{m}.json") for m in ("student", "teacher"))]
    if "two teachers" in case:
        argv += ["--distill-model", "tiny-teacher,tiny-teacher"]
        argv += ["--distill-pretrained", f"{weights},{weights}"]
    elif method != "none":
        argv += ["--distill-model", "tiny-teacher", "--distill-pretrained", weights]
    if method == "cifd":
        argv += ["--rdm-bank", str(directory / "bank")]
    world = world or World()
    given = parse([*argv, *flags])
    config = resolve(given, world.size, **named_files(given))
    add_model_configs(config.model_config)
    rdm = method == "rdm"
    stage = RDMStage(config, CPU) if rdm else StudentStage(config, CPU, world, config.banks)
    stage.task.train()
    return Trainer(stage, config, 100, world, CPU, config.precision)


@cache
def tokens() -> Tensor:
    """Of every caption."""
    return open_clip.get_tokenizer("tiny-student")(CAPTIONS)


def batch(rows: int, seed: int = 0) -> Batch:
    """What the loader would deliver: uint8 images and tokens of captions."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(CAPTIONS), (rows,), generator=generator)
    return Batch(
        images=[torch.randint(256, (rows, 3, SIZE, SIZE), generator=generator).to(torch.uint8)],
        texts=[tokens()[chosen]],
        rows=torch.arange(rows),
        views=torch.zeros(rows, dtype=torch.int64),
        keys=[str(i) for i in range(rows)],
    )


def part(whole: Batch, rank: int, ranks: int) -> Batch:
    """A rank's consecutive rows."""
    size = len(whole) // ranks
    rows = slice(rank * size, (rank + 1) * size)
    return replace(
        whole,
        images=[t[rows] for t in whole.images],
        texts=[t[rows] for t in whole.texts],
        rows=whole.rows[rows],
        views=whole.views[rows],
        keys=whole.keys[rows],
    )


def gradients(made: Trainer) -> dict[str, Tensor]:
    """Gradients of the last step; a trainable parameter without one is an error."""
    found = {}
    for name, parameter in made.stage.task.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} trains, but no loss reaches it"
            found[name] = parameter.grad.detach().clone()
    return found


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference, relative to its tensor's largest element, and where it is."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    largest = max(v.abs().max().item() for v in expected.values())

    def off(name: str) -> float:
        # a tensor whose gradient is nothing but rounding is measured against the others
        scale = max(expected[name].abs().max().item(), 1e-3 * largest)
        return (found[name] - expected[name]).abs().max().item() / scale

    return max((off(name), name) for name in expected)
