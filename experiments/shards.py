"""Data sets as WebDataset tars: training pairs in img2dataset's layout, clip_benchmark's sets."""

import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from training.data.write import Sample, write_shards


def write_split(
    folder: Path, split: str, samples: Iterable[Sample], per_shard: int, key: str
) -> None:
    """Write a split of a data set in clip_benchmark's layout."""
    shards = write_shards(folder / split, samples, per_shard, key)
    (folder / split / "nshards.txt").write_text(f"{shards}\n")


def describe(folder: Path, classnames: Iterable[str] = (), templates: Iterable[str] = ()) -> None:
    """Say what a data set in clip_benchmark's layout is: with classes, or for retrieval."""
    kind = "classification" if classnames else "retrieval"
    write_lines(folder / "dataset_type.txt", [kind])
    if classnames:
        write_lines(folder / "classnames.txt", classnames)
        write_lines(folder / "zeroshot_classification_templates.txt", templates)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The bytes of an image's file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
