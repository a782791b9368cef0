"""Image-text pairs of CIFAR-100, with captions of templates, and of Flickr8k."""

import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from torchvision.datasets import CIFAR100

from experiments.shards import Sample, encoded
from training.errors import UsageError

#: Captions of CIFAR-100 and the prompts it is classified with: those that fit small photos.
TEMPLATES = [OPENAI_IMAGENET_TEMPLATES[i]("{c}") for i in (39, 53, 45, 20, 26, 61, 64, 27)]


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


def cifar_pairs(folder: Path, split: str) -> tuple[list[str], list[Pair]]:
    """Class names and all pairs of a split, in its order.

    Args:
        folder: has torchvision's ``cifar-100-python/``, or ``cifar100_{train,test}.npz``: ``webp``
            (all images' bytes), ``offsets``, ``labels``, ``classnames``.
        split: "train" or "test".
    """
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
    """The pairs of a folder of shards, in file order.

    Args:
        folder: shards in img2dataset's layout (all captions in ``key.json``), or clip_benchmark's.
    """
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
