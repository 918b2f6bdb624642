"""Data modules of the 5 fine-grained datasets (FGVC): what they share, then one class each."""

from functools import cached_property
from pathlib import Path
from typing import Any

from visprompt.data.catalog import TASKS
from visprompt.data.ragged_datamodule import RaggedDataModule
from visprompt.data.stores.plan import Plan
from visprompt.data.stores.prepare import prepare_ragged
from visprompt.data.stores.ragged import RaggedStore


class FGVCDataModule(RaggedDataModule):
    """A fine-grained dataset: resized by the short side, random crops and flips in training."""

    def __init__(
        self,
        *,
        data_dir: str,
        store_dir: str,
        source: str = "raw",
        root: str | None = None,
        download: bool = True,
        **cropping: Any,
    ) -> None:
        """Check the options; no data is read yet.

        Args:
            data_dir: Folder of the original files, see `Plan`.
            store_dir: Folder of the stores of decoded images.
            source: "raw".
            root: Folder with the dataset's unpacked files, if it is not below `data_dir`.
            download: Whether missing files may be downloaded.
            **cropping: The arguments of `RaggedDataModule`.

        Raises:
            UserError: A value is not valid.
        """
        super().__init__(**cropping | {"resampling": "pillow"})  # whatever preprocessing= says
        self.plan = Plan(
            spec=TASKS[self.task],
            data_dir=Path(data_dir),
            root=Path(root).expanduser() if root else None,
            store_dir=Path(store_dir),
            source=source,
            size=self.short_side,
            interpolation=self.interpolation,
            resampling="pillow",
            download=download,
        )

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Return the preprocessing of `RaggedDataModule`, with the decoder of the dataset's store."""
        return {**super().preprocessing, "decode": self.plan.spec.decode}

    @property
    def origin(self) -> str:
        """Return "raw:json" (the VPT authors' split files) or "raw:lists" (the datasets' official lists)."""
        return f"raw:{self.store.origin}"

    @cached_property
    def store(self) -> RaggedStore:
        """Return the store of decoded images, which is written first if it is missing."""
        return prepare_ragged(self.plan)


class CUB200DataModule(FGVCDataModule):
    task = "cub200"


class NABirdsDataModule(FGVCDataModule):
    task = "nabirds"


class OxfordFlowersDataModule(FGVCDataModule):
    task = "oxford_flowers"


class StanfordDogsDataModule(FGVCDataModule):
    task = "stanford_dogs"


class StanfordCarsDataModule(FGVCDataModule):
    task = "stanford_cars"
