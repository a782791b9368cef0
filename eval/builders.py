"""Data sets as their authors distribute them, as clip_benchmark's builders read them.

    imagenet1k/val/WNID/*            imagenet_sketch, imagenet-a, imagenet-r: NAME/WNID/*
    imagenetv2/ImageNetV2-matched-frequency/{0..999}/*.jpeg
    objectnet/objectnet-1.0/images/FOLDER/*, with the four files of its mappings/ in objectnet/
    mscoco_captions/val2014/*, mscoco_captions/coco_test_karpathy.json
    flickr30k/*.jpg, flickr30k/flickr30k_test_karpathy.txt; flickr8k alike

A builder downloads what it misses. Here it is called only when everything it reads is there.
"""

import contextlib
import io
import json
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

MAPPINGS = (
    "folder_to_objectnet_label.json",
    "objectnet_to_imagenet_1k.json",
    "pytorch_to_imagenet_2012_id.json",
    "imagenet_to_label_2012_v2",
)
V2 = "ImageNetV2-matched-frequency"
#: The splits that each builder reads, and what it needs in the data set's folder for them.
NEEDS = {
    "imagenet1k": (("test",), ("val",)),
    "imagenetv2": (("test",), (V2,)),
    "imagenet_sketch": (("test",), ("n[0-9]*",)),
    "imagenet-a": (("test",), ("n[0-9]*",)),
    "imagenet-r": (("test",), ("n[0-9]*",)),
    "objectnet": (("test",), ("objectnet-1.0/images", *MAPPINGS)),
    "mscoco_captions": (("val", "test"), ("val2014", "coco_{split}_karpathy.json")),
    "flickr30k": (("train", "val", "test"), ("flickr30k_{split}_karpathy.txt",)),
    "flickr8k": (("train", "val", "test"), ("flickr8k_{split}_karpathy.txt",)),
}
#: Named after class folders; their labels are places in the sorted list of folders.
BY_WNID = ("imagenet1k", "imagenet_sketch", "imagenet-a", "imagenet-r")


class Local(NamedTuple):
    """A data set's samples; class names and templates are empty where the builder has none."""

    task: str
    samples: list[tuple[Path, int | list[str]]]
    """Image files, each with its class number or its captions."""
    classnames: list[str] = []
    templates: list[str] = []
    annotations: list[Path] = []


def knows(name: str, split: str) -> bool:
    """Whether a builder reads this data set's split."""
    return name in NEEDS and split in NEEDS[name][0]


def missing(path: Path, name: str, split: str) -> str | None:
    """The first file or folder that is not there: the builder would download it."""
    return next((need for need in _needs(name, split) if not any(path.glob(need))), None)


def _needs(name: str, split: str) -> list[str]:
    return [need.format(split=split) for need in NEEDS[name][1]]


def build(path: Path, name: str, split: str) -> Local:
    """The data set; `OSError` or `ValueError` where it is not as its builder expects it."""
    if name == "imagenetv2":
        # Its builder downloads whenever it does not count 10,000 images.
        images = sorted((path / V2).glob("*/*.jpeg"))
        samples = [(image, int(image.parent.name)) for image in images]
        return Local("zeroshot_classification", samples)
    # takes seconds to import, and is not needed for WebDataset folders
    from clip_benchmark.datasets import builder

    task = builder.get_dataset_default_task(name)
    # imagenet1k's own builder wants torchvision's archives; the class folders are the same
    known = {"imagenet1k": "imagenet1k-unverified"}.get(name, name)
    with contextlib.redirect_stdout(io.StringIO()):
        data = builder.build_dataset(known, root=str(path), split=split, download=False, task=task)
    if name in BY_WNID:
        _check_class_folders(data, builder.all_imagenet_wordnet_ids)
        samples = [(Path(image), label) for image, label in data.samples]
    elif name == "objectnet":
        samples = [(Path(p), data.label_map[Path(p).parent.name]) for p, _ in data.samples]
    elif name == "mscoco_captions":
        samples = [_coco(path / "val2014", data.coco, number) for number in data.ids]
    else:
        samples = [(path / image, captions) for image, captions in data.data]
    for image, _ in samples:
        if not image.is_file():
            raise ValueError(f"'{image.relative_to(path)}' is missing")
    return Local(
        task=task,
        samples=samples,
        classnames=getattr(data, "classes", []),
        templates=getattr(data, "templates", []),
        annotations=[path / need for need in _needs(name, split) if (path / need).is_file()],
    )


def _coco(images: Path, coco, number: int) -> tuple[Path, list[str]]:
    captions = [note["caption"] for note in coco.loadAnns(coco.getAnnIds(number))]
    return images / coco.loadImgs(number)[0]["file_name"], captions


def _check_class_folders(data, wnids: list[str]) -> None:
    """A missing or additional class folder would shift the labels of all that follow."""
    packaged = json.loads((files("clip_benchmark") / "datasets/en_classnames.json").read_text())
    names = dict(zip(wnids, packaged["imagenet1k"]))
    if [names.get(folder) for folder in data.class_to_idx] != data.classes:
        raise ValueError(
            f"{len(data.class_to_idx)} class folders, which are not those of the "
            f"{len(data.classes)} classes"
        )
