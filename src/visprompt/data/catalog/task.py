"""What a record of the catalog consists of; the records themselves are in one file per family."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple


def own_name(root: str, name: str | None) -> str:
    """Return the name of the task that own images are: the one given, or that of their folder."""
    return name or Path(root).expanduser().resolve().name


class Cut(NamedTuple):
    """Images `start` to `stop` of an official split in md5 order (see `splits.md5_order`; the salt is the split).

    Attributes:
        split: Name of the official split, which is also the salt.
        start: First position.
        stop: Position behind the last one; None for the end.
    """

    split: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file that a dataset's owners distribute.

    Attributes:
        name: File name below the dataset's raw folder.
        urls: Where it is, the official place first; empty where a user has to fetch it by hand.
        size: In bytes; None where it is not known.
        roughly: In bytes, where the exact size is not known.
        sha256: Checksum in hex, "" where it is not known.
        md5: Checksum in hex, "" where it is not known; one of the two is enough.
    """

    name: str
    urls: tuple[str, ...] = ()
    size: int | None = None
    roughly: int | None = None
    sha256: str = ""
    md5: str = ""


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """A copy of a dataset on the Hugging Face hub.

    Attributes:
        repo: Its name there, owner/name.
        revision: The commit that is read; "" where none has been seen: the first preparation pins the one it finds.
        config: Configuration of the dataset, where it has several.
        splits: Official split -> split of the mirror.
        image: Column of the images.
        labels: Task -> column of its labels, 0-based in the order of the record's class names.
        key: Column of the keys; "" where the row number is the key.
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
    """Values that are known of a split set, to prove that the data is the right one.

    Attributes:
        keys: The first keys in md5 order.
        labels: The first labels in md5 order.
        histogram: Number of images of each class; empty where it is not known.
        classes: Number of classes that occur; 0 where it is not known.
    """

    keys: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    histogram: tuple[int, ...] = ()
    classes: int = 0


_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """Everything that is known about a task without opening its data.

    Attributes:
        id: The one name that configs, folders, results and tables use.
        aliases: Other names in circulation; `tasks=` accepts them, and so do names of folders of the prepared source.
        group: "natural", "specialized" or "structured" (VTAB's kinds of task), or "fine-grained".
        family: The folder of its config below `configs/data/`: "vtab", "fgvc", "demo" or "other".
        dataset: The dataset whose images it uses; tasks of one dataset share raw files and decoded pixels.
        num_classes: Number of classes.
        class_names: In the order of the labels; empty where only the data's own files tell them.
        split_sizes: Number of images of each disjoint split set.
        official_sizes: Number of images of each official split.
        cuts: Split set -> the part of an official split that it is; empty where the data's own lists say it.
        label_rule: How a label comes from the original annotation.
        exact: Whether the raw source gives the images of the task as its paper made them; `notes` say what differs.
        notes: What a user has to know of this task's data.
        decode: What becomes of an image file: a name of `decoders.DECODERS`.
        native: Side in pixels where all images are squares of one size that is stored as it is; else None.
        files: What the raw source reads.
        mirror: What the hf source reads.
        golden: Split set -> known values.
        source: Where the pixels and labels come from, in words.
        licence: Terms of the data.
        homepage: Page of the data.
        citation: Who to cite.
        description: What is seen and what is asked, in a sentence or two.
        how_to_get: What a user has to do by hand before the first run; empty where nothing is.
    """

    id: str
    aliases: tuple[str, ...] = ()
    group: str
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
        """What `data=` takes for this task."""
        return f"{self.family}/{self.id}"

    @property
    def size(self) -> int | None:
        """Bytes of all raw files together; None where one is not known."""
        sizes = [file.size for file in self.files]
        return None if None in sizes or not sizes else sum(size for size in sizes if size)


def in_bytes(size: int | None) -> str:
    """Returns a number of bytes in words, in powers of 1,000."""
    if size is None:
        return "size not known"
    if size >= 10**9:
        return f"{size / 10**9:,.1f} GB"
    return f"{size / 10**6:,.1f} MB" if size >= 10**5 else f"{size:,} B"
