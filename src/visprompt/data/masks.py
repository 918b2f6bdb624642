"""Masks: the class of every pixel, read from and written to images of 8-bit numbers."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from visprompt.data.sources.images import MAX_PIXELS, BadImage, decoding, open_image

IGNORED = 255
"""The label of pixels that no loss and no score counts"""
_FEW_BITS = {"L;2": 85, "L;4": 17}  # by which Pillow multiplies grey values of 2 and 4 bits
MOST_CLASSES = 255
"""Labels are 8-bit numbers, and one of them is `IGNORED`"""


def decode_mask(source: bytes | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a mask to the numbers that its file stores: indices of a palette, or grey values.

    Args:
        source: The file, or its content.
        max_pixels: See `images.open_image`.

    Returns:
        uint8 [h, w].

    Raises:
        BadImage: The file is damaged, has colours instead of numbers, numbers above 255, or too many pixels.
    """
    opened = BytesIO(source) if isinstance(source, bytes) else source
    with decoding(), open_image(opened, max_pixels) as file:
        tile = getattr(file, "tile", None)  # before the pixels are read
        few_bits = _FEW_BITS.get(str(tile[0][3])) if tile else None
        mode, values = file.mode, np.asarray(file)
    if mode not in ("1", "L", "P") and not mode.startswith("I"):
        raise BadImage(
            f"has colours (Pillow's mode {mode}) and not one number for each pixel: save it as an indexed or "
            "grey image of 8 bits, in which the number of a pixel is its class"
        )
    if mode.startswith("I") and (values.min() < 0 or values.max() > 255):
        raise BadImage(
            f"has the value {int(values.max() if values.max() > 255 else values.min())}, and masks have "
            "values from 0 to 255"
        )
    return values.astype(np.uint8) // (few_bits or 1)


def encode_mask(labels: np.ndarray) -> bytes:
    """Return labels, uint8 [h, w], as the bytes of a grey PNG."""
    file = BytesIO()
    Image.fromarray(labels).save(file, "png")
    return file.getvalue()
