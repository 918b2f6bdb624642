"""The user's own images: finds the files, their classes and splits, and decodes one file.

Layouts: `root/<class>/...`; `root/{train,val,test}/<class>/...`; or a CSV of path,label[,split]. Without given splits
every class is cut 80/10/10 (`splits.stratified`) in md5 order of the POSIX paths relative to the root. Given splits are
taken as they are: nothing is cut from train where val or test is missing. Hidden files and folders (a leading dot) are
left out.
"""

import csv
import logging
import os
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from visprompt.data.split_folders import class_parents, folders_in
from visprompt.data.splits import SPLITS, stratified
from visprompt.errors import UserError, unknown

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
MIN_SIDE = 16
"""Images whose short side has fewer pixels are taken for thumbnails or damage, not for data."""

_LITTER = frozenset({"thumbs.db", "desktop.ini"})  # written by Windows into every folder of images

_log = logging.getLogger(__name__)


class BadImage(UserError):
    """A file that cannot be used as an image; the message is the reason, without the file's name."""


class Item(NamedTuple):
    """One image file.

    Attributes:
        path: Where the file is.
        key: The same on every machine: the POSIX path relative to the root (Unicode NFC).
        label: Index into the class names.
        split: "train", "val" or "test".
    """

    path: Path
    key: str
    label: int
    split: str


class _Found(NamedTuple):
    path: Path
    key: str
    name: str  # of the class
    split: str  # "" where none is given


@dataclass(frozen=True)
class ImageFolder:
    """The images of one task, sorted by key.

    Attributes:
        class_names: In the order of the labels.
        items: All images.
    """

    class_names: tuple[str, ...]
    items: tuple[Item, ...]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over key, size in bytes, class name and split of all images.

        No pixel is read: a file that is edited in place and keeps its size in bytes is not noticed.
        """
        digest = sha256()
        for item in self.items:
            size = item.path.stat().st_size if item.path.exists() else -1  # a dead link: named when it is decoded
            fields = (item.key, str(size), self.class_names[item.label], item.split)
            digest.update(("\0".join(fields) + "\n").encode())
        return digest.hexdigest()


def find(
    root: str | Path,
    table: str | Path | None = None,
    skip_bad: bool = False,
    split_names: Mapping[str, Any] | str | None = None,
) -> ImageFolder:
    """List the images of a folder or of a CSV.

    Args:
        root: The folder that holds class folders or split folders, or to which the paths of the CSV are relative.
        table: A CSV with the columns path, label and, if splits are given, split; relative to the working directory or
            to the root. Its paths are relative to the root or to the CSV.
        skip_bad: Leave out files of unsupported formats, with a warning, instead of refusing them.
        split_names: Which folders are the splits, where they have other names: see `split_folders.class_parents`.

    Returns:
        All images with their classes and splits.

    Raises:
        UserError: If there is nothing to train on, saying why.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"data.root={root} is not a folder: give the folder that holds one folder of images per class")
    if table and split_names is not None:
        raise UserError("data.split_names is for split folders: with data.csv the column split says train, val or test")
    found = list(_read_table(root, Path(table).expanduser()) if table else _read_folders(root, split_names))
    images = _supported(root, found, skip_bad)
    names = sorted({image.name for image in found})
    _check_classes(root, names, images)
    images.sort(key=lambda image: image.key)
    splits = [image.split for image in images]
    if not any(splits):
        splits = stratified([image.key for image in images], [image.name for image in images])
    label_of = {name: label for label, name in enumerate(names)}
    items = tuple(Item(i.path, i.key, label_of[i.name], split) for i, split in zip(images, splits, strict=True))
    return ImageFolder(tuple(names), items)


def _files(folder: Path) -> Iterator[Path]:
    """Yields the visible files at any depth; a linked class folder is entered, links below it are not (cycles)."""
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, n) for n in files if not n.startswith(".") and n.lower() not in _LITTER)


def _key(path: Path, root: Path) -> str:
    return unicodedata.normalize("NFC", path.relative_to(root).as_posix())  # macOS hands out decomposed names


def _read_folders(root: Path, split_names: Mapping[str, Any] | str | None) -> Iterator[_Found]:
    if not folders_in(root):
        what = "holds files but no class folders" if any(_files(root)) else "is empty"
        raise UserError(f"data.root={root} {what}: put the images of each class into a folder named after the class")
    for split, parent in class_parents(root, split_names):
        for folder in folders_in(parent):
            files = [_Found(path, _key(path, root), folder.name, split) for path in _files(folder)]
            if not files and split in ("", "train"):
                raise UserError(f"the class folder {folder} is empty: put images into it or remove it")
            yield from files


def _read_table(root: Path, table: Path) -> Iterator[_Found]:
    table = table if table.is_file() else root / table
    if not table.is_file():
        raise UserError(f"data.csv={table} is not a file: give a CSV with the columns path,label or path,label,split")
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte-order mark
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data.csv={table} is not a CSV in UTF-8 ({error}): save it as one") from error
    if not rows:
        raise UserError(f"data.csv={table} lists no images: its first line is path,label[,split], then one per image")
    seen: set[str] = set()
    for number, row in enumerate(rows, start=2):
        found = _read_row(root, table, number, row)
        if found.key in seen:
            raise UserError(f"data.csv={table}, line {number}: {found.key} is listed twice, remove one of the lines")
        seen.add(found.key)
        if bool(found.split) != bool((rows[0].get("split") or "").strip()):
            raise UserError(f"data.csv={table}, line {number}: give a split for all images or for none")
        yield found


def _read_row(root: Path, table: Path, number: int, row: dict[str, str | None]) -> _Found:
    where = f"data.csv={table}, line {number}"
    if "path" not in row or "label" not in row:
        raise UserError(f"data.csv={table} has no columns named path and label: write path,label[,split] as first line")
    given, label, split = ((row.get(column) or "").strip() for column in ("path", "label", "split"))
    if not given or not label:
        raise UserError(f"{where}: the path or the label is empty, fill it in or remove the line")
    if split and split not in SPLITS:
        raise UserError(f"{where}: {unknown('split', split, SPLITS)}")
    path = next((path for path in (root / given, table.parent / given) if path.is_file()), None)
    if path is None:
        raise UserError(f"{where}: there is no file {given}, neither below {root} nor beside the CSV")
    return _Found(path, unicodedata.normalize("NFC", Path(given).as_posix()), label, split)


def _supported(root: Path, found: list[_Found], skip_bad: bool) -> list[_Found]:
    strange = sorted(file.key for file in found if file.path.suffix.lower() not in EXTENSIONS)
    named = ", ".join(strange[:5]) + (", ..." if len(strange) > 5 else "")
    if strange and not skip_bad:
        raise UserError(
            f"{len(strange)} file(s) in {root} are no supported images ({named}; supported: "
            f"{' '.join(sorted(EXTENSIONS))}): convert or remove them, or set data.skip_bad=true to leave them out"
        )
    if strange:
        _log.warning("%d file(s) left out, no supported images: %s", len(strange), named)
    return [file for file in found if file.path.suffix.lower() in EXTENSIONS]


def _check_classes(root: Path, names: list[str], images: list[_Found]) -> None:
    if len(names) < 2:
        only = f"only one class ({names[0]!r})" if names else "no classes"
        raise UserError(
            f"data.root={root} has {only}: classification needs a folder (or label) for each of two or more"
        )
    trained = {image.name for image in images if image.split in ("", "train")}
    if missing := [name for name in names if name not in trained]:
        raise UserError(f"class {missing[0]!r} in {root} has no training image: add some or remove the class")


def decode(path: str | Path) -> np.ndarray:
    """Reads an image file as it is meant to be seen.

    The EXIF orientation is applied; of an animation the first frame is taken; transparent pixels are laid over white;
    grey is repeated; 16-bit grey is scaled (not clipped) to 8 bits; palettes, CMYK and the like become RGB.

    Args:
        path: The file.

    Returns:
        uint8 [h, w, 3].

    Raises:
        BadImage: If the file is damaged, of an unknown format, without a defined range of values, or smaller than
            `MIN_SIDE` pixels; the message is the reason without the path.
    """
    try:
        with Image.open(path) as file:
            image = _to_rgb(ImageOps.exif_transpose(file))
    except BadImage:
        raise
    except Exception as error:  # Pillow's readers let all kinds of errors through when bytes are damaged
        raise BadImage(f"cannot be decoded ({error_reason(error)})") from error
    if min(image.size) < MIN_SIDE:
        raise BadImage(f"is {image.width} x {image.height} pixels, less than {MIN_SIDE} on the short side")
    return np.asarray(image)


def error_reason(error: Exception) -> str:
    """Says in a few words, without a path, why Pillow could not read a file."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"  # Pillow's own text repeats the absolute path
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray(_sixteen_to_eight(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        raise BadImage("has floating-point pixels, whose range is not defined")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _sixteen_to_eight(values: np.ndarray) -> np.ndarray:
    wide = values.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise BadImage("has integer pixels outside 0..65535, whose range is not defined")
    return ((wide * 255 + 32767) // 65535).astype(np.uint8)
