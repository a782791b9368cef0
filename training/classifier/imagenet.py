"""Large image-classification data on disk: ImageNet as folders of images, or as tars.

Random views are pure functions of (seed, epoch, the image's name); every byte is untrusted.
"""

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

from cifd_clip import World
from training.classifier.cifar import ImageBatch, normalise, share
from training.classifier.tars import SUFFIXES, read_labels, shards
from training.data import draws
from training.data.decode import BadSample, Caps, decode_image
from training.data.tar import open_regular
from training.data.views import draw, private_randomness
from training.data.workers import check_limits, data_loader, end, iterate, reads
from training.errors import UsageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE, RESIZED = 224, 256
#: ImageNet has photos of sixty million pixels.
CAPS = Caps(max_bytes=1 << 27, max_pixels=1 << 27)
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
class Photos:
    """Encoded images, each a stretch of a file.

    Attributes:
        names: (N,) what each is called, whatever file it lies in.
        files: the files.
        file: (N,) which of them.
        offset, size: (N,) where in it, in bytes; size -1 for all of it.
    """

    names: tuple[str, ...]
    files: tuple[Path, ...]
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: np.ndarray) -> "Photos":
        """Some of them."""
        names = tuple(self.names[row] for row in rows)
        return Photos(names, self.files, self.file[rows], self.offset[rows], self.size[rows])

    def open(self, row: int) -> Image.Image:
        """One of them, RGB.

        Raises:
            UsageError: it can't be read or decoded.
        """
        reads(row)
        try:
            with open_regular(self.files[self.file[row]]) as file:
                file.seek(self.offset[row])
                data = file.read(self.size[row])
            return decode_image(data, CAPS)
        except (BadSample, OSError) as problem:
            raise UsageError(f"--data: {self.place(row)}: {problem}") from None

    def place(self, row: int) -> str:
        """What one of them is called, and where it lies."""
        return f"'{self.names[row]}' in {self.files[self.file[row]]}"


@dataclass(frozen=True)
class PhotoTable:
    """The images of a split, on disk.

    Attributes:
        photos: where they are.
        labels: (N,) int64.
        class_names: what the classes are called, in the order of their numbers.
        hash: SHA-256 of the images' names and labels.
        workers: processes that decode.
        device: where batches go.
        named: whether the data say what the classes are called, or only their numbers.
    """

    photos: Photos
    labels: Tensor
    class_names: tuple[str, ...]
    hash: str
    workers: int
    device: torch.device
    named: bool = True
    side = SIDE

    def __len__(self) -> int:
        return len(self.photos)

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def to(self, device: torch.device) -> "PhotoTable":
        """The same table, with batches on a device."""
        return replace(self, labels=self.labels.to(device), device=device)

    def take(self, rows: np.ndarray) -> "PhotoTable":
        """Some of its rows, in this order."""
        labels = self.labels[torch.from_numpy(rows)]
        return replace(self, photos=self.photos.take(rows), labels=labels)

    def in_order(
        self, rows: Tensor, size: int, images: bool = True, stopping=None, timeout=None
    ) -> Iterator[ImageBatch]:
        """The plain views of some rows, ``size`` at a time."""
        yield from self.decoded(rows.split(size), PLAIN, stopping=stopping, timeout=timeout)

    def decoded(
        self,
        chunks: Sequence[Tensor],
        view: Callable,
        seed: int = 0,
        epoch: int = 0,
        stopping: Callable[[], bool] | None = None,
        timeout: float | None = None,
    ) -> Iterator[ImageBatch]:
        """Batches of these rows; random views are functions of seed, epoch and the image's name.

        ``stopping`` and ``timeout`` as of `training.data.workers.iterate`.
        """
        items = _Decoded(self.photos, [chunk.tolist() for chunk in chunks], view, seed, epoch)
        if self.workers and chunks:
            check_limits(3 * SIDE**2 * len(chunks[0]), self.workers)
        loader = data_loader(items, None, self.workers, None, self.device.type == "cuda", 2, False)
        iterator = iterate(loader, stopping, timeout, self.photos.place)
        try:
            for rows, pixels in zip(chunks, iterator):
                rows = rows.to(self.device)
                pixels = normalise(pixels.to(self.device, non_blocking=True), MEAN, STD)
                yield ImageBatch(rows, torch.zeros_like(rows), self.labels[rows], pixels)
        finally:
            end(iterator)


class _Decoded(Dataset):
    """Whole batches of decoded images, (B, H, W, 3) uint8."""

    def __init__(
        self, photos: Photos, chunks: list[list[int]], view: Callable, seed: int, epoch: int
    ):
        self.photos, self.chunks, self.view = photos, chunks, view
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> Tensor:
        with private_randomness():
            images = [self._view(row) for row in self.chunks[index]]
        return torch.stack(images).permute(0, 2, 3, 1).contiguous()

    def _view(self, row: int) -> Tensor:
        name = self.photos.names[row].encode()
        return draw(self.view, self.photos.open(row), self.seed, self.epoch, name)


class PhotoBatches:
    """The training batches of a table: random resized crops, mirrored half the time.

    Args:
        table: the images.
        rows: which are trained on.
        seed: of order and views.
        size: samples per batch; what is left over at an epoch's end is dropped.
        world: this process's place among those that share each batch.
    """

    def __init__(
        self,
        table: PhotoTable,
        rows: np.ndarray,
        seed: int,
        size: int,
        world: World | None = None,
    ):
        self.table, self.rows, self.seed, self.size = table, rows, seed, size
        self.share = share(size, world or World())
        self.per_epoch = len(rows) // size

    def epoch(
        self, epoch: int, start: int, images: bool, stopping=None, timeout=None
    ) -> Iterator[ImageBatch]:
        """This process's part of each batch of an epoch from batch ``start`` on."""
        order = draws.permutation(len(self.rows), "classify/order", self.seed, epoch)
        rows = torch.from_numpy(self.rows[order])
        batches = rows[: self.per_epoch * self.size].split(self.size)[start:]
        chunks = [batch[self.share] for batch in batches]
        yield from self.table.decoded(chunks, AUGMENTED, self.seed, epoch, stopping, timeout)


def load_photos(directory: Path, split: str, workers: int) -> PhotoTable:
    """A split of ImageNet, or of other data in one of its layouts.

    Args:
        directory: holds ``{split}/{class}/*.jpg``; or ``{split}/*.tar`` with ``key.jpg`` and
            ``key.cls``, as WebDataset and clip_benchmark have it, and maybe ``classnames.txt``.
        split: ``train`` or ``val``; tars may call the latter ``test``.
        workers: processes that decode.

    Raises:
        UsageError: no such folder, no image in it, or damaged tars.
    """
    names = (split, "test") if split == "val" else (split,)
    for name in names:
        if tars := shards(directory / name):
            return _from_tars(directory, tars, workers)
    root = directory / split
    if not root.is_dir():
        raise UsageError(
            f"--data {directory}: there is no {split}/ with a folder per class, or with tars of "
            "key.jpg and key.cls"
        )
    try:
        classes, index = find_classes(str(root))
        samples = make_dataset(str(root), index, extensions=SUFFIXES)
    except FileNotFoundError as problem:
        raise UsageError(f"--data {root}: {problem}") from None
    files = tuple(Path(path) for path, _ in samples)
    names = tuple(str(file.relative_to(root)) for file in files)
    whole = np.full(len(files), -1)
    photos = Photos(names, files, np.arange(len(files)), np.zeros(len(files), np.int64), whole)
    digest = sha256("\0".join(names).encode()).hexdigest()  # the folder is the label
    return _table(photos, [label for _, label in samples], classes, digest, workers)


def check_classes(place: Path, test: PhotoTable, names: Sequence[str] | None, count: int) -> None:
    """Refuse a test split whose labels are numbers of other classes than those trained on.

    Args:
        place: where it is.
        test: the split.
        names: of the classes trained on, in the order of their numbers; None: they have none.
        count: how many of them there are.

    Raises:
        UsageError: what differs.
    """
    if names is None or not test.named:
        if test.classes == count:
            return
        what = [f"it has {test.classes}, not {count}"]
    elif tuple(names) == test.class_names:
        return
    else:
        lacks, has = set(names) - set(test.class_names), set(test.class_names) - set(names)
        what = [f"it lacks {_some(lacks)}"] * bool(lacks) + [f"it has {_some(has)}"] * bool(has)
    raise UsageError(
        f"--data {place}: the test split's classes are not those trained on: "
        f"{' and '.join(what) or 'they come in another order'}"
    )


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _table(
    photos: Photos,
    labels: list[int],
    classes: Sequence[str],
    digest: str,
    workers: int,
    named: bool = True,
) -> PhotoTable:
    on_host = torch.tensor(labels)
    return PhotoTable(photos, on_host, tuple(classes), digest, workers, on_host.device, named)


def _from_tars(directory: Path, tars: list[Path], workers: int) -> PhotoTable:
    names, where, labels = [], [], []
    for number, path in enumerate(tars):
        for key, image, label in read_labels(path):
            names.append(f"{path.name}/{key}")
            where.append((number, image.offset, image.size))
            labels.append(label)
    listed = directory / "classnames.txt"
    count = max(labels) + 1
    if listed.is_file():  # a blank line keeps its place, as in clip_benchmark
        classes = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines()]
    else:
        classes = list(map(str, range(count)))
    if count > len(classes):
        raise UsageError(f"{listed} names {len(classes)} classes, and there is a label {count - 1}")
    file, offset, size = np.array(where, dtype=np.int64).T
    digest = sha256("\0".join(f"{n} {y}" for n, y in zip(names, labels)).encode()).hexdigest()
    photos = Photos(tuple(names), tuple(tars), file, offset, size)
    return _table(photos, labels, classes, digest, workers, listed.is_file())
