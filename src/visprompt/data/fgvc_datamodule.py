"""The 5 fine-grained datasets (FGVC), one named data module each; what they have in common stands above them."""

from functools import cached_property
from pathlib import Path
from typing import Any

from visprompt.data.catalog import TASKS
from visprompt.data.ragged_datamodule import RaggedDataModule
from visprompt.data.stores.plan import Plan
from visprompt.data.stores.prepare import prepare_ragged
from visprompt.data.stores.ragged import RaggedStore


class FGVCDataModule(RaggedDataModule):
    """A fine-grained dataset: the short side resized, random crops and flips in training, the middle in evaluation."""

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
        """Reads nothing yet.

        Args:
            data_dir: See `Plan`.
            store_dir: Where decoded images are kept.
            source: "raw".
            root: The user's own folder with the dataset's unpacked files.
            download: Whether a missing dataset may be fetched.
            **cropping: The arguments of `RaggedDataModule`.

        Raises:
            UserError: If a value is not valid.
        """
        super().__init__(**cropping | {"resampling": "pillow"})  # Pillow resizes, whatever the preset says
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
    def origin(self) -> str:
        """The original files, with the lists that were read: "json" (the Visual Prompt Tuning authors') or "lists"."""
        return f"raw:{self.store.origin}"

    @cached_property
    def store(self) -> RaggedStore:
        """The decoded images, made if there are none."""
        return prepare_ragged(self.plan)


class CUB200DataModule(FGVCDataModule):
    """A bird: which of 200 species, most of them North American, is it?"""

    task = "cub200"


class NABirdsDataModule(FGVCDataModule):
    """A North American bird: which of 555 species, sexes and ages is it?"""

    task = "nabirds"


class OxfordFlowersDataModule(FGVCDataModule):
    """A flower common in the United Kingdom: which of 102 kinds is it?"""

    task = "oxford_flowers"


class StanfordDogsDataModule(FGVCDataModule):
    """A dog: which of 120 breeds is it?"""

    task = "stanford_dogs"


class StanfordCarsDataModule(FGVCDataModule):
    """A car: which of 196 makes, models and years is it?"""

    task = "stanford_cars"
