"""From a member's bytes to an image or a caption. Every byte is untrusted; nothing is unpickled.

Images are what stock OpenCLIP sees: ``PIL.Image.open(...).convert("RGB")``. That takes the first
frame of an animation, drops transparency, and does *not* apply an EXIF rotation.
"""

import contextlib
import io
import json
import re
from bisect import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from PIL import Image

from training.data.draws import seed_of

FORMATS = ("JPEG", "PNG", "WEBP")
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # in a JPEG, not counting restarts
_MOST_MARKERS = 2000
#: Multiples of the golden ratio fill [0, 1) more evenly than those of any other number.
GOLDEN = (5**0.5 - 1) / 2


class BadSample(Exception):
    """A sample cannot be used; ``str()`` is the reason it is counted under."""


@dataclass(frozen=True)
class Caps:
    """Limits of one sample; what exceeds them is skipped before it costs anything.

    Attributes:
        max_bytes: encoded image.
        max_pixels: decoded image, read from its header (4 bytes a pixel while decoding).
        max_scans: of a JPEG that is not decoded in one; each costs a pass over its pixels.
        max_caption: caption in bytes (also of one caption among several).
        max_json: ``key.json`` in bytes.
    """

    max_bytes: int = 1 << 25
    max_pixels: int = 1 << 25
    max_scans: int = 64
    max_caption: int = 1 << 14
    max_json: int = 1 << 20


def decode_image(data: bytes, caps: Caps) -> Image.Image:
    """Encoded image -> RGB image.

    Raises:
        BadSample: too large, of no known format, or broken.
    """
    return decode(open_image(data, caps))


def open_image(data: bytes, caps: Caps) -> Image.Image:
    """An image that is within the limits, its header read and nothing decoded yet; see above."""
    if len(data) > caps.max_bytes:
        raise BadSample("image: too many bytes")
    with _broken():
        image = _open(data, caps)
        if data.startswith(b"\xff\xd8") and _scans(data) > caps.max_scans:
            raise BadSample("image: too many scans")
        return image


def decode(image: Image.Image, least: int = 0) -> Image.Image:
    """The RGB image; with ``least``, one of so many pixels on its shorter side is good enough.

    Raises:
        BadSample: it is broken.
    """
    with _broken():
        if least:
            image.draft(None, (least, least))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


@contextlib.contextmanager
def _broken():
    """Decoders raise whatever they like on hostile bytes."""
    try:
        yield
    except BadSample:
        raise
    except Exception as error:
        raise BadSample("image: broken") from error


def image_size(data: bytes, caps: Caps) -> tuple[int, int]:
    """(width, height) from an image's header; ``data`` may end after it.

    Raises:
        BadSample: too many pixels, of no known format, or a broken header.
    """
    with _broken():
        return _open(data, caps).size


def decode_text(data: bytes, caps: Caps) -> list[str]:
    """The bytes of ``key.txt`` -> its captions, one a line, at least one.

    Several lines are several captions, as clip_benchmark's retrieval sets are laid out. img2dataset
    writes one caption a file, and where it has a line break stock OpenCLIP makes that a blank.

    Raises:
        BadSample: empty, too long, or not UTF-8.
    """
    if len(data) > caps.max_caption:
        raise BadSample("caption: too long")
    try:
        lines = [line.strip() for line in data.decode("utf-8").split("\n")]
    except UnicodeDecodeError:
        raise BadSample("caption: not UTF-8") from None
    captions = [line for line in lines if line.strip("\0")]  # NULs: a download that broke off
    if not captions:
        raise BadSample("caption: empty")
    return captions


def decode_captions(
    data: bytes, caps: Caps, names: Iterable[str] = ("captions",)
) -> dict[str, list[str]]:
    """The bytes of ``key.json`` -> the captions of each of its fields (none where it lacks it).

    Raises:
        BadSample: not JSON, or captions that are no usable strings.
    """
    if len(data) > caps.max_json:
        raise BadSample("json: too many bytes")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise BadSample("json: broken") from None
    fields = document if isinstance(document, dict) else {}
    return {name: _captions(name, fields.get(name), caps) for name in names}


def _captions(name: str, value: Any, caps: Caps) -> list[str]:
    captions = [value] if isinstance(value, str) else value or []
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise BadSample(f"json: {name} are not a list of strings")
    captions = [caption.strip() for caption in captions if caption.strip()]
    if any(len(caption) > caps.max_caption for caption in captions):
        raise BadSample("caption: too long")
    return captions


def choose_caption(
    fields: Mapping[str, list[str]],
    weights: Mapping[str, float],
    seed: int,
    view: int,
    key: bytes,
) -> str:
    """One of the captions of one of several fields, a pure function of (seed, view, key).

    A field comes with its weight among those that are there. Over a sample's views the fields come
    as evenly as they can: V views hold each that has a share of about 1/V.
    """
    names = sorted(fields)  # whatever the order that they were given in
    captions = fields[names[0]]
    if len(names) > 1:
        bounds = list(accumulate(weights[name] for name in names))
        place = (seed_of(seed, "field", key) / 2**64 + GOLDEN * view) % 1
        captions = fields[names[bisect(bounds, place * bounds[-1], hi=len(bounds) - 1)]]
    return captions[seed_of(seed, "caption", view, key) % len(captions)]


def _open(data: bytes, caps: Caps) -> Image.Image:
    # the WebP plugin allocates its canvas when it opens a file, so its header is read here
    if data[:4] == b"RIFF":
        _check_pixels(*_webp_size(data), caps)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:  # Pillow's own cap, far above ours
        raise BadSample("image: too many pixels") from None
    _check_pixels(*image.size, caps)
    return image


def _check_pixels(width: int, height: int, caps: Caps) -> None:
    if width * height > caps.max_pixels:
        raise BadSample("image: too many pixels")


def _scans(data: bytes) -> int:
    """How often a decoder passes over a JPEG's pixels, from its markers."""
    place, scans, components, progressive = 2, 0, None, False
    for _ in range(_MOST_MARKERS):
        marker = _MARKER.search(data, place)
        if marker is None or marker[1] == b"\xd9":  # the image's end
            return scans
        place = marker.end()
        if marker[1] in b"\xc0\xc1\xc2\xc5\xc6\xc9\xca\xcd\xce":  # a frame begins
            components, progressive = data[place + 7 : place + 8], marker[1][0] & 3 == 2
        if marker[1] == b"\xda":
            scans += 1
            if not progressive and data[place + 2 : place + 3] == components:
                return scans  # all components at once: what follows is not decoded
        if marker[1] not in b"\x01\xd8":
            place += int.from_bytes(data[place : place + 2], "big")
    return _MOST_MARKERS


def _webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) from a WebP header (RFC 9649)."""
    chunk, body = data[12:16], data[20:30]
    if chunk == b"VP8X":
        return (
            1 + int.from_bytes(body[4:7], "little"),
            1 + int.from_bytes(body[7:10], "little"),
        )
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return (
        int.from_bytes(body[6:8], "little") & 0x3FFF,
        int.from_bytes(body[8:10], "little") & 0x3FFF,
    )
