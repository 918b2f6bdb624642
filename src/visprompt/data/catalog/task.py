"""The classes that a record of the catalog consists of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple


def own_name(root: str, name: str | None) -> str:
    """Return the name of the task of own images: the given one, or the name of their folder."""
    return name or Path(root).expanduser().resolve().name


class Cut(NamedTuple):
    """A slice of an official split in md5 order (see `splits.md5_order`).

    Attributes:
        split: Name of the official split, which is also the salt.
        start: First position.
        stop: Position after the last one; None for the end.
    """

    split: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file that a dataset's owners distribute.

    Attributes:
        name: File name below the dataset's raw folder.
        urls: The official url first; empty where a user has to download it by hand.
        size: In bytes; None where it is unknown.
        roughly: Estimate in bytes, where the size is unknown.
        sha256: Checksum in hex, "" where it is unknown.
        md5: Checksum in hex, "" where it is unknown; compared only where there is no sha256.
        sha1: Likewise.
    """

    name: str
    urls: tuple[str, ...] = ()
    size: int | None = None
    roughly: int | None = None
    sha256: str = ""
    md5: str = ""
    sha1: str = ""

    @property
    def checksums(self) -> dict[str, str]:
        """Return the known checksums in hex by kind, the strongest first."""
        kinds = {"sha256": self.sha256, "sha1": self.sha1, "md5": self.md5}
        return {kind: value for kind, value in kinds.items() if value}


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """A copy of a dataset on the Hugging Face hub.

    Attributes:
        repo: Its name, owner/name.
        revision: The commit to read; "" for the newest one, which the store then records.
        config: Configuration of the dataset, where it has several.
        splits: Official split -> split of the mirror.
        image: Column of the images.
        labels: Task -> column of its labels, 0-based in the order of the record's class names.
        key: Column of the keys; "" for row numbers.
    """

    repo: str
    revision: str = ""
    config: str | None = None
    splits: Mapping[str, str]
    image: str
    labels: Mapping[str, str]
    key: str = ""


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Known values of a split set, to check that the data is the right one.

    Attributes:
        keys: The first keys in md5 order.
        labels: The first labels in md5 order.
        histogram: Number of images of each class; empty where it is unknown.
        classes: Number of classes that occur; 0 where it is unknown.
    """

    keys: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    histogram: tuple[int, ...] = ()
    classes: int = 0


_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """All facts about a task that do not need its data.

    Attributes:
        id: The name in configs, folders, results and tables.
        aliases: Other names in use, which `tasks=` accepts; the prepared folder may use them, too.
        group: "natural", "specialized" or "structured" (VTAB's groups), "fine-grained", or "dense".
        kind: The kind of its labels, a name of `models.kind.KINDS`.
        family: Folder of its config below `configs/data/`: "vtab", "fgvc", "segmentation", "demo" or "other".
        dataset: Dataset of its images; tasks of one dataset share raw files and decoded pixels.
        num_classes: Number of classes.
        class_names: In the order of the labels; empty where only the data's files have them.
        split_sizes: Number of images of each disjoint split set.
        official_sizes: Number of images of each official split.
        cuts: Split set -> its slice of an official split; empty where lists in the data define the split
            sets.
        label_rule: How a label follows from the original annotation.
        exact: Whether the raw source gives exactly the benchmark's images and splits; `notes` say what
            differs.
        notes: What users have to know about the data.
        decode: Decoder of the image files: a name of `decoders.DECODERS`.
        native: Side in pixels of images that are stored unresized; None where sizes differ or are large.
        files: Files of the raw source.
        mirror: Repository of the hf source.
        golden: Split set -> known values.
        source: Origin of pixels and labels, in words.
        licence: Terms of the data.
        homepage: Page of the data.
        citation: Who to cite.
        description: What is seen and what is asked, in a sentence or two.
        how_to_get: What a user has to do by hand before the first run, if anything.
    """

    id: str
    aliases: tuple[str, ...] = ()
    group: str
    kind: str = "single_label"
    family: str
    dataset: str = ""
    num_classes: int
    class_names: tuple[str, ...] = ()
    split_sizes: Mapping[str, int]
    official_sizes: Mapping[str, int] = field(default_factory=lambda: _NONE)
    cuts: Mapping[str, Cut] = field(default_factory=lambda: _NONE)
    label_rule: str = "as in the original files"
    exact: bool = True
    notes: str = ""
    decode: str = "rgb"
    native: int | None = None
    files: tuple[SourceFile, ...] = ()
    mirror: Mirror | None = None
    golden: Mapping[str, Golden] = field(default_factory=lambda: _NONE)
    source: str
    licence: str
    homepage: str
    citation: str
    description: str
    how_to_get: str = ""

    @property
    def config(self) -> str:
        """Return the name of its config, as `data=` takes it."""
        return f"{self.family}/{self.id}"

    @property
    def size(self) -> int | None:
        """Return the total size of the raw files in bytes; None where one is unknown."""
        sizes = [file.size for file in self.files]
        return None if None in sizes or not sizes else sum(size for size in sizes if size)


def in_bytes(size: int | None) -> str:
    """Return a number of bytes as text, in powers of 1,000: "3.1 MB"."""
    if size is None:
        return "size not known"
    if size >= 10**9:
        return f"{size / 10**9:,.1f} GB"
    return f"{size / 10**6:,.1f} MB" if size >= 10**5 else f"{size:,} B"
