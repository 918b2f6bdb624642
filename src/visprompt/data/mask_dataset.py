"""Images with the class of every pixel: cropped and changed together in training, whole in evaluation."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from visprompt.data.augment import seeded
from visprompt.data.datasets import Batch, Ticket, TicketDataset
from visprompt.data.masks import IGNORED
from visprompt.data.stores.masked import MaskStore
from visprompt.data.transforms import window_size

_MOST_OF_ONE = 0.75  # a crop with a larger share of one class is drawn again, as in mmsegmentation
_REDRAWS = 10


class MaskDataset(TicketDataset):
    """Rows of a `MaskStore`.

    In training, a ticket gives a square of an image that was resized by a random factor: a random crop,
    drawn again if one class fills it, flipped, and with changed colours. The mask is resized, cropped and
    flipped in the same way. An image that is smaller than the square is padded with the mean colour, and its
    mask with `IGNORED`. Changes are drawn from `Ticket.draw` with the row of the store. In evaluation a
    ticket gives the whole image in its original size.
    """

    one_by_one = True

    def __init__(
        self,
        store: MaskStore,
        rows: np.ndarray,
        *,
        size: int,
        short_side: int,
        seed: int,
        scale: tuple[float, float] | None,
        flip: float,
        jitter: bool,
        fill: Sequence[float],
        interpolation: str = "bilinear",
        antialias: bool = True,
    ) -> None:
        """Select rows of a store; no image is read yet.

        Args:
            store: The images and masks.
            rows: int64 [n], the rows of the store, in the order of this dataset.
            size: Height and width of training images in pixels.
            short_side: See `transforms.window_size`.
            seed: Seed of the changes.
            scale: Least and largest factor of the size of training images, before the random crop; None takes
                the centre of the image.
            flip: Probability of a horizontal flip in training.
            jitter: Whether colours are changed in training.
            fill: The colour of padding, for each channel in 0..1.
            interpolation: "bilinear" or "bicubic", of training images.
            antialias: Whether the filter widens where a training image shrinks.
        """
        self.store, self.rows, self.size, self.short_side, self.seed = store, rows, size, short_side, seed
        self.scale, self.flip, self.jitter, self.fill = scale, flip, jitter, tuple(fill)
        self.interpolation, self.antialias = interpolation, antialias
        self.keys = [store.keys[row] for row in rows]
        self.labels = torch.zeros(len(rows), dtype=torch.int64)  # those of the pixels come with the batches
        self._transforms: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_transforms": None}  # a worker makes them again

    def __getitems__(self, tickets: list[Ticket]) -> Batch:
        """Return a batch with labels of pixels, uint8 [b, h, w]: an eighth of what int64 takes to copy."""
        views = [self._view(ticket) for ticket in tickets]
        self.store.release()
        images, labels = (torch.stack(parts) for parts in zip(*views, strict=True))
        return self._batch(images, tickets)._replace(labels=labels)

    def pixels(self, tickets: list[Ticket]) -> np.ndarray:
        """Return the images without their labels."""
        return self.__getitems__(tickets).images.numpy()

    def subset(self, rows: np.ndarray) -> Self:
        """Return a dataset of some of these rows; each keeps its changes."""
        return type(self)(
            self.store,
            self.rows[rows],
            size=self.size,
            short_side=self.short_side,
            seed=self.seed,
            scale=self.scale,
            flip=self.flip,
            jitter=self.jitter,
            fill=self.fill,
            interpolation=self.interpolation,
            antialias=self.antialias,
        )

    def _view(self, ticket: Ticket) -> tuple[Tensor, Tensor]:
        """Return one image, uint8 [3, h, w], and its labels, uint8 [h, w]."""
        row = int(self.rows[ticket.row])
        image = torch.from_numpy(self.store.image(row).transpose(2, 0, 1).copy())
        labels = torch.from_numpy(self.store.mask(row).copy())
        if ticket.epoch is None:
            return image, labels
        draw = ticket.draw(self.seed, row)
        factor = 1.0 if self.scale is None else float(draw.uniform(*self.scale))
        if self._transforms is None:
            self._transforms = _Transforms(self)
        with seeded(int(draw.integers(2**32))):
            view: tuple[Tensor, Tensor] = self._transforms(image, labels, factor)
        return view


class _Transforms:
    """The changes of a training image and its mask."""

    def __init__(self, data: MaskDataset) -> None:
        # imported late: only training needs it, and it takes a second
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        self._types, self._v2, self._data = tv_tensors, v2, data
        self._fill = {tv_tensors.Image: [round(255 * v) for v in data.fill], tv_tensors.Mask: IGNORED}
        self._crop = v2.RandomCrop(data.size, pad_if_needed=True, fill=self._fill)
        self._flip = v2.RandomHorizontalFlip(data.flip)
        # the ranges of mmsegmentation, which adds the brightness and draws where the contrast comes;
        # torchvision's RandomPhotometricDistort also permutes the channels: half of the skies were green
        ranges = {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}
        changes = [v2.RandomApply([v2.ColorJitter(**{name: span})]) for name, span in ranges.items()]
        self._jitter = v2.Compose(changes) if data.jitter else v2.Identity()

    def __call__(self, image: Tensor, labels: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        data, functional = self._data, self._v2.functional
        height, width = image.shape[1:]
        size = [*window_size(height, width, data.short_side * factor)]
        how = self._v2.InterpolationMode(data.interpolation)
        image = functional.resize(image, size, how, antialias=data.antialias)
        # not as a tv_tensors.Mask, whose nearest labels are of the corners of pixels, not of their centres
        labels = functional.resize(labels[None], size, self._v2.InterpolationMode.NEAREST_EXACT)[0]
        pair = self._types.Image(image), self._types.Mask(labels)
        pair = self._flip(*(self._centre(*pair) if data.scale is None else self._random_crop(*pair)))
        return self._jitter(pair[0]).as_subclass(Tensor), pair[1].as_subclass(Tensor)

    def _random_crop(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(1 + _REDRAWS):
            crop: tuple[Tensor, Tensor] = self._crop(image, labels)
            counts = torch.bincount(crop[1].reshape(-1), minlength=256)[:IGNORED]
            if int(counts.max()) <= _MOST_OF_ONE * int(counts.sum()) and counts.any():
                break
        return crop

    def _centre(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        side = self._data.size
        height, width = labels.shape
        lacks = [max(0, side - length) for length in (width, height)]
        before = [lack // 2 for lack in lacks]
        padding = [*before, *(lack - half for lack, half in zip(lacks, before, strict=True))]
        pad = self._v2.Pad(padding, fill=self._fill)
        crop: tuple[Tensor, Tensor] = self._v2.CenterCrop(side)(*pad(image, labels))
        return crop
