"""Resizing, cropping and normalising, the same for training, evaluation and prediction."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def resize_short_side(image: np.ndarray, short_side: int) -> np.ndarray:
    """Resizes so that the short side has a given length (Pillow's bicubic filter, which antialiases).

    Args:
        image: uint8 [h, w, 3].
        short_side: New length of the shorter side in pixels; the other follows, rounded down as in torchvision.

    Returns:
        uint8 [h', w', 3].
    """
    height, width = image.shape[:2]
    short = min(height, width)
    size = (int(short_side * width / short), int(short_side * height / short))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def crop(image: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    """Cuts a square of `size` pixels out of an image [h, w, 3]."""
    return image[top : top + size, left : left + size]


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Cuts the middle square of `size` pixels out of an image [h, w, 3] (odd margins: rounded as in torchvision)."""
    height, width = image.shape[:2]
    return crop(image, round((height - size) / 2), round((width - size) / 2), size)


def normalise(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turns stored pixels into what a backbone reads, on the device where they are.

    Args:
        images: uint8 [b, 3, h, w].
        size: Side of the result; other sizes are squashed to it (bilinear, antialiased).
        mean: Per channel, subtracted after scaling to 0..1.
        std: Per channel, divided by.

    Returns:
        float32 [b, 3, size, size].
    """
    scaled = images.float() / 255
    if scaled.shape[-2:] != (size, size):
        scaled = F.interpolate(scaled, size=(size, size), mode="bilinear", antialias=True)
    shift, scale = (torch.tensor(list(v), dtype=torch.float32, device=images.device).view(3, 1, 1) for v in (mean, std))
    return (scaled - shift) / scale


def to_input(image: np.ndarray, preprocessing: Mapping[str, Any]) -> Tensor:
    """Prepares one decoded image exactly as the evaluation of the run that stored `preprocessing` does.

    Args:
        image: uint8 [h, w, 3].
        preprocessing: A data module's `preprocessing`, as kept in the tuned state.

    Returns:
        float32 [3, size, size].
    """
    size = preprocessing["size"]
    if preprocessing["resize"] == "short_side":
        image = center_crop(resize_short_side(image, preprocessing["short_side"]), size)
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return normalise(planes[None], size, preprocessing["mean"], preprocessing["std"])[0]
