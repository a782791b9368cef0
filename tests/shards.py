"""Small WebDataset shards for tests: good ones, and members written just as a test says."""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FLICKR = Path(__file__).resolve().parents[2] / "shared/data/flickr8k/train"

needs_flickr = pytest.mark.skipif(
    not FLICKR.is_dir(), reason="needs Flickr8k in ../shared/data/flickr8k"
)


def picture(number: int = 0, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Image.Image:
    """Noise, different for each number."""
    noise = np.random.Generator(np.random.Philox(number)).integers(0, 256, (*size[::-1], 3))
    return Image.fromarray(noise.astype(np.uint8)).convert(mode)


def encode(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    """Encoded image."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def sample(key: str, number: int = 0) -> dict[str, bytes]:
    """Members of one good sample, with three captions."""
    captions = [f"caption {i} of {key}" for i in range(3)]
    return {
        f"{key}.jpg": encode(picture(number)),
        f"{key}.txt": captions[0].encode(),
        f"{key}.json": json.dumps({"key": key, "captions": captions}).encode(),
    }


def write_tar(path: Path, members: dict[str, bytes] | Sequence[tuple], **options) -> Path:
    """A tar of (name or TarInfo, bytes) members."""
    items = members.items() if isinstance(members, dict) else members
    with tarfile.open(path, "w", **options) as tar:
        for name, data in items:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    return path


def overwrite(path: Path, old: bytes, new: bytes) -> None:
    """Change bytes in place, at the same size and with the same times."""
    data, times = path.read_bytes(), path.stat()
    assert data.count(old) and len(old) == len(new)
    with open(path, "r+b") as file:
        file.write(data.replace(old, new))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def write_shards(folder: Path, counts: Sequence[int], prefix: str = "") -> str:
    """Good shards ``00000.tar``, ...; keys are ``PREFIX`` + a running number."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        members = {}
        for _ in range(count):
            members |= sample(f"{prefix}{number:06d}", number)
            number += 1
        write_tar(folder / f"{shard:05d}.tar", members)
    return str(folder)


class Letters:
    """A tokenizer for tests: the captions' first bytes."""

    def __init__(self, context: int = 24):
        self.context = context

    def __call__(self, texts: list[str]):
        import torch

        rows = [text.encode()[: self.context].ljust(self.context, b"\0") for text in texts]
        return torch.tensor([list(row) for row in rows])
