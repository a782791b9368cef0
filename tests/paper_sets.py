"""Small copies of the paper's seven test sets, as WebDatasets and as their authors have them."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import fabricate
from benchmarks.fabricate import OBJECTNET, Pictures, classes
from experiments.shards import describe, write_lines, write_split

RETRIEVAL = ("mscoco_captions", "flickr30k")
WORDS = "a red, dog runs over the old bridge two children near green water with small white boats"

#: Three of the 200 classes of ObjectNet that ImageNet has not: they don't count.
OTHERS = {"air_freshener": "Air freshener", "squeegee": "Squeegee", "toy": "Toy"}


def captions(name: str, pictures: Pictures) -> Iterator[list[str]]:
    """Five captions for each image; for every tenth of COCO, six."""
    rng = np.random.Generator(np.random.Philox(pictures.seed))
    words = WORDS.split()
    for number in range(pictures.count):
        count = 6 if name == "mscoco_captions" and number % 10 == 0 else 5
        yield [" ".join(rng.permutation(words)[:9]) for _ in range(count)]


def webdataset(root: Path, name: str, pictures: Pictures, templates: int) -> None:
    """Write ``root/name`` in clip_benchmark's WebDataset layout, 500 images a shard."""
    if name not in RETRIEVAL:
        return fabricate.webdataset(root, name, pictures, templates)
    samples = (
        {"txt": "\n".join(some).encode(), "jpg": image}
        for image, some in zip(pictures("JPEG"), captions(name, pictures))
    )
    describe(root / name)
    write_split(root / name, "test", samples, 500, "s{:07}")


def local(root: Path, name: str, pictures: Pictures) -> None:
    """Write ``root/name`` in the layout that its authors distribute and its builder reads.

    A classification set gets at least one image of each class where the builder asks for it.
    """
    if name in RETRIEVAL:
        return {"mscoco_captions": _coco, "flickr30k": _flickr30k}[name](root / name, pictures)
    inner = {
        "imagenet1k": "val",
        "imagenetv2": "ImageNetV2-matched-frequency",
        "objectnet": "objectnet-1.0/images",
    }
    folder = root / name / inner.get(name, "")
    extension = {"imagenet1k": "JPEG", "imagenetv2": "jpeg", "objectnet": "png"}.get(name, "jpg")
    folders = [own for own, _ in classes(name)]
    if name == "objectnet":
        _objectnet_mappings(root / name)
        folders += OTHERS  # of no class: these images are not in the test set
    for number, image in enumerate(pictures("PNG" if extension == "png" else "JPEG")):
        path = folder / folders[number % len(folders)] / f"ILSVRC2012_val_{number:08}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)


def _coco(folder: Path, pictures: Pictures) -> None:
    images, notes = [], []
    (folder / "val2014").mkdir(parents=True)
    for number, (image, texts) in enumerate(zip(pictures("JPEG"), captions(folder.name, pictures))):
        identity = 581_929 - 7 * number
        file = f"COCO_val2014_{identity:012}.jpg"
        (folder / "val2014" / file).write_bytes(image)
        images.append({"id": identity, "file_name": file})
        for text in texts:
            notes.append({"id": len(notes), "image_id": identity, "caption": text})
    content = {"images": images, "annotations": notes}
    (folder / "coco_test_karpathy.json").write_text(json.dumps(content))


def _flickr30k(folder: Path, pictures: Pictures) -> None:
    folder.mkdir(parents=True)
    lines = ["image,caption"]
    for number, (image, texts) in enumerate(zip(pictures("JPEG"), captions(folder.name, pictures))):
        file = f"{1_007_129_816 + 11 * number}.jpg"
        (folder / file).write_bytes(image)
        lines += [f"{file},{text}" for text in texts]
    write_lines(folder / "flickr30k_test_karpathy.txt", lines)


def _objectnet_mappings(folder: Path) -> None:
    """The four files of ObjectNet's ``mappings``; its ImageNet side has no part in the figures."""
    names = list(OBJECTNET.values())
    folder.mkdir(parents=True)
    for file, content in {
        "folder_to_objectnet_label.json": OBJECTNET | OTHERS,
        "objectnet_to_imagenet_1k.json": {label: label.lower() for label in names},
        "pytorch_to_imagenet_2012_id.json": {str(n): n for n in range(len(names))},
    }.items():
        (folder / file).write_text(json.dumps(content))
    write_lines(folder / "imagenet_to_label_2012_v2", [label.lower() for label in names])
