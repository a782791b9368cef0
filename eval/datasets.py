"""Data sets on this disk, read without a decoder that could run code.

Either in clip_benchmark's WebDataset layout

    NAME/dataset_type.txt                          'classification' (the default) or 'retrieval'
    NAME/classnames.txt                            one class a line
    NAME/zeroshot_classification_templates.txt     one template a line, {c} is the class
    NAME/SPLIT/nshards.txt, NAME/SPLIT/{0..}.tar   key.png|jpg|jpeg|webp with key.cls or key.txt

or as their authors distribute them, where `eval.builders` knows the name. A member that is neither
an image nor a label nor a caption is never opened. Nothing here imports torch.
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
from typing import Any

import numpy as np
from PIL import Image

from cifd_clip.names import did_you_mean, nearby
from eval import builders, datacomp
from training.errors import UsageError

IMAGES = ("webp", "png", "jpg", "jpeg")
LABELS = {"zeroshot_classification": "cls", "zeroshot_retrieval": "txt"}
MAX_PIXELS = 100_000_000

SUITES = {
    "paper": "imagenet1k imagenetv2 imagenet-r imagenet-a objectnet mscoco_captions flickr30k",
    "imagenet_robustness": "imagenetv2 imagenet_sketch imagenet-a imagenet-r objectnet",
    "retrieval": "mscoco_captions flickr30k",
    "datacomp": " ".join(datacomp.TASKS),
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
    """One image, and its class number or its captions."""

    key: str
    image: tuple[Path, int, int]
    """File, offset and size in bytes; size -1 is the rest of the file."""
    target: int | list[str]
    group: int | None = None
    """Where a task is scored by its worst group: the image's."""

    def read(self) -> bytes:
        """The encoded image."""
        path, offset, size = self.image
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)


@dataclass
class Folder:
    """One split of a data set."""

    name: str
    split: str
    task: str
    """``zeroshot_classification`` or ``zeroshot_retrieval``."""
    path: Path
    files: list[Path] = field(repr=False)
    """All that its figures depend on, under ``path``."""
    samples: list[Sample] = field(repr=False)
    classnames: list[str] = field(repr=False)
    templates: list[str] = field(repr=False)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names, sizes and bytes of all files."""
        digest = hashlib.sha256()
        for path in self.files:
            name = path.relative_to(self.path).as_posix()
            digest.update(f"{name} {path.stat().st_size}\0".encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    @property
    def targets(self) -> list[Any]:
        """The class number, or the captions, of every image."""
        return [sample.target for sample in self.samples]

    @property
    def groups(self) -> list[int | None]:
        """The group of every image, where the task has groups."""
        return [sample.group for sample in self.samples]


class Part(Folder):
    """Some samples of a data set."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what its figures depend on; of the files no more is read."""
        digest = hashlib.sha256(repr((self.classnames, self.templates)).encode())
        for sample in self.samples:
            digest.update(repr((sample.key, sample.target)).encode() + sample.read())
        return digest.hexdigest()


@dataclass
class Images:
    """The images of samples, decoded and transformed one by one: a data set for torch's loader."""

    samples: list[Sample]
    transform: Callable

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.transform(picture(self.samples[index]))


def picture(sample: Sample) -> Image.Image:
    """The sample's image in RGB, its size looked at before its pixels; raises nothing but `Gap`."""
    try:
        image = Image.open(io.BytesIO(sample.read()), formats=("PNG", "JPEG", "WEBP"))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels")
        return image.convert("RGB")
    except Exception as error:
        raise Gap(f"sample '{sample.key}' has no readable image: {error}") from error


def names(given: list[str]) -> list[str]:
    """Data set names with suites spelled out, each once, without clip_benchmark's ``wds/``."""
    spelled = (SUITES.get(name, name.removeprefix("wds/")).split() for name in given)
    return list(dict.fromkeys(name for names in spelled for name in names))


def wanted(given: list[str], root: Path) -> list[str]:
    """The `names` that a command line gives, each of them known or a folder under root.

    Raises:
        UsageError: one is neither: no gap, but a typo.
    """
    known = {*SUITES, *PROTOCOLS, *builders.NEEDS, *datacomp.TASKS}
    known |= {p.name.removeprefix("wds_") for f in (root, root / "wds") for p in f.glob("*")}
    for name in (spelled := names(given)):
        if not known & {name, name.replace("/", "-")} and not (root / name).exists():
            raise UsageError(
                f"--datasets '{name}': no data set of that name is known or under --data-root"
                f"{did_you_mean(name, known)}"
            )
    return spelled


def open_folder(root: Path, name: str, split: str, samples: int | None = None) -> Folder:
    """A data set under root: WebDataset (NAME, wds/NAME, wds_NAME), else as its builder reads it.

    Args:
        root, name, split: where it lies.
        samples: images at most, the same ones each time; None: all.

    Raises:
        Gap: it is missing, damaged or does not keep the protocol known for its name.
    """
    flat = name.replace("/", "-")
    tries = [root / name, root / "wds" / name, root / f"wds_{flat}", root / flat]
    tries.append(root / f"wds_{flat}_{split}")  # as DataComp's download has it
    path = next((p for p in tries if (p / split / "nshards.txt").is_file()), None)
    try:
        folder = _webdataset(name, path, split) if path else _built(name, root / name, split)
    except LookupError as error:
        raise Gap(f"an annotation file lacks {error}") from error
    except (OSError, ValueError, AssertionError, tarfile.TarError) as error:
        raise Gap(" ".join(str(error).split())) from error
    _check(folder)
    count = len(folder.samples)
    if samples is None or samples >= count:
        return folder
    rows = np.sort(np.random.default_rng(0).permutation(count)[:samples])
    return Part(**{**vars(folder), "samples": [folder.samples[row] for row in rows]})


def _built(name: str, path: Path, split: str) -> Folder:
    missing = f"no folder '{name}/{split}' with nshards.txt under the data root"
    if not builders.knows(name, split):
        raise Gap(missing)
    if absent := builders.missing(path, name, split):
        raise Gap(f"{missing}, nor '{name}/{absent}'")
    local = builders.build(path, name, split)
    samples = [
        Sample(file.relative_to(path).as_posix(), (file, 0, -1), target)
        for file, target in local.samples
    ]
    return Folder(
        name=name,
        split=split,
        task=local.task,
        path=path,
        files=[*local.annotations, *(file for file, _ in local.samples)],
        samples=samples,
        classnames=local.classnames or _packaged("classnames", name),
        templates=local.templates or _packaged("zeroshot_classification_templates", name),
    )


def _webdataset(name: str, path: Path, split: str) -> Folder:
    kind = "".join(_lines(path / "dataset_type.txt")).lower() or "classification"
    task = f"zeroshot_{kind}"
    if task not in LABELS:
        raise Gap(f"dataset_type.txt says '{kind}'; classification and retrieval are supported")
    count = int("".join(_lines(path / split / "nshards.txt")))
    shards = [path / split / f"{number}.tar" for number in range(count)]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise Gap(f"shard '{split}/{missing[0]}' of {count} is missing")
    templates, grouped = "zeroshot_classification_templates", name in datacomp.WORST_GROUP
    return Folder(
        name=name,
        split=split,
        task=task,
        path=path,
        files=[*sorted(path.glob("*.txt")), *shards],
        samples=[sample for shard in shards for sample in _samples(shard, LABELS[task], grouped)],
        classnames=_lines(path / "classnames.txt") or _packaged("classnames", name),
        templates=[*filter(None, _lines(path / f"{templates}.txt"))] or _packaged(templates, name),
    )


def _samples(shard: Path, label: str, grouped: bool = False) -> list[Sample]:
    """A shard's samples, in order; of the images, the headers alone are read."""
    groups: dict[str, int] = {}
    images: dict[str, tuple[Path, int, int]] = {}
    targets: dict[str, int | list[str]] = {}
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            key = f"{folder}{slash}{stem}"
            if not member.isreg():
                continue
            if extension.lower() in IMAGES:
                images[key] = (shard, member.offset_data, member.size)
            elif extension.lower() == label:
                text = tar.extractfile(member).read().decode("utf-8")
                if label == "cls" and not text.strip().isdecimal():
                    raise Gap(f"sample '{key}' of '{shard.name}' has class '{text}', not a number")
                targets[key] = int(text) if label == "cls" else text.splitlines()
            elif grouped and extension == "npy":
                numbers = np.load(io.BytesIO(tar.extractfile(member).read()), allow_pickle=False)
                groups[key] = int(numbers.flat[0])
    if odd := images.keys() ^ targets.keys():
        raise Gap(f"sample '{min(odd)}' of '{shard.name}' needs an image and a .{label}")
    if grouped and (odd := images.keys() - groups.keys()):
        raise Gap(f"sample '{min(odd)}' of '{shard.name}' needs a .npy that tells its group")
    return [Sample(key, place, targets[key], groups.get(key)) for key, place in images.items()]


def _check(folder: Folder) -> None:
    """Refuse what can't give the figure its name promises."""
    protocol = PROTOCOLS.get(folder.name, Protocol(0))
    if not folder.samples:
        raise Gap(f"split '{folder.split}' holds no samples")
    if folder.task == "zeroshot_retrieval":
        if protocol.classes:
            raise Gap("a retrieval folder where the protocol is classification")
        if not any(folder.targets):
            raise Gap("no image has a caption")
        return
    count = len(folder.classnames)
    if not count or not folder.templates:
        raise Gap("no class names or no templates, neither in the folder nor in clip_benchmark")
    for template in folder.templates:
        # replaced by itself alone: a format such as {c:>3000000000} would fill the memory
        if "{c}" not in template or set("{}") & set(template.replace("{c}", "")):
            raise Gap(
                f"template '{template[:60]}': expected the class name as {{c}}, no other braces"
            )
    if protocol.captions:
        raise Gap("a classification folder where the protocol is retrieval")
    if protocol.classes and count != protocol.classes:
        raise Gap(f"{count} class names where the protocol has {protocol.classes}")
    for sample in folder.samples:
        if not 0 <= sample.target < count:
            raise Gap(f"sample '{sample.key}' has class {sample.target} of {count} classes")


def _lines(path: Path) -> list[str]:
    """A file's lines; a blank one keeps its place, or every class after it would be another."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [line.strip() for line in text.splitlines()]


def _packaged(kind: str, name: str) -> list[str]:
    """clip_benchmark's English class names or templates; ImageNet's for its variants."""
    known = json.loads((files("clip_benchmark") / "datasets" / f"en_{kind}.json").read_text())
    imagenet = PROTOCOLS.get(name) and PROTOCOLS[name].classes
    same_classes = imagenet == 1000 or (imagenet and kind != "classnames")
    return known.get(name) or (known["imagenet1k"] if same_classes else [])


def check_root(root: Path) -> Path:
    """The data root, if it is a folder."""
    if not root.is_dir():
        raise UsageError(
            f"--data-root '{root}': no such folder; give the folder of the data sets{nearby(root)}"
        )
    return root
