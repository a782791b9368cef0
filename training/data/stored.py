"""Views stored once, as JPEGs: tars in img2dataset's layout, one per shard and view.

Who trains with a teacher's cache sees the same few views of an image in every run. Here each is
drawn and resized once; from then on it is read as any image is. A sample keeps its key, caption and
JSON, so that a view's tars are a data set of their own.
"""

import contextlib
import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, features
from torch import Tensor
from torch.utils.data import Dataset

from cifd_clip.files import writing
from training.data.decode import BadSample
from training.data.index import Sources
from training.data.loader import Reader
from training.data.pixels import picture
from training.data.shard import Shard, index_shard
from training.data.tar import BLOCK
from training.data.views import private_randomness

SUBSAMPLING = "4:2:0"


def libraries() -> dict[str, str]:
    """What draws and encodes views, and in which version."""
    return {"Pillow": Image.__version__, "libjpeg-turbo": str(features.version("libjpeg_turbo"))}


def encoded(image: Tensor, quality: int) -> bytes:
    """uint8 (3, H, W) -> JPEG."""
    buffer = io.BytesIO()
    picture(image).save(buffer, "JPEG", quality=quality, subsampling=SUBSAMPLING)
    return buffer.getvalue()


@contextlib.contextmanager
def view_tar(path: Path) -> Iterator[Callable[[Mapping[str, bytes]], None]]:
    """What adds members by their names to a tar, which appears when the block ends well."""
    layout = {"format": tarfile.GNU_FORMAT, "encoding": "utf-8"}
    with writing(path) as file, tarfile.open(fileobj=file, mode="w", **layout) as tar:

        def add(members: Mapping[str, bytes]) -> None:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

        yield add


@dataclass
class ViewWriter(Dataset):
    """Job number -> the tar of one view of one shard, written if it isn't there.

    Attributes:
        reader: of the originals, with the transform of the views alone.
        jobs: shard number, view, and where its tar goes.
        quality: of the JPEGs.
    """

    reader: Reader
    jobs: Sequence[tuple[int, int, Path]]
    quality: int

    def __getitem__(self, number: int) -> Shard:
        shard, view, path = self.jobs[number]
        if not path.is_file():
            with view_tar(path) as add, private_randomness():
                for row in self.reader.sources.rows_of(shard):
                    with contextlib.suppress(BadSample):
                        add(self.members(row, view))
        return index_shard(str(path), check=True)

    def bytes_of(self, rows: Sequence[int]) -> float:
        """What a sample's view takes in its tar: the mean of some."""
        sizes = []
        with private_randomness():
            for row in rows:
                with contextlib.suppress(BadSample):
                    contents = self.members(row, 0).values()
                    sizes.append(sum(BLOCK + -(-len(c) // BLOCK) * BLOCK for c in contents))
        return sum(sizes) / max(len(sizes), 1)

    def members(self, row: int, view: int) -> dict[str, bytes]:
        """Names and contents of a sample whose image is a view.

        Raises:
            BadSample: the original can't be used.
        """
        key, read = self.reader.members(row, view)
        _, (image,) = self.reader.recipe.sample(key, view, read)
        # captions are judged when they are read again
        most, reason = self.reader.recipe.caps.max_bytes, "sample: too many bytes"
        contents = {
            "jpg": encoded(image, self.quality),
            "txt": read("text", most, reason),
            "json": read("json", most, reason),
        }
        name = key.decode("utf-8", "surrogateescape")
        return {f"{name}.{kind}": c for kind, c in contents.items() if c is not None}


class StoredViews(Sources):
    """A data set, row by row as it is, whose samples are read from stored views.

    Args:
        sources: the data set.
        views: by number of its shards, one shard for each view.
    """

    def __init__(self, sources: Sources, views: dict[int, list[Shard]]):
        super().__init__(sources.shards, sources.source, sources.weights)
        self.views = views

    def fingerprint(self) -> dict:
        """Of the data set, and of the tars that its views are stored in."""
        digest = hashlib.sha256()
        for shard in (shard for number in sorted(self.views) for shard in self.views[number]):
            digest.update(f"{shard.bytes} {shard.digest}\n".encode())
        return super().fingerprint() | {"views": digest.hexdigest()}

    def record(self, row: int, view: int) -> tuple[Shard, np.void]:
        """See `Sources.record`.

        Raises:
            BadSample: the view was not stored, because the original can't be used.
        """
        number, place = self.place(row)
        original, views = self.shards[number], self.views[number]
        stored = views[view % len(views)]
        # in the originals' order, without those that could not be used
        first = max(0, place - (original.samples - stored.samples))
        near = stored.records[first : place + 1]
        match = np.flatnonzero(near["key"] == original.records["key"][place])
        if not match.size:
            raise BadSample("view: not stored")
        return stored, near[match[0]]
