"""ONNX: one graph per tower, any batch size, unit-norm features."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifd_clip.export.source import Source, Towers
from cifd_clip.export.tokenizer import clean_name, pads_with_zeros, read_tokenizer, save_tokenizer
from cifd_clip.files import write_json


class Tower(nn.Module):
    """One tower: ``encode`` is the name of the model's function to features."""

    def __init__(self, model: nn.Module, encode: str):
        super().__init__()
        self.model, self.encode = model, encode

    def forward(self, inputs: Tensor) -> Tensor:
        return getattr(self.model, self.encode)(inputs, normalize=True)


def write_onnx(source: Source, folder: Path) -> Towers:
    """``image.onnx`` and ``text.onnx``, ``preprocess.json`` and the tokenizer's files.

    Raises:
        ValueError: the packages are missing, or PyTorch can't trace the student.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--format onnx needs {error.name}: pip install 'cifd_clip[export]'"
        ) from error
    # Two rows: a batch of one would be taken for a constant.
    images = torch.zeros(2, 3, *source.image_size)
    tokens = source.tokenizer(["a", "b"])
    _trace(Tower(source.model, "encode_image"), images, folder / "image.onnx", "images")
    _trace(Tower(source.model, "encode_text"), tokens, folder / "text.onnx", "tokens")
    write_json(folder / "preprocess.json", describe(source))
    save_tokenizer(source, folder)
    return Towers(
        _session(folder / "image.onnx", "images"),
        _session(folder / "text.onnx", "tokens"),
        read_tokenizer(source, folder, zeros=pads_with_zeros(source)),
    )


def describe(source: Source) -> dict[str, Any]:
    """What a user of the graphs must know: inputs, outputs, preprocessing, temperature."""
    height, width = source.image_size
    bias = source.model.logit_bias
    image = {"name": "images", "dtype": "float32", "shape": ["batch", 3, height, width]}
    text = {"name": "tokens", "dtype": "int64", "shape": ["batch", source.context_length]}
    padding = 0 if pads_with_zeros(source) else source.tokenizer.tokenizer.pad_token_id
    return {
        "image": {
            "file": "image.onnx",
            "input": image,
            "output": "image_features",
            "preprocess": source.preprocess,
        },
        "text": {
            "file": "text.onnx",
            "input": text,
            "output": "text_features",
            "tokenizer": "tokenizer.json",
            "clean": clean_name(source),
            "padding": padding,
            "tokenizer_kwargs": source.text_config.get("tokenizer_kwargs") or {},
        },
        # logits = logit_scale * image_features @ text_features.T + logit_bias
        "logit_scale": source.model.logit_scale.exp().item(),
        "logit_bias": 0.0 if bias is None else bias.item(),
    }


def _trace(tower: Tower, example: Tensor, path: Path, input_name: str) -> None:
    try:
        torch.onnx.export(
            tower.eval(),
            (example,),
            path,
            input_names=[input_name],
            output_names=[f"{path.stem}_features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(
            f"--format onnx: PyTorch can't export {path.stem} tower "
            f"{type(tower.model).__name__}: {str(error).splitlines()[0]}"
        ) from error


def _session(path: Path, name: str) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])
