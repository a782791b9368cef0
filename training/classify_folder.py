"""Large image-classification data: one folder of images per class (ImageNet's layout)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets.folder import find_classes, make_dataset

from training.classify_data import Batch, normalise
from training.data import draws
from training.data.loader import data_loader, end, iterate
from training.data.views import draw, private_randomness
from training.errors import UsageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE, RESIZED = 224, 256
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
AUGMENTED = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIDE),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
    ]
)
PLAIN = transforms.Compose(
    [transforms.Resize(RESIZED), transforms.CenterCrop(SIDE), transforms.PILToTensor()]
)


@dataclass(frozen=True)
class FolderTable:
    """The images of a split, on disk.

    Attributes:
        root: the split's folder.
        files: paths below it, in order.
        labels: (N,) int64.
        classes: how many there are.
        hash: SHA-256 of the file names.
        workers: processes that decode.
        device: where batches go.
    """

    root: Path
    files: tuple[str, ...]
    labels: Tensor
    classes: int
    hash: str
    workers: int
    device: torch.device
    side = SIDE

    def __len__(self) -> int:
        return len(self.files)

    def to(self, device: torch.device) -> "FolderTable":
        """The same table, with batches on a device."""
        return replace(self, labels=self.labels.to(device), device=device)

    def subset(self, samples: int) -> "FolderTable":
        """The same ``samples`` images of it every time; 0 for all."""
        if not samples:
            return self
        rows = np.sort(draws.permutation(len(self), "classify/subset")[:samples])
        files = tuple(self.files[row] for row in rows)
        return replace(self, files=files, labels=self.labels[torch.from_numpy(rows)])

    def in_order(self, rows: Tensor, size: int, images: bool = True) -> Iterator[Batch]:
        """The plain views of some rows, ``size`` at a time."""
        yield from self.decoded(rows.split(size), PLAIN, ())

    def decoded(
        self, chunks: Sequence[Tensor], view: Callable, labels_of_draw: tuple
    ) -> Iterator[Batch]:
        """Batches of these rows; random views are functions of the labels and the file's name."""
        items = _Decoded(self.root, [[self.files[r] for r in c] for c in chunks], view)
        items.labels_of_draw = labels_of_draw
        loader = data_loader(items, None, self.workers, None, self.device.type == "cuda", 2, False)
        iterator = iterate(loader)
        try:
            for rows, pixels in zip(chunks, iterator):
                rows = rows.to(self.device)
                pixels = normalise(pixels.to(self.device, non_blocking=True), MEAN, STD)
                yield Batch(rows, torch.zeros_like(rows), self.labels[rows], pixels)
        finally:
            end(iterator)


class _Decoded(Dataset):
    """Whole batches of decoded files, (B, H, W, 3) uint8."""

    labels_of_draw: tuple = ()

    def __init__(self, root: Path, chunks: list[list[str]], view: Callable):
        self.root, self.chunks, self.view = root, chunks, view

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> Tensor:
        seed, number = self.labels_of_draw or (0, 0)
        with private_randomness():
            images = [
                draw(self.view, self._open(name), seed, number, name.encode())
                for name in self.chunks[index]
            ]
        return torch.stack(images).permute(0, 2, 3, 1).contiguous()

    def _open(self, name: str) -> Image.Image:
        return Image.open(self.root / name).convert("RGB")


class FolderBatches:
    """The training batches of a folder: random resized crops, mirrored half the time.

    Args:
        table: the images.
        rows: which are trained on.
        seed: of order and views.
        size: samples per batch; what is left over at an epoch's end is dropped.
    """

    def __init__(self, table: FolderTable, rows: np.ndarray, seed: int, size: int):
        self.table, self.rows, self.seed, self.size = table, rows, seed, size
        self.per_epoch = len(rows) // size

    def epoch(self, epoch: int, start: int, images: bool) -> Iterator[Batch]:
        """The batches of an epoch from batch ``start`` on."""
        order = draws.permutation(len(self.rows), "classify/order", self.seed, epoch)
        rows = torch.from_numpy(self.rows[order])
        chunks = rows[: self.per_epoch * self.size].split(self.size)[start:]
        yield from self.table.decoded(chunks, AUGMENTED, (self.seed, epoch))


def load_folder(directory: Path, split: str, workers: int) -> FolderTable:
    """A split of a data set in ImageNet's layout.

    Args:
        directory: holds ``{split}/{class}/*.jpg``.
        split: ``train`` or ``val``.
        workers: processes that decode.

    Raises:
        UsageError: no such folder, or no image in it.
    """
    root = directory / split
    if not root.is_dir():
        raise UsageError(f"--data {directory}: there is no {split}/ with a folder per class")
    try:
        names, index = find_classes(str(root))
        samples = make_dataset(str(root), index, extensions=SUFFIXES)
    except FileNotFoundError as problem:
        raise UsageError(f"--data {root}: {problem}") from None
    files = tuple(str(Path(path).relative_to(root)) for path, _ in samples)
    digest = sha256("\0".join(files).encode()).hexdigest()
    labels = torch.tensor([label for _, label in samples])
    return FolderTable(root, files, labels, len(names), digest, workers, labels.device)
