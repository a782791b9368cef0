"""Small image-classification data, whole in memory: CIFAR-100 in the layouts it comes in.

Order and augmentation are pure functions of (seed, epoch); which rows are held out depends on
neither.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor

from cifd_clip import World
from training.classifier.tars import read_labels, shards
from training.data import draws
from training.data.decode import Caps, decode_image
from training.errors import Failure, UsageError

MEAN = (0.5071, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2762)
SIDE, CLASSES, PADDING = 32, 100, 4
SPLITS = {"train": 50_000, "test": 10_000}
#: Of an image of 32×32, and of the arrays of an npz: allocated only within these.
CAPS = Caps(max_bytes=1 << 16, max_pixels=SIDE * SIDE)
NPZ_BYTES = {"webp": 1 << 30, "offsets": 1 << 20, "labels": 1 << 20}
#: How many different views of an image there are; 0: too many to keep a teacher's answers to.
VIEWS = {"none": 1, "flip": 2, "crop": 0}


@dataclass(frozen=True)
class ImageBatch:
    """Some samples, on the device; see `training.engine.stage.ImageBatch`."""

    rows: Tensor
    """(B,) which rows of the table they are."""
    views: Tensor
    """(B,) which view of each; 1 is mirrored."""
    labels: Tensor
    """(B,) class indices."""
    images: Tensor | None
    """(B, 3, H, W) normalised float32, channels last; None where nobody looks at them."""
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> "ImageBatch":
        """Itself: batches are made on the device."""
        return self

    def split(self, parts: int) -> list["ImageBatch"]:
        """Micro-batches of consecutive rows."""
        images = [None] * parts if self.images is None else self.images.chunk(parts)
        rest = (t.chunk(parts) for t in (self.rows, self.views, self.labels))
        return [ImageBatch(*part) for part in zip(*rest, images, strict=True)]


@dataclass(frozen=True)
class Table:
    """All images of a split of CIFAR-100.

    Attributes:
        images: (N, H, W, 3) uint8.
        labels: (N,) int64.
        hash: SHA-256 of images and labels of the whole split, whatever layout they came in.
        part: which of its rows these are.
    """

    images: Tensor
    labels: Tensor
    hash: str
    part: str = "all"
    classes, side = CLASSES, SIDE

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Table":
        """The same table on a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def take(self, rows: np.ndarray) -> "Table":
        """Some of its rows, in this order."""
        part = sha256(rows.astype("<i8").tobytes()).hexdigest()
        rows = torch.from_numpy(rows)
        return Table(self.images[rows], self.labels[rows], self.hash, part)

    def in_order(
        self, rows: Tensor, size: int, images: bool = True, stopping=None, timeout=None
    ) -> Iterator[ImageBatch]:
        """The plain views of some rows, ``size`` at a time; nothing is waited for."""
        for chunk in rows.split(size):
            yield self.batch(chunk, images)

    def batch(self, rows: Tensor, images: bool = True) -> ImageBatch:
        """The plain view of some rows."""
        pixels = normalise(self.images[rows]) if images else None
        return ImageBatch(rows, torch.zeros_like(rows), self.labels[rows], pixels)


class Batches:
    """The training batches: rows of a table in an epoch's order, under an augmentation.

    Args:
        table: the images.
        rows: which of its rows are trained on.
        augment: ``none``, ``flip`` or ``crop``.
        seed: of order and augmentation.
        size: samples per batch; what is left over at an epoch's end is dropped.
        world: this process's place among those that share each batch.
    """

    def __init__(
        self,
        table: Table,
        rows: np.ndarray,
        augment: str,
        seed: int,
        size: int,
        world: World | None = None,
    ):
        self.table, self.rows, self.augment, self.seed, self.size = table, rows, augment, seed, size
        self.share = share(size, world or World())
        self.device = table.images.device
        self.images = table.images
        if augment == "crop":
            pad = (0, 0, PADDING, PADDING, PADDING, PADDING)
            self.images = torch.nn.functional.pad(table.images, pad)
        self.per_epoch = len(rows) // size

    def epoch(
        self, epoch: int, start: int, images: bool, stopping=None, timeout=None
    ) -> Iterator[ImageBatch]:
        """This process's part of each batch from batch ``start`` on, with or without images."""
        order = draws.permutation(len(self.rows), "classify/order", self.seed, epoch)
        shuffled = torch.from_numpy(self.rows[order]).to(self.device)
        words = draws.words(len(self.rows), "classify/view", self.seed, epoch)
        words = torch.from_numpy((words >> np.uint64(33)).astype(np.int64)).to(self.device)
        if self.augment == "none":
            words.zero_()
        for i in range(start, self.per_epoch):
            batch = slice(i * self.size, (i + 1) * self.size)
            rows, bits = shuffled[batch][self.share], words[batch][self.share]
            views = bits & 1
            pixels = self._view(rows, bits) if images else None
            yield ImageBatch(rows, views, self.table.labels[rows], pixels)

    def _view(self, rows: Tensor, bits: Tensor) -> Tensor:
        mirrored = (bits & 1).bool()
        if self.augment == "crop":
            places = 2 * PADDING + 1
            side = torch.arange(SIDE, device=self.device)
            y = ((bits >> 1) % places)[:, None] + side
            x = ((bits >> 1) // places % places)[:, None] + side
            x = torch.where(mirrored[:, None], x.flip(1), x)
            return normalise(self.images[rows[:, None, None], y[:, :, None], x[:, None, :]])
        pixels = self.images[rows]
        if self.augment == "flip":
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels)
        return normalise(pixels)


def share(size: int, world: World) -> slice:
    """A process's places in a batch of ``size``, which all processes share evenly."""
    each = size // world.size
    return slice(world.rank * each, (world.rank + 1) * each)


def mirrored(batch: ImageBatch) -> ImageBatch:
    """The mirrored view of a plain batch."""
    return ImageBatch(batch.rows, torch.ones_like(batch.views), batch.labels, batch.images.flip(3))


def normalise(
    pixels: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> Tensor:
    """(B, H, W, 3) uint8 → (B, 3, H, W) float32 of about zero mean and unit variance."""
    mean, std = _statistics(mean, std, pixels.device)
    return pixels.float().sub_(mean).div_(std).permute(0, 3, 1, 2)  # channels last as it is


@lru_cache
def _statistics(mean, std, device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(255 * torch.tensor(values, device=device) for values in (mean, std))


def split_rows(total: int, holdout: int, subset: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out: the same whatever the seed.

    A larger holdout contains a smaller one.

    Args:
        total: how many rows there are.
        holdout: how many are held out.
        subset: how many of the others are trained on, if there are more; 0: all.
    """
    order = draws.permutation(total, "classify/holdout")
    rows = np.sort(order[holdout:])
    if subset:
        rows = np.sort(rows[draws.permutation(len(rows), "classify/subset")[:subset]])
    return rows, np.sort(order[:holdout])


def load_cifar100(directory: Path, split: str) -> Table:
    """CIFAR-100's ``train`` or ``test`` split.

    Args:
        directory: ``cifar100_{split}.npz`` of webp images; clip_benchmark's WebDataset tars in
            ``{split}/`` or ``cifar100/{split}/``; or torchvision's ``cifar-100-python/``.

    Raises:
        UsageError: none of these is there, or the split is damaged or not whole.
    """
    place = find_cifar100(directory, split)
    if place.is_file():
        with _reading(place):
            images, labels = _from_npz(place)
    elif place.name == split:
        images, labels = _from_tars(place)
    else:
        from torchvision.datasets import CIFAR100

        with _reading(place):
            data = CIFAR100(str(directory), train=split == "train")
        images, labels = data.data, np.array(data.targets)
    if images.shape != (SPLITS[split], SIDE, SIDE, 3) or len(labels) != len(images):
        raise UsageError(
            f"--data {directory}: the {split} split has {len(images)} images of {images.shape[1:]} "
            f"and {len(labels)} labels, CIFAR-100's has {SPLITS[split]} of {(SIDE, SIDE, 3)}"
        )
    if not ((labels >= 0) & (labels < CLASSES)).all():
        raise UsageError(
            f"--data {directory}: the {split} split has labels that are not from 0 to {CLASSES - 1}"
        )
    digest = sha256(images.tobytes() + labels.astype(np.int64).tobytes()).hexdigest()
    return Table(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)), digest)


def find_cifar100(directory: Path, split: str) -> Path:
    """The file or folder that `load_cifar100` reads.

    Raises:
        UsageError: none is there.
    """
    packed, unpacked = directory / f"cifar100_{split}.npz", directory / "cifar-100-python"
    if packed.is_file():
        return packed
    for place in (directory / split, directory / "cifar100" / split, unpacked):
        if place.is_dir():
            return place
    raise UsageError(
        f"--data {directory} holds no CIFAR-100: expected cifar100_{split}.npz, {split}/*.tar "
        "as clip_benchmark writes it, or torchvision's cifar-100-python/"
    )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except Failure:
        raise
    except Exception as problem:  # on damaged bytes, decoders raise whatever they like
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise UsageError(f"--data: {path} is damaged: {reason}") from problem


def _from_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with ZipFile(path) as archive:
        for name, limit in NPZ_BYTES.items():
            size = archive.getinfo(f"{name}.npy").file_size
            if size > limit:
                raise ValueError(f"{name} has {size} bytes, expected at most {limit}")
    packed = np.load(path)
    blob, offsets = packed["webp"].tobytes(), packed["offsets"]
    images = [_decode(blob[a:b]) for a, b in pairwise(offsets)]
    return np.stack(images), packed["labels"]


def _from_tars(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for path in shards(directory):
        with _reading(path), open(path, "rb") as file:
            for _, image, label in read_labels(path):
                file.seek(image.offset)
                images.append(_decode(file.read(min(image.size, CAPS.max_bytes + 1))))
                labels.append(label)
    if not images:
        raise UsageError(f"--data: {directory} holds no *.tar")
    with _reading(directory):
        return np.stack(images), np.array(labels)


def _decode(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data, CAPS))
