"""The demo tasks: scikit-learn's 1,797 handwritten digits, composed into four tasks of 64 x 64 pixels.

They show and test the whole program on real scans without a download; there are no published scores. Every
choice is derived from md5 values, so the pixels are the same on every machine and for every seed.
"""

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from visprompt.data.splits import md5_int, md5_order
from visprompt.errors import unknown

SIDE = 64
"""Height and width of a composed image."""

NUM_SCANS = 1797


@cache
def _raw() -> tuple[np.ndarray, np.ndarray]:
    """Return the scans as uint8 [1797, 8, 8], 0..16 stretched to 0..255, and the digits they show."""
    from sklearn.datasets import load_digits  # takes a second, and only the demo needs it

    bunch = load_digits()
    return np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target.astype(np.int64)


@cache
def _scans(side: int) -> np.ndarray:
    """Return all scans enlarged to [1797, side, side] by Pillow's bicubic filter."""
    scans, _ = _raw()
    return np.stack(
        [np.asarray(Image.fromarray(scan).resize((side, side), Image.Resampling.BICUBIC)) for scan in scans]
    )


@cache
def split_rows(split_set: str) -> tuple[int, ...]:
    """Return the rows of load_digits in a split set, in md5 order with salt "train", as VTAB cuts its sets.

    Raises:
        UserError: There is no such split set.
    """
    order = md5_order(range(NUM_SCANS), "train")
    sets = {
        "train800": order[:800],
        "val200": order[800:1000],
        "test": order[1000:],
    }
    if split_set not in sets:
        raise unknown("split set", split_set, sets)
    return tuple(sets[split_set])


def compose(task: str, split_set: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Compose the images and labels of one split set.

    Args:
        task: "digits", "digits_crowded", "digits_loc" or "digits_masks".
        split_set: "train800", "val200" or "test".

    Returns:
        Images (uint8 [n, 3, 64, 64], grey repeated), labels (int64 [n], or [n, 64, 64] of pixels) and keys
        (the rows of load_digits, as text).

    Raises:
        UserError: There is no such task or split set.
    """
    if task not in _COMPOSED:
        raise unknown("demo task", task, _COMPOSED)
    rows = split_rows(split_set)
    grey, labels = _COMPOSED[task](rows)
    return np.repeat(grey[:, None], 3, axis=1), labels, tuple(str(row) for row in rows)


def _plain(rows: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    index = np.array(rows)
    return _scans(SIDE)[index], _raw()[1][index]


def _crowded(rows: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Place each digit (32 x 32) between the right half of one other digit and the left half of another."""
    scans, index, half = _scans(32), np.array(rows), 16
    images = np.zeros((len(rows), SIDE, SIDE), np.uint8)
    band = images[:, half:-half]
    band[:, :, half:-half] = scans[index]
    band[:, :, :half] = scans[[_neighbour(rows, place, "left") for place in range(len(rows))]][:, :, half:]
    band[:, :, -half:] = scans[[_neighbour(rows, place, "right") for place in range(len(rows))]][:, :, :half]
    return images, _raw()[1][index]


def _neighbour(rows: tuple[int, ...], place: int, side: str) -> int:
    """Return a row other than rows[place], picked by md5("digits_crowded/<row>/<side>")."""
    pick = md5_int(f"digits_crowded/{rows[place]}/{side}") % (len(rows) - 1)
    return rows[pick + (pick >= place)]


def _located(rows: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Place each scan (16 x 16) in cell md5("digits_loc/<row>") modulo 16 of a 4 x 4 grid."""
    scans = _scans(16)
    images = np.zeros((len(rows), SIDE, SIDE), np.uint8)
    labels = np.array([md5_int(f"digits_loc/{row}") % 16 for row in rows], np.int64)
    for image, row, cell in zip(images, rows, labels, strict=True):
        top, left = 16 * (cell // 4), 16 * (cell % 4)
        image[top : top + 16, left : left + 16] = scans[row]
    return images, labels


def _masked(rows: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Label the pixels of the digit in the middle of an image of digits_crowded; all others are background.

    A pixel of it has ink or is at most three pixels from ink, and has the label digit + 1; 0 is background.
    """
    images, digits = _crowded(rows)
    labels = np.zeros(images.shape, np.int64)
    for mask, row, digit in zip(labels, rows, digits, strict=True):
        ink = Image.fromarray(_scans(32)[row] >= _INK).convert("L")
        mask[16:-16, 16:-16][np.asarray(ink.filter(ImageFilter.MaxFilter(7))) > 0] = digit + 1
    return images, labels


_INK = 48  # the least value of a pixel with ink
_COMPOSED: Mapping[str, Callable[[tuple[int, ...]], tuple[np.ndarray, np.ndarray]]] = {
    "digits": _plain,
    "digits_crowded": _crowded,
    "digits_loc": _located,
    "digits_masks": _masked,
}
