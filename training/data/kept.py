"""Batches kept on disk: what one run makes, others read (``--in-memory-dir``).

A folder has a safetensors file for each batch, and a manifest that comes last with their hashes.
"""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from cifd_clip.files import file_hash, read_json, write_json, write_tensors, writing_folder
from training.data.batch import Batch
from training.errors import Failure

FORMAT = 1  # of the folder
MANIFEST = "manifest.json"


def folder_of(parent: Path, identity: dict[str, Any]) -> Path:
    """The folder for batches that depend on nothing but ``identity``, JSON values."""
    content = json.dumps(identity, sort_keys=True)
    return parent / sha256(content.encode()).hexdigest()[:16]


def read(folder: Path) -> Iterator[Batch]:
    """The batches that a folder keeps, in their order; they count no skipped samples.

    Raises:
        Failure: a file is damaged.
    """
    for name, digest in read_json(folder / MANIFEST, FORMAT, files=dict)["files"].items():
        path = folder / name
        if not path.is_file() or file_hash(path) != digest:
            raise Failure(f"{path} is damaged: remove {folder}, and the next run makes it again")
        yield _batch(path)


def keep(
    folder: Path, batches: Iterator[Batch], samples: int, identity: dict[str, Any]
) -> Iterator[Batch]:
    """The batches, which are kept in a folder if they are all that there are.

    Args:
        folder: appears when the last batch has been taken, unless another process was faster.
        batches: without extras; an interrupted reading may end early.
        samples: how many there are, with those that are skipped.
        identity: what they depend on, for who looks into the manifest.
    """
    try:
        with writing_folder(folder) as new:
            files = {}
            for number, batch in enumerate(batches):
                samples -= len(batch) + sum(batch.skipped.values())
                if len(batch):
                    path = new / f"{number:06}.safetensors"
                    write_tensors(path, _tensors(batch), {"keys": json.dumps(batch.keys)})
                    files[path.name] = file_hash(path)
                yield batch
            if samples:
                raise _Incomplete
            write_json(new / MANIFEST, {"made_of": identity, "files": files}, FORMAT)
    except _Incomplete:
        pass
    except OSError:
        made = (folder / MANIFEST).is_file()  # by another process meanwhile
        if samples or not made:
            raise


class _Incomplete(Exception):
    """The batches ended early."""


def _tensors(batch: Batch) -> dict[str, Tensor]:
    images = {f"image{i}": image for i, image in enumerate(batch.images)}
    texts = {f"text{i}": text for i, text in enumerate(batch.texts)}
    return {**images, **texts, "rows": batch.rows, "views": batch.views}


def _batch(path: Path) -> Batch:
    tensors = load(path.read_bytes())
    with safe_open(path, "pt") as file:
        keys = json.loads(file.metadata()["keys"])
    rows, views = tensors.pop("rows"), tensors.pop("views")
    by_name = sorted(tensors.items(), key=lambda item: (len(item[0]), item[0]))  # image10 after 9
    kinds = ([t for name, t in by_name if name.startswith(k)] for k in ("image", "text"))
    return Batch(*kinds, rows=rows, views=views, keys=keys)
