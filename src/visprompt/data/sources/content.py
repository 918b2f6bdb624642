"""The content of a dataset's files, the same for all sources: keys, labels, images by official split."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import numpy as np

from visprompt.data.sources.images import MAX_PIXELS, decoding, open_image
from visprompt.errors import UserError


class Part(NamedTuple):
    """One official split.

    Attributes:
        keys: Distinct strings; row numbers in decimal.
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
    """Decode an image as TensorFlow does for VTAB: to RGB, without transparency and EXIF orientation.

    TensorFlow's default JPEG decoder is faster and less exact than Pillow's: it differs by a few levels of
    256.

    Args:
        data: The content of a file of one of `images.FORMATS`.
        max_pixels: See `images.open_image`.

    Returns:
        uint8 [h, w, 3].

    Raises:
        BadImage: The bytes are damaged, of an unknown format or of too many pixels.
    """
    with decoding(), open_image(BytesIO(data), max_pixels) as image:
        return np.asarray(image.convert("RGB"))


Wanted = Mapping[str, Collection[str]]
"""Official split -> keys."""


@dataclass(frozen=True)
class Content:
    """An opened dataset: the lists are read, the images are read on demand.

    Attributes:
        parts: Official split -> its keys and labels.
        read: Yields the wanted images once each, in the order of the files; missing images are left out.
        decode: Decodes a file to uint8 [h, w, c], with the preprocessing of the official task.
        lossy: Whether the files were re-encoded from lossless originals.
    """

    parts: Mapping[str, Part]
    read: Callable[[Wanted], Iterator[Found]]
    decode: Callable[[bytes], np.ndarray] = decode_rgb
    lossy: bool = False


def check_labels(labels: np.ndarray, num_classes: int, keys: Sequence[str], where: str) -> np.ndarray:
    """Return the labels as int64 after checking their range.

    Raises:
        UserError: A label is not in 0..num_classes - 1; names the first such image.
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
