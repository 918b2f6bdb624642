"""The data module of the user's own images."""

import os
from collections.abc import Mapping
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from visprompt.data.catalog import TASKS
from visprompt.data.catalog.task import own_name
from visprompt.data.datamodule import no_images
from visprompt.data.ragged_datamodule import RaggedDataModule
from visprompt.data.sources.images import MAX_PIXELS
from visprompt.data.sources.label_sets import targets
from visprompt.data.sources.own_images import OwnImages, find
from visprompt.data.sources.summary import sentences, summarise
from visprompt.data.stores.ragged import RaggedStore, open_store
from visprompt.errors import UserError, unknown
from visprompt.text import has_control

_KINDS = ("single_label", "multi_label")


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
        kind: str = "single_label",
        **cropping: Any,
    ) -> None:
        """Check the options; no data is read yet.

        Args:
            root: Folder of the images, see `own_images.find`.
            store_dir: Folder of the stores of decoded images.
            name: Name of the task; by default the name of the root folder.
            csv: CSV or Parquet file of paths and labels, see `own_images.find`.
            skip_bad: Skip files that cannot be read instead of raising.
            split_names: Names of the splits, if they are not train, val and test.
            csv_columns: Names of the CSV's columns, if they are not path, label and split.
            white_level: Value of white in grey images of 16 or 32 bits; 65535 by default.
            max_pixels: Images of more pixels are refused before they are decoded.
            test: "required", or "none" for data without test images, on which `split=final` trains and scores
                nothing.
            kind: "single_label", or "multi_label" if an image may have several classes, or none.
            **cropping: The arguments of `RaggedDataModule`.

        Raises:
            UserError: A value is not valid.
        """
        super().__init__(**cropping)
        self.root, self.csv, self.store_dir, self.skip_bad = (
            Path(root).expanduser(),
            csv,
            Path(store_dir),
            skip_bad,
        )
        if test not in ("required", "none"):
            raise unknown("data.test", test, ("required", "none"))
        if kind not in _KINDS:
            raise unknown("data.kind", kind, _KINDS)
        self.kind = kind
        self.split_names, self.csv_columns, self.white_level, self.test = (
            split_names,
            csv_columns,
            white_level,
            test,
        )
        self.max_pixels, self.task = max_pixels, own_name(root, name)
        if self.task in ("", ".", "..") or "/" in self.task or has_control(self.task):
            raise UserError(
                f"data.name={self.task!r} cannot name a folder of results: set data.name to a plain word"
            )
        if self.task in TASKS:  # else results would be compared with the papers'
            raise UserError(
                f"{self.task} is the name of a task of this project, not of your own images: give data.name="
                "another name"
            )

    @property
    def origin(self) -> str:
        """Return "csv" or "folder"."""
        return "csv" if self.csv else "folder"

    @cached_property
    def images(self) -> OwnImages:
        """Return the files with their classes and splits; their pixels are not decoded."""
        place = sha256(os.fsencode(self.root.absolute())).hexdigest()[:20]
        memory = self.store_dir / "checksums" / f"{place}.json"
        names = self.split_names, self.csv_columns
        multi_label, limits = self.kind == "multi_label", (self.white_level, self.max_pixels)
        return find(self.root, self.csv, self.skip_bad, *names, memory, *limits, multi_label)

    @property
    def targets(self) -> np.ndarray | None:
        """Return which classes each label of the store stands for in multi-label data; see `label_sets`."""
        return targets(self.store.class_names, self.class_names) if self.images.multi_label else None

    @property
    def store_folder(self) -> Path:
        """Return the folder of the store, which may not exist yet."""
        how = self.interpolation + {"pillow": "", "tf1": "-tf1", "tf2": "-tf"}[self.resampling]
        white = "" if self.white_level is None else f"-white{self.white_level}"
        white += "" if self.max_pixels == MAX_PIXELS else f"-max{self.max_pixels}"
        return self.store_dir / f"{self.images.fingerprint[:20]}-{self.short_side}-{how}{white}"

    @cached_property
    def store(self) -> RaggedStore:
        """Return the store of decoded images, which is written first if it is missing."""
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
        """Return that of `RaggedDataModule`, with white level and pixel limit if they are set."""
        white = {} if self.white_level is None else {"white_level": self.white_level}
        white |= {} if self.max_pixels == MAX_PIXELS else {"max_pixels": self.max_pixels}
        return super().preprocessing | white

    @property
    def is_scored(self) -> bool:
        """Return whether this split has images to score, which `split=final` with data.test=none lacks."""
        return self.split == "tune" or self.test == "required"

    def check_sets(self) -> None:
        """Check that every split that the run trains on or scores has images.

        Raises:
            UserError: A split has no images, or there are test images in spite of data.test=none.
        """
        splits = {item.split for item in self.images.items}
        for needed in (
            *self.train_sets[self.split],
            *(["val" if self.split == "tune" else "test"] * self.is_scored),
        ):
            if needed not in splits:
                raise no_images(self.task, needed)
        if not self.is_scored and "test" in splits:
            raise UserError(
                f"data.test=none, but {self.task} has test images: remove that option to score them"
            )

    def prepare_data(self) -> None:
        """Write the store, and check that each split has an image that can be read."""
        for needed in {item.split for item in self.images.items}:
            if not (self.store.splits == needed).any():
                raise no_images(self.task, needed)

    @property
    def described(self) -> list[str]:
        """Return the summary as lines to print."""
        return sentences(self.task, self.class_names, self.summary)

    @property
    def summary(self) -> dict[str, Any]:
        """Return `summary.summarise`; it includes unreadable files once the store has been opened."""
        if "store" not in vars(self):
            return summarise(self.images, self.root)
        return summarise(self.images, self.root, [key for key, _ in self.store.bad], self.store.notes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the sorted names of the classes: of folders or labels."""
        return self.images.classes

    @property
    def fingerprint(self) -> str:
        """Return the sha256 (hex) of relative path, content, class and split of all files."""
        return self.images.fingerprint
