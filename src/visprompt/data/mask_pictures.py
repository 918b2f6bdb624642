"""Masks as pictures: indexed PNGs, and colours over the image they belong to."""

from io import BytesIO

import numpy as np
from PIL import Image


def _voc_colours() -> np.ndarray:
    """Return the colour map of PASCAL VOC, uint8 [256, 3]: the bits of an index, dealt to the channels.

    Bits 0, 3 and 6 of the index are the highest bits of red, 1, 4 and 7 those of green, 2 and 5 of blue.
    """
    bits = np.arange(256)[:, None] >> np.arange(9) & 1
    return (bits.reshape(256, 3, 3) * np.array([128, 64, 32])[:, None]).sum(1).astype(np.uint8)


COLOURS = _voc_colours()
"""The colour of each class; class 0 is black"""


def indexed_png(labels: np.ndarray) -> bytes:
    """Return labels, uint8 [H, W], as a PNG: its values are the classes, and its palette colours them.

    A program that reads the values gets the labels back; a viewer shows the colours.
    """
    out = BytesIO()
    picture = Image.fromarray(labels)
    picture.putpalette(COLOURS.tobytes())
    picture.save(out, "PNG", optimize=False)
    return out.getvalue()


def overlay(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the mean of an image and the colours of its classes, uint8 [H, W, 3].

    Args:
        image: uint8 [H, W, 3].
        labels: uint8 [H, W].
    """
    return ((image.astype(np.uint16) + COLOURS[labels]) // 2).astype(np.uint8)
