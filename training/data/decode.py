"""From a member's bytes to an image or a caption. Every byte is untrusted; nothing is unpickled.

Images are what stock OpenCLIP sees: ``PIL.Image.open(...).convert("RGB")``. That takes the first
frame of an animation, drops transparency, and does *not* apply an EXIF rotation.
"""

import io
import json
from dataclasses import dataclass

from PIL import Image

from training.data.draws import seed_of

FORMATS = ("JPEG", "PNG", "WEBP")


class BadSample(Exception):
    """A sample cannot be used; ``str()`` is the reason it is counted under."""


@dataclass(frozen=True)
class Caps:
    """Limits of one sample; what exceeds them is skipped before it costs anything.

    Attributes:
        max_bytes: encoded image.
        max_pixels: decoded image, read from its header (4 bytes a pixel while decoding).
        max_caption: caption in bytes (also of one caption among several).
        max_json: ``key.json`` in bytes.
    """

    max_bytes: int = 1 << 25
    max_pixels: int = 1 << 25
    max_caption: int = 1 << 14
    max_json: int = 1 << 20


def decode_image(data: bytes, caps: Caps) -> Image.Image:
    """Encoded image -> RGB image.

    Raises:
        BadSample: too large, of no known format, or broken.
    """
    if len(data) > caps.max_bytes:
        raise BadSample("image: too many bytes")
    try:
        image = _open(data, caps)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except BadSample:
        raise
    except Exception as error:  # decoders raise whatever they like on hostile bytes
        raise BadSample("image: broken") from error


def image_size(data: bytes, caps: Caps) -> tuple[int, int]:
    """(width, height) from an image's header; ``data`` may end after it.

    Raises:
        BadSample: too many pixels, of no known format, or a broken header.
    """
    try:
        return _open(data, caps).size
    except BadSample:
        raise
    except Exception as error:
        raise BadSample("image: broken") from error


def decode_caption(data: bytes, caps: Caps) -> str:
    """The bytes of ``key.txt`` -> caption.

    Raises:
        BadSample: empty, too long, or not UTF-8.
    """
    if len(data) > caps.max_caption:
        raise BadSample("caption: too long")
    try:
        caption = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise BadSample("caption: not UTF-8") from None
    if not caption:
        raise BadSample("caption: empty")
    return caption


def decode_captions(data: bytes, caps: Caps) -> list[str]:
    """The bytes of ``key.json`` -> its ``"captions"`` (empty list when it has none).

    Raises:
        BadSample: not JSON, or captions that are no usable strings.
    """
    if len(data) > caps.max_json:
        raise BadSample("json: too many bytes")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise BadSample("json: broken") from None
    captions = document.get("captions") if isinstance(document, dict) else None
    if captions is None:
        return []
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise BadSample("json: captions are not a list of strings")
    captions = [caption.strip() for caption in captions if caption.strip()]
    if any(len(caption) > caps.max_caption for caption in captions):
        raise BadSample("caption: too long")
    return captions


def choose_caption(captions: list[str], seed: int, view: int, key: bytes) -> str:
    """One of several captions, a pure function of (seed, view, key)."""
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
