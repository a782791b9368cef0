"""A student is written in a format, and checked against what was trained, before it appears.

Every format is one function that writes a folder and reads it back as two towers; `export` compares
these with the student's on a fixed probe, and captions through the written tokenizer with captions
through the student's, and lets the folder appear only when they agree.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from cifd_clip.export.card import model_card
from cifd_clip.export.graphs import write_onnx, write_torch_export
from cifd_clip.export.int8 import Cost, ZeroShot, quantise, read_pairs, trained_on
from cifd_clip.export.source import Source, Towers, load
from cifd_clip.export.stock import write_open_clip
from cifd_clip.export.transformers_clip import write_transformers
from cifd_clip.files import write_text, writing_folder
from cifd_clip.noise import Noise

#: By format, see `cifd_clip.export.FORMATS`.
WRITERS: dict[str, Callable[[Source, Path], Towers]] = {
    "open_clip": write_open_clip,
    "onnx": write_onnx,
    "torch_export": write_torch_export,
    "transformers": write_transformers,
}
#: Largest accepted difference of a unit-norm feature's component. OpenCLIP's folder holds the same
#: weights for the same code: it has no excuse.
TOLERANCE = {"open_clip": 0.0, "onnx": 1e-4, "torch_export": 1e-4, "transformers": 1e-4}
BATCHES = (1, 7)
CAPTIONS = (
    "a photo of a dog",
    "two children in front of a blue door, one of them laughing",
    "snow",
    "A map of the old harbour; the lighthouse isn't on it!",
    "the number 42, handwritten",
    "an espresso on a marble table next to a folded newspaper and a pair of reading glasses",
    "naïve façade, 3 × 5 m",
)
#: What OpenCLIP mends before it tokenises, and what tells tokenizers apart.
WILD_CAPTIONS = (
    "it’s a “quoted” word, isn’t it?",
    "bread &amp; butter &amp;lt;3",
    "a camp ﬁre",
    "schÃ¶nes Wetter",
    "Ｆｕｌｌ　ｗｉｄｔｈ",
    "ΟΔΟΣ, İSTANBUL, a snake_case NAME",
    "wow !!! two\n  lines\t",
    "",
)


def export(spec: str, format: str, out: Path | None = None) -> tuple[Path, float]:
    """Write a student in another format, with its model card.

    Args:
        spec: a run directory, or a model folder with or without ``local-dir:``.
        format: one of `cifd_clip.export.FORMATS`.
        out: the folder to make; it must not exist or be empty. Default: ``RUN/export/FORMAT``, or
            beside a model folder, ``FOLDER-FORMAT``.

    Returns:
        The folder, and the largest difference between the student's unit-norm features and those
        of what was written, over `BATCHES` and the captions.

    Raises:
        BadFile: a file of its run is damaged or of another format.
        ValueError: no student there, a folder that holds something already, an architecture or a
            tokenizer the format has no place for, a missing package, or features that differ.
    """
    source = load(spec)
    with appearing(source, format, out) as folder:
        largest = write_checked(source, format, folder)
        write_text(folder / "README.md", model_card(source, format, largest))
    return out or source.default_out(format), largest


def export_int8(
    spec: str,
    out: Path | None = None,
    shards: str | None = None,
    evaluate: Callable[[Source, Path], ZeroShot] = lambda source, folder: {},
) -> tuple[Path, Cost]:
    """Write a student as ONNX, as `export` does, and quantise its weights and activations.

    Args:
        spec, out: as of `export`; the default folder is called ``onnx-int8``.
        shards: image-text pairs to calibrate with [those that its run was trained on].
        evaluate: given the student and the quantised folder, zero-shot figures of both by data set.

    Returns:
        The folder, and what int8 costs; the model card says it too.

    Raises:
        BadFile, ValueError: as `export`, or there are too few pairs in the shards.
    """
    source = load(spec)
    pairs = read_pairs(shards or trained_on(source))
    with appearing(source, "onnx-int8", out) as folder:
        largest = write_checked(source, "onnx", folder)
        cost = quantise(source, folder, *pairs)._replace(zeroshot=evaluate(source, folder))
        write_text(folder / "README.md", model_card(source, "onnx", largest, cost))
    return out or source.default_out("onnx-int8"), cost


def appearing(source: Source, format: str, out: Path | None) -> AbstractContextManager[Path]:
    """The folder to write an export in; it appears when the block ends well."""
    out = out or source.default_out(format)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already: nothing is overwritten; choose another -o")
    return writing_folder(out)


def write_checked(source: Source, format: str, folder: Path) -> float:
    """Write a student's files; the largest difference of what they compute, see `export`."""
    written = WRITERS[format](source, folder)
    largest = difference(source.towers(), written, *probe(source))
    if not largest <= TOLERANCE[format]:
        raise ValueError(
            f"--format {format}: the features of {source.name} differ by {largest:.1e} after "
            f"export, {TOLERANCE[format]:.0e} is allowed; nothing was written"
        )
    if written.tokenizer:
        largest = max(largest, _check_captions(source, written, format))
    return largest


def _check_captions(source: Source, written: Towers, format: str) -> float:
    # Towers that agree are not enough: users come with captions, and with what was written.
    captions = [*CAPTIONS, *WILD_CAPTIONS, "snow on snow " * source.context_length]
    own, theirs = source.tokenizer(captions), written.tokenizer(captions)
    gaps = torch.full((len(captions),), torch.nan)
    if own.shape == theirs.shape:
        features = source.towers().text(own)
        gaps = (features - written.text(theirs)).abs().amax(dim=1)
    for caption, gap in zip(captions, gaps.tolist()):
        if not gap <= TOLERANCE[format]:
            raise ValueError(
                f"--format {format}: what the tokenizer of {source.name} does has no place in a "
                f"tokenizer's files: the features of {caption[:40]!r} differ by {gap:.1e}, "
                f"{TOLERANCE[format]:.0e} is allowed; nothing was written; use --format open_clip"
            )
    return gaps.max().item()


def probe(source: Source) -> tuple[Tensor, Tensor]:
    """Seven images of white noise (7, 3, H, W) and the tokens of seven captions (7, context)."""
    height, width = source.image_size
    pixels = 3 * height * width
    white = Noise(seed=0, step=0).uniform("export", len(CAPTIONS), pixels, torch.device("cpu"))
    images = white.reshape(-1, 3, height, width) * 12**0.5  # of unit variance
    return images, source.tokenizer(list(CAPTIONS))


def difference(a: Towers, b: Towers, images: Tensor, tokens: Tensor) -> float:
    """Largest absolute difference of two pairs of towers, at each batch size; NaN if one has it."""
    gaps = [
        (one(inputs[:n]) - other(inputs[:n])).abs().max()
        for one, other, inputs in ((a.image, b.image, images), (a.text, b.text, tokens))
        for n in BATCHES
    ]
    return torch.stack(gaps).max().item()
