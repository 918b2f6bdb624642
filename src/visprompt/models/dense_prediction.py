"""The class of each pixel of an image, at one scale or as the mean over scales."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.models.segmentation import largest, resized

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Sizes of the image in multi-scale prediction, those of mmsegmentation's published figures."""


class Mask(NamedTuple):
    """What a segmentation task finds in an image.

    Attributes:
        labels: The class of each pixel, uint8 [H, W].
        probability: Mean over the pixels of the probability of that class; NaN if a logit is not finite.
    """

    labels: np.ndarray
    probability: float


def mask_of(logits: Tensor, size: tuple[int, int]) -> Mask:
    """Return the mask of an image at its own size.

    Args:
        logits: The image's logits [C, h, w], at the size at which the network saw it.
        size: Height and width of the mask.
    """
    probability = float(logits.float().softmax(0).amax(0).mean())
    return Mask(largest(logits[None], size)[0].to(torch.uint8).cpu().numpy(), probability)


class MultiScale(nn.Module):
    """The mean of a segmentation network's probabilities over scales of an image and its mirror image.

    As mmsegmentation's multi-scale test with flip: each of `FACTORS`, mirrored and not, twelve passes over
    windows; logits are resized to the image that the network is given, and their softmaxes averaged. The
    image is resized from there, where mmsegmentation resizes it from the file: the same if the file's short
    side has the length that the network works at, as those of ADE20K do.

    Args:
        network: Function of normalised images [B, 3, H, W] of any size that returns logits [B, C, H, W].
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return logarithms of the mean probabilities [B, C, H, W]: logits with these probabilities."""
        size = tuple(images.shape[-2:])
        total = torch.zeros((), device=images.device)
        for factor in FACTORS:
            scaled = _scaled(images, factor)
            for mirrored in (False, True):
                logits = self.network(scaled.flip(-1) if mirrored else scaled).float()
                logits = logits.flip(-1) if mirrored else logits
                total = total + resized(logits, size).softmax(1)
        mean: Tensor = total / (2 * len(FACTORS))
        return mean.clamp(min=torch.finfo(mean.dtype).tiny).log()


def _scaled(images: Tensor, factor: float) -> Tensor:
    """Return images with both sides multiplied by a factor, with the filter that widens when they shrink."""
    if factor == 1:
        return images
    size = [max(1, int(side * factor + 0.5)) for side in images.shape[-2:]]
    wide = F.interpolate(images.float(), size, mode="bilinear", antialias=True, align_corners=False)
    return wide.to(images.dtype)
