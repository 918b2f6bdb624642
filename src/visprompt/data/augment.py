"""Augmentation of training images beyond `data.crop` and `data.flip`: the setting `data.augment`.

- "none": nothing more; a random crop has the size of the backbone's input.
- "light": a random crop takes 50 to 100 % of the image's area, with sides in a ratio of 3:4 to 4:3, and is
  resized; brightness, contrast and saturation are each multiplied by a factor from 0.8 to 1.2.
- "randaugment": the crop of "light", then RandAugment (Cubuk et al., arXiv:1909.13719) with two random
  operations of magnitude 9.
- A module of the user: the crop of "none", then the module, which gets an image as uint8 [c, h, w] and
  returns one of the same shape.

Flips have the probability `data.flip` under each of them, and `data.crop=false` takes the middle.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from visprompt.errors import UserError, unknown

NAMES = ("none", "light", "randaugment")


class Augmentation:
    """A random change of a training image, by transforms of torchvision.

    Attributes:
        resizes: Whether a random crop is of random size, and resized.
    """

    def __init__(self, choice: str | nn.Module, interpolation: str = "bilinear") -> None:
        """Build the transforms.

        Args:
            choice: "light", "randaugment" or the user's module.
            interpolation: "bilinear" or "bicubic", for crops that are resized.
        """
        from torchvision.transforms import v2  # imported late: few runs need it, and it takes a second

        self.resizes = isinstance(choice, str)
        self._crop = partial(
            v2.RandomResizedCrop, scale=(0.5, 1.0), interpolation=v2.InterpolationMode(interpolation)
        )
        if isinstance(choice, nn.Module):
            self._change: nn.Module = choice
        else:
            self._change = v2.ColorJitter(0.2, 0.2, 0.2) if choice == "light" else v2.RandAugment(2, 9)

    def cropped(self, image: np.ndarray, size: tuple[int, int], draw: np.random.Generator) -> np.ndarray:
        """Return a random crop of an image, uint8 [c, h, w], resized to a height and width."""
        return self._apply(self._crop(size), image, draw)

    def changed(self, image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """Return an image, uint8 [c, h, w], with random changes.

        Raises:
            UserError: The user's module returns something else.
        """
        return self._apply(self._change, image, draw, image.shape)

    def _apply(
        self,
        transform: nn.Module,
        image: np.ndarray,
        draw: np.random.Generator,
        shape: tuple[int, ...] | None = None,
    ) -> np.ndarray:
        """Apply a transform, and check that the result has a shape; None checks nothing."""
        given = torch.from_numpy(np.array(image, order="C"))  # a copy, because torch requires a writable one
        with seeded(int(draw.integers(2**32))):
            out = transform(given)
        if shape is None:
            return np.asarray(out)
        if not isinstance(out, Tensor) or out.dtype != torch.uint8 or tuple(out.shape) != tuple(shape):
            form = f"{out.dtype} {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise UserError(
                f"data.augment={type(transform).__name__} returns {form} for an image that is torch.uint8 "
                f"{list(shape)}: return an image of the same type and shape"
            )
        return out.numpy()


def check(choice: str | nn.Module) -> None:
    """Check a choice of augmentation.

    Raises:
        UserError: It is neither a name of `NAMES` nor a module.
    """
    if not isinstance(choice, nn.Module) and choice not in NAMES:
        raise unknown("data.augment", choice, NAMES)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's generators, from which transforms draw, and restore them afterwards.

    The generators of GPUs stay as they are; `torch.manual_seed` would seed them too.
    """
    # a module of the user may draw from numpy's global generator
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002
