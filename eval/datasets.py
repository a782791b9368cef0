"""Data sets in clip_benchmark's WebDataset layout, read without a decoder that could run code.

::

    NAME/dataset_type.txt                          'classification' (the default) or 'retrieval'
    NAME/classnames.txt                            one class a line
    NAME/zeroshot_classification_templates.txt     one template a line, {c} is the class
    NAME/SPLIT/nshards.txt, NAME/SPLIT/{0..}.tar   key.png|jpg|jpeg|webp with key.cls or key.txt

A member that is neither an image nor a label nor a caption is never opened.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import torch
from PIL import Image

from training.errors import UsageError

IMAGES = ("webp", "png", "jpg", "jpeg")
LABELS = {"zeroshot_classification": "cls", "zeroshot_retrieval": "txt"}
MAX_PIXELS = 100_000_000

SUITES = {
    "paper": (
        "imagenet1k",
        "imagenetv2",
        "imagenet-r",
        "imagenet-a",
        "objectnet",
        "mscoco_captions",
        "flickr30k",
    ),
    "imagenet_robustness": (
        "imagenetv2",
        "imagenet_sketch",
        "imagenet-a",
        "imagenet-r",
        "objectnet",
    ),
    "retrieval": ("mscoco_captions", "flickr30k"),
}


@dataclass(frozen=True)
class Protocol:
    """What a known data set's test split must hold for its figures to be comparable."""

    images: int
    classes: int | None = None
    captions: int | None = None


# ImageNet-A and -R are scored over their own 200 classes, ObjectNet over the 113 it shares with
# ImageNet; COCO and Flickr30k are Karpathy's test splits.
PROTOCOLS = {
    "imagenet1k": Protocol(50_000, classes=1000),
    "imagenetv2": Protocol(10_000, classes=1000),
    "imagenet_sketch": Protocol(50_889, classes=1000),
    "imagenet-a": Protocol(7_500, classes=200),
    "imagenet-r": Protocol(30_000, classes=200),
    "objectnet": Protocol(18_574, classes=113),
    "mscoco_captions": Protocol(5_000, captions=25_010),
    "flickr30k": Protocol(1_000, captions=5_000),
}


class Gap(Exception):
    """A data set that can't be evaluated, and why: a named gap in the table."""


@dataclass(frozen=True)
class Sample:
    """Where one sample's image and its label or caption lie: (shard, offset, size) each."""

    key: str
    image: tuple[Path, int, int]
    label: tuple[Path, int, int]


@dataclass
class Folder:
    """One split of a data set folder."""

    name: str
    path: Path
    split: str
    samples: list[Sample] = field(repr=False)

    @property
    def task(self) -> str:
        """``zeroshot_classification`` or ``zeroshot_retrieval``."""
        return _task(self.path)

    @cached_property
    def classnames(self) -> list[str]:
        """The folder's class names, else those clip_benchmark ships under this name."""
        return _lines(self.path / "classnames.txt") or _packaged("classnames", self.name)

    @cached_property
    def templates(self) -> list[str]:
        """The folder's templates, else those clip_benchmark ships under this name."""
        name = "zeroshot_classification_templates"
        return _lines(self.path / f"{name}.txt") or _packaged(name, self.name)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the text files and every shard's bytes."""
        digest = hashlib.sha256()
        shards = sorted({sample.image[0] for sample in self.samples}, key=lambda p: int(p.stem))
        for path in [*sorted(self.path.glob("*.txt")), *shards]:
            digest.update(f"{path.name} {path.stat().st_size}\0".encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    def images(self, transform: Callable) -> "Images":
        """The images as a torch data set of (index, tensor)."""
        return Images(self.samples, transform)

    def labels(self) -> torch.Tensor:
        """Class numbers (N,)."""
        labels = [int(read(sample.label)) for sample in self.samples]
        for sample, label in zip(self.samples, labels):
            if not 0 <= label < len(self.classnames):
                raise Gap(
                    f"sample '{sample.key}' has class {label} of {len(self.classnames)} classes"
                )
        return torch.tensor(labels)

    def captions(self) -> list[list[str]]:
        """The captions of every image."""
        return [read(sample.label).decode("utf-8").splitlines() for sample in self.samples]


class Images(torch.utils.data.Dataset):
    """Decodes and transforms the images of samples."""

    def __init__(self, samples: list[Sample], transform: Callable):
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(picture(self.samples[index]))


def read(place: tuple[Path, int, int]) -> bytes:
    """The bytes of one member."""
    path, offset, size = place
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def picture(sample: Sample) -> Image.Image:
    """The sample's image; its size is looked at before its pixels are."""
    image = Image.open(io.BytesIO(read(sample.image)), formats=("PNG", "JPEG", "WEBP"))
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"sample '{sample.key}': {image.width} x {image.height} pixels")
    return image


def names(wanted: list[str]) -> list[str]:
    """Data set names with suites spelled out, each once, without clip_benchmark's ``wds/``."""
    spelled = [name for item in wanted for name in SUITES.get(item, (item.removeprefix("wds/"),))]
    return list(dict.fromkeys(spelled))


def open_folder(root: Path, name: str, split: str) -> Folder:
    """A data set of this name under root (``NAME``, ``wds/NAME`` or ``wds_NAME``).

    Raises `Gap` where it is missing or does not keep the protocol known for its name.
    """
    flat = name.replace("/", "-")
    tries = [root / name, root / "wds" / name, root / f"wds_{flat}", root / flat]
    path = next((p for p in tries if (p / split).is_dir()), None)
    if path is None:
        raise Gap(f"no folder '{name}/{split}' under the data root")
    folder = Folder(name, path, split, _index(path, split))
    protocol = PROTOCOLS.get(name)
    if folder.task == "zeroshot_classification":
        found = len(folder.classnames)
        if not found or not folder.templates:
            raise Gap("no class names or no templates, neither in the folder nor in clip_benchmark")
        if protocol and protocol.classes and found != protocol.classes:
            raise Gap(f"{found} class names where the protocol has {protocol.classes}")
    elif protocol and protocol.classes:
        raise Gap("a retrieval folder where the protocol is classification")
    return folder


def _task(path: Path) -> str:
    kind = "".join(_lines(path / "dataset_type.txt")).lower() or "classification"
    tasks = {"classification": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}
    if kind not in tasks:
        raise Gap(f"dataset_type.txt says '{kind}'; classification and retrieval are supported")
    return tasks[kind]


def _index(path: Path, split: str) -> list[Sample]:
    """Samples in shard order, from the tars' headers alone."""
    label = LABELS[_task(path)]
    count = _lines(path / split / "nshards.txt")
    if not count:
        raise Gap(f"'{split}/nshards.txt' is missing")
    samples = []
    for number in range(int(count[0])):
        shard = path / split / f"{number}.tar"
        if not shard.exists():
            raise Gap(f"shard '{split}/{number}.tar' of {count[0]} is missing")
        members: dict[str, dict[str, tuple[Path, int, int]]] = {}
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    kind = "image" if extension.lower() in IMAGES else extension.lower()
                    if member.isreg() and kind in ("image", label):
                        members.setdefault(key, {})[kind] = (shard, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise Gap(f"shard '{split}/{number}.tar': {error}") from error
        for key, parts in members.items():
            if len(parts) < 2:
                raise Gap(f"sample '{key}' of shard {number} needs an image and a .{label}")
            samples.append(Sample(key, parts["image"], parts[label]))
    if not samples:
        raise Gap(f"split '{split}' holds no samples")
    return samples


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [line.strip() for line in text.splitlines() if line.strip()]


def _packaged(kind: str, name: str) -> list[str]:
    """clip_benchmark's English class names or templates; ImageNet's for its variants."""
    known = json.loads((files("clip_benchmark") / "datasets" / f"en_{kind}.json").read_text())
    imagenet = PROTOCOLS.get(name) and PROTOCOLS[name].classes
    same_classes = imagenet == 1000 or (imagenet and kind != "classnames")
    return known.get(name) or (known["imagenet1k"] if same_classes else [])


def check_root(root: Path) -> Path:
    """The data root, if it is a folder."""
    if not root.is_dir():
        raise UsageError(f"--data-root '{root}': no such folder; give the folder of the data sets")
    return root
