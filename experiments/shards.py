"""Data sets as WebDataset tars: training pairs in img2dataset's layout, clip_benchmark's sets."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

from PIL import Image

Sample = Mapping[str, bytes]  # an image and what belongs to it, by the extensions of their files


def write_shards(
    folder: Path, samples: Iterable[Sample], per_shard: int, key: str, shard: str = "{}"
) -> int:
    """Write tars whose bytes depend on nothing but the samples; how many tars.

    `key` and `shard` name samples and tars, with ``{}`` for a running number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples, shards, number = iter(samples), 0, 0
    while chunk := list(islice(samples, per_shard)):
        path = folder / f"{shard.format(shards)}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in chunk:
                for extension, content in sample.items():
                    member = tarfile.TarInfo(f"{key.format(number)}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                number += 1
        shards += 1
    return shards


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
