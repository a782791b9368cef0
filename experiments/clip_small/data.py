"""The study's data: CIFAR-100 as image-text pairs beside Flickr8k, and what is held out of both.

Written: training pairs in img2dataset's layout, ``cifar100/*.tar`` and ``flickr8k/*.tar``, which
teachers see, and ``cifar100_few/*.tar`` and ``flickr8k_few/*.tar``, what students see of them; and
``benchmark/NAME`` in clip_benchmark's layout, each with the splits ``test`` and ``val`` (held-out
training data). NAME is ``cifar100``, ``flickr8k``, and, to measure what a student gains by having
seen its data, ``cifar100_seen`` and ``flickr8k_seen``: what it saw, as many as the split has beside
it or as there are.
"""

import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from torchvision.datasets import CIFAR100

from cifd_clip.files import read_json, write_json
from experiments.clip_small.plan import Sizes
from experiments.shards import Sample, describe, encoded, write_shards, write_split
from training.errors import UsageError

#: Captions of CIFAR-100 and the prompts it is classified with: those that fit small photos.
TEMPLATES = [OPENAI_IMAGENET_TEMPLATES[i]("{c}") for i in (39, 53, 45, 20, 26, 61, 64, 27)]
PER_SHARD, KEY = 500, "{:06}"


class Pair(NamedTuple):
    """An image with its captions; of CIFAR-100, its class number too."""

    extension: str
    image: bytes
    captions: list[str]
    label: int | None = None

    def trained(self) -> Sample:
        """As a training pair: the image, ``txt`` (the first caption), ``json`` (all)."""
        captions = json.dumps({"captions": self.captions}).encode()
        return {self.extension: self.image, "txt": self.captions[0].encode(), "json": captions}

    def tested(self) -> Sample:
        """As a sample of clip_benchmark's: with its class, or else its captions."""
        if self.label is None:
            return {self.extension: self.image, "txt": "\n".join(self.captions).encode()}
        return {self.extension: self.image, "cls": str(self.label).encode()}


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
    settings = {"sizes": sizes._asdict(), "templates": TEMPLATES}
    mark = out / "made.json"
    if mark.is_file():
        if read_json(mark) != settings:
            raise UsageError(f"{out} holds data of other sizes: move it away, or use other --logs")
        return
    draft = out.with_name(f"{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)

    classnames, train, val = cifar_split(cifar100, sizes)
    test = _some(cifar_pairs(cifar100, "test")[1], sizes.cifar_test)
    few = _some(train, sizes.cifar_few)
    seen = {"test": few[: len(val)], "val": few[: len(val)]}
    _write(draft, "cifar100", train, few, {"test": test, "val": val}, seen, classnames)

    photos = list(flickr_pairs(flickr8k / "train"))
    train, val = photos[: -sizes.flickr_val], photos[-sizes.flickr_val :]
    train = _some(train, sizes.flickr_train)
    test = _some(list(flickr_pairs(flickr8k / "test")), sizes.flickr_test)
    few = _some(train, sizes.flickr_few)
    seen = {"test": few[: len(test)], "val": few[: len(val)]}
    _write(draft, "flickr8k", train, few, {"test": test, "val": val}, seen)

    write_json(draft / "made.json", settings)
    draft.rename(out)


def _write(
    out: Path,
    name: str,
    train: list[Pair],
    few: list[Pair],
    held: dict[str, list[Pair]],
    seen: dict[str, list[Pair]],
    classnames: Sequence[str] = (),
) -> None:
    """Write a data set: training pairs of teachers and students, test sets by their splits."""
    for folder, pairs in ((name, train), (f"{name}_few", few)):
        write_shards(out / folder, map(Pair.trained, pairs), PER_SHARD, KEY, "{:05}")
    for folder, splits in ((name, held), (f"{name}_seen", seen)):
        benchmark = out / "benchmark" / folder
        for split, pairs in splits.items():
            write_split(benchmark, split, map(Pair.tested, pairs), PER_SHARD, KEY)
        describe(benchmark, classnames, TEMPLATES)


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
    images = [encoded(Image.fromarray(pixels)) for pixels in data.data]
    return images, data.targets, data.classes


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
            captions = sample["txt"].decode().splitlines()
            if "json" in sample:
                captions = json.loads(sample["json"])["captions"]
            yield Pair("jpg", sample["jpg"], captions)


def _some(pairs: list[Pair], most: int) -> list[Pair]:
    return pairs[:most] if most else pairs
