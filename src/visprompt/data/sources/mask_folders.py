"""Own images with masks: find the pairs of files, their classes and splits.

`root/images/` and `root/masks/` hold files of the same relative paths, the masks as PNG. Either both have
folders train, val and test, or the pairs are cut 80/10/10 (`splits.stratified`) in md5 order of the images'
paths. A mask has the number of a class for each pixel (see `masks`).
"""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from visprompt.data.masks import IGNORED, MOST_CLASSES
from visprompt.data.sources.checksums import UNREADABLE, Checksums
from visprompt.data.sources.images import EXTENSIONS
from visprompt.data.sources.masked_images import MaskedImages, Pair
from visprompt.data.sources.split_folders import split_of
from visprompt.data.sources.walk import files_below, folders_in
from visprompt.data.splits import SPLITS, stratified
from visprompt.errors import UserError
from visprompt.text import has_control, visible


@dataclass(frozen=True)
class OwnMasks(MaskedImages):
    """Own images with masks, which are identified by their content, wherever they are.

    Attributes:
        files: Path of the image and of the mask of each pair.
        cut: Whether the pairs were cut 80/10/10, because no splits were given.
        left_out: Number of files that were left out, by kind.
        known: The stored checksums of the files.
    """

    files: tuple[tuple[Path, Path], ...] = ()
    cut: bool = False
    left_out: Mapping[str, int] = field(default_factory=dict)
    known: Checksums = field(default_factory=Checksums)

    @cached_property
    def checksums(self) -> tuple[tuple[str, str], ...]:
        """Return the sha256 (hex) of each pair's files; the first call reads all that are new or changed."""
        images, masks = zip(*self.files, strict=True)
        sums = self.known.of([*images, *masks])
        pairs = zip(sums[: len(images)], sums[len(images) :], strict=True)
        # as the writer of a store does, which reads neither of two files if one cannot be read
        return tuple((UNREADABLE, UNREADABLE) if UNREADABLE in pair else pair for pair in pairs)

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 (hex) of classes, ignored value, keys, content and splits."""
        return self.digest(self.checksums)

    @cached_property
    def repeated(self) -> dict[str, int]:
        """Return the number of val and of test images that are copies of training images."""
        pairs = list(zip(self.items, self.checksums, strict=True))
        trained = {image for item, (image, _) in pairs if item.split == "train"} - {UNREADABLE}
        counts = Counter(
            item.split for item, (image, _) in pairs if item.split != "train" and image in trained
        )
        return {split: counts[split] for split in SPLITS if counts[split]}


def find_masks(
    root: Path,
    classes: str | Sequence[str] | None = None,
    ignore: int | None = IGNORED,
    skip_bad: bool = False,
    memory: Path | None = None,
) -> OwnMasks:
    """List the pairs of images and masks of a folder.

    Args:
        root: The folder with `images/` and `masks/`.
        classes: The names of the classes, or a text file with a name on each line; line i, from 0, names the
            class of value i. None is `root/classes.txt`.
        ignore: The value of pixels that are ignored; None ignores none. If a name is given for it, it is
            left out, and the labels of higher values are one less.
        skip_bad: Leave out files that are not a pair instead of raising.
        memory: File in which checksums are stored.

    Returns:
        All pairs with their splits.

    Raises:
        UserError: The classes cannot be read, a file is not one of a pair, or there are no pairs.
    """
    if not root.is_dir():
        raise UserError(
            f"data.root={root} is not a folder: give the folder that holds images/, masks/ and classes.txt"
        )
    left_out: Counter[str] = Counter()
    images, masks = (_files(root, folder, left_out) for folder in ("images", "masks"))
    names = _names(root, classes)
    label_of = {value: value - (ignore is not None and ignore < value) for value in range(len(names))}
    label_of |= {} if ignore is None else {ignore: IGNORED}
    kept = tuple(name for value, name in enumerate(names) if value != ignore)
    if not 2 <= len(kept) <= MOST_CLASSES:
        raise UserError(
            f"data.root={root} has {len(kept)} classes that are not ignored: segmentation needs 2 to "
            f"{MOST_CLASSES}"
        )
    images = _supported(root, images, skip_bad, left_out)
    found = _paired(root, images, masks, skip_bad, left_out)
    split_of = _splits(root, [path.relative_to(root / "images").parts for path, _ in found])
    cut = split_of is None
    keys = [_key(path, root / "images") for path, _ in found]
    splits = stratified(keys, ["(of all images)"] * len(keys)) if split_of is None else split_of
    items = tuple(
        Pair(key, split, partial(_content, image), partial(_content, mask))
        for key, split, (image, mask) in zip(keys, splits, found, strict=True)
    )
    counts = {what: left_out[what] for what in sorted(left_out)}
    return OwnMasks(kept, items, label_of, tuple(found), cut, counts, Checksums(memory))


def _content(path: Path) -> bytes:
    return path.read_bytes()


def _names(root: Path, classes: str | Sequence[str] | None) -> list[str]:
    """Return the names of the classes, after checking them."""
    where = "data.classes"
    if classes is None or isinstance(classes, str):
        path = Path(classes).expanduser() if classes else root / "classes.txt"
        where = str(path)
        try:
            lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = "is not a text file" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise UserError(
                f"the classes cannot be read from {path} ({why}): write the name of each class on a line, "
                "in the order of their values from 0, or give data.classes=[NAME,...]"
            ) from error
        classes = [line.strip() for line in lines]
    for number, name in enumerate(classes):
        if not name or has_control(name):
            raise UserError(f"{where} gives value {number} the name {visible(name)!r}: write a plain name")
        if name in classes[:number]:
            raise UserError(f"{where} has the name {name!r} twice: names of classes must differ")
    return list(classes)


def _files(root: Path, name: str, left_out: Counter[str]) -> list[Path]:
    folder = root / name
    if not folder.is_dir():
        raise UserError(
            f"data.root={root} has no folder {name}: put the images into images/ and their masks "
            "into masks/, with the same names"
        )
    files = sorted(files_below(folder, left_out))
    if not files:
        raise UserError(f"{folder} is empty: put the {name} there")
    return files


def _supported(root: Path, files: list[Path], skip_bad: bool, left_out: Counter[str]) -> list[Path]:
    strange = [path for path in files if path.suffix.lower() not in EXTENSIONS]
    if strange and not skip_bad:
        raise UserError(
            f"{_first(strange, root)} is not a supported image (supported: {' '.join(sorted(EXTENSIONS))}): "
            "convert or remove it, or set data.skip_bad=true to leave such files out"
        )
    left_out.update({"files of other formats": len(strange)} if strange else {})
    return [path for path in files if path.suffix.lower() in EXTENSIONS]


def _paired(
    root: Path, images: list[Path], masks: list[Path], skip_bad: bool, left_out: Counter[str]
) -> list[tuple[Path, Path]]:
    """Return each image with its mask, sorted by the image's path."""
    mask_of = {path.relative_to(root / "masks").with_suffix(""): path for path in masks if _is_png(path)}
    strange = [path for path in masks if not _is_png(path)]
    image_of: dict[Path, Path] = {}
    for path in images:
        stem = path.relative_to(root / "images").with_suffix("")
        if stem in image_of:
            raise UserError(
                f"{_first([image_of[stem]], root)} and {path.name} would have the same mask: rename one"
            )
        image_of[stem] = path
    unmasked = [path for stem, path in image_of.items() if stem not in mask_of]
    alone = [path for stem, path in mask_of.items() if stem not in image_of]
    wrong = (
        (strange, "is not a PNG", "save masks as PNG, which loses nothing"),
        (unmasked, "has no mask", "add a PNG of the same path in masks/"),
        (alone, "has no image", "add the image of the same path in images/, or remove it"),
    )
    for paths, what, how in wrong:
        if paths and not skip_bad:
            raise UserError(
                f"{_first(paths, root)} {what}: {how}, or set data.skip_bad=true to leave such files out"
            )
    kinds = ("masks of other formats", "images without a mask", "masks without an image")
    left_out.update({kind: len(paths) for kind, (paths, *_) in zip(kinds, wrong, strict=True) if paths})
    pairs = [(path, mask_of[stem]) for stem, path in image_of.items() if stem in mask_of]
    if not pairs:
        raise UserError(
            f"no image in {root / 'images'} has a mask in {root / 'masks'}: give both equal names"
        )
    return sorted(pairs, key=lambda pair: _key(pair[0], root / "images"))


def _splits(root: Path, paths: Sequence[tuple[str, ...]]) -> list[str] | None:
    """Return the split of each image, or None if `images/` has no folders of splits.

    Args:
        root: The root, for the message.
        paths: The parts of each image's path relative to `images/`.

    Raises:
        UserError: Some images are in no folder of a split, or folders have names like "Testing".
    """
    folders = [folder.name for folder in folders_in(root / "images")]
    if not {*folders} & {*SPLITS}:
        if like_splits := [visible(name) for name in folders if split_of(name)]:
            raise UserError(
                f"images/ in {root} has folders that are named like splits ({', '.join(like_splits)}): "
                "rename them to train, val and test, there and in masks/"
            )
        return None
    for parts in paths:
        if parts[0] not in SPLITS or len(parts) == 1:
            raise UserError(
                f"images/{'/'.join(parts)} in {root} is not in images/train, images/val or images/test: move "
                "it into one of them, or give no folders of splits and have the images cut"
            )
    return [parts[0] for parts in paths]


def _is_png(path: Path) -> bool:
    return path.suffix.lower() == ".png"


def _first(paths: Sequence[Path], root: Path) -> str:
    """Return the first file as text, with the number of others."""
    others = f" (one of {len(paths)})" if len(paths) > 1 else ""
    return f"{visible(paths[0].relative_to(root).as_posix())} in {root}{others}"


def _key(path: Path, folder: Path) -> str:
    return unicodedata.normalize("NFC", path.relative_to(folder).as_posix())  # macOS returns decomposed names
