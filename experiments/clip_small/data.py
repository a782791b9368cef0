"""The study's data: CIFAR-100 as image-text pairs beside Flickr8k, and what is held out of both.

Written: training pairs in img2dataset's layout, ``cifar100/*.tar`` and ``flickr8k/*.tar``, which
teachers see, and ``cifar100_few/*.tar`` and ``flickr8k_few/*.tar``, what students see of them; and
``benchmark/NAME`` in clip_benchmark's layout, each with the splits ``test`` and ``val`` (held-out
training data). NAME is ``cifar100``, ``flickr8k``, and, to measure what a student gains by having
seen its data, ``cifar100_seen`` and ``flickr8k_seen``: what it saw, as many as the split has beside
it or as there are.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from torchvision.datasets import CIFAR100

from training.errors import UsageError

#: Captions of CIFAR-100 and the prompts it is classified with: those that fit small photos.
TEMPLATES = [OPENAI_IMAGENET_TEMPLATES[i]("{c}") for i in (39, 53, 45, 20, 26, 61, 64, 27)]
PER_SHARD = 500


class Sizes(NamedTuple):
    """Most samples of each kind; 0 for all there are."""

    cifar_train: int = 0
    cifar_few: int = 2_500
    """What students see of the training images; teachers see all."""
    cifar_val: int = 5_000
    cifar_test: int = 0
    flickr_train: int = 0
    flickr_few: int = 1_500
    flickr_val: int = 591
    """The two last shards: the last alone has 91 photos."""
    flickr_test: int = 0


class Pair(NamedTuple):
    """An image with its captions; of CIFAR-100, its class number too."""

    extension: str
    image: bytes
    captions: list[str]
    label: int | None = None


def prepare(out: Path, cifar100: Path, flickr8k: Path, sizes: Sizes) -> None:
    """Write the data unless they are there; a function of its arguments.

    Args:
        out: folder to write.
        cifar100: has torchvision's ``cifar-100-python/``, or ``cifar100_{train,test}.npz``:
            ``webp`` (all images' bytes), ``offsets``, ``labels``, ``classnames``.
        flickr8k: has ``train/*.tar`` (img2dataset's layout, all captions in ``key.json``) and
            ``test/*.tar`` (clip_benchmark's).
        sizes: how much of it.

    Raises:
        UsageError: a folder lacks what it should have, or ``out`` was written with other sizes.
    """
    made = {"sizes": sizes._asdict(), "templates": TEMPLATES}
    mark = out / "made.json"
    if mark.is_file():
        if json.loads(mark.read_text()) != made:
            raise UsageError(f"{out} holds data of other sizes: move it away, or use other --logs")
        return
    draft = out.with_name(f"{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    benchmark = draft / "benchmark"
    classnames, train, val = cifar_split(cifar100, sizes)
    test = _some(cifar_pairs(cifar100, "test")[1], sizes.cifar_test)
    few = _some(train, sizes.cifar_few)
    write_pairs(draft / "cifar100", train)
    write_pairs(draft / "cifar100_few", few)
    for name, splits in {
        "cifar100": {"test": test, "val": val},
        "cifar100_seen": {"test": few[: len(val)], "val": few[: len(val)]},
    }.items():
        write_benchmark(benchmark / name, splits, "classification")
        (benchmark / name / "classnames.txt").write_text("\n".join(classnames) + "\n")
        prompts = "\n".join(TEMPLATES) + "\n"
        (benchmark / name / "zeroshot_classification_templates.txt").write_text(prompts)
    photos = list(flickr_pairs(flickr8k / "train"))
    train, val = photos[: -sizes.flickr_val], photos[-sizes.flickr_val :]
    train = _some(train, sizes.flickr_train)
    test = _some(list(flickr_pairs(flickr8k / "test")), sizes.flickr_test)
    few = _some(train, sizes.flickr_few)
    write_pairs(draft / "flickr8k", train)
    write_pairs(draft / "flickr8k_few", few)
    for name, splits in {
        "flickr8k": {"test": test, "val": val},
        "flickr8k_seen": {"test": few[: len(test)], "val": few[: len(val)]},
    }.items():
        write_benchmark(benchmark / name, splits, "retrieval")
    (draft / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    draft.rename(out)


def cifar_split(folder: Path, sizes: Sizes) -> tuple[list[str], list[Pair], list[Pair]]:
    """Class names, training pairs and held-out pairs: the last of each class, equally many."""
    classnames, pairs = cifar_pairs(folder, "train")
    held = sizes.cifar_val // len(classnames)
    labels = np.array([pair.label for pair in pairs])
    held_rows = {row for c in range(len(classnames)) for row in np.flatnonzero(labels == c)[-held:]}
    train = [pair for row, pair in enumerate(pairs) if row not in held_rows]
    return classnames, _some(train, sizes.cifar_train), [pairs[row] for row in sorted(held_rows)]


def cifar_pairs(folder: Path, split: str) -> tuple[list[str], list[Pair]]:
    """Class names and all pairs of a split, in its order."""
    packed = folder / f"cifar100_{split}.npz"
    if packed.is_file():
        extension, images, labels, names = "webp", *_from_npz(packed)
    elif (folder / "cifar-100-python").is_dir():
        extension, images, labels, names = "png", *_from_torchvision(folder, split)
    else:
        raise UsageError(
            f"--cifar100 '{folder}': neither {packed.name} nor torchvision's cifar-100-python/ is "
            "there"
        )
    classnames = [str(name).replace("_", " ") for name in names]
    captions = [[t.format(c=name) for t in TEMPLATES] for name in classnames]
    return classnames, [
        Pair(extension, image, captions[label], label) for image, label in zip(images, labels)
    ]


def _from_npz(path: Path) -> tuple[list[bytes], list[int], Iterable[str]]:
    packed = np.load(path)
    blob, offsets = packed["webp"].tobytes(), packed["offsets"].tolist()
    images = [blob[start:stop] for start, stop in pairwise(offsets)]
    return images, packed["labels"].tolist(), packed["classnames"]


def _from_torchvision(folder: Path, split: str) -> tuple[list[bytes], list[int], list[str]]:
    data = CIFAR100(str(folder), train=split == "train")

    def png(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    return [png(pixels) for pixels in data.data], data.targets, data.classes


def flickr_pairs(folder: Path) -> Iterator[Pair]:
    """The pairs of a folder of shards, in file order."""
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise UsageError(f"--flickr8k '{folder.parent}': {folder.name}/ has no .tar")
    for shard in shards:
        samples: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
        for sample in samples.values():
            told = sample["txt"].decode().splitlines()
            if "json" in sample:
                told = json.loads(sample["json"])["captions"]
            yield Pair("jpg", sample["jpg"], told)


def write_pairs(folder: Path, pairs: list[Pair]) -> None:
    """Training shards: the image, key.txt (the first caption), key.json (all)."""
    _write_shards(
        folder,
        (
            {
                pair.extension: pair.image,
                "txt": pair.captions[0].encode(),
                "json": json.dumps({"captions": pair.captions}).encode(),
            }
            for pair in pairs
        ),
        digits=5,
    )


def write_benchmark(folder: Path, splits: dict[str, list[Pair]], kind: str) -> None:
    """A data set in clip_benchmark's layout."""
    for split, pairs in splits.items():
        samples = (
            {pair.extension: pair.image, "txt": "\n".join(pair.captions).encode()}
            if kind == "retrieval"
            else {pair.extension: pair.image, "cls": str(pair.label).encode()}
            for pair in pairs
        )
        shards = _write_shards(folder / split, samples)
        (folder / split / "nshards.txt").write_text(f"{shards}\n")
    (folder / "dataset_type.txt").write_text(f"{kind}\n")


def _some(pairs: list[Pair], most: int) -> list[Pair]:
    return pairs[:most] if most else pairs


def _write_shards(folder: Path, samples: Iterable[dict[str, bytes]], digits: int = 0) -> int:
    """Tars that depend on nothing but the samples; how many."""
    folder.mkdir(parents=True, exist_ok=True)
    samples, shards, number = iter(samples), 0, 0
    while chunk := list(islice(samples, PER_SHARD)):
        path = folder / f"{shards:0{digits}}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in chunk:
                for extension, content in sample.items():
                    member = tarfile.TarInfo(f"{number:06d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                number += 1
        shards += 1
    return shards
