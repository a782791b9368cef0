"""What was trained on a teacher's embeddings, as a folder: ``config.json`` and its weights.

The configuration of a bank is read and checked here without importing torch.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifd_clip.files import BadFile, read_json, read_tensors, write_json, write_tensors
from cifd_clip.names import nearby

if TYPE_CHECKING:
    from torch import nn

#: Of the folder's files.
FORMAT = 1
BANK_WEIGHTS = "bank.safetensors"
#: Of any layer: what a file may make this process allocate has a bound.
MAX_WIDTH, MAX_RATES, MAX_CLASSES = 1 << 16, 1 << 10, 1 << 20
#: Of a CLIP teacher, in the order in which everything takes them.
MODALITIES = ("image", "text")
#: What an RDM's last layer gives back: the teacher's embedding, or logits alone.
FORMS = ("reconstruct", "classify")


def save(module: "nn.Module", config: dict[str, Any], folder: Path, weights: str) -> None:
    """Write a module's weights, then the configuration, into a folder."""
    write_tensors(folder / weights, module.state_dict())
    write_json(folder / "config.json", config, FORMAT)


def load(build: "Callable[[], nn.Module]", file: Path) -> "nn.Module":
    """A frozen module in evaluation mode, with the weights of a file.

    Args:
        build: makes the module; it is called on torch's meta device.
        file: of weights, see `save`.

    Raises:
        BadFile: they are damaged, not finite, or another module's.
    """
    import torch

    with torch.device("meta"):
        module = build()
    tensors = read_tensors(file, module.state_dict())
    module.to_empty(device="cpu").load_state_dict(tensors)
    return module.requires_grad_(False).eval()


def modalities_of(teacher: dict[str, Any]) -> tuple[str, ...]:
    """The modalities that a teacher embeds, by its identity; one that names none has both."""
    return tuple(teacher.get("modalities", MODALITIES))


def check_teacher(what: str, trained_on: dict[str, Any], teacher: dict[str, Any]) -> None:
    """Refuse another teacher than the one that something was trained on.

    Args:
        what: its name in the message.
        trained_on, teacher: identities: ``model``, ``weights`` and, if known, ``preprocess`` (see
            `cifd_clip.teacher.Teacher.identity`).

    Raises:
        ValueError: they have other weights, or other images.
    """
    ours, theirs = teacher["weights"], trained_on["weights"]
    if ours != theirs:
        raise ValueError(
            f"{what} was trained on {trained_on['model']} with weights {theirs[:12]}, but the "
            f"teacher is {teacher['model']} with weights {ours[:12]}"
        )
    # As JSON has them: without tuples.
    preprocess = [one.get("preprocess") for one in (teacher, trained_on)]
    ours, theirs = json.loads(json.dumps(preprocess))
    if None not in (ours, theirs) and ours != theirs:
        raise ValueError(
            f"{what} was trained on inputs prepared as {theirs}, but the teacher prepares them as "
            f"{ours}"
        )


def read_bank_config(folder: Path) -> dict[str, Any]:
    """The arguments of `cifd_clip.rdm.RDMBank` of a stored bank, and its ``task``.

    Raises:
        FileNotFoundError: there is no bank in the folder.
        BadFile: its configuration is damaged.
    """
    checks = {
        "task": lambda task: task in ("clip", "classifier"),
        "teacher": is_teacher,
        "rates": lambda rates: 0 < len(rates) <= MAX_RATES and all(map(is_positive, rates)),
        "dim": is_width,
        "hidden": lambda hidden: len(hidden) == 3 and all(map(is_width, hidden)),
        "scale": is_positive,
        "classes": lambda classes: classes is None or is_width(classes, MAX_CLASSES),
        "form": lambda form: form in FORMS,
    }
    config = read_config(folder, "RDM bank", BANK_WEIGHTS, checks)
    if (config["task"] == "clip") != (config["classes"] is None):
        raise BadFile(f"{folder / 'config.json'} is damaged: its task and its classes disagree")
    return config


def read_config(
    folder: Path, what: str, weights: str, checks: dict[str, Callable[[Any], bool]]
) -> dict[str, Any]:
    """The configuration of a folder that `save` wrote.

    Args:
        folder: where it is.
        what: its name in messages.
        weights: the other file that must be there.
        checks: for each of its keys, whether a value is valid.

    Raises:
        FileNotFoundError: a file is missing.
        BadFile: a key is missing, is none of these, or has a value that is not valid.
    """
    for name in ("config.json", weights):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {what} ({name} is missing){nearby(folder)}")
    config = read_json(file := folder / "config.json", FORMAT)
    if config.keys() != checks.keys():
        raise BadFile(f"{file} is damaged: expected {', '.join(checks)}, got {', '.join(config)}")
    for name, value in config.items():
        try:
            valid = checks[name](value)
        except (KeyError, TypeError):
            valid = False
        if not valid:
            raise BadFile(f"{file} is damaged: {name} is {value!r}")
    return config


def is_teacher(value: Any) -> bool:
    """Whether a value is a teacher's identity."""
    modalities = modalities_of(value)
    known = modalities and modalities == tuple(m for m in MODALITIES if m in modalities)
    return bool(known) and all(isinstance(value[name], str) for name in ("model", "weights"))


def is_width(value: Any, largest: int = MAX_WIDTH) -> bool:
    """Whether a value is the width of a layer."""
    return type(value) is int and 0 < value <= largest


def is_positive(value: Any) -> bool:
    """Whether a value is a finite number above 0."""
    return type(value) in (int, float) and math.isfinite(value) and value > 0
