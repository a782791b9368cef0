"""Tars of images with labels, as clip_benchmark writes them; every byte is untrusted."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cifd_clip.artefact import MAX_CLASSES
from training.data.tar import BadTar, Member, members
from training.errors import UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_LABEL = 20  # bytes of key.cls


class Labelled(NamedTuple):
    """An image of a tar, by the position of its bytes, and its label."""

    key: str
    image: Member
    label: int


def shards(folder: Path) -> list[Path]:
    """The tars of a folder, ``2.tar`` before ``10.tar``."""
    return sorted(folder.glob("*.tar"), key=lambda path: (len(path.stem), path.stem))


def read_labels(path: Path) -> list[Labelled]:
    """The samples of a tar in the order of their images, which are not read here.

    Members are one sample by their key, the path up to the first dot of the file's name
    (WebDataset's rule); members that are neither image nor label don't matter.

    Raises:
        UsageError: the tar is damaged, a label is none, or a key lacks an image or a label.
    """
    images: dict[str, Member] = {}
    labels: dict[str, int] = {}
    with open(path, "rb") as file:

        def read(size: int, position: int) -> bytes:
            file.seek(position)
            return file.read(size)

        try:
            for member in members(read, path.stat().st_size):
                folder, slash, name = member.name.decode(errors="replace").rpartition("/")
                stem, _, suffix = name.partition(".")
                key = folder + slash + stem
                if member.kind == "file" and f".{suffix.lower()}" in SUFFIXES:
                    if key in images:
                        raise ValueError(f"'{key}' has two images")
                    images[key] = member
                elif member.kind == "file" and suffix == "cls":
                    if key in labels:
                        raise ValueError(f"'{key}' has two labels")
                    labels[key] = _label(member, read)
        except (BadTar, ValueError) as problem:
            raise UsageError(f"--data: {path} is damaged: {problem}") from None
    if images.keys() != labels.keys() or not images:
        odd = sorted(images.keys() ^ labels.keys())
        raise UsageError(
            f"--data: {path} has {len(images)} images and {len(labels)} labels, expected an image "
            f"and a label (key.cls) of each key{f', such as {odd[0]!r}' if odd else ''}"
        )
    return [Labelled(key, image, labels[key]) for key, image in images.items()]


def _label(member: Member, read: Callable[[int, int], bytes]) -> int:
    """The class of a ``key.cls``, of which no more is read than a label has."""
    name = member.name.decode(errors="replace")
    if member.size > MAX_LABEL:
        raise ValueError(f"'{name}' has {member.size} bytes, a label at most {MAX_LABEL}")
    text = read(member.size, member.offset).strip()
    if not text.isdigit() or int(text) >= MAX_CLASSES:
        shown = text.decode(errors="replace")
        raise ValueError(f"'{name}' is '{shown}', expected a class from 0 to {MAX_CLASSES - 1}")
    return int(text)
