"""Data modules of the demo tasks: what they share, then one class per task."""

from collections.abc import Mapping
from functools import cache
from hashlib import sha256

import numpy as np

from visprompt.data.catalog import TASKS
from visprompt.data.datamodule import TaskDataModule
from visprompt.data.datasets import ArrayDataset
from visprompt.data.sources.digits import compose


class DemoDataModule(TaskDataModule):
    """A demo task, composed in memory from scikit-learn's digits."""

    source = "scikit-learn"
    train_sets: Mapping[str, tuple[str, ...]] = {"tune": ("train800",), "final": ("train800", "val200")}
    val_set = "val200"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, in the order of the labels."""
        return TASKS[self.task].class_names

    @property
    def sizes(self) -> dict[str, int]:
        """Return the number of images of each split set."""
        return dict(TASKS[self.task].split_sizes)

    @property
    def fingerprint(self) -> str:
        """Return the sha256 (hex) of the names, keys, labels and pixels of all split sets."""
        return _fingerprint(self.task)

    def open_sets(self, sets: tuple[str, ...]) -> ArrayDataset:
        """Return the images of some split sets, composed in memory."""
        images, labels, keys = zip(*(compose(self.task, split_set) for split_set in sets), strict=True)
        return ArrayDataset(
            np.concatenate(images), np.concatenate(labels), [key for part in keys for key in part]
        )


@cache
def _fingerprint(task: str) -> str:
    digest = sha256()
    for split_set in TASKS[task].split_sizes:
        images, labels, keys = compose(task, split_set)
        of_labels = labels if labels.ndim == 1 else [sha256(mask.data).hexdigest() for mask in labels]
        digest.update(f"{split_set}\n{' '.join(keys)}\n{' '.join(map(str, of_labels))}\n".encode())
        digest.update(images.data)
    return digest.hexdigest()


class DigitsDataModule(DemoDataModule):
    task = "digits"


class DigitsCrowdedDataModule(DemoDataModule):
    task = "digits_crowded"


class DigitsLocDataModule(DemoDataModule):
    task = "digits_loc"


class DigitsMasksDataModule(DemoDataModule):
    task = "digits_masks"
