"""Image files with their classes and splits, and the decoding of one file."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from visprompt.errors import UserError

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are read; EPS, for example, would run Ghostscript"""
MAX_PIXELS = 178_956_970
"""Images with more pixels are refused, unless data.max_pixels allows them; Pillow's default limit"""
MIN_SIDE = 16
"""Images with a shorter side are refused: they are thumbnails or damaged"""
WIDE_WHITE = 65535
"""White in grey images of 16 or 32 bits, unless data.white_level sets it"""

_PILLOW = threading.Lock()  # images are decoded in threads, and Pillow's limit is global


class BadImage(UserError):
    """A file that cannot be used as an image; the message is the reason, without the file's name."""


class TooLarge(BadImage):
    """An image of more pixels than are decoded."""


class TooLong(TooLarge):
    """An image so long and narrow that resizing by its short side would give more pixels than are decoded."""


def open_image(source: str | Path | IO[bytes], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image file of a supported format and limited size; its pixels are not decoded yet.

    Args:
        source: The file, or its content.
        max_pixels: Larger images are refused: a file of a few kilobytes can claim gigabytes of pixels.

    Returns:
        Pillow's image, to be used in a `with`.

    Raises:
        TooLarge: The image has more pixels.
        Exception: Pillow cannot read it; see `decoding`.
    """
    with _PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        pillows, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # Pillow has no limit per image
        try:
            image = Image.open(source, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = pillows
    if image.width * image.height > max_pixels:
        image.close()
        raise TooLarge(
            f"is {image.width} x {image.height} pixels, more than the {max_pixels} that are decoded: if it "
            "is meant to be so large, raise data.max_pixels, or for src/predict.py max_pixels"
        )
    return image


class Item(NamedTuple):
    """One image file.

    Attributes:
        path: Where the file is.
        key: The same on every machine: the POSIX path relative to the root (Unicode NFC).
        label: Index into the class names.
        split: "train", "val" or "test".
    """

    path: Path
    key: str
    label: int
    split: str


@dataclass(frozen=True)
class ImageFolder:
    """The images of one task, sorted by key.

    Attributes:
        class_names: In the order of the labels.
        items: All images.
    """

    class_names: tuple[str, ...]
    items: tuple[Item, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 (hex) of key, size in bytes, class name and split of all images.

        No file is read: one that is edited in place and keeps its size is not noticed.
        """
        digest = sha256()
        for item in self.items:
            # a dead link is reported when it is decoded
            size = item.path.stat().st_size if item.path.exists() else -1
            fields = (item.key, str(size), self.class_names[item.label], item.split)
            digest.update(("\0".join(fields) + "\n").encode())
        return digest.hexdigest()


@contextmanager
def decoding() -> Iterator[None]:
    """Raise `BadImage` for all errors that Pillow raises where bytes are damaged, which are of many kinds."""
    try:
        yield
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"cannot be decoded ({_reason(error)})") from error


def decode(
    path: str | Path | IO[bytes],
    white_level: int | None = None,
    tops: list[int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decode an image file to 8-bit RGB.

    The EXIF orientation is applied, an animation gives its first frame, transparency is composited over
    white, grey of 16 or 32 bits is scaled to 8 bits, and grey, palettes, CMYK and the like become RGB.

    Args:
        path: The file, or its content.
        white_level: The value of white in grey images of 16 or 32 bits; higher values are white too. None
            stands for 65535 and refuses higher values.
        tops: A list to which the highest value of a grey image of 16 or 32 bits is appended.
        max_pixels: See `open_image`.

    Returns:
        uint8 [h, w, 3].

    Raises:
        BadImage: The file is damaged, of an unknown format, without a defined range of values, larger than
            `max_pixels`, or smaller than `MIN_SIDE` on a side.
    """
    with decoding(), open_image(path, max_pixels) as file:
        image = to_rgb(ImageOps.exif_transpose(file), white_level, tops)
    if min(image.size) < MIN_SIDE:
        raise BadImage(f"is {image.width} x {image.height} pixels, less than {MIN_SIDE} on the short side")
    return np.asarray(image)


def _reason(error: Exception) -> str:
    """Return in a few words, without a path, why Pillow could not read a file."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"  # Pillow's text repeats the absolute path
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def to_rgb(image: Image.Image, white_level: int | None = None, tops: list[int] | None = None) -> Image.Image:
    """Convert a picture to 8-bit RGB as `decode` does."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if tops is not None:
            tops.append(int(values.max()))
        return Image.fromarray(_to_eight_bits(values, white_level)).convert("RGB")
    if image.mode == "F":
        raise BadImage("has floating-point pixels, whose range is not defined")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(values: np.ndarray, white_level: int | None) -> np.ndarray:
    if values.min() < 0:
        raise BadImage("has integer pixels below 0, whose range is not defined")
    if white_level is None and values.max() > WIDE_WHITE:
        raise BadImage(f"has integer pixels above {WIDE_WHITE}: set data.white_level to the value of white")
    white = white_level or WIDE_WHITE
    return ((values.clip(0, white) * 255 + white // 2) // white).astype(np.uint8)
