"""One graph per tower, of ONNX or of torch.export: any batch size, unit-norm features."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifd_clip.export.source import Source, Towers
from cifd_clip.export.tokenizer import clean_name, pads_with_zeros, read_tokenizer, save_tokenizer
from cifd_clip.files import read_json, write_json


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
    return _write(source, folder, ".onnx", _trace)


def write_torch_export(source: Source, folder: Path) -> Towers:
    """``image.pt2`` and ``text.pt2``, what ExecuTorch and AOTInductor compile, and the rest.

    Raises:
        ValueError: PyTorch can't trace the student.
    """
    return _write(source, folder, ".pt2", _program)


def _write(
    source: Source, folder: Path, suffix: str, trace: Callable[[nn.Module, Tensor, Path, str], None]
) -> Towers:
    # Two rows: a batch of one would be taken for a constant.
    images = torch.zeros(2, 3, *source.image_size)
    tokens = source.tokenizer(["a", "b"])
    try:
        for name, inputs, kind in (("image", images, "images"), ("text", tokens, "tokens")):
            tower = Tower(source.model, f"encode_{name}").eval()
            trace(tower, inputs, folder / f"{name}{suffix}", kind)
    except (torch.onnx.OnnxExporterError, torch._dynamo.exc.TorchDynamoException) as error:
        raise ValueError(
            f"PyTorch can't export {name} tower {type(source.model).__name__}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    write_json(folder / "preprocess.json", describe(source, suffix))
    save_tokenizer(source, folder)
    return read_graphs(folder)


def read_graphs(folder: Path) -> Towers:
    """The towers and the tokenizer that `write_onnx` or `write_torch_export` wrote.

    Raises:
        BadFile: ``preprocess.json`` is missing or damaged.
    """
    about = read_json(folder / "preprocess.json", image=dict, text=dict)
    image, text = (open_graph(folder / about[part]["file"]) for part in ("image", "text"))
    clean, zeros = about["text"]["clean"], about["text"]["padding"] == 0
    return Towers(image, text, read_tokenizer(folder, clean, zeros))


def describe(source: Source, suffix: str) -> dict[str, Any]:
    """What a user of the graphs must know: inputs, outputs, preprocessing, temperature."""
    height, width = source.image_size
    bias = source.model.logit_bias
    image = {"name": "images", "dtype": "float32", "shape": ["batch", 3, height, width]}
    text = {"name": "tokens", "dtype": "int64", "shape": ["batch", source.context_length]}
    padding = 0 if pads_with_zeros(source) else source.tokenizer.tokenizer.pad_token_id
    return {
        "image": {
            "file": f"image{suffix}",
            "input": image,
            "output": "image_features",
            "preprocess": source.preprocess,
        },
        "text": {
            "file": f"text{suffix}",
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


def _trace(tower: nn.Module, example: Tensor, path: Path, input_name: str) -> None:
    torch.onnx.export(
        tower,
        (example,),
        path,
        input_names=[input_name],
        output_names=[f"{path.stem}_features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _program(tower: nn.Module, example: Tensor, path: Path, input_name: str) -> None:
    batch = {0: torch.export.Dim("batch")}
    torch.export.save(torch.export.export(tower, (example,), dynamic_shapes=(batch,)), path)


def open_graph(path: Path) -> Callable[[Tensor], Tensor]:
    """A tower that lies in a file: inputs (b, …) -> unit-norm features (b, D)."""
    if path.suffix == ".pt2":
        return torch.no_grad()(torch.export.load(path).module())
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda inputs: torch.from_numpy(session.run(None, {given.name: inputs.numpy()})[0])
