"""The data module of ADE20K's scene parsing benchmark."""

from functools import cached_property
from pathlib import Path
from typing import Any

from visprompt.data.catalog import TASKS
from visprompt.data.segmentation_datamodule import SegmentationDataModule
from visprompt.data.stores.masked import MaskStore
from visprompt.data.stores.plan import Plan
from visprompt.data.stores.prepare import prepare_masked


class ADE20KDataModule(SegmentationDataModule):
    task = "ade20k"

    def __init__(
        self,
        *,
        data_dir: str,
        store_dir: str,
        root: str | None = None,
        download: bool = True,
        final: str = "train+val",
        **changing: Any,
    ) -> None:
        """Check the options; no data is read yet.

        Args:
            data_dir: Folder of the original files, see `Plan`.
            store_dir: Folder of the stores of images.
            root: Folder with the archive or its unpacked files, if it is not below `data_dir`.
            download: Whether missing files may be downloaded.
            final: What `split=final` trains on: "train+val", all official training images, or "train".
            **changing: The arguments of `SegmentationDataModule`.

        Raises:
            UserError: A value is not valid.
        """
        super().__init__(final=final, **changing | {"resampling": "pillow"})  # whatever preprocessing= says
        self.plan = Plan(
            spec=TASKS[self.task],
            data_dir=Path(data_dir),
            root=Path(root).expanduser() if root else None,
            store_dir=Path(store_dir),
            resampling="pillow",
            download=download,
        )

    @property
    def origin(self) -> str:
        """Return "raw"."""
        return self.plan.source

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, in the order of the labels."""
        return self.plan.spec.class_names

    @property
    def fingerprint(self) -> str:
        """Return the sha256 (hex) of name, content and split of all files."""
        return self.store.fingerprint

    @cached_property
    def store(self) -> MaskStore:
        """Return the store of images and masks, which is written first if it is missing."""
        return prepare_masked(self.plan)
