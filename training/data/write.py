"""Image-text pairs as WebDataset tars."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

Sample = Mapping[str, bytes]  # an image and what belongs to it, by the extensions of their files


def write_shards(
    folder: Path, samples: Iterable[Sample], per_shard: int, key: str, shard: str = "{}"
) -> int:
    """Write tars whose bytes depend on nothing but the samples; how many tars.

    `key` and `shard` name samples and tars, with ``{}`` for a running number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples, shards, number = iter(samples), 0, 0
    while chunk := list(islice(samples, per_shard)):
        path = folder / f"{shard.format(shards)}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in chunk:
                for extension, content in sample.items():
                    member = tarfile.TarInfo(f"{key.format(number)}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                number += 1
        shards += 1
    return shards
