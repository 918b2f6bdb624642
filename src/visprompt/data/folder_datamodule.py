"""The data module of the user's own images."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from visprompt.data.own_datamodule import OwnDataModule
from visprompt.data.ragged_datamodule import RaggedDataModule
from visprompt.data.sources.images import MAX_PIXELS
from visprompt.data.sources.label_sets import targets
from visprompt.data.sources.own_images import OwnImages, find
from visprompt.data.sources.summary import sentences, summarise
from visprompt.data.stores.plan import photographs
from visprompt.data.stores.ragged import RaggedStore, open_store
from visprompt.errors import unknown

_KINDS = ("single_label", "multi_label")


class FolderDataModule(OwnDataModule, RaggedDataModule):
    """The user's own images, decoded once into a store, cropped and flipped as the FGVC protocol does."""

    def __init__(
        self,
        *,
        csv: str | None = None,
        split_names: Mapping[str, Any] | str | None = None,
        csv_columns: Mapping[str, Any] | None = None,
        white_level: int | None = None,
        kind: str = "single_label",
        **options: Any,
    ) -> None:
        """Check the options; no data is read yet.

        Args:
            csv: CSV or Parquet file of paths and labels, see `own_images.find`.
            split_names: Names of the splits, if they are not train, val and test.
            csv_columns: Names of the CSV's columns, if they are not path, label and split.
            white_level: Value of white in grey images of 16 or 32 bits; 65535 by default.
            kind: "single_label", or "multi_label" if an image may have several classes, or none.
            **options: The arguments of `OwnDataModule` and `RaggedDataModule`.

        Raises:
            UserError: A value is not valid.
        """
        super().__init__(**options)
        if kind not in _KINDS:
            raise unknown("data.kind", kind, _KINDS)
        self.csv, self.kind = csv, kind
        self.split_names, self.csv_columns, self.white_level = split_names, csv_columns, white_level

    @property
    def origin(self) -> str:
        """Return "csv" or "folder"."""
        return "csv" if self.csv else "folder"

    @cached_property
    def images(self) -> OwnImages:
        """Return the files with their classes and splits; their pixels are not decoded."""
        memory = self.checksums_file
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

    @property
    def store_bytes(self) -> int:
        """Return an estimate of the size of the store, for photographs of 4 : 3."""
        return photographs(len(self.images.items), self.short_side)

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
        """Return that of the base classes, with the white level if it is set."""
        return super().preprocessing | ({} if self.white_level is None else {"white_level": self.white_level})

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
