"""What was trained on a teacher's embeddings, as a folder: ``config.json`` and its weights.

The configuration of a bank is read and checked here without importing torch.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifd_clip.files import BadFile, read_json, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from torch import nn

#: Of the folder's files.
FORMAT = 1
BANK_WEIGHTS = "bank.safetensors"
#: Of any layer: what a file may make this process allocate has a bound.
MAX_WIDTH, MAX_RATES, MAX_CLASSES = 1 << 16, 1 << 10, 1 << 20
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
            f"{what} was trained on images prepared as {theirs}, but the teacher prepares them as "
            f"{ours}"
        )


def read_bank_config(folder: Path) -> dict[str, Any]:
    """The arguments of `cifd_clip.rdm.RDMBank` of a stored bank, and its ``task``.

    Raises:
        FileNotFoundError: there is no bank in the folder.
        BadFile: its configuration is damaged.
    """
    for name in ("config.json", BANK_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no RDM bank ({name} is missing)")
    config = read_json(file := folder / "config.json", FORMAT)
    try:
        teacher, rates, hidden = config["teacher"], config["rates"], config["hidden"]
        valid = {
            "task": config["task"] == ("clip" if config["classes"] is None else "classifier"),
            "teacher": all(isinstance(teacher[name], str) for name in ("model", "weights")),
            "rates": 0 < len(rates) <= MAX_RATES and all(map(is_positive, rates)),
            "dim": is_count(config["dim"], MAX_WIDTH),
            "hidden": len(hidden) == 3 and all(is_count(width, MAX_WIDTH) for width in hidden),
            "scale": is_positive(config["scale"]),
            "classes": config["classes"] is None or is_count(config["classes"], MAX_CLASSES),
            "form": config["form"] in FORMS,
        }
    except (KeyError, TypeError) as error:
        raise BadFile(f"{file} is damaged: {error!r}") from error
    if wrong := [name for name in config if not valid.get(name)]:
        raise BadFile(f"{file} is damaged: {wrong[0]} is {config[wrong[0]]!r}")
    return config


def is_count(value: Any, largest: int) -> bool:
    """Whether a value of a file is an integer from 1 to the largest."""
    return type(value) is int and 0 < value <= largest


def is_positive(value: Any) -> bool:
    """Whether a value of a file is a finite number above 0."""
    return type(value) in (int, float) and math.isfinite(value) and value > 0
