"""What MobileCLIP's reinforced sets (DataCompDR) hold of a sample beside its image and caption.

KEY.paug.json has augmentations: a crop, and operations of torchvision's RandAugment, by number, on
the 224 × 224 pixels made of it. KEY.syn.json has synthetic captions. KEY.npz has what the teachers
made of each augmented image (``image_emb``), and of the caption and then the synthetic ones
(``text_emb``): unit vectors, one teacher's after the other's in each row. The layout is read off
https://github.com/apple/ml-mobileclip and ml-mobileclip-dr.
"""

import io
import json
from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op  # what the sets were made with
from torchvision.transforms.functional import resized_crop

from training.data.decode import BadSample, Caps, decode_text

BICUBIC, NEAREST = InterpolationMode.BICUBIC, InterpolationMode.NEAREST
SIZE = (224, 224)  # of what the teachers saw; shifts are in its pixels
#: Members that a sample needs beside its image and its caption.
NEEDED = ("paug.json", "syn.json", "npz")
OPERATIONS = dict(
    enumerate(
        "Identity ShearX ShearY TranslateX TranslateY Rotate Brightness Color Contrast Sharpness "
        "Posterize Solarize AutoContrast Equalize".split()
    )
)


def reapplied(image: Image.Image, augmentation: Any) -> Image.Image:
    """A stored augmentation, [[top, left, height, width], [[operation, magnitude], …]], once more.

    Raises:
        BadSample: it crops what lies outside the image.
        ValueError: it is no such augmentation.
    """
    try:
        (top, left, height, width), steps = augmentation
        bottom, right = top + height, left + width
        if not (0 <= top < bottom <= image.height and 0 <= left < right <= image.width):
            raise BadSample("augmentation: crops what lies outside the image")
        image = resized_crop(image, top, left, height, width, list(SIZE), BICUBIC)
        for number, magnitude in steps or ():
            image = _apply_op(image, OPERATIONS[number], magnitude, NEAREST, fill=None)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise ValueError(
            f"the augmentation {json.dumps(augmentation):.120} is not known: expected [[top, left, "
            "height, width], [[number of an operation of RandAugment, magnitude], …]]"
        ) from error
    return image


def reinforcements(
    members: dict[str, bytes], width: int
) -> tuple[list[Any], list[str], np.ndarray, np.ndarray]:
    """(A augmentations, 1 + S captions, (A, width) of images, (1 + S, width) of captions).

    Args:
        members: the content of ``txt`` and of `NEEDED`, by extension.
        width: of all teachers' embeddings together.

    Raises:
        BadSample: the caption can't be used.
        ValueError: a member is not as it is published.
    """
    augmentations = _entries(members, "paug.json", "param_aug")
    synthetic = _entries(members, "syn.json", "syn_text")
    # In one line, which to tokenizers is the same.
    own = " ".join(decode_text(members["txt"], Caps()))
    captions = [own, *(" ".join(str(text).split()) for text in synthetic)]
    try:
        with np.load(io.BytesIO(members["npz"]), allow_pickle=False) as archive:
            if sum(entry.file_size for entry in archive.zip.infolist()) > Caps.max_bytes:
                raise ValueError("too many bytes")
            image, text = archive["image_emb"], archive["text_emb"]
    except Exception as error:  # a damaged zip raises whatever it likes
        raise ValueError(
            f"KEY.npz has no plain 'image_emb' and 'text_emb' (nothing is unpickled): {error}"
        ) from error
    for name, rows, of in (("image_emb", image, augmentations), ("text_emb", text, captions)):
        if rows.dtype.kind != "f" or rows.shape != (len(of), width):
            raise ValueError(
                f"KEY.npz: '{name}' is {rows.dtype} {rows.shape}, expected floats "
                f"({len(of)}, {width}), a row for each augmentation or caption"
            )
    return augmentations, captions, image, text


def _entries(members: dict[str, bytes], kind: str, name: str) -> list[Any]:
    """A list in a JSON member, where it may be JSON in a string, as hubs of data sets make it."""
    try:
        value = json.loads(members[kind])[name]
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, LookupError, TypeError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise ValueError(f"KEY.{kind} has no list '{name}'")
    return value
