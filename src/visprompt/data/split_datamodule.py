"""The base class of data modules whose images are in the splits train, val and test."""

from abc import abstractmethod
from typing import Any

from visprompt.data.datamodule import TaskDataModule
from visprompt.data.splits import SPLITS
from visprompt.data.stores.masked import MaskStore
from visprompt.data.stores.ragged import RaggedStore
from visprompt.errors import unknown


class SplitDataModule(TaskDataModule):
    """Images in a store with the splits train, val and test: FGVC, segmentation and the user's own."""

    val_set = "val"

    def __init__(self, *, final: str = "train", **feeding: Any) -> None:
        """Check the options; no data is read yet.

        Args:
            final: What `split=final` trains on: "train" or "train+val".
            **feeding: The arguments of `TaskDataModule`.

        Raises:
            UserError: A value is not valid.
        """
        if final not in ("train", "train+val"):
            raise unknown("data.final", final, ("train", "train+val"))
        self.train_sets = {"tune": ("train",), "final": tuple(final.split("+"))}
        super().__init__(**feeding)
        self.final = final

    @property
    @abstractmethod
    def origin(self) -> str:
        """Return where images and splits come from: "folder", "csv", for example."""

    @property
    def source(self) -> str:  # type: ignore[override]  # a property here
        """Return the origin as results record it, with ":train+val" if validation images are trained on."""
        return self.origin + (":train+val" if self.split == "final" and self.final != "train" else "")

    @property
    @abstractmethod
    def store(self) -> RaggedStore | MaskStore:
        """Return the store of the images, which is written first if it is missing."""

    @property
    def sizes(self) -> dict[str, int]:
        """Return the number of readable images of each split; splits without images are left out."""
        counts = {split: int((self.store.splits == split).sum()) for split in SPLITS}
        return {split: count for split, count in counts.items() if count}

    @property
    def validates(self) -> bool:
        """Return whether there are validation images that this split does not train on."""
        if self.split == "tune":
            return True
        return self.val_set not in self.train_sets[self.split] and self.val_set in self.sizes

    def prepare_data(self) -> None:
        """Write the store if it is missing; Lightning calls this on one rank of each machine."""
        _ = self.store
