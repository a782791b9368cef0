"""torch in Pillow's place (``--image-backend torch``): about half the time, nearly the same pixels.

Crops are drawn as for Pillow and the same files are refused: what torch's JPEG decoder does not
take is decoded by Pillow. An image of more than twice the pixels that are wanted is decoded at 1/2,
1/4 or 1/8 of its size, which leaves most of a JPEG's work out.
"""

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import RandomResizedCrop

from training.data.decode import Caps, decode, open_image


class Pixels(NamedTuple):
    """A decoded image: uint8 (3, h, w), and the (height, width) of the whole if that is scaled."""

    image: Tensor
    whole: tuple[int, int]


def decode_pixels(data: bytes, caps: Caps, least: int) -> Pixels:
    """Encoded image -> its pixels, or a smaller image's, of ``least`` on the shorter side or more.

    Raises:
        BadSample: as `training.data.decode.decode_image` does.
    """
    image = open_image(data, caps)
    width, height = image.size
    if image.format == "JPEG" and image.mode == "RGB" and min(width, height) < 2 * least:
        with contextlib.suppress(RuntimeError):  # it is Pillow that says what can be used
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return Pixels(decode_jpeg(encoded, ImageReadMode.RGB), (height, width))
    return Pixels(tensor(decode(image, least)), (height, width))


def tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8 (3, H, W), channels last in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def picture(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) -> RGB image."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class Whole:
    """All of `Pixels`, at this (height, width)."""

    size: tuple[int, int]

    @property
    def least(self) -> int:
        """Pixels of the shorter side that are wanted."""
        return max(self.size)

    def __call__(self, pixels: Pixels) -> Tensor:
        """uint8 (3, *size)."""
        image = pixels.image
        return image if image.shape[1:] == self.size else _resized(image[None], self.size)


@dataclass(frozen=True)
class Crop:
    """torchvision's RandomResizedCrop of `Pixels`, drawn as it is for Pillow's images.

    Attributes:
        drawn: what draws it.
    """

    drawn: RandomResizedCrop

    @property
    def least(self) -> int:
        """Pixels of the shorter side of which each crop has at least as many as are wanted."""
        # a crop is at least that share of each side: its other side is no longer than the image
        return int(np.ceil(max(self.drawn.size) / self.drawn.scale[0]))

    def __call__(self, pixels: Pixels) -> Tensor:
        """uint8 (3, *size)."""
        whole = torch.empty(pixels.whole, device="meta")
        box = RandomResizedCrop.get_params(whole, self.drawn.scale, self.drawn.ratio)
        rows, columns = (
            slice(round(first * have / of), round((first + size) * have / of))
            for first, size, have, of in zip(box[:2], box[2:], pixels.image.shape[1:], pixels.whole)
        )
        return _resized(pixels.image[None, :, rows, columns], self.drawn.size)


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    # the kernel is slow on any other layout
    images = images.contiguous(memory_format=torch.channels_last)
    return F.interpolate(images, size, mode="bicubic", antialias=True)[0]
