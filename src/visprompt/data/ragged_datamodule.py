"""The base class of data modules whose images differ in size: FGVC and the user's own images."""

from abc import abstractmethod
from typing import Any

import numpy as np

from visprompt.data.datasets import RaggedDataset
from visprompt.data.split_datamodule import SplitDataModule
from visprompt.data.stores.ragged import RaggedStore
from visprompt.errors import UserError


class RaggedDataModule(SplitDataModule):
    """Images that differ in size: resized by the short side, random square crops and flips in training."""

    def __init__(
        self,
        *,
        short_side: int | None = None,
        crop: bool = True,
        flip: float = 0.5,
        **feeding: Any,
    ) -> None:
        """Check the options; no data is read yet.

        Args:
            short_side: Short side of the stored images in pixels; by default image_size * 256 / 224, rounded
                down.
            crop: Whether training crops are random; otherwise they are central.
            flip: Probability of a horizontal flip in training.
            **feeding: The arguments of `SplitDataModule`.

        Raises:
            UserError: A value is not valid.
        """
        super().__init__(**feeding)
        self.crop, self.flip, self.augments = crop, flip, self.augments or crop or flip > 0
        self.short_side = short_side or int(self.image_size * 256 / 224)
        if self.short_side < self.image_size:
            raise UserError(
                f"data.short_side={short_side} is below the backbone's {self.image_size} px: make it larger"
            )

    @property
    @abstractmethod
    def store(self) -> RaggedStore:
        """Return the store of decoded images, which is written first if it is missing."""

    @property
    def targets(self) -> np.ndarray | None:
        """Return the classes that each label of the store stands for, int64 [labels, C]; None: itself."""
        return None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, in the order of the labels."""
        return self.store.class_names

    @property
    def fingerprint(self) -> str:
        """Return the sha256 (hex) of relative path, bytes (not content), class and split of all files."""
        return self.store.fingerprint

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Return the preprocessing of `TaskDataModule`, with the short side and the crop."""
        view = {"resize": "short_side", "short_side": self.short_side}
        return {
            **super().preprocessing,
            **view,
            "crop": "random" if self.crop else "center",
            "flip": self.flip,
        }

    def open_sets(self, sets: tuple[str, ...]) -> RaggedDataset:
        """Return the images of some splits, read from the store."""
        store = self.store
        rows = np.concatenate([np.flatnonzero(store.splits == split) for split in sets])
        for split in sets:
            if not (store.splits == split).any():
                raise self.no_images(split)
        labels = store.labels if self.targets is None else self.targets[store.labels]
        seen = np.unique(labels[rows]) if labels.ndim == 1 else np.flatnonzero(labels[rows].any(0))
        if "train" in sets and (missing := set(range(self.num_classes)) - set(seen.tolist())):
            lost = self.class_names[min(missing)]
            raise UserError(
                f"no training image of class {lost!r} can be read: repair its images or remove the class"
            )
        if not len(seen):
            raise UserError(f"no {sets[0]} image of {self.task} has a class: add images that have one")
        return RaggedDataset(
            store,
            rows,
            size=self.image_size,
            seed=self.seed,
            random_crop=self.crop,
            flip=self.flip,
            augmentation=self.augmentation,
            labels=labels,
        )
