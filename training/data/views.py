"""From a decoded image to the uint8 tensor a model sees, with OpenCLIP's own transforms.

Images travel as uint8 and are normalised per batch on the device (`normalise`), a quarter of the
bytes of OpenCLIP's float images, with the same pixels. A view's randomness is seeded just before
it is drawn (`draw`), so it depends on (seed, view, key) alone, and two models of different
resolution see the same crop of one sample.
"""

import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Normalize, RandomResizedCrop, ToTensor

from cifd_clip.compiled import Compiled
from training.data.decode import BadSample
from training.data.draws import seed_of
from training.data.pixels import Crop, Pixels, Whole, picture, tensor
from training.errors import UsageError

MAX_RESIZED = 1 << 25  # pixels of a whole image, resized by its shorter side


@dataclass(frozen=True)
class ImageSpec:
    """What a model expects of its images: OpenCLIP's ``visual.preprocess_cfg``."""

    size: int | tuple[int, int] = 224
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    @classmethod
    def of(cls, preprocess_cfg: dict) -> "ImageSpec":
        """From an open_clip model's ``visual.preprocess_cfg`` (a dict)."""
        known = {k: v for k, v in preprocess_cfg.items() if k in cls.__dataclass_fields__}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})


@dataclass(frozen=True)
class View:
    """PIL RGB image, or `Pixels` -> uint8 (3, H, W), channels last in memory.

    With ``finish`` (stages that work on normalised images, such as timm's random erasing) the
    result is float32 and already normalised.
    """

    stages: tuple[Callable, ...]
    finish: tuple[Callable, ...] = ()

    @property
    def least(self) -> int:
        """Pixels of the shorter side that are enough of `Pixels`; 0: it takes PIL images."""
        return getattr(self.stages[0], "least", 0) if self.stages else 0

    def __call__(self, image: Image.Image | Pixels) -> Tensor:
        """Apply the transform, drawing from torch's default generator and `random`."""
        for stage in self.stages:
            image = stage(image)
        if not self.finish:
            return image if isinstance(image, Tensor) else tensor(image)
        for stage in self.finish:
            image = stage(image)
        return image

    def example(self) -> Tensor:
        """What it makes of a blank image."""
        image = Image.new("RGB", (64, 64))
        with private_randomness():
            return self(Pixels(tensor(image), (64, 64)) if self.least else image)


def train_view(spec: ImageSpec, aug_cfg: dict | None = None, backend: str = "pil") -> View:
    """OpenCLIP's training transform (``aug_cfg``: its ``--aug-cfg``), up to the uint8 pixels.

    Args:
        spec, aug_cfg: what OpenCLIP makes it of.
        backend: ``pil``, or ``torch``: see `training.data.pixels`.
    """
    view = _view(_transform(spec, True, aug_cfg))
    if backend == "pil":
        return view
    crop, *rest = view.stages
    if type(crop) is not RandomResizedCrop:
        raise UsageError(
            "--image-backend torch knows OpenCLIP's own crops, not timm's (--aug-cfg "
            "use_timm=True): leave one of them out"
        )
    after = (picture, *rest) if rest or view.finish else ()
    return View((Crop(crop), *after), view.finish)


def eval_view(spec: ImageSpec) -> View:
    """OpenCLIP's evaluation transform, up to the uint8 pixels.

    It raises `BadSample` on an image that is far too long for it, see `MAX_RESIZED`.
    """
    view = _view(_transform(spec, False))
    if spec.resize_mode != "shortest":
        return view
    side = spec.size if isinstance(spec.size, int) else max(spec.size)
    return View((_Bounded(side), *view.stages), view.finish)


def stored_view(spec: ImageSpec) -> View:
    """The transform of an image that is a training view already, perhaps of another size."""
    return View((Whole(height_width(spec.size)),))


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """An `ImageSpec`'s size, spelled out."""
    return (size, size) if isinstance(size, int) else tuple(size)


def normalise(images: Tensor, spec: ImageSpec) -> Tensor:
    """uint8 (B, 3, H, W) -> float32, contiguous, bit-equal to OpenCLIP's ToTensor + Normalize.

    Float images are already normalised (see `View`) and pass through.
    """
    if images.is_floating_point():
        return images
    return _normalised(images, *_statistics(spec.mean, spec.std, images.device))


def _plainly_normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    images = images.to(torch.float32, memory_format=torch.contiguous_format)
    return images.div_(255).sub_(mean).div_(std)


_normalised = Compiled(_plainly_normalised)  # one pass over the pixels in place of four


def draw(view_of: View, image: Image.Image, seed: int, view: int, key: bytes) -> Tensor:
    """View number ``view`` of the sample ``key``: a pure function of (seed, view, key, image)."""
    seed_generators(seed, "view", view, key)
    return view_of(image)


def seed_generators(*labels: int | str | bytes) -> None:
    """Seed torch's default generator and `random` by labels, see `seed_of`."""
    number = seed_of(*labels)
    # not torch.manual_seed, which also queues a call for every other device
    torch.default_generator.manual_seed(number & (2**63 - 1))
    random.seed(number)


@contextlib.contextmanager
def private_randomness():
    """Leave torch's and Python's generators as they were."""
    state, python = torch.default_generator.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
        random.setstate(python)


@dataclass(frozen=True)
class _Bounded:
    """Refuses an image before a resize of its shorter side to ``side`` makes it huge."""

    side: int

    def __call__(self, image: Image.Image) -> Image.Image:
        shorter, longer = sorted(image.size)
        if self.side**2 * longer > MAX_RESIZED * shorter:
            raise BadSample("image: too long for its width")
        return image


def _transform(spec: ImageSpec, is_train: bool, aug_cfg: dict | None = None) -> Compose:
    # imported here, so that a spawned worker, which is handed its views, need not import it
    from open_clip.transform import image_transform

    return image_transform(
        spec.size,
        is_train=is_train,
        mean=spec.mean,
        std=spec.std,
        resize_mode=spec.resize_mode,
        interpolation=spec.interpolation,
        fill_color=spec.fill_color,
        aug_cfg=aug_cfg,
    )


def _view(transform: Compose) -> View:
    from open_clip.transform import MaybeConvertMode

    stages = transform.transforms
    cut = next(i for i, stage in enumerate(stages) if isinstance(stage, ToTensor))
    head = tuple(stage for stage in stages[:cut] if not isinstance(stage, MaybeConvertMode))
    plain = len(stages) == cut + 2 and isinstance(stages[-1], Normalize)
    return View(head, () if plain else tuple(stages[cut:]))


@lru_cache
def _statistics(mean, std, device) -> tuple[Tensor, Tensor]:
    return tuple(
        torch.tensor(x, dtype=torch.float32).view(-1, 1, 1).to(device) for x in (mean, std)
    )
