"""Data modules of the 19 VTAB-1k tasks: what they share, then one class per task."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from visprompt.data.catalog import TASKS
from visprompt.data.datamodule import TaskDataModule
from visprompt.data.datasets import SquareDataset
from visprompt.data.stores.plan import Plan
from visprompt.data.stores.prepare import prepare_square, warn_lossy
from visprompt.data.stores.square import SquareStore
from visprompt.errors import UserError


class VTABDataModule(TaskDataModule):
    """A VTAB-1k task: 1,000 training images squashed to squares, and the whole test set."""

    train_sets: Mapping[str, tuple[str, ...]] = {"tune": ("train800",), "final": ("train800", "val200")}
    val_set = "val200"

    def __init__(
        self,
        *,
        data_dir: str,
        store_dir: str,
        source: str = "raw",
        root: str | None = None,
        download: bool = True,
        revision: str = "",
        **feeding: Any,
    ) -> None:
        """Check the options; no data is read yet.

        Args:
            data_dir: Folder of the original files, see `Plan`.
            store_dir: Folder of the stores of decoded images.
            source: "raw", "prepared" or "hf".
            root: Folder with the source's files, if it is not below `data_dir`.
            download: Whether missing files may be downloaded.
            revision: Commit of the mirror that source "hf" reads; "" for the commit in the record.
            **feeding: The arguments of `TaskDataModule`.

        Raises:
            UserError: A value is not valid.
        """
        super().__init__(**feeding)
        named = isinstance(feeding.get("augment"), str)  # a module of the user may fit the labels
        if self.augments and named and TASKS[self.task].group == "structured":
            raise UserError(
                f"data.augment does not suit {self.task}, whose labels are places, directions or numbers of "
                "things in the image, which augmentation changes: leave it out"
            )
        self.source = source
        self.plan = Plan(
            spec=TASKS[self.task],
            data_dir=Path(data_dir),
            root=Path(root).expanduser() if root else None,
            store_dir=Path(store_dir),
            source=source,
            size=self.image_size,
            interpolation=self.interpolation,
            resampling=self.resampling,
            download=download,
            revision=revision,
        )

    @cached_property
    def _store(self) -> SquareStore:
        store = prepare_square(self.plan)
        warn_lossy(self.plan, store)
        return store

    @property
    def form(self) -> str:  # type: ignore[override]  # of this source, read from its store
        """Return "lossless" for images of the original files, "lossy" for re-encoded ones."""
        return str(self._store.record["form"])

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, in the order of the labels."""
        return TASKS[self.task].class_names

    @property
    def fingerprint(self) -> str:
        """Return the sha256 (hex) of the source's images, keys and labels, over all split sets."""
        return self._store.fingerprint(self.task)

    @property
    def sizes(self) -> dict[str, int]:
        """Return the number of images of each split set."""
        return {name: stop - start for name, (start, stop) in self._store.sets.items()}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Return the preprocessing of `TaskDataModule`, with the decoder and the side of unresized images."""
        spec = TASKS[self.task]
        return {
            **super().preprocessing,
            "decode": spec.decode,
            "native": spec.native if self.plan.native else None,
        }

    def prepare_data(self) -> None:
        """Write the store if it is missing; Lightning calls this on one rank of each machine."""
        _ = self._store

    def open_sets(self, sets: tuple[str, ...]) -> SquareDataset:
        """Return the images of some split sets, read from the store."""
        return SquareDataset(self._store, self._store.rows(sets), self.task)


class CIFARDataModule(VTABDataModule):
    task = "cifar"


class Caltech101DataModule(VTABDataModule):
    task = "caltech101"


class DTDDataModule(VTABDataModule):
    task = "dtd"


class OxfordFlowers102DataModule(VTABDataModule):
    task = "oxford_flowers102"


class OxfordIIITPetDataModule(VTABDataModule):
    task = "oxford_iiit_pet"


class SVHNDataModule(VTABDataModule):
    task = "svhn"


class SUN397DataModule(VTABDataModule):
    task = "sun397"


class PatchCamelyonDataModule(VTABDataModule):
    task = "patch_camelyon"


class EuroSATDataModule(VTABDataModule):
    task = "eurosat"


class RESISC45DataModule(VTABDataModule):
    task = "resisc45"


class DiabeticRetinopathyDataModule(VTABDataModule):
    task = "diabetic_retinopathy"


class CLEVRCountDataModule(VTABDataModule):
    task = "clevr_count"


class CLEVRDistDataModule(VTABDataModule):
    task = "clevr_dist"


class DMLabDataModule(VTABDataModule):
    task = "dmlab"


class KITTIDataModule(VTABDataModule):
    task = "kitti"


class DSpritesLocDataModule(VTABDataModule):
    task = "dsprites_loc"


class DSpritesOriDataModule(VTABDataModule):
    task = "dsprites_ori"


class SmallNORBAziDataModule(VTABDataModule):
    task = "smallnorb_azi"


class SmallNORBEleDataModule(VTABDataModule):
    task = "smallnorb_ele"
