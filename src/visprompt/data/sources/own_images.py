"""Own images: find the files, their classes and splits.

Layouts: `root/<class>/...`; `root/{train,val,test}/<class>/...`; or a table of path,label[,split]. Without
given splits every class is cut 80/10/10 (`splits.stratified`) in md5 order of the POSIX paths relative to the
root; multi-label images are cut as if they were of one class. Given splits are used unchanged: nothing is cut
from train where val or test is missing. Hidden files and folders (a leading dot), images next to the class
folders, and system files (see `walk`) are left out and counted.
"""

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from visprompt.data.sources.checksums import UNREADABLE, Checksums
from visprompt.data.sources.csv_list import Found, read_csv
from visprompt.data.sources.images import EXTENSIONS, MAX_PIXELS, WIDE_WHITE, ImageFolder, Item, decode
from visprompt.data.sources.label_sets import all_classes, classes_in
from visprompt.data.sources.split_folders import class_parents
from visprompt.data.sources.walk import entries, files_below, folders_in
from visprompt.data.splits import SPLITS, stratified
from visprompt.errors import UserError
from visprompt.text import has_control, visible

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnImages(ImageFolder):
    """Own images, which are identified by their content, wherever they are.

    Attributes:
        cut: Whether every class was cut 80/10/10, because no splits were given.
        left_out: Number of files or folders that were left out, by kind.
        unread: Columns of the CSV that were not read.
        known: The stored checksums of the files.
        white_level: See `images.decode`.
        max_pixels: See `images.open_image`.
        multi_label: Whether `class_names` are names of sets of classes (see `label_sets`).
    """

    cut: bool = False
    left_out: Mapping[str, int] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    known: Checksums = field(default_factory=Checksums)
    white_level: int | None = None
    max_pixels: int = MAX_PIXELS
    multi_label: bool = False
    _tops: list[int] = field(default_factory=list)  # highest value of each grey image of 16 or 32 bits

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Return the sorted names of the classes."""
        return all_classes(self.class_names) if self.multi_label else self.class_names

    def classes_of(self, item: Item) -> list[str]:
        """Return the classes of an image."""
        name = self.class_names[item.label]
        return classes_in(name) if self.multi_label else [name]

    @cached_property
    def checksums(self) -> tuple[str, ...]:
        """Return the sha256 (hex) of each file; the first call reads all files that are new or changed."""
        return tuple(self.known.of([item.path for item in self.items]))

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 (hex) of key, content, class name and split of all images."""
        digest = sha256()
        for item, checksum in zip(self.items, self.checksums, strict=True):
            fields = (item.key, checksum, self.class_names[item.label], item.split)
            digest.update(("\0".join(fields) + "\n").encode(errors="surrogateescape"))
        return digest.hexdigest()

    @cached_property
    def repeated(self) -> dict[str, int]:
        """Return the number of val and of test images that are copies of training images."""
        pairs = list(zip(self.items, self.checksums, strict=True))
        trained = {checksum for item, checksum in pairs if item.split == "train"} - {UNREADABLE}
        counts = Counter(
            item.split for item, checksum in pairs if item.split != "train" and checksum in trained
        )
        return {split: counts[split] for split in SPLITS if counts[split]}

    @cached_property
    def _by_path(self) -> dict[Path, str]:
        return {item.path: checksum for item, checksum in zip(self.items, self.checksums, strict=True)}

    def decode(self, path: Path) -> np.ndarray:
        """Decode a file after comparing its content with its checksum; see `images.decode`.

        Raises:
            BadImage: The file cannot be decoded.
            UserError: The file has changed since its checksum was taken.
        """
        try:
            content = path.read_bytes()
        except OSError:
            return decode(path, self.white_level, self._tops, self.max_pixels)  # raises and says why
        if sha256(content).hexdigest() != self._by_path[path]:
            raise UserError(f"{path} was changed while the images were read: run the same command again")
        return decode(BytesIO(content), self.white_level, self._tops, self.max_pixels)

    def notes(self) -> dict[str, int]:
        """Return the number and the highest value of images that use few of their 16 or 32 bits."""
        faint = [top for top in self._tops if top < WIDE_WHITE // 4] if self.white_level is None else []
        return {"faint": len(faint), "faint_top": max(faint)} if faint else {}


def find(
    root: str | Path,
    table: str | Path | None = None,
    skip_bad: bool = False,
    split_names: Mapping[str, Any] | str | None = None,
    columns: Mapping[str, Any] | None = None,
    memory: Path | None = None,
    white_level: int | None = None,
    max_pixels: int = MAX_PIXELS,
    multi_label: bool = False,
) -> OwnImages:
    """List the images of a folder or of a CSV.

    Args:
        root: Folder with class folders or split folders, or the folder that the CSV's paths are relative to.
        table: A CSV or Parquet file with the columns path, label and, optionally, split: see `read_csv`.
        skip_bad: Skip files of unsupported formats instead of raising.
        split_names: Names of the splits: see `split_folders.class_parents` and `read_csv`.
        columns: Names of the CSV's columns: see `read_csv`.
        memory: File in which checksums are stored.
        white_level: See `images.decode`.
        max_pixels: See `images.open_image`.
        multi_label: Whether an image may have several classes; only tables can say so.

    Returns:
        All images with their classes and splits.

    Raises:
        UserError: There is nothing to train on; the message says why.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(
            f"data.root={root} is not a folder: give the folder that holds one folder of images per class"
        )
    if columns is not None and not table:
        raise UserError(
            "data.csv_columns names columns of a CSV, and no CSV is given: give data.csv=FILE too"
        )
    if multi_label and not table:
        raise UserError(
            "data.kind=multi_label needs a table of labels, because a folder gives an image one class: give "
            "data.csv=FILE"
        )
    left_out: Counter[str] = Counter()
    unread: list[str] = []
    if table:
        found, unread = read_csv(root, Path(table).expanduser(), columns, split_names, multi_label)
    else:
        found = list(_read_folders(root, split_names, left_out))
    images = _supported(root, found, skip_bad, left_out)
    names = sorted({image.name for image in found})
    _check_classes(root, names, images, multi_label)
    images.sort(key=lambda image: image.key)
    splits = [image.split for image in images]
    cut = not any(splits)
    if cut:
        classes = ["(of all images)" if multi_label else image.name for image in images]
        splits = stratified([image.key for image in images], classes)
        if multi_label:
            _train_each_class(images, splits)
    label_of = {name: label for label, name in enumerate(names)}
    items = tuple(
        Item(i.path, i.key, label_of[i.name], split) for i, split in zip(images, splits, strict=True)
    )
    left = {what: left_out[what] for what in sorted(left_out)}
    known, unread_columns = Checksums(memory), tuple(unread)
    return OwnImages(
        tuple(names), items, cut, left, unread_columns, known, white_level, max_pixels, multi_label
    )


def _train_each_class(images: list[Found], splits: list[str]) -> None:
    """Move the first image of each class that has no training image to train."""
    pairs = zip(images, splits, strict=True)
    trained = {*all_classes(image.name for image, split in pairs if split == "train")}
    for i, image in enumerate(images):
        if not trained.issuperset(classes := classes_in(image.name)):
            splits[i] = "train"
            trained.update(classes)


def is_supported(path: Path) -> bool:
    """Return whether a file has the suffix of a supported image format."""
    return path.suffix.lower() in EXTENSIONS


def _read_folders(
    root: Path, split_names: Mapping[str, Any] | str | None, left_out: Counter[str]
) -> Iterator[Found]:
    if not folders_in(root):
        what = "holds files but no class folders" if entries(root)[1] else "is empty"
        raise UserError(
            f"data.root={root} {what}: put the images of each class into a folder named after the class"
        )
    parents = class_parents(root, split_names)
    read = {parent for _, parent in parents}
    if root not in read:
        _count_loose(root, left_out)
        if unnamed := [folder for folder in folders_in(root) if folder not in read]:
            left_out["folders that are not named in data.split_names"] = len(unnamed)
    for split, parent in parents:
        _count_loose(parent, left_out)
        for folder in folders_in(parent):
            name = unicodedata.normalize("NFC", folder.name)
            files = [Found(path, _key(path, root), name, split) for path in files_below(folder, left_out)]
            if not files and split in ("", "train"):
                raise UserError(f"the class folder {folder} is empty: put images into it or remove it")
            yield from files


def _count_loose(folder: Path, left_out: Counter[str]) -> None:
    """Count the images next to the folders in a folder: they are not read."""
    _, files = entries(folder, left_out)
    if loose := sum(is_supported(Path(name)) for name in files):
        left_out["images next to the folders"] += loose


def _key(path: Path, root: Path) -> str:
    return unicodedata.normalize("NFC", path.relative_to(root).as_posix())  # macOS returns decomposed names


def _supported(root: Path, found: list[Found], skip_bad: bool, left_out: Counter[str]) -> list[Found]:
    strange = sorted(file.key for file in found if not is_supported(file.path))
    named = ", ".join(strange[:5]) + (", ..." if len(strange) > 5 else "")
    if strange and not skip_bad:
        raise UserError(
            f"{len(strange)} file(s) in {root} are not supported images ({named}; supported: "
            f"{' '.join(sorted(EXTENSIONS))}): convert or remove them, or set data.skip_bad=true to leave "
            "them out"
        )
    if strange:
        left_out["files of other formats"] = len(strange)
        _log.warning("%d file(s) left out, not supported images: %s", len(strange), named)
    return [file for file in found if is_supported(file.path)]


def _check_classes(root: Path, names: list[str], images: list[Found], multi_label: bool) -> None:
    trained = {image.name for image in images if image.split in ("", "train")}
    if multi_label:
        names, trained = list(all_classes(names)), set(all_classes(trained))
    if len(names) < 2:
        only = f"only one class ({names[0]!r})" if names else "no classes"
        raise UserError(
            f"data.root={root} has {only}: classification needs a folder (or label) for each of two or more"
        )
    if unseen := [name for name in names if has_control(name)]:
        raise UserError(
            f"the class {visible(unseen[0])} in {root} has control characters in its name: rename it"
        )
    if missing := [name for name in names if name not in trained]:
        raise UserError(f"class {missing[0]!r} in {root} has no training image: add some or remove the class")
