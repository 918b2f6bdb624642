"""What a dataset's own files say, in one form for every source: keys and labels by official split, and the images."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import numpy as np

from visprompt.data.sources.images import MAX_PIXELS, BadImage, error_reason, open_image
from visprompt.errors import UserError


class Part(NamedTuple):
    """One official split.

    Attributes:
        keys: Distinct texts; a row number is written in decimal.
        labels: Task -> int64 [n], 0-based, in the order of the keys.
    """

    keys: Sequence[str]
    labels: Mapping[str, np.ndarray]


class Found(NamedTuple):
    """One image on its way into a store.

    Attributes:
        split: Official split.
        key: Its key there.
        image: uint8 [h, w, c] with 1 or 3 channels, or the bytes of an encoded image.
    """

    split: str
    key: str
    image: np.ndarray | bytes


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image as TensorFlow does for VTAB: three channels, transparency dropped, EXIF orientation ignored.

    Pillow's JPEG decoder is the exact one; TensorFlow's default is a faster one that differs by a few levels of 256.

    Args:
        data: A file of one of `folder.FORMATS`.
        max_pixels: See `folder.open_image`.

    Returns:
        uint8 [h, w, 3].

    Raises:
        BadImage: The bytes are damaged, of an unknown format or of too many pixels; the message is the reason without
            a name.
    """
    try:
        with open_image(BytesIO(data), max_pixels) as image:
            return np.asarray(image.convert("RGB"))
    except BadImage:
        raise
    except Exception as error:  # Pillow's readers let all kinds of errors through when bytes are damaged
        raise BadImage(f"cannot be decoded ({error_reason(error)})") from error


Wanted = Mapping[str, Collection[str]]
"""Official split -> keys."""


@dataclass(frozen=True)
class Content:
    """A dataset, opened: lists now, images when asked for.

    Attributes:
        parts: Official split -> its keys and labels.
        read: Yields the wanted images in the order of the files, each once; what is not there is left out.
        decode: Makes uint8 [h, w, c] of an encoded image; what the official task does to pixels happens here.
        lossy: Whether the files themselves were re-encoded from lossless originals.
    """

    parts: Mapping[str, Part]
    read: Callable[[Wanted], Iterator[Found]]
    decode: Callable[[bytes], np.ndarray] = decode_rgb
    lossy: bool = False


def check_labels(labels: np.ndarray, num_classes: int, keys: Sequence[str], where: str) -> np.ndarray:
    """Return the labels as int64, or names the first image whose label is out of range.

    Raises:
        UserError: A label is not in 0..num_classes - 1.
    """
    labels = np.asarray(labels).astype(np.int64)
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        row = int(bad[0])
        raise UserError(
            f"{where} gives image {keys[row]} the label {labels[row]}, outside 0..{num_classes - 1}: "
            "the file is not the right one or is damaged, get it again"
        )
    return labels
