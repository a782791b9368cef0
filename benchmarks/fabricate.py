"""Small copies of ImageNet and four variants, as ``clip_benchmark_export_wds`` would write them.

Class names, class folders and templates are the real ones, as clip_benchmark ships them (ObjectNet
ships its own); images are generated.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from clip_benchmark.datasets import builder
from PIL import Image

from experiments.shards import describe, encoded, write_split

CLASSIFICATION = ("imagenet1k", "imagenetv2", "imagenet-r", "imagenet-a", "objectnet")
#: The 113 classes of ObjectNet that ImageNet has too, by their folders.
OBJECTNET: dict[str, str] = json.loads(Path(__file__).with_name("objectnet.json").read_text())


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


def webdataset(root: Path, name: str, pictures: Pictures, templates: int = 80) -> None:
    """Write ``root/name`` in clip_benchmark's WebDataset layout, 500 images a shard."""
    names = [label for _, label in classes(name)]
    extension = "png" if name == "objectnet" else "jpg"
    images = pictures("PNG" if extension == "png" else "JPEG")
    samples = (
        {"cls": str(number % len(names)).encode(), extension: image}
        for number, image in enumerate(images)
    )
    describe(root / name, names, packaged("zeroshot_classification_templates")[:templates])
    write_split(root / name, "test", samples, 500, "s{:07}")
