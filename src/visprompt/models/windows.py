"""Sliding windows: the logits of an image of any size from a network that takes one size.

As mmsegmentation's `mode="slide"`: windows of the network's size at a stride of two thirds of it (512: 341);
the last window of a row or column is moved back into the image; logits are the mean of those of all windows
that cover a pixel. Different from it, an image smaller than a window is padded to it (by zeros, the mean
colour), and not given to the network at its own size.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_AT_ONCE = 8  # windows in a batch


def slide(network: Callable[[Tensor], Tensor], images: Tensor, height: int, width: int) -> Tensor:
    """Return logits of images of any size.

    Args:
        network: Function of windows [n, 3, height, width] that returns logits [n, C, height, width].
        images: Normalised images [B, 3, H, W].
        height: Height of a window in pixels.
        width: Width of a window in pixels.

    Returns:
        [B, C, H, W].
    """
    full_height, full_width = images.shape[-2:]
    right, below = max(0, width - full_width), max(0, height - full_height)
    images = F.pad(images, (0, right, 0, below)) if right or below else images
    corners = [(y, x) for y in places(images.shape[-2], height) for x in places(images.shape[-1], width)]
    total, times = None, images.new_zeros(images.shape[-2:], dtype=torch.float32)
    step = max(1, _AT_ONCE // len(images))
    for start in range(0, len(corners), step):
        some = corners[start : start + step]
        windows = torch.cat([images[..., y : y + height, x : x + width] for y, x in some])
        for (y, x), logits in zip(some, network(windows).float().split(len(images)), strict=True):
            if total is None:
                total = logits.new_zeros(len(images), logits.shape[1], *images.shape[-2:])
            total[..., y : y + height, x : x + width] += logits
            times[y : y + height, x : x + width] += 1
    assert total is not None  # an image has a window
    return (total / times)[..., :full_height, :full_width]


def central(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the middle of images [B, 3, H, W] as one window of a height and width, padded by zeros."""
    (full_height, full_width), (height, width) = images.shape[-2:], size
    top, left = max(0, full_height - height) // 2, max(0, full_width - width) // 2
    window = images[..., top : top + height, left : left + width]
    return F.pad(window, (0, width - window.shape[-1], 0, height - window.shape[-2]))


def stride_of(window: int) -> int:
    """Return the pixels between two windows of a length."""
    return max(1, window * 2 // 3)


def places(length: int, window: int) -> list[int]:
    """Return the first pixels of the windows along one axis: 683 pixels and windows of 512 give [0, 171].

    Args:
        length: Pixels of the axis, at least those of a window.
        window: Pixels of a window.
    """
    stride = stride_of(window)
    count = max(length - window + stride - 1, 0) // stride + 1
    return [min(i * stride, length - window) for i in range(count)]
