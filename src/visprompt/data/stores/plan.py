"""What is wanted of a task's data: its source, the form it is stored in, and where everything lies."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from visprompt.data.catalog.task import TaskSpec
from visprompt.data.stores.manifest import check_place, whole
from visprompt.data.stores.ragged import RaggedStore, read_store
from visprompt.data.stores.square import SquareStore, read_square
from visprompt.data.transforms import check_resizing
from visprompt.errors import UserError, unknown

SOURCES = ("raw", "prepared", "hf")
_ASPECT = 4 / 3  # long side over short side of a photograph, where it is not known
_SUFFIXES = {"pillow": "-antialias", "tf1": "-tf1", "tf2": ""}  # of stores' folders, as they have always been named


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is wanted of a task's data, and where it lies.

    Attributes:
        spec: The task.
        data_dir: Holds `raw/<dataset>/` with original files and `vtab-1k/`.
        root: The user's own place of the source's files; None for the one below `data_dir`.
        store_dir: Where stores lie.
        source: "raw", "prepared" or "hf"; FGVC has "raw" alone.
        size: Side of the stored squares (VTAB) or length of the short side (FGVC), in pixels.
        interpolation: "bilinear" or "bicubic".
        resampling: A name of `pixels.RESAMPLINGS`; FGVC's is always Pillow's.
        download: Whether missing files may be fetched.
        revision: Commit of the mirror (source "hf"); "" for that of the record.
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
            raise UserError(f"{self.spec.id} has no source {self.source!r}: FGVC datasets are read with source=raw")
        if self.spec.family == "other" and self.source == "prepared":
            raise UserError(f"{self.spec.id} is not in the vtab-1k folder in circulation: use source=raw")
        if self.source == "hf" and self.spec.mirror is None:
            raise UserError(f"{self.spec.id} has no mirror on the hub that is known to be right: use source=raw")

    @property
    def name(self) -> str:
        """What the store holds: a dataset; of a folder in circulation, where tasks have copies of their own, a task."""
        return self.spec.id if self.source == "prepared" else self.spec.dataset

    @property
    def folder(self) -> Path:
        """The store's own folder."""
        kind = f"{self.size}-{self.interpolation}{_SUFFIXES[self.resampling]}"
        parts = [self.source, "native" if self.native else kind]
        if self.root or self.revision:  # another place or commit may hold other data
            given = f"{self.root.resolve() if self.root else ''} {self.revision}"
            parts.append(sha256(given.encode()).hexdigest()[:8])
        return self.store_dir / self.name / "-".join(parts)

    @property
    def place(self) -> str:
        """Names the store's folder wherever stores lie: "dtd/raw-224-bilinear" for example."""
        return f"{self.name}/{self.folder.name}"

    @property
    def native(self) -> bool:
        """Whether images are stored as they are and resized on the device."""
        return bool(self.spec.native and self.spec.native <= self.size and self.source != "prepared")

    @property
    def bytes(self) -> int:
        """Size of the store; of photographs with their own shapes roughly: they are taken for 4 : 3."""
        count = sum(self.spec.split_sizes.values())
        if self.spec.family == "fgvc":
            return photographs(count, self.size)
        side = self.spec.native if self.native and self.spec.native else self.size
        return 3 * count * side * side

    def others(self) -> list[Path]:
        """Find the stores of the same images and size that were resized in another way."""
        if self.native or self.spec.family == "fgvc":
            return []
        found = self.folder.parent.glob(f"{self.source}-{self.size}-*/manifest.json")
        return sorted(path.parent for path in found if path.parent != self.folder)

    @property
    def files_dir(self) -> Path:
        """The folder with the source's files."""
        if self.root:
            return self.root
        return self.data_dir / ("vtab-1k" if self.source == "prepared" else f"raw/{self.spec.dataset}")

    @property
    def command(self) -> str:
        """The command that prepares it, as far as it is not the default."""
        words = {"tasks": self.spec.id}
        words |= {"source": self.source} if self.source != "raw" else {}
        words |= {"root": str(self.root)} if self.root else {}
        words |= {"revision": self.revision} if self.revision else {}
        if self.spec.family != "fgvc" and not self.native:
            words |= {"image_size": str(self.size)} if self.size != 224 else {}
            words |= {"preprocessing.interpolation": self.interpolation} if self.interpolation != "bilinear" else {}
            words |= {"preprocessing.resampling": self.resampling} if self.resampling != "tf1" else {}
        return " ".join(["python src/prepare.py", *(f"{key}={value}" for key, value in words.items())])


def photographs(count: int, short_side: int) -> int:
    """Return roughly the bytes of decoded photographs of one short side."""
    return int(3 * count * short_side**2 * _ASPECT)


def load_square(plan: Plan) -> SquareStore | None:
    """Read the store of a VTAB task; return None where no store holds it.

    Raises:
        DamagedRecord: It is damaged.
        UserError: Another store lies in its place.
    """
    store = read_square(plan.folder)
    if store is None or plan.spec.id not in store.labels:
        return None
    noted = store.made_for
    if noted is None:  # an older version noted less
        dataset, source = store.record.get("dataset", plan.name), store.record.get("source", plan.source)
        side = store.shape[2]
        as_wanted = (dataset, source, side) == (plan.name, plan.source, plan.spec.native if plan.native else plan.size)
        noted = None if as_wanted else f"{dataset}/{source}-{side}"
    check_place(plan.folder, noted, plan.place)
    return store


def find_square(plan: Plan) -> SquareStore | None:
    """Returns the store of a VTAB task if it is there and whole."""
    store: SquareStore | None = whole(lambda: load_square(plan))
    return store


def has_json(plan: Plan) -> bool:
    """Whether the json split files of an FGVC dataset lie in its folder or in a folder in it."""
    return any(True for pattern in ("train.json", "*/train.json") for _ in plan.files_dir.glob(pattern))


def load_ragged(plan: Plan) -> RaggedStore | None:
    """Read the store of an FGVC dataset; return None where no store was made of the lists that are to be read.

    Raises:
        DamagedRecord: It is damaged.
        UserError: Another store lies in its place.
    """
    store = read_store(plan.folder)
    if store is None or store.bad or (store.origin != "json" and has_json(plan)):
        return None
    side = store.short_side
    check_place(plan.folder, store.made_for if side == plan.size else f"of short side {side}", plan.place)
    return store


def find_ragged(plan: Plan) -> RaggedStore | None:
    """Returns the store of an FGVC dataset if it is whole and of the lists that are to be read."""
    store: RaggedStore | None = whole(lambda: load_ragged(plan))
    return store


def load(plan: Plan) -> SquareStore | RaggedStore | None:
    """Reads a task's store: `load_ragged` or `load_square`."""
    return load_ragged(plan) if plan.spec.family == "fgvc" else load_square(plan)


def find(plan: Plan) -> SquareStore | RaggedStore | None:
    """Returns a task's store if it is there and whole."""
    return find_ragged(plan) if plan.spec.family == "fgvc" else find_square(plan)
