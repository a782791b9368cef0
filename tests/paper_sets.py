"""Small copies of the paper's seven test sets, as WebDatasets and as their authors have them.

Class names, class folders and templates are the real ones, as clip_benchmark ships them (ObjectNet
ships its own); images and captions are generated.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from clip_benchmark.datasets import builder
from PIL import Image

from experiments.shards import describe, encoded, write_lines, write_split

RETRIEVAL = ("mscoco_captions", "flickr30k")
WORDS = "a red, dog runs over the old bridge two children near green water with small white boats"

#: The 113 classes of ObjectNet that ImageNet has too, by their folders.
OBJECTNET: dict[str, str] = json.loads(Path(__file__).with_name("objectnet.json").read_text())
#: Three of the 200 classes of ObjectNet that ImageNet has not: they don't count.
OTHERS = {"air_freshener": "Air freshener", "squeegee": "Squeegee", "toy": "Toy"}


@dataclass(frozen=True)
class Pictures:
    """How a set's images look: noise of many scales, encoded."""

    count: int
    low: int = 40  # least and most pixels of a side
    high: int = 64
    seed: int = 0
    distinct: int | None = None  # the first ones, which are repeated; None: all
    scales: tuple[int, ...] = (3, 9, 27, 81)  # cells of a side of each noise
    power: float = 1.0  # of the cells, with which a noise's share falls
    contrast: float = 60.0  # standard deviation of the pixels
    quality: int = 75  # of a JPEG

    def __call__(self, kind: str) -> Iterator[bytes]:
        """The encoded images; a few are not RGB, as in the real sets."""
        odd = {"JPEG": {5: "L", 17: "CMYK"}, "PNG": {5: "P", 17: "RGBA"}}[kind]
        different = [
            encoded(image.convert(odd.get(number % 100, "RGB")), kind, quality=self.quality)
            for number, image in enumerate(self.different())
        ]
        return (different[number % len(different)] for number in range(self.count))

    def different(self) -> Iterator[Image.Image]:
        """The distinct images."""
        rng = np.random.Generator(np.random.Philox(self.seed))
        for _ in range(min(self.count, self.distinct or self.count)):
            width, height = (int(side) for side in rng.integers(self.low, self.high + 1, 2))
            total = np.zeros((height, width, 3), dtype=np.float32)
            for cells in self.scales:
                noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
                total += np.asarray(noise.resize((width, height))) / np.float32(cells**self.power)
            total = (total - total.mean()) / total.std() * self.contrast + 120
            yield Image.fromarray(total.clip(0, 255).astype(np.uint8))


def packaged(kind: str) -> list[str]:
    """ImageNet's ``classnames`` or ``zeroshot_classification_templates`` of clip_benchmark."""
    path = Path(builder.__file__).parent / f"en_{kind}.json"
    return json.loads(path.read_text())["imagenet1k"]


def classes(name: str) -> list[tuple[str, str]]:
    """(class folder, class name) of a data set, in the order of its labels."""
    if name == "objectnet":
        return sorted((folder, label.lower()) for folder, label in OBJECTNET.items())
    imagenet = list(zip(builder.all_imagenet_wordnet_ids, packaged("classnames")))
    if name == "imagenet1k":
        return imagenet
    if name == "imagenetv2":
        return [(str(number), label) for number, (_, label) in enumerate(imagenet)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "class").mkdir()
        (Path(folder) / "class" / "image.jpg").touch()
        names = builder.build_dataset(name, root=folder).classes
    rest = iter(imagenet)
    return [next(pair for pair in rest if pair[1] == label) for label in names]


def captions(name: str, pictures: Pictures) -> Iterator[list[str]]:
    """Five captions for each image; for every tenth of COCO, six."""
    rng = np.random.Generator(np.random.Philox(pictures.seed))
    words = WORDS.split()
    for number in range(pictures.count):
        count = 6 if name == "mscoco_captions" and number % 10 == 0 else 5
        yield [" ".join(rng.permutation(words)[:9]) for _ in range(count)]


def webdataset(root: Path, name: str, pictures: Pictures, templates: int) -> None:
    """Write ``root/name`` in clip_benchmark's WebDataset layout, 500 images a shard."""
    extension = "png" if name == "objectnet" else "jpg"
    images = pictures("PNG" if extension == "png" else "JPEG")
    if name in RETRIEVAL:
        describe(root / name)
        targets = [("txt", "\n".join(some)) for some in captions(name, pictures)]
    else:
        names = [label for _, label in classes(name)]
        describe(root / name, names, packaged("zeroshot_classification_templates")[:templates])
        targets = [("cls", str(number % len(names))) for number in range(pictures.count)]
    samples = (
        {kind: target.encode(), extension: image} for image, (kind, target) in zip(images, targets)
    )
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
