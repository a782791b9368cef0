"""Files that survive a power cut, a kill and a second writer.

Everything that anyone reads again is written here: beside its place, synced to disk, renamed, and
the folder synced. A reader sees the old file or the new one, whole. This is the one module of the
library that deals with the operating system.
"""

import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class BadFile(Exception):
    """A file can't be used; the message names it and says why, in one sentence."""


@contextmanager
def writing(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """A binary file that appears at ``path``, whole and on disk, when the block ends well.

    An error in the block leaves what was there as it was. The file's permissions are ``mode``
    without those that the process's umask takes away.
    """
    path = Path(path)
    make_folder(path.parent)
    # Named after the process: several may write one file at once.
    temporary = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at ``path``, whole and on disk, when the block ends well.

    Whoever writes into it need not do so durably: libraries with writers of their own, say. What
    stands at ``path`` already must be an empty folder.
    """
    make_folder(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
        folder = Path(temporary) / path.name  # the temporary one is private to its user
        folder.mkdir()
        yield folder
        sync_tree(folder)
        folder.rename(path)
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those above it where they are missing; they survive a power cut."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder (new, renamed, removed) survive a power cut."""
    _sync(folder)


def sync_tree(folder: Path) -> None:
    """Make all that is in a folder survive a power cut."""
    for content in (*folder.rglob("*"), folder):
        _sync(content)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a whole file, see `writing`."""
    with writing(path, mode) as file:
        file.write(content)


def write_text(path: Path, content: str, mode: int = 0o666) -> None:
    """Write a whole UTF-8 file, see `writing`; of a name that is none, its bytes' numbers."""
    write_bytes(path, content.encode(errors="backslashreplace"), mode)


def write_json(path: Path, content: Any, version: int | None = None) -> None:
    """Write JSON, see `writing`.

    Args:
        path: where.
        content: JSON values; an object if it has a version.
        version: the artefact's format, which `read_json` compares; None: a file without one.
    """
    if version is not None:
        content = {"format": version, **content}
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path, version: int | None = None, **types: type | tuple[type, ...]) -> Any:
    """The content of a JSON file, without its format.

    Args:
        path: where.
        version: the format that this code reads; None: of a file without one.
        types: of the values that an object with a format must have, by their keys.

    Raises:
        BadFile: it is missing, no JSON, of another format, or lacks such a value.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadFile(f"{path} can't be read: {error}") from error
    if version is None:
        return content
    if not isinstance(content, dict):
        raise BadFile(f"{path} is damaged: it holds no JSON object")
    if (format := content.pop("format", None)) != version:
        raise BadFile(
            f"{path} has format {format}, this version of cifd_clip reads format {version}: make "
            "it again, or read it with the version that made it"
        )
    for key, kind in types.items():
        if key not in content or not isinstance(content[key], kind):
            raise BadFile(f"{path} is damaged: its '{key}' is {content.get(key)!r}")
    return content


def write_tensors(
    path: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, see `writing` (safetensors' own would be private to its user)."""
    from safetensors.torch import save

    content = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_bytes(path, save(content, metadata))


def read_tensors(path: Path, expected: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """The tensors of a safetensors file.

    Args:
        path: where.
        expected: tensors (on the meta device, say) of the same names, shapes and types: no more
            than they need is allocated, whatever the file says.

    Raises:
        BadFile: it is missing or damaged, holds other tensors, or a value that is not finite.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            if shapes != {name: tuple(tensor.shape) for name, tensor in expected.items()}:
                raise BadFile(f"{path} holds other tensors than those its configuration describes")
            tensors = {name: file.get_tensor(name) for name in shapes}
    except (OSError, SafetensorError) as error:
        raise BadFile(f"{path} can't be read: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype != expected[name].dtype:
            raise BadFile(f"{path}: {name} is {tensor.dtype}, expected {expected[name].dtype}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise BadFile(f"{path}: {name} holds values that are not finite")
    return tensors


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
