"""The base class of data modules for segmentation: images with the class of every pixel."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from visprompt.data.datasets import Batch
from visprompt.data.mask_dataset import MaskDataset
from visprompt.data.split_datamodule import SplitDataModule
from visprompt.data.stores.manifest import say_once
from visprompt.data.stores.masked import MaskStore
from visprompt.data.transforms import normalise, window_size
from visprompt.errors import UserError

_NAMED = 10  # classes that a warning names


class SegmentationDataModule(SplitDataModule):
    """Images with masks: random squares in training; whole and one to a batch in evaluation."""

    kind = "segmentation"
    layout = "images/{0}/ and masks/{0}/"

    def __init__(
        self,
        *,
        short_side: int | None = None,
        scale: Sequence[float] | None = (0.5, 2.0),
        flip: float = 0.5,
        jitter: bool = True,
        **feeding: Any,
    ) -> None:
        """Check the options; no data is read yet.

        Args:
            short_side: Short side of images in evaluation, and of training images before `scale`, in pixels;
                by default that of the backbone's input.
            scale: Least and largest factor by which training images are resized before their random crop;
                None takes the centre of the image instead.
            flip: Probability of a horizontal flip in training.
            jitter: Whether brightness, contrast, saturation and hue are changed in training.
            **feeding: The arguments of `SplitDataModule`.

        Raises:
            UserError: A value is not valid.
        """
        super().__init__(**feeding)
        if scale is not None and (len(scale) != 2 or not 0 < scale[0] <= scale[1]):
            raise UserError(
                f"data.scale={list(scale)} is not a range of factors: give [0.5,2.0] for example, or null"
            )
        self.scale = None if scale is None else (float(scale[0]), float(scale[1]))
        self.flip, self.jitter = flip, jitter
        self.augments = self.scale is not None or flip > 0 or jitter
        self.short_side = short_side or self.image_size

    @property
    @abstractmethod
    def store(self) -> MaskStore:
        """Return the store of images and masks, which is written first if it is missing."""

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Return the preprocessing of `TaskDataModule`, with the resizing of images scored in windows."""
        view = {"resize": "windows", "short_side": self.short_side, "flip": self.flip}
        return super().preprocessing | view | {"crop": None if self.scale is None else "random"}

    def open_sets(self, sets: tuple[str, ...]) -> MaskDataset:
        """Return the images of some splits, read from the store.

        Raises:
            UserError: A split has no image.
        """
        store = self.store
        for split in sets:
            if not (store.splits == split).any():
                raise self.no_images(split)
            if not store.pixels_of[split].any():
                raise UserError(
                    f"no pixel of the {split} masks of {self.task} has a class, all are ignored: check the "
                    "masks, and data.ignore if it is given"
                )
        if "train" in sets:
            self._warn_of_missing(np.sum([store.pixels_of[split] for split in sets], axis=0))
        rows = np.concatenate([np.flatnonzero(store.splits == split) for split in sets])
        return MaskDataset(
            store,
            rows,
            size=self.image_size,
            short_side=self.short_side,
            seed=self.seed,
            scale=self.scale,
            flip=self.flip,
            jitter=self.jitter,
            fill=self.mean,
            interpolation=self.interpolation,
            antialias=self.resampling == "pillow",
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalise uint8 pixels on the device, and in evaluation resize them first; labels stay as they are.

        In training all images are squares of the size of the backbone's input already.
        """
        if batch.images.is_floating_point():
            return batch
        height, width = batch.images.shape[-2:]
        size = height, width
        if size != (self.image_size,) * 2 or self.trainer is None or not self.trainer.training:
            size = window_size(height, width, self.short_side)
        how = self.interpolation, self.resampling
        images = normalise(batch.images, size, *self._scales(batch.images.device), *how)
        return batch._replace(images=images, labels=batch.labels.long())

    def _warn_of_missing(self, pixels: np.ndarray) -> None:
        """Warn once of classes that no training mask has: they are neither learned nor predicted.

        This is no error, as for classification: benchmarks have rare classes that a share of their images or
        a random split lacks.
        """
        missing = [name for name, count in zip(self.class_names, pixels, strict=True) if not count]
        if missing:
            others = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            say_once(
                f"{self.task}: no training mask has a pixel of {', '.join(missing[:_NAMED])}{others}: "
                "nothing can be learned about it"
            )
