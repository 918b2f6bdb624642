"""The base class of data modules of the user's own images."""

import os
from abc import abstractmethod
from hashlib import sha256
from pathlib import Path
from typing import Any

from visprompt.data.catalog import TASKS
from visprompt.data.catalog.task import own_name
from visprompt.data.sources.images import MAX_PIXELS
from visprompt.data.sources.mask_folders import OwnMasks
from visprompt.data.sources.own_images import OwnImages
from visprompt.data.split_datamodule import SplitDataModule
from visprompt.errors import UserError, unknown
from visprompt.text import has_control


class OwnDataModule(SplitDataModule):
    """The user's own images, identified by their content and named by the user."""

    def __init__(
        self,
        *,
        root: str,
        store_dir: str,
        name: str | None = None,
        skip_bad: bool = False,
        max_pixels: int = MAX_PIXELS,
        test: str = "required",
        **options: Any,
    ) -> None:
        """Check the options; no data is read yet.

        Args:
            root: Folder of the images.
            store_dir: Folder of the stores of images.
            name: Name of the task; by default the name of the root folder.
            skip_bad: Skip files that cannot be read instead of raising.
            max_pixels: Images of more pixels are refused before they are decoded.
            test: "required", or "none" for data without test images, on which `split=final` trains and scores
                nothing.
            **options: The arguments of the next class.

        Raises:
            UserError: A value is not valid.
        """
        super().__init__(**options)
        if test not in ("required", "none"):
            raise unknown("data.test", test, ("required", "none"))
        self.root, self.store_dir = Path(root).expanduser(), Path(store_dir)
        self.skip_bad, self.max_pixels, self.test = skip_bad, max_pixels, test
        self.task = own_name(root, name)
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
    @abstractmethod
    def images(self) -> OwnImages | OwnMasks:
        """Return the files with their splits; their pixels are not decoded."""

    @property
    @abstractmethod
    def store_folder(self) -> Path:
        """Return the folder of the store, which may not exist yet."""

    @property
    @abstractmethod
    def store_bytes(self) -> int:
        """Return the size of the store in bytes, or an estimate of it."""

    @property
    def checksums_file(self) -> Path:
        """Return the file that stores the checksums of the images."""
        place = sha256(os.fsencode(self.root.absolute())).hexdigest()[:20]
        return self.store_dir / "checksums" / f"{place}.json"

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Return that of the next class, with the pixel limit if it is set."""
        return super().preprocessing | (
            {} if self.max_pixels == MAX_PIXELS else {"max_pixels": self.max_pixels}
        )

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
                raise self.no_images(needed)
        if not self.is_scored and "test" in splits:
            raise UserError(
                f"data.test=none, but {self.task} has test images: remove that option to score them"
            )

    def prepare_data(self) -> None:
        """Write the store, and check that each split has an image that can be read."""
        for needed in {item.split for item in self.images.items}:
            if not (self.store.splits == needed).any():
                raise self.no_images(needed)

    @property
    def fingerprint(self) -> str:
        """Return the sha256 (hex) of relative path, content, class and split of all files."""
        return self.images.fingerprint
