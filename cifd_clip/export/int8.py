"""int8: static quantisation of a student's ONNX towers, and what it costs."""

import glob
import io
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from braceexpand import braceexpand
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from cifd_clip.export.graphs import open_graph, read_graphs
from cifd_clip.export.source import Source
from cifd_clip.files import read_json

#: Pairs that ranges of activations are taken from, and others that features are compared on.
CALIBRATED, COMPARED = 128, 64
#: Shares of an activation's values that its range may hold.
PERCENTILES = (99.999, 99.99, 99.9)
IMAGES = ("jpg", "jpeg", "png", "webp")
#: What int8 should not cost more than: zero-shot points, and share of the bytes.
POINTS, BYTES = 0.5, 0.3
#: Data set → zero-shot top-1, or mean recall, before and after.
ZeroShot = dict[str, tuple[float, float]]


class Cost(NamedTuple):
    """What quantising did to a student.

    Attributes:
        calibrated: image-text pairs that it was calibrated on.
        bytes: of both graphs, as a share of those before.
        image, text: mean cosine of features before and after, of pairs that did not calibrate.
        zeroshot: see `ZeroShot`.
    """

    calibrated: int
    bytes: float
    image: float
    text: float
    zeroshot: ZeroShot = {}

    @property
    def sentence(self) -> str:
        """The figures in a line, and whether they are what int8 should cost."""
        drop = max((100 * (before - after) for before, after in self.zeroshot.values()), default=0)
        cosines = f"cosine to the student {self.image:.4f} (images) and {self.text:.4f} (texts)"
        line = f"{self.bytes:.2f} × the bytes, {cosines}"
        if self.zeroshot:
            line += f", zero-shot {-drop:+.2f} points at worst"
        if drop > POINTS or self.bytes > BYTES:
            line += f". That is more than int8 should cost: {POINTS} points, {BYTES} × the bytes"
        return f"{line}."


def trained_on(source: Source) -> str:
    """The shards that a run was trained on.

    Raises:
        ValueError: the student is no run's.
    """
    shards = read_json(source.run / "config.json").get("train_data") if source.run else None
    if not shards:
        raise ValueError("--quantize int8 needs --calibration-data SHARDS: there is no run here")
    return shards


def read_pairs(shards: str) -> tuple[list[Image.Image], list[str]]:
    """Images and captions of the first pairs of WebDataset tars.

    Args:
        shards: a directory, a brace or glob pattern; ``::`` joins sources.

    Raises:
        ValueError: there are fewer than `CALIBRATED` and `COMPARED`.
    """
    paths = []
    for name in (name for source in shards.split("::") for name in braceexpand(source)):
        folder = Path(name).is_dir()
        paths += sorted(glob.glob(f"{glob.escape(name)}/*.tar" if folder else name))
    pairs = list(islice((p for path in paths for p in _pairs(path)), CALIBRATED + COMPARED))
    if len(pairs) < CALIBRATED + COMPARED:
        raise ValueError(
            f"--calibration-data '{shards}': {len(pairs)} image-text pairs in {len(paths)} tars, "
            f"expected {CALIBRATED} to calibrate with and {COMPARED} to compare features on"
        )
    images, captions = zip(*pairs)
    return list(images), list(captions)


def _pairs(path: str) -> Iterator[tuple[Image.Image, str]]:
    parts: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in filter(tarfile.TarInfo.isreg, tar):
            key, _, extension = member.name.rpartition(".")
            kind = "image" if extension in IMAGES else extension
            if kind not in ("image", "txt"):
                continue
            pair = parts.setdefault(key, {})
            pair[kind] = tar.extractfile(member).read()
            if len(pair) == 2:
                image = Image.open(io.BytesIO(pair["image"]), formats=("JPEG", "PNG", "WEBP"))
                yield image.convert("RGB"), parts.pop(key)["txt"].decode()


def quantise(source: Source, folder: Path, images: list[Image.Image], captions: list[str]) -> Cost:
    """Quantise ``image.onnx`` and ``text.onnx`` of a folder in place, and read them back.

    Weights per channel; what multiplies two activations (attention) stays in float32, and an output
    is not quantised before its activation function, where its range is widest. Weights are unsigned
    as activations are: x86 processors without VNNI add products of unsigned and signed bytes in 16
    bits, which overflow, and the same graph would compute other features there. Of several ways to
    cut outliers off an activation's range (`PERCENTILES`) each tower gets the one that leaves its
    features of the calibration pairs nearest to the student's.
    """
    transform = image_transform_v2(PreprocessCfg(**source.preprocess), is_train=False)
    pixels = torch.stack([transform(image) for image in images])
    tokens, student, after = read_graphs(folder).tokenizer(captions), source.towers(), {}
    sizes = []
    for tower, encode, rows in (
        ("image", student.image, pixels),
        ("text", student.text, tokens),
    ):
        path, own = folder / f"{tower}.onnx", encode(rows)
        with tempfile.TemporaryDirectory() as scratch:
            written = [
                _quantise(path, rows[:CALIBRATED], percentile, Path(scratch))
                for percentile in PERCENTILES
            ]
            cosines = [torch.cosine_similarity(open_graph(each)(rows), own) for each in written]
            best = max(range(len(written)), key=lambda n: cosines[n][:CALIBRATED].mean().item())
            sizes.append((path.stat().st_size, written[best].stat().st_size))
            shutil.copyfile(written[best], path)
        after[tower] = cosines[best][CALIBRATED:].mean().item()
    float32, int8 = map(sum, zip(*sizes))
    return Cost(CALIBRATED, int8 / float32, after["image"], after["text"])


def _quantise(path: Path, rows: Tensor, percentile: float, scratch: Path) -> Path:
    """A quantised copy of a graph, whose activations' ranges hold this share of what rows show."""
    from onnxruntime import InferenceSession, quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    (given,) = InferenceSession(path).get_inputs()

    class Rows(quantization.CalibrationDataReader):
        """Eight rows at a time; ranges are updated after each, or all activations would be kept."""

        def __len__(self):
            return len(rows) // 8

        def set_range(self, start_index, end_index):
            self.batches = iter(rows.split(8)[start_index:end_index])

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {given.name: batch.numpy()}

    prepared, written = scratch / path.name, scratch / f"{path.stem}-{percentile}.onnx"
    with redirect_stdout(io.StringIO()):  # a line for each batch
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            written,
            Rows(),
            op_types_to_quantize=["MatMul", "Gemm", "Conv", "Gather"],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QUInt8,
            calibrate_method=quantization.CalibrationMethod.Percentile,
            extra_options={
                "MatMulConstBOnly": True,
                "CalibStridedMinMax": 1,
                "CalibPercentile": percentile,
                # each is an input of what follows its activation function, and in range there
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm", "Conv"],
            },
        )
    return written
