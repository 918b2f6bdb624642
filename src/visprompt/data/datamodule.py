"""All of Lightning's data behaviour, once: which split set is trained on, which is scored, loaders, device transfer."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from visprompt.data.datasets import Batch, DeviceDataset, TicketDataset, as_is
from visprompt.data.sampler import GlobalBatches
from visprompt.data.splits import share
from visprompt.data.transforms import check_resizing, mean_and_std, normalise
from visprompt.errors import UserError, unknown


def no_images(task: str, split_set: str) -> UserError:
    """Build the error for a split set that a run needs and that has no image."""
    what = f"{task} has no {split_set} images: add {split_set}/<class>/ folders (or CSV rows)"
    if split_set != "test":
        return UserError(what)
    return UserError(
        f"{what}, train with split=tune, which scores val, or give data.test=none, which trains and scores nothing"
    )


class TaskDataModule(L.LightningDataModule, ABC):
    """One task under one split; subclasses say what the data is, this class how it is fed.

    `split=tune` trains on the training set and scores the validation set: a test loader does not exist.
    `split=final` has no held-out images and reads the test set.

    Attributes:
        task: Id of the task.
        kind: What the task asks of an image: a name of `models.kind.KINDS`.
        source: Where the data came from, as results record it.
        form: "lossless" where the images are those of the original files, "lossy" where they were encoded again.
        augments: Whether training images differ between epochs.
        train_sets: The split sets trained on, by split.
        val_set: The split set that `split=tune` scores.
    """

    task: str
    kind: str = "single_label"
    source: str
    form: str = "lossless"
    augments: bool = False
    train_sets: Mapping[str, tuple[str, ...]]
    val_set: str

    def __init__(
        self,
        *,
        batch_size: int,
        split: str,
        seed: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bilinear",
        resampling: str = "pillow",
        normalisation: str = "model",
        fraction: float = 1.0,
        accumulate: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Reads nothing yet.

        Args:
            batch_size: Global: images per optimiser step, on all devices and in all accumulation steps together.
            split: "tune" or "final".
            seed: Seed of the order and the augmentation.
            image_size: Side of the images that the backbone reads, in pixels.
            mean: The backbone's, per channel, of pixels in 0..1; what `normalisation=model` means.
            std: The backbone's, per channel, of pixels in 0..1.
            interpolation: "bilinear" or "bicubic".
            resampling: A name of `pixels.RESAMPLINGS`.
            normalisation: A name of `pixels.NORMALISATIONS`.
            fraction: Share of each class's training images that is trained on.
            accumulate: Micro steps per optimiser step; the trainer's `accumulate_grad_batches`.
            num_workers: Processes that load data; 0 loads in the main process.
            pin_memory: Whether loaders copy to page-locked memory.

        Raises:
            UserError: A word or a number is not among the valid ones.
        """
        super().__init__()
        if split not in self.train_sets:
            raise unknown("split", split, self.train_sets)
        check_resizing(interpolation, resampling)
        if not 0 < fraction <= 1:
            raise UserError(f"data.fraction={fraction} is no share of the training images: give 0.1, 0.2, ... or 1.0")
        self.batch_size, self.split, self.seed, self.image_size = batch_size, split, seed, image_size
        self.interpolation, self.resampling, self.fraction = interpolation, resampling, float(fraction)
        self.mean, self.std = mean_and_std(normalisation, (mean, std))
        self.accumulate, self.num_workers, self.pin_memory = accumulate, num_workers, pin_memory

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""

    @property
    def images_key(self) -> Hashable:
        """What tells the images that a run reads again and again from those of other runs."""
        return self.fingerprint, self.split

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hex) of what the data is."""

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Number of images of each split set."""

    @property
    def summary(self) -> dict[str, Any]:
        """What is recorded of the user's own data, beyond `sizes`; nothing of the known tasks."""
        return {}

    @property
    def described(self) -> list[str]:
        """The lines that are printed of the user's own data before training; none of the known tasks."""
        return []

    @abstractmethod
    def open_sets(self, sets: tuple[str, ...]) -> TicketDataset:
        """Returns the images of some split sets, one set after the other, as one dataset."""

    def setup(self, stage: str | None = None) -> None:
        """Tells the trainer where nothing is held out; the images themselves are opened when first asked for."""
        if self.trainer is not None and self.split == "final":
            self.trainer.limit_val_batches = 0  # or Lightning starts a validation of no loaders, and warns about it

    @property
    def is_scored(self) -> bool:
        """Whether there are images to score under this split."""
        return True

    def check_sets(self) -> None:
        """Refuse a split for which there are no images, before anything is decoded or trained.

        Raises:
            UserError: It names the split set that is missing.
        """

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What happens to pixels between file and backbone, as plain JSON values; `pixels.to_input` follows it."""
        return {
            "size": self.image_size,
            "resize": "squash",
            "short_side": None,
            "decode": "upright",
            "native": None,
            "interpolation": self.interpolation,
            "resampling": self.resampling,
            "crop": None,
            "flip": 0.0,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @cached_property
    def train_dataset(self) -> TicketDataset:
        """The images trained on under this split, or the share of each class that `fraction` leaves of them."""
        dataset = self.open_sets(self.train_sets[self.split])
        if self.fraction == 1:
            return dataset
        return dataset.subset(np.array(share(dataset.keys, dataset.labels.tolist(), self.fraction)))

    @cached_property
    def val_dataset(self) -> TicketDataset:
        """The images scored by `split=tune`."""
        return self.open_sets((self.val_set,))

    @cached_property
    def test_dataset(self) -> TicketDataset:
        """The test images.

        Raises:
            UserError: Under `split=tune`, so that no choice can see them.
        """
        if self.split == "tune":
            raise UserError(
                f"split=tune has no test set (it scores {self.val_set}): use split=final to score the test set"
            )
        return self.open_sets(("test",))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled training images in global batches."""
        return self._loader(self.train_dataset, training=True)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The validation images; nothing under `split=final`, which holds none out."""
        return self._loader(self.val_dataset) if self.split == "tune" else []

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test images, each on one rank, none twice.

        Raises:
            UserError: Under `split=tune`.
        """
        return self._loader(self.test_dataset)

    def feature_dataloader(self, dataset: TicketDataset) -> DataLoader[Batch]:
        """All images of a set in order, on every rank, without augmentation: for features that are computed once."""
        return self._loader(dataset, everywhere=True)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Makes floating-point input of the pixels on the device; what is floating point already is left alone."""
        if batch.images.is_floating_point():
            return batch
        images = normalise(batch.images, self.image_size, self.mean, self.std, self.interpolation, self.resampling)
        return batch._replace(images=images)

    def _loader(self, dataset: TicketDataset, training: bool = False, everywhere: bool = False) -> DataLoader[Batch]:
        trainer = None if everywhere else self.trainer
        batches = GlobalBatches(
            num_rows=len(dataset),
            batch_size=self.batch_size,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
            accumulate=self.accumulate,
            seed=self.seed,
            epoch=self._epoch,
            training=training,
        )
        loads = not isinstance(dataset, DeviceDataset)  # what lies on the device needs no help to get there
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=as_is,
            num_workers=self.num_workers if loads else 0,
            pin_memory=self.pin_memory and loads,
            persistent_workers=self.num_workers > 0 and loads,
            generator=torch.Generator(),  # its own: a loader would draw from the global stream that dropout reads
        )

    def _epoch(self) -> int:
        return 0 if self.trainer is None else self.trainer.current_epoch
