"""The map's data: subsets of CIFAR-100 and Flickr8k to train on, their test sets, two teachers.

Written: ``{N}a/*.tar`` and ``{N}b/*.tar``, two subsets of N labelled images and photos in
proportion, in img2dataset's layout, without a pair in common while there are enough;
``benchmark/cifar100`` and ``benchmark/flickr8k`` in clip_benchmark's; and ``teacher`` and
``teacher1``, trained on all training pairs.
"""

from collections.abc import Sequence
from pathlib import Path

from cifd_clip.files import read_json, write_json
from experiments.map.bed import IMAGE_TOWERS, write_teacher
from experiments.map.pairs import TEMPLATES, Pair, cifar_pairs, flickr_pairs
from experiments.shards import describe, write_shards, write_split
from training.data.draws import permutation
from training.errors import UsageError

PER_SHARD, KEY = 500, "{:06}"


def prepare(
    out: Path,
    cifar100: Path,
    flickr8k: Path,
    sizes: Sequence[int],
    photos: float,
    teacher: int = 0,
) -> None:
    """Write the data unless they are there; a function of its arguments.

    Args:
        out: folder to write.
        cifar100: as `cifar_pairs` reads it.
        flickr8k: with ``train/*.tar`` and ``test/*.tar``, as `flickr_pairs` reads them.
        sizes: numbers of labelled images.
        photos: how many photos come with each.
        teacher: labelled images that the teachers are trained on; 0: all.
    """
    mark, settings = out / "made.json", {"sizes": list(sizes), "photos": photos, "teacher": teacher}
    teachers = {out / f"teacher{n or ''}": tower for n, tower in enumerate(IMAGE_TOWERS)}
    written = mark.is_file()
    if written and read_json(mark) != settings:
        raise UsageError(f"{out} holds data of other sizes: move it away, or use other --logs")
    if written and all(folder.is_dir() for folder in teachers):
        return
    names, images = cifar_pairs(cifar100, "train")
    pictures = list(flickr_pairs(flickr8k / "train"))
    for size in sizes if not written else ():
        parts = [(images, size), (pictures, round(size * photos))]
        for number, subset in enumerate("ab"):
            chosen = [pair for pairs, count in parts for pair in _some(pairs, count, number)]
            mixed = permutation(len(chosen), "map", size, subset)
            samples = (chosen[row].trained() for row in mixed)
            write_shards(out / f"{size}{subset}", samples, PER_SHARD, KEY, "{:05}")
    if not written:
        tests = {"cifar100": cifar_pairs(cifar100, "test")[1]}
        tests["flickr8k"] = list(flickr_pairs(flickr8k / "test"))
        for name, pairs in tests.items():
            write_split(out / "benchmark" / name, "test", map(Pair.tested, pairs), PER_SHARD, KEY)
            describe(out / "benchmark" / name, names if name == "cifar100" else (), TEMPLATES)
    write_json(mark, settings)
    some = round(teacher * photos) if teacher else len(pictures)
    for folder, tower in teachers.items():
        write_teacher(folder, images[: teacher or len(images)], pictures[:some], tower)


def _some(pairs: Sequence[Pair], count: int, number: int) -> list[Pair]:
    """The ``number``-th ``count`` pairs of an order that is always the same; wraps at the end."""
    order = permutation(len(pairs), "map", "subset")
    return [pairs[order[(number * count + i) % len(pairs)]] for i in range(count)]
