"""The base class of all data modules: split sets, data loaders and the transfer to the device."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from visprompt.data import augment as augmenting
from visprompt.data.augment import Augmentation
from visprompt.data.catalog import TASKS
from visprompt.data.datasets import (
    ArrayDataset,
    AugmentedDataset,
    Batch,
    DeviceDataset,
    RaggedDataset,
    TicketDataset,
    as_is,
)
from visprompt.data.loader import GatheringLoader
from visprompt.data.sampler import GlobalBatches, balanced
from visprompt.data.splits import share
from visprompt.data.transforms import check_resizing, mean_and_std, normalise, per_channel
from visprompt.errors import UserError, unknown


class TaskDataModule(L.LightningDataModule, ABC):
    """The data of one task under one split; subclasses open the images, this class builds data loaders.

    `split=tune` trains on the training set and scores the validation set; it has no test loader.
    `split=final` scores the test set. Where its training set leaves the validation set out, that is scored
    too, after every epoch.

    Attributes:
        task: Id of the task.
        kind: The kind of the task's labels, a name of `models.kind.KINDS`.
        source: Where the data come from, as results record it.
        form: "lossless" for the images of the original files, "lossy" if they were re-encoded.
        augments: Whether training images are augmented at random.
        augmentation: The augmentation that `augment` names; None for none.
        first_epoch: The epoch with which training begins; above 0 for a run that is resumed.
        balanced: Whether training draws images with replacement, each class with equal probability.
        pairs: Whether training batches have each image's predecessor (see `GlobalBatches`).
        loss_weights: float [n], the weight of each training image's loss; None is 1 for all.
        train_sets: Split -> the split sets that it trains on.
        val_set: The split set that `split=tune` scores.
        layout: Where the images of a split set belong, for messages.
    """

    task: str
    kind: str = "single_label"
    source: str
    form: str = "lossless"
    augments: bool = False
    first_epoch: int = 0
    # how training images are drawn and weighed is decided by the recipe; the LightningModule sets it
    balanced: bool = False
    pairs: bool = False
    loss_weights: np.ndarray | None = None
    train_sets: Mapping[str, tuple[str, ...]]
    val_set: str
    layout: str = "{0}/<class>/ folders (or CSV rows)"

    def __init_subclass__(cls) -> None:
        """Take the docstring of the class of a catalogued task, and its kind, from its record."""
        super().__init_subclass__()
        if spec := TASKS.get(vars(cls).get("task", "")):
            cls.kind = spec.kind
            cls.__doc__ = f"{spec.description}\n\n{spec.num_classes} classes; {spec.source}."

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
        augment: str | nn.Module = "none",
        accumulate: int = 1,
        num_workers: int = 0,
        pin_memory: bool = True,
    ) -> None:
        """Check the options; no data is read yet.

        Args:
            batch_size: Images per optimiser step, over all devices and accumulation steps.
            split: "tune" or "final".
            seed: Seed of shuffling and augmentation.
            image_size: Side of the backbone's input in pixels.
            mean: The backbone's mean per channel, of pixels in 0..1; used by `normalisation=model`.
            std: The backbone's standard deviation per channel, of pixels in 0..1.
            interpolation: "bilinear" or "bicubic".
            resampling: A name of `transforms.RESAMPLINGS`.
            normalisation: A name of `transforms.NORMALISATIONS`.
            fraction: Share of each class's training images to train on.
            augment: Augmentation of training images, see `augment`: a name, or the user's module.
            accumulate: Micro steps per optimiser step; the trainer's `accumulate_grad_batches`.
            num_workers: Processes that load data; 0 loads in the main process.
            pin_memory: Whether batches for a GPU are in page-locked memory, from which copies do not wait.

        Raises:
            UserError: A value is not valid.
        """
        super().__init__()
        if split not in self.train_sets:
            raise unknown("split", split, self.train_sets)
        check_resizing(interpolation, resampling)
        if not 0 < fraction <= 1:
            raise UserError(
                f"data.fraction={fraction} is not a share of the training images: give 0.1, 0.2, ... or 1.0"
            )
        self.batch_size, self.split, self.seed, self.image_size = batch_size, split, seed, image_size
        self.interpolation, self.resampling, self.fraction = interpolation, resampling, float(fraction)
        self.mean, self.std = mean_and_std(normalisation, (mean, std))
        self.accumulate, self.num_workers, self.pin_memory = accumulate, num_workers, pin_memory
        augmenting.check(augment)
        if augment != "none" and self.kind == "segmentation":
            raise UserError(
                f"data.augment={augment} changes images and not their masks: leave it out (data.scale, "
                "data.flip and data.jitter of own images and of ADE20K change both)"
            )
        self.augmentation = None if augment == "none" else Augmentation(augment, interpolation)
        self._scaling: dict[torch.device, tuple[Tensor, Tensor]] = {}  # mean and deviation on each device
        self.augments = self.augments or self.augmentation is not None  # a subclass may augment by itself

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, in the order of the labels."""

    @property
    def images_key(self) -> Hashable:
        """Return the key by which runs share images on the device: equal keys mean equal images."""
        return self.fingerprint, self.split

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Return the sha256 (hex) of the data, which does not depend on the size of the stored images."""

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Return the number of images of each split set."""

    @property
    def summary(self) -> dict[str, Any]:
        """Return what results record about the user's own images besides `sizes`; empty for other tasks."""
        return {}

    @property
    def described(self) -> list[str]:
        """Return the lines to print about the user's own images before training; empty for other tasks."""
        return []

    @abstractmethod
    def open_sets(self, sets: tuple[str, ...]) -> TicketDataset:
        """Return the images of some split sets as one dataset."""

    def setup(self, stage: str | None = None) -> None:
        """Turn validation off if the run has no validation images; images are opened at first use."""
        if self.trainer is not None and not self.validates:
            self.trainer.limit_val_batches = 0  # or Lightning warns about a validation without data loaders

    @property
    def validates(self) -> bool:
        """Return whether there are validation images that this split does not train on."""
        return self.split == "tune"

    @property
    def is_scored(self) -> bool:
        """Return whether there are images to score under this split."""
        return True

    def no_images(self, split_set: str) -> UserError:
        """Return the error for a split set that a run needs and that has no image."""
        what = f"{self.task} has no {split_set} images: add {self.layout.format(split_set)}"
        if split_set != "test":
            return UserError(what)
        return UserError(
            f"{what}, train with split=tune, which scores val, or give data.test=none, which trains and "
            "scores nothing"
        )

    def check_sets(self) -> None:
        """Check, before anything is decoded or trained, that the split has the images that it needs.

        Raises:
            UserError: A split set has no image.
        """

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return len(self.class_names)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Return the steps from file to input as JSON values; `transforms.to_input` applies them."""
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
        """Return the training images of this split, or the share of each class that `fraction` asks for."""
        dataset = self.open_sets(self.train_sets[self.split])
        if self.fraction < 1:
            # if an image has no one class: a share of all images
            classes = dataset.labels.tolist() if self.kind == "single_label" else [0] * len(dataset)
            dataset = dataset.subset(np.array(share(dataset.keys, classes, self.fraction)))
            if self.kind == "multi_label" and not dataset.labels.any(0).all():
                lost = self.class_names[int(dataset.labels.any(0).int().argmin())]
                raise UserError(
                    f"data.fraction={self.fraction:g} leaves no training image of class {lost!r}: give a "
                    "larger share"
                )
        if self.augmentation is None or isinstance(dataset, RaggedDataset):  # which augments by itself
            return dataset
        return AugmentedDataset(dataset, self.augmentation, self.seed)

    @cached_property
    def val_dataset(self) -> TicketDataset:
        """Return the validation images, on which a run that does not train on them fits its temperature."""
        return self.open_sets((self.val_set,))

    @cached_property
    def test_dataset(self) -> TicketDataset:
        """Return the test images.

        Raises:
            UserError: The split is `tune`, which must not see the test set.
        """
        if self.split == "tune":
            raise UserError(
                f"split=tune has no test set (it scores {self.val_set}): use split=final to score the test "
                "set"
            )
        return self.open_sets(("test",))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of the shuffled training images."""
        return self._loader(self.train_dataset, training=True)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the loader of the validation images, or an empty list if the run has no such images."""
        return self._loader(self.val_dataset) if self.validates else []

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of the test images, each of which is scored on exactly one rank.

        Raises:
            UserError: The split is `tune`.
        """
        return self._loader(self.test_dataset)

    def feature_dataloader(self, dataset: TicketDataset) -> DataLoader[Batch]:
        """Return a loader of all images in order, unaugmented and on every rank, to cache features."""
        return self._loader(dataset, everywhere=True)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Copy a batch to a device, unless it is there."""
        if all(part is None or part.device == device for part in batch):
            return batch
        moved: Batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalise uint8 pixels on the device; floating-point inputs (cached features) pass unchanged."""
        if batch.images.is_floating_point():
            return batch
        how = self.interpolation, self.resampling
        scales = self._scales(batch.images.device)
        return batch._replace(images=normalise(batch.images, self.image_size, *scales, *how))

    def _scales(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation on a device, where they are copied once."""
        if device not in self._scaling:
            self._scaling[device] = per_channel(self.mean, device), per_channel(self.std, device)
        return self._scaling[device]

    def _loader(
        self, dataset: TicketDataset, training: bool = False, everywhere: bool = False
    ) -> DataLoader[Batch]:
        trainer = None if everywhere else self.trainer
        world = trainer.world_size if trainer else 1
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        batches = GlobalBatches(
            num_rows=len(dataset),
            batch_size=world if dataset.one_by_one and not training else self.batch_size,
            rank=trainer.global_rank if trainer else 0,
            world=world,
            accumulate=self.accumulate,
            seed=self.seed,
            epoch=self._epoch,
            training=training,
            probabilities=balanced(dataset.labels.numpy()) if training and self.balanced else None,
            loss_weights=self.loss_weights if training else None,
            pairs=self.pairs,
        )
        exactly = type(dataset) in (ArrayDataset, DeviceDataset)  # a subclass may change its pixels
        if exactly and isinstance(dataset, ArrayDataset | DeviceDataset):
            return GatheringLoader(dataset, batches, self.pin_memory and on_gpu)
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=as_is,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory and on_gpu,
            persistent_workers=self.num_workers > 0,
            # or the loader would draw from the global generator, which dropout uses
            generator=torch.Generator(),
        )

    def _epoch(self) -> int:
        return 0 if self.trainer is None else max(self.first_epoch, self.trainer.current_epoch)
