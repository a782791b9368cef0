"""OpenCLIP's own format: a folder for ``local-dir:`` and for the Hugging Face hub."""

import json
from pathlib import Path

from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save

from cifd_clip.export.source import CONFIG, Source, Towers, load


def write_open_clip(source: Source, folder: Path) -> Towers:
    """Configuration and preprocessing, safetensors, and the files of a Hugging Face tokenizer.

    OpenCLIP's byte-pair encoding has no files: the package brings it.
    """
    (folder / CONFIG).write_text(json.dumps(source.config, indent=2) + "\n")
    # Copies: safetensors refuses tensors that share memory.
    tensors = {name: t.detach().clone() for name, t in source.model.state_dict().items()}
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    (folder / "open_clip_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    if isinstance(source.tokenizer, HFTokenizer):
        source.tokenizer.save_pretrained(folder)
    return load(str(folder)).towers()
