"""The data module of the user's own images with masks."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from visprompt.data.masks import IGNORED
from visprompt.data.own_datamodule import OwnDataModule
from visprompt.data.segmentation_datamodule import SegmentationDataModule
from visprompt.data.sources.images import MAX_PIXELS
from visprompt.data.sources.mask_folders import OwnMasks, find_masks
from visprompt.data.splits import SPLITS
from visprompt.data.stores.masked import MaskStore, open_masks
from visprompt.text import visible


class MaskFolderDataModule(OwnDataModule, SegmentationDataModule):
    """The user's own images and masks, in the folders images and masks."""

    def __init__(
        self, *, classes: str | Sequence[str] | None = None, ignore: int | None = IGNORED, **options: Any
    ) -> None:
        """Keep the options; no data is read yet.

        Args:
            classes: See `mask_folders.find_masks`.
            ignore: See `mask_folders.find_masks`.
            **options: The arguments of `OwnDataModule` and `SegmentationDataModule`.

        Raises:
            UserError: A value is not valid.
        """
        super().__init__(**options)
        self.classes, self.ignore = classes, ignore

    @property
    def origin(self) -> str:
        """Return "folder"."""
        return "folder"

    @cached_property
    def images(self) -> OwnMasks:
        """Return the pairs of files with their splits; their pixels are not decoded."""
        return find_masks(self.root, self.classes, self.ignore, self.skip_bad, self.checksums_file)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, in the order of the labels."""
        return self.images.class_names

    @property
    def store_folder(self) -> Path:
        """Return the folder of the store, which may not exist yet."""
        limit = "" if self.max_pixels == MAX_PIXELS else f"-max{self.max_pixels}"
        return self.store_dir / f"{self.images.fingerprint[:20]}-masks{limit}"

    @property
    def store_bytes(self) -> int:
        """Return an estimate of the size of the store: that of the files."""
        return sum(path.stat().st_size for pair in self.images.files for path in pair if path.exists())

    @cached_property
    def store(self) -> MaskStore:
        """Return the store of images and masks, which is written first if it is missing."""
        store = open_masks(
            self.images,
            self.store_folder,
            fingerprint=self.images.fingerprint,
            skip_bad=self.skip_bad,
            max_pixels=self.max_pixels,
        )
        self.images.known.remember()
        return store

    @property
    def summary(self) -> dict[str, Any]:
        """Return what results record about the images; unreadable files once the store has been opened."""
        splits = [item.split for item in self.images.items]
        left_out = dict(self.images.left_out)
        if "store" in vars(self) and self.store.bad:
            left_out["images that cannot be used"] = len(self.store.bad)
        return {
            "root": str(self.root.absolute()),
            "classes": self.num_classes,
            "images": {split: splits.count(split) for split in SPLITS if split in splits},
            "cut": self.images.cut,
            "left_out": left_out,
            "repeated": self.images.repeated,
        }

    @property
    def described(self) -> list[str]:
        """Return the summary as lines to print."""
        facts = self.summary
        counts = ", ".join(f"{split} {count:,}" for split, count in facts["images"].items())
        cut = " (no splits were given: images were cut 80/10/10)" if facts["cut"] else ""
        lines = [f"data: {self.task} in {facts['root']}: {facts['classes']} classes; images: {counts}{cut}"]
        if facts["left_out"]:
            left = (f"{what} ({count:,})" for what, count in facts["left_out"].items())
            lines.append(f"left out: {', '.join(left)}")
        lines += [
            f"warning: {count:,} of {facts['images'][split]:,} {split} images have the same bytes as "
            "training images, so the score says little: remove them from one of the two"
            for split, count in facts["repeated"].items()
        ]
        return [visible(line) for line in lines]
