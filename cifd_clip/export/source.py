"""The student that is exported: a run's, or any OpenCLIP model folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from safetensors import SafetensorError
from torch import Tensor, nn

from cifd_clip.files import BadFile, read_json
from cifd_clip.names import nearby

CONFIG = "open_clip_config.json"
#: Of weights that were cut short safetensors and pickle say it in classes of their own.
UNREADABLE = BadFile, RuntimeError, OSError, ValueError, KeyError, SafetensorError, EOFError


class Towers(NamedTuple):
    """A model as its users see it: two functions to unit-norm features, without gradients."""

    image: Callable[[Tensor], Tensor]
    """(b, 3, H, W) float32, normalised -> (b, D) float32"""
    text: Callable[[Tensor], Tensor]
    """(b, context) int64 -> (b, D) float32"""
    tokenizer: Callable[[list[str]], Tensor] | None = None
    """b captions -> (b, context) int64, as the model card's code does it; None: OpenCLIP's own"""


@dataclass(frozen=True)
class Source:
    """A student in float32, in evaluation mode, with what belongs to it."""

    folder: Path
    run: Path | None
    name: str
    config: dict[str, Any]
    """The content of ``open_clip_config.json``."""
    model: nn.Module
    tokenizer: Callable[[list[str]], Tensor]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        size = self.preprocess["size"]
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def preprocess(self) -> dict[str, Any]:
        """OpenCLIP's preprocessing for evaluation, complete."""
        return self.model.visual.preprocess_cfg

    @property
    def text_config(self) -> dict[str, Any]:
        return self.config["model_cfg"]["text_cfg"]

    @property
    def context_length(self) -> int:
        return self.tokenizer.context_length

    def towers(self) -> Towers:
        """The student itself."""
        model = self.model
        return Towers(
            torch.no_grad()(lambda images: model.encode_image(images, normalize=True)),
            torch.no_grad()(lambda tokens: model.encode_text(tokens, normalize=True)),
        )

    def default_out(self, format: str) -> Path:
        """Where an export goes when nothing is said."""
        if self.run:
            return self.run / "export" / format
        folder = self.folder.resolve()
        return folder.with_name(f"{folder.name}-{format}")


def load(spec: str) -> Source:
    """The student that ``spec`` names: a run directory or a model folder (``local-dir:`` or not).

    Raises:
        ValueError: there is none, or OpenCLIP can't make it.
    """
    path = Path(spec.removeprefix("local-dir:"))
    folder = path if (path / CONFIG).is_file() else path / "student"
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"'{spec}': expected a finished run directory (with student/{CONFIG}) or an OpenCLIP "
            f"model folder (with {CONFIG}){nearby(path)}"
        )
    of_run = folder.name == "student" and (folder.parent / "config.json").is_file()
    run = folder.parent if of_run else None
    try:
        config = read_json(folder / CONFIG)
        model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
        tokenizer = folder_tokenizer(folder, config["model_cfg"]["text_cfg"])
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"'{spec}' could not be loaded from {folder}: {reason}") from error
    name = (run or folder).resolve().name
    return Source(folder, run, name, config, model.eval(), tokenizer)


def folder_tokenizer(folder: Path, config: dict[str, Any]) -> Callable[[list[str]], Tensor]:
    """The tokenizer of an OpenCLIP folder with this ``text_cfg``.

    A Hugging Face tokenizer's files may lie elsewhere, as where training had them from.
    """
    name = config.get("hf_tokenizer_name")
    if not name or (folder / "tokenizer_config.json").is_file():
        return open_clip.get_tokenizer(f"local-dir:{folder}")
    return HFTokenizer(
        name,
        context_length=config.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH),
        tokenizer_mode=config.get("tokenizer_mode"),
        **(config.get("tokenizer_kwargs") or {}),
    )
