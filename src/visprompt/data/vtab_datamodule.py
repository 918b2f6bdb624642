"""The 19 tasks of VTAB-1k, one named data module each; what they have in common stands above them."""

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


class VTABDataModule(TaskDataModule):
    """A VTAB-1k task: 1,000 training images squashed to squares, not augmented, and the whole test set."""

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
        """Reads nothing yet.

        Args:
            data_dir: See `Plan`.
            store_dir: Where decoded images are kept.
            source: "raw", "prepared" or "hf".
            root: The user's own place of the source's files.
            download: Whether a missing task may be fetched.
            revision: Commit of the mirror that source "hf" reads; "" for that of the record.
            **feeding: The arguments of `TaskDataModule`.

        Raises:
            UserError: If a value is not valid.
        """
        super().__init__(**feeding)
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
    def form(self) -> str:  # type: ignore[override]  # of this source, known when its store is open
        """Whether the images are those of the original files ("lossless") or were encoded again ("lossy")."""
        return str(self._store.record["form"])

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""
        return TASKS[self.task].class_names

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the images as the source has them, keys and labels of all split sets."""
        return self._store.fingerprint(self.task)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images of each split set."""
        return {name: stop - start for name, (start, stop) in self._store.sets.items()}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """As for `TaskDataModule`, with the side of the images that are stored as they are."""
        spec = TASKS[self.task]
        return {**super().preprocessing, "decode": spec.decode, "native": spec.native if self.plan.native else None}

    def prepare_data(self) -> None:
        """Makes the store if there is none; Lightning calls it on one rank of each machine."""
        _ = self._store

    def open_sets(self, sets: tuple[str, ...]) -> SquareDataset:
        """Selects the rows of some split sets of the store."""
        return SquareDataset(self._store, self._store.rows(sets), self.task)


class CIFARDataModule(VTABDataModule):
    """A tiny photograph of an animal, a plant, a person, a thing or a scene: which of 100 kinds is it?"""

    task = "cifar"


class Caltech101DataModule(VTABDataModule):
    """A thing, an animal or a face in the middle of a picture, or none: which of 101 kinds is it?"""

    task = "caltech101"


class DTDDataModule(VTABDataModule):
    """A texture that fills the picture: which of 47 adjectives (banded, dotted, woven ...) describes it?"""

    task = "dtd"


class OxfordFlowers102DataModule(VTABDataModule):
    """A flower common in the United Kingdom: which of 102 kinds is it?"""

    task = "oxford_flowers102"


class OxfordIIITPetDataModule(VTABDataModule):
    """A cat or a dog: which of 37 breeds is it?"""

    task = "oxford_iiit_pet"


class SVHNDataModule(VTABDataModule):
    """A digit of a house number, often between its neighbours: which digit is in the middle?"""

    task = "svhn"


class SUN397DataModule(VTABDataModule):
    """A place, indoors or outdoors: which of 397 kinds of scene is it?"""

    task = "sun397"


class PatchCamelyonDataModule(VTABDataModule):
    """A stained patch of a lymph node: is there tumor tissue in its middle?"""

    task = "patch_camelyon"


class EuroSATDataModule(VTABDataModule):
    """640 m of Europe from a satellite: which of 10 kinds of land use is it?"""

    task = "eurosat"


class RESISC45DataModule(VTABDataModule):
    """A scene on the ground from above: which of 45 kinds (airport, bridge, forest ...) is it?"""

    task = "resisc45"


class DiabeticRetinopathyDataModule(VTABDataModule):
    """The retina of an eye: how far has diabetic retinopathy gone, on a scale of 5?"""

    task = "diabetic_retinopathy"


class CLEVRCountDataModule(VTABDataModule):
    """Cubes, spheres and cylinders on a grey table: how many, 3 to 10?"""

    task = "clevr_count"


class CLEVRDistDataModule(VTABDataModule):
    """Cubes, spheres and cylinders on a grey table: how far from the camera is the nearest, in 6 steps?"""

    task = "clevr_dist"


class DMLabDataModule(VTABDataModule):
    """What an agent sees in a 3D maze: how far is the object, and is it a good or a bad one?"""

    task = "dmlab"


class KITTIDataModule(VTABDataModule):
    """A street from a driving car: how far is the nearest car, van or truck?"""

    task = "kitti"


class DSpritesLocDataModule(VTABDataModule):
    """A white square, ellipse or heart on black: in which of 16 columns is it?"""

    task = "dsprites_loc"


class DSpritesOriDataModule(VTABDataModule):
    """A white square, ellipse or heart on black: in which of 16 directions is it turned?"""

    task = "dsprites_ori"


class SmallNORBAziDataModule(VTABDataModule):
    """A grey toy animal, human, airplane, truck or car: from which of 18 sides is it seen?"""

    task = "smallnorb_azi"


class SmallNORBEleDataModule(VTABDataModule):
    """A grey toy animal, human, airplane, truck or car: from which of 9 heights is it seen?"""

    task = "smallnorb_ele"
