"""OpenCLIP's own format: a folder for ``local-dir:`` and for the Hugging Face hub."""

from pathlib import Path

from open_clip.tokenizer import HFTokenizer

from cifd_clip.export.source import CONFIG, Source, Towers, load
from cifd_clip.files import write_json, write_tensors


def write_open_clip(source: Source, folder: Path) -> Towers:
    """Configuration and preprocessing, safetensors, and the files of a Hugging Face tokenizer.

    OpenCLIP's byte-pair encoding has no files: the package brings it.
    """
    write_json(folder / CONFIG, source.config)
    # Copies: safetensors refuses tensors that share memory.
    tensors = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    write_tensors(folder / "open_clip_model.safetensors", tensors, {"format": "pt"})
    if isinstance(source.tokenizer, HFTokenizer):
        source.tokenizer.save_pretrained(folder)
    return load(str(folder)).towers()
