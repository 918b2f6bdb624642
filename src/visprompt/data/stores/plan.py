"""The plan of a task's data: its source, the form in which it is stored, and the folders."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from visprompt.data.catalog.task import TaskSpec
from visprompt.data.stores.manifest import check_place, whole
from visprompt.data.stores.masked import MaskStore, read_masks
from visprompt.data.stores.ragged import RaggedStore, read_store
from visprompt.data.stores.square import SquareStore, read_square
from visprompt.data.transforms import check_resizing
from visprompt.errors import UserError, unknown

AnyStore = SquareStore | RaggedStore | MaskStore
SOURCES = ("raw", "prepared", "hf")
_ASPECT = 4 / 3  # long side over short side of a photograph, where it is not known
# of the stores' folders
_SUFFIXES = {
    "pillow": "-antialias",
    "tf1": "-tf1",
    "tf2": "",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The source of a task's data, the form in which it is stored, and the folders.

    Attributes:
        spec: The task.
        data_dir: Folder with `raw/<dataset>/` (original files) and `vtab-1k/`.
        root: Folder of the source's files, where it is not below `data_dir`.
        store_dir: Folder of the stores.
        source: "raw", "prepared" or "hf"; FGVC and segmentation have only "raw".
        size: Side of the stored squares (VTAB) or length of the short side (FGVC), in pixels; images with
            masks are stored as their files, in any size.
        interpolation: "bilinear" or "bicubic".
        resampling: A name of `transforms.RESAMPLINGS`; always "pillow" for FGVC.
        download: Whether missing files may be downloaded.
        revision: Commit of the mirror (source "hf"); "" for the commit in the record.
    """

    spec: TaskSpec
    data_dir: Path
    root: Path | None = None
    store_dir: Path
    source: str = "raw"
    size: int = 224
    interpolation: str = "bilinear"
    resampling: str = "tf1"
    download: bool = True
    revision: str = ""

    def __post_init__(self) -> None:
        check_resizing(self.interpolation, self.resampling)
        if self.spec.family == "demo":
            raise UserError(f"{self.spec.id} needs no preparation: {self.spec.how_to_get}")
        if self.source not in SOURCES:
            raise unknown("source", self.source, SOURCES)
        if self.spec.family == "fgvc" and self.source != "raw":
            raise UserError(
                f"{self.spec.id} has no source {self.source!r}: FGVC datasets are read with source=raw"
            )
        if self.spec.family == "segmentation" and self.source != "raw":
            raise UserError(
                f"{self.spec.id} has no source {self.source!r}: segmentation datasets are read with "
                "source=raw"
            )
        if self.spec.family == "other" and self.source == "prepared":
            raise UserError(f"{self.spec.id} is not in the vtab-1k folder in circulation: use source=raw")
        if self.source == "hf" and self.spec.mirror is None:
            raise UserError(
                f"{self.spec.id} has no mirror on the hub that is known to be right: use source=raw"
            )

    @property
    def name(self) -> str:
        """Return the name of the store: the dataset, or the task in source "prepared", which has copies."""
        return self.spec.id if self.source == "prepared" else self.spec.dataset

    @property
    def folder(self) -> Path:
        """Return the folder of the store."""
        kind = f"{self.size}-{self.interpolation}{_SUFFIXES[self.resampling]}"
        kind = "files" if self.spec.family == "segmentation" else kind
        parts = [self.source, "native" if self.native else kind]
        if self.root or self.revision:  # another folder or commit may hold other data
            given = f"{self.root.resolve() if self.root else ''} {self.revision}"
            parts.append(sha256(given.encode()).hexdigest()[:8])
        return self.store_dir / self.name / "-".join(parts)

    @property
    def place(self) -> str:
        """Return the store's folder below `store_dir`, "dtd/raw-224-bilinear" for example."""
        return f"{self.name}/{self.folder.name}"

    @property
    def native(self) -> bool:
        """Return whether images are stored in their original size and resized on the device."""
        return bool(self.spec.native and self.spec.native <= self.size and self.source != "prepared")

    @property
    def bytes(self) -> int:
        """Return the size of the store in bytes; an estimate for FGVC, which assumes photographs of 4 : 3.

        For segmentation it is about that of the original files.
        """
        if self.spec.family == "segmentation":
            return sum(file.size or file.roughly or 0 for file in self.spec.files)
        count = sum(self.spec.split_sizes.values())
        if self.spec.family == "fgvc":
            return photographs(count, self.size)
        side = self.spec.native if self.native and self.spec.native else self.size
        return 3 * count * side * side

    def others(self) -> list[Path]:
        """Return the stores of the same images and size that were resized in another way."""
        if self.native or self.spec.family in ("fgvc", "segmentation"):
            return []
        found = self.folder.parent.glob(f"{self.source}-{self.size}-*/manifest.json")
        return sorted(path.parent for path in found if path.parent != self.folder)

    @property
    def files_dir(self) -> Path:
        """Return the folder with the source's files."""
        if self.root:
            return self.root
        return self.data_dir / ("vtab-1k" if self.source == "prepared" else f"raw/{self.spec.dataset}")

    @property
    def command(self) -> str:
        """Return the command that prepares the task, with all options that are not the default."""
        words = {"tasks": self.spec.id}
        words |= {"source": self.source} if self.source != "raw" else {}
        words |= {"root": str(self.root)} if self.root else {}
        words |= {"revision": self.revision} if self.revision else {}
        if self.spec.family not in ("fgvc", "segmentation") and not self.native:
            words |= {"image_size": str(self.size)} if self.size != 224 else {}
            words |= (
                {"preprocessing.interpolation": self.interpolation}
                if self.interpolation != "bilinear"
                else {}
            )
            words |= {"preprocessing.resampling": self.resampling} if self.resampling != "tf1" else {}
        return " ".join(["python src/prepare.py", *(f"{key}={value}" for key, value in words.items())])


def photographs(count: int, short_side: int) -> int:
    """Estimate the bytes of decoded photographs of one short side."""
    return int(3 * count * short_side**2 * _ASPECT)


def has_json(plan: Plan) -> bool:
    """Return whether the json split files of an FGVC dataset are in its folder or in a folder in it."""
    return any(True for pattern in ("train.json", "*/train.json") for _ in plan.files_dir.glob(pattern))


def find(plan: Plan) -> AnyStore | None:
    """Return a task's store, or None where it is missing or damaged; damage is logged."""
    store: AnyStore | None = whole(lambda: load(plan))
    return store


def load(plan: Plan) -> AnyStore | None:
    """Open a task's store; return None if it is missing, or an FGVC store made from other lists.

    Raises:
        DamagedRecord: The store is damaged.
        UserError: The folder holds the store of another plan.
    """
    if plan.spec.family == "segmentation":
        return _load_masked(plan)
    return _load_ragged(plan) if plan.spec.family == "fgvc" else _load_square(plan)


def _load_square(plan: Plan) -> SquareStore | None:
    store = read_square(plan.folder)
    if store is None or plan.spec.id not in store.labels:
        return None
    made_for = store.made_for
    if made_for is None:  # an older version recorded less
        dataset, source = store.record.get("dataset", plan.name), store.record.get("source", plan.source)
        side, wanted = store.shape[2], plan.spec.native if plan.native else plan.size
        if (dataset, source, side) != (plan.name, plan.source, wanted):
            made_for = f"{dataset}/{source}-{side}"
    check_place(plan.folder, made_for, plan.place)
    return store


def _load_ragged(plan: Plan) -> RaggedStore | None:
    store = read_store(plan.folder)
    if store is None or store.bad or (store.origin != "json" and has_json(plan)):
        return None
    side = store.short_side
    check_place(plan.folder, store.made_for if side == plan.size else f"of short side {side}", plan.place)
    return store


def _load_masked(plan: Plan) -> MaskStore | None:
    store = read_masks(plan.folder)
    if store is not None:
        check_place(plan.folder, store.made_for, plan.place)
    return store
