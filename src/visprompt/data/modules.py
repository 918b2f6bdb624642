"""Data modules of the demo tasks and of the user's own images, and what all images of differing sizes share."""

import os
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from visprompt.data.catalog import TASKS
from visprompt.data.datamodule import TaskDataModule, no_images
from visprompt.data.dataset import ArrayDataset, RaggedDataset
from visprompt.data.demo import compose
from visprompt.data.folder import MAX_PIXELS
from visprompt.data.own_images import OwnImages, find
from visprompt.data.splits import SPLITS
from visprompt.data.store import RaggedStore, open_store
from visprompt.data.summary import sentences, summarise
from visprompt.data.task import own_name
from visprompt.errors import UserError, unknown
from visprompt.text import has_control


class DemoDataModule(TaskDataModule):
    """A demo task, composed in memory from scikit-learn's digits."""

    source = "scikit-learn"
    train_sets: Mapping[str, tuple[str, ...]] = {"tune": ("train800",), "final": ("train800", "val200")}
    val_set = "val200"

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""
        return TASKS[self.task].class_names

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images of each split set."""
        return dict(TASKS[self.task].split_sizes)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over name, keys, labels and pixels of all split sets."""
        digest = sha256()
        for split_set in self.sizes:
            images, labels, keys = compose(self.task, split_set)
            digest.update(f"{split_set}\n{' '.join(keys)}\n{' '.join(map(str, labels))}\n".encode())
            digest.update(images.data)
        return digest.hexdigest()

    def open_sets(self, sets: tuple[str, ...]) -> ArrayDataset:
        """Composes some split sets."""
        images, labels, keys = zip(*(compose(self.task, split_set) for split_set in sets), strict=True)
        return ArrayDataset(np.concatenate(images), np.concatenate(labels), [key for part in keys for key in part])


class DigitsDataModule(DemoDataModule):
    """The scan: which digit?"""

    task = "digits"


class DigitsCrowdedDataModule(DemoDataModule):
    """The digit between the halves of two others, as in SVHN: which one?"""

    task = "digits_crowded"


class DigitsLocDataModule(DemoDataModule):
    """The scan in one of 4 x 4 cells: in which?"""

    task = "digits_loc"


class RaggedDataModule(TaskDataModule):
    """Images of differing sizes in a store: the short side resized, random square crops and flips in training."""

    val_set = "val"

    def __init__(
        self,
        *,
        final: str = "train",
        short_side: int | None = None,
        crop: bool = True,
        flip: float = 0.5,
        **feeding: Any,
    ) -> None:
        """Reads nothing yet.

        Args:
            final: What `split=final` trains on: "train" or "train+val".
            short_side: Of the stored images; image_size * 256 / 224 rounded down by default, the FGVC rule.
            crop: Whether training crops lie at random; in the middle otherwise.
            flip: Probability of a horizontal flip in training.
            **feeding: The arguments of `TaskDataModule`.

        Raises:
            UserError: If a value is not valid.
        """
        if final not in ("train", "train+val"):
            raise unknown("data.final", final, ("train", "train+val"))
        self.train_sets = {"tune": ("train",), "final": tuple(final.split("+"))}
        super().__init__(**feeding)
        self.final = final
        self.crop, self.flip, self.augments = crop, flip, crop or flip > 0
        self.short_side = short_side or int(self.image_size * 256 / 224)
        if self.short_side < self.image_size:
            raise UserError(
                f"data.short_side={short_side} is below the backbone's {self.image_size} px: make it larger"
            )

    @property
    @abstractmethod
    def origin(self) -> str:
        """Where images and splits come from."""

    @property
    def source(self) -> str:  # type: ignore[override]  # of several parts
        """Where the data comes from, as results record it."""
        # the pixels are the same, the training set is not: results must tell
        return self.origin + (":train+val" if self.split == "final" and self.final != "train" else "")

    @property
    @abstractmethod
    def store(self) -> RaggedStore:
        """The decoded images, made if there are none."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""
        return self.store.class_names

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over relative path, size in bytes, class and split of all files."""
        return self.store.fingerprint

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images that can be used, of each split that exists."""
        counts = {split: int((self.store.splits == split).sum()) for split in SPLITS}
        return {split: count for split, count in counts.items() if count}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """As for `TaskDataModule`, with short side and crop."""
        view = {"resize": "short_side", "short_side": self.short_side}
        return {**super().preprocessing, **view, "crop": "random" if self.crop else "center", "flip": self.flip}

    def prepare_data(self) -> None:
        """Decodes the images, if that was not done before; Lightning calls it on one rank of each machine."""
        _ = self.store

    def open_sets(self, sets: tuple[str, ...]) -> RaggedDataset:
        """Selects the rows of some splits of the store."""
        store = self.store
        rows = np.concatenate([np.flatnonzero(store.splits == split) for split in sets])
        for split in sets:
            if not (store.splits == split).any():
                raise no_images(self.task, split)
        if "train" in sets and (missing := set(range(self.num_classes)) - set(store.labels[rows].tolist())):
            lost = self.class_names[min(missing)]
            raise UserError(f"no training image of class {lost!r} can be read: mend its images or remove the class")
        return RaggedDataset(store, rows, size=self.image_size, seed=self.seed, random_crop=self.crop, flip=self.flip)


class FolderDataModule(RaggedDataModule):
    """The user's own images, decoded once into a store, cropped and flipped as the FGVC protocol does."""

    def __init__(
        self,
        *,
        root: str,
        store_dir: str,
        name: str | None = None,
        csv: str | None = None,
        skip_bad: bool = False,
        split_names: Mapping[str, Any] | str | None = None,
        csv_columns: Mapping[str, Any] | None = None,
        white_level: int | None = None,
        max_pixels: int = MAX_PIXELS,
        test: str = "required",
        **cropping: Any,
    ) -> None:
        """Reads nothing yet.

        Args:
            root: See `own_images.find`.
            store_dir: Where decoded images are kept.
            name: Name of the task; that of the root folder by default.
            csv: See `own_images.find`.
            skip_bad: Leave out files that cannot be used instead of refusing them.
            split_names: What the splits are called, where these have other names than train, val and test.
            csv_columns: What the columns of the CSV are called, where these have other names than path, label, split.
            white_level: Value of white in grey images of 16 or 32 bits; 65535 by default.
            max_pixels: Images of more pixels are refused before they are decoded.
            test: "required", or "none" where there are no test images and `split=final` trains without a score.
            **cropping: The arguments of `RaggedDataModule`.

        Raises:
            UserError: If a value is not valid.
        """
        super().__init__(**cropping)
        self.root, self.csv, self.store_dir, self.skip_bad = Path(root).expanduser(), csv, Path(store_dir), skip_bad
        if test not in ("required", "none"):
            raise unknown("data.test", test, ("required", "none"))
        self.split_names, self.csv_columns, self.white_level, self.test = split_names, csv_columns, white_level, test
        self.max_pixels, self.task = max_pixels, own_name(root, name)
        if self.task in ("", ".", "..") or "/" in self.task or has_control(self.task):
            raise UserError(f"data.name={self.task!r} cannot name a folder of results: set data.name to a plain word")

    @property
    def origin(self) -> str:
        """A CSV or a folder."""
        return "csv" if self.csv else "folder"

    @cached_property
    def images(self) -> OwnImages:
        """The files with their classes and splits; none is decoded for it."""
        place = sha256(os.fsencode(self.root.absolute())).hexdigest()[:20]
        memory = self.store_dir / "checksums" / f"{place}.json"
        names = self.split_names, self.csv_columns
        return find(self.root, self.csv, self.skip_bad, *names, memory, self.white_level, self.max_pixels)

    @property
    def store_folder(self) -> Path:
        """Where the decoded images are, or will be."""
        how = self.interpolation + {"pillow": "", "tf1": "-tf1", "tf2": "-tf"}[self.resampling]
        white = "" if self.white_level is None else f"-white{self.white_level}"
        white += "" if self.max_pixels == MAX_PIXELS else f"-max{self.max_pixels}"
        return self.store_dir / f"{self.images.fingerprint[:20]}-{self.short_side}-{how}{white}"

    @cached_property
    def store(self) -> RaggedStore:
        """The decoded images, made if there are none."""
        store = open_store(
            self.images,
            self.store_folder,
            self.short_side,
            interpolation=self.interpolation,
            resampling=self.resampling,
            decode=self.images.decode,
            skip_bad=self.skip_bad,
            notes=self.images.notes,
        )
        self.images.known.remember()
        return store

    @property
    def preprocessing(self) -> dict[str, Any]:
        """As for `RaggedDataModule`, with the white level where one is set."""
        white = {} if self.white_level is None else {"white_level": self.white_level}
        white |= {} if self.max_pixels == MAX_PIXELS else {"max_pixels": self.max_pixels}
        return super().preprocessing | white

    @property
    def is_scored(self) -> bool:
        """Whether there are images to score: not where data.test=none trains a final state alone."""
        return self.split == "tune" or self.test == "required"

    def check_sets(self) -> None:
        """See `TaskDataModule`.

        Raises:
            UserError: A split that the run trains on or scores has no image; or there are test images, and
                data.test=none.
        """
        splits = {item.split for item in self.images.items}
        for needed in (*self.train_sets[self.split], *(["val" if self.split == "tune" else "test"] * self.is_scored)):
            if needed not in splits:
                raise no_images(self.task, needed)
        if not self.is_scored and "test" in splits:
            raise UserError(f"data.test=none, but {self.task} has test images: take it away to score them")

    def prepare_data(self) -> None:
        """Decode the images, and see that files that cannot be read leave some of each split that is needed."""
        for needed in {item.split for item in self.images.items}:
            if not (self.store.splits == needed).any():
                raise no_images(self.task, needed)

    @property
    def described(self) -> list[str]:
        """The summary in a few lines."""
        return sentences(self.task, self.class_names, self.summary)

    @property
    def summary(self) -> dict[str, Any]:
        """See `summary.summarise`; files that cannot be read are known once the images are decoded."""
        if "store" not in vars(self):
            return summarise(self.images, self.root)
        return summarise(self.images, self.root, [key for key, _ in self.store.bad], self.store.notes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Sorted names of the class folders or labels."""
        return self.images.class_names

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over relative path, content, class and split of all files."""
        return self.images.fingerprint
