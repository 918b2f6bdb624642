"""Stores of images with masks, as encoded files: decoded, those of ADE20K would take 35 GB instead of one.

A store is a folder with `pixels.bin` and `manifest.json`. `pixels.bin` has for each image the content of its
original file, then its labels as a grey PNG of 8 bits (see `masks`). The manifest has the schema version,
fingerprint and class names, for each image its key, split, height, width and numbers of bytes, and for each
split how many pixels each class has. A store is written once, after every file was decoded and checked, and
a store that exists is complete. The original files may be deleted.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visprompt.data.masks import decode_mask, encode_mask
from visprompt.data.sources.checksums import UNREADABLE
from visprompt.data.sources.images import MAX_PIXELS, BadImage, decode
from visprompt.data.sources.masked_images import MaskedImages, Pair
from visprompt.data.splits import SPLITS
from visprompt.data.stores.manifest import (
    Store,
    check_place,
    check_size,
    read_manifest,
    whole,
    write_manifest,
)
from visprompt.data.stores.ragged import named, written
from visprompt.data.stores.threads import in_threads
from visprompt.errors import UserError
from visprompt.files import DamagedRecord

SCHEMA = 1
_NAMES = frozenset({"schema", "fingerprint", "class_names", "origin", "images", "bad", "pixels"})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MaskStore(Store):
    """An open store of images with masks.

    Attributes:
        fingerprint: `MaskedImages.digest` of the original files.
        class_names: In the order of the labels.
        origin: Where the files come from.
        keys: One per image.
        splits: "train", "val" or "test" per image.
        shapes: int64 [n, 2], height and width.
        lengths: int64 [n, 2], bytes of the image and of its labels.
        bad: Key and reason of the pairs that were left out.
        pixels_of: Split -> int64 [C], the number of pixels of each class.
    """

    fingerprint: str
    class_names: tuple[str, ...]
    origin: str
    keys: tuple[str, ...]
    splits: np.ndarray
    shapes: np.ndarray
    lengths: np.ndarray
    bad: tuple[tuple[str, str], ...]
    pixels_of: Mapping[str, np.ndarray]

    @cached_property
    def offsets(self) -> np.ndarray:
        """Return the first byte of each image and of each mask in `pixels.bin`, int64 [2n + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths.reshape(-1))]).astype(np.int64)

    def image(self, row: int) -> np.ndarray:
        """Return one decoded image, uint8 [h, w, 3].

        Raises:
            UserError: The image has changed since the store was made.
        """
        # its size was checked when the store was written
        return decode(BytesIO(self._content(2 * row)), max_pixels=int(self.shapes[row].prod()))

    def mask(self, row: int) -> np.ndarray:
        """Return the labels of one image, uint8 [h, w].

        Raises:
            UserError: They have changed since the store was made.
        """
        return decode_mask(self._content(2 * row + 1), max_pixels=int(self.shapes[row].prod()))

    def _content(self, part: int) -> bytes:
        start, stop = self.offsets[part : part + 2].tolist()
        pixels = self.pixels.bytes
        self.pixels.compare(start, stop)
        return pixels[start:stop].tobytes()

    def release(self) -> None:
        """Release the memory of what was read so far; called once per batch."""
        self.pixels.release()


def open_masks(
    images: MaskedImages,
    folder: Path,
    *,
    fingerprint: str | None = None,
    skip_bad: bool = False,
    max_pixels: int = MAX_PIXELS,
    advice: str = "repair or remove them, or set data.skip_bad=true to leave them out",
    origin: str = "",
    made_for: str = "",
) -> MaskStore:
    """Open the store of some images with masks; write it first where it is missing or damaged.

    Any number of processes may call this at once: one writes, the others wait for its store.

    Args:
        images: The images and masks.
        folder: The store's folder.
        fingerprint: That of the images, if it is known before they are read.
        skip_bad: Skip pairs that cannot be used, with a warning, instead of raising.
        max_pixels: See `images.open_image`.
        advice: What the error tells the user to do about pairs that cannot be used.
        origin: See `MaskStore`.
        made_for: See `write_manifest`; by default the folder's name.

    Returns:
        The store.

    Raises:
        UserError: A pair cannot be used, no training pixel has a class, or the disk is full.
    """
    made_for = made_for or folder.name

    def write(temporary: Path) -> None:
        content = _write(temporary, images, fingerprint, skip_bad, max_pixels, advice)
        write_manifest(temporary, {**content, "origin": origin}, made_for)

    def usable() -> MaskStore | None:
        store: MaskStore | None = whole(lambda: read_masks(folder))
        if store is None or fingerprint not in (None, store.fingerprint) or (store.bad and not skip_bad):
            return None
        check_place(folder, store.made_for, made_for)
        return store

    store = usable() or written(folder, len(images.items), write, usable, "copying")
    if store is None:
        raise UserError(f"the store {folder} vanished while it was opened: start again")
    if store.bad:
        _log.warning("%d of %d images left out: %s", len(store.bad), len(images.items), named(store.bad))
    return store


def read_masks(folder: Path) -> MaskStore | None:
    """Read a store; return None where the folder holds no store of this schema.

    Raises:
        DamagedRecord: The store is damaged; the message says why.
    """
    manifest = read_manifest(folder, SCHEMA, _NAMES)
    if manifest is None:
        return None
    try:
        keys, splits, *numbers = zip(*manifest["images"], strict=True)
        sizes = np.array(numbers, np.int64).reshape(4, len(keys)).T
        store = MaskStore(
            folder=folder,
            fingerprint=manifest["fingerprint"],
            class_names=tuple(manifest["class_names"]),
            origin=manifest["origin"],
            keys=keys,
            splits=np.array(splits),
            shapes=sizes[:, :2],
            lengths=sizes[:, 2:],
            bad=tuple((key, reason) for key, reason in manifest["bad"]),
            pixels_of={name: np.array(counts, np.int64) for name, counts in manifest["pixels"].items()},
            chunks=None if manifest["chunks"] is None else tuple(manifest["chunks"]),
            made_for=manifest["made_for"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedRecord(
            f"{folder / 'manifest.json'} is damaged: it is not the manifest of a store"
        ) from error
    check_size(folder / "pixels.bin", int(store.offsets[-1]))
    return store


class _Ready(NamedTuple):
    image: bytes  # of the original file
    labels: bytes  # as PNG
    shape: tuple[int, int]
    counts: np.ndarray  # pixels of each class


def _write(
    folder: Path,
    images: MaskedImages,
    fingerprint: str | None,
    skip_bad: bool,
    max_pixels: int,
    advice: str,
) -> dict[str, Any]:
    """Check all pairs, write them into a folder's pixels.bin and return the content of the manifest."""
    listed: list[tuple[str, str, int, int, int, int]] = []
    bad: list[tuple[str, str]] = []
    checksums: list[tuple[str, str]] = []
    counts = {split: np.zeros(len(images.class_names), np.int64) for split in SPLITS}

    def attempt(item: Pair) -> tuple[tuple[str, str], _Ready | BadImage]:
        return _attempt(images, item, max_pixels)

    with (folder / "pixels.bin").open("wb") as file:
        for item, (sums, result) in zip(images.items, in_threads(attempt, images.items), strict=True):
            checksums.append(sums)
            if isinstance(result, BadImage):
                bad.append((item.key, str(result)))
                continue
            listed.append((item.key, item.split, *result.shape, len(result.image), len(result.labels)))
            counts[item.split] += result.counts
            file.write(result.image + result.labels)
    if bad and (not skip_bad or not listed):
        raise UserError(f"{len(bad)} of {len(images.items)} images cannot be used ({named(bad)}): {advice}")
    found = images.digest(checksums)
    if fingerprint not in (None, found):
        raise UserError(
            f"the files of {folder.name} were changed while they were read: run the command again"
        )
    if any(item.split == "train" for item in images.items) and not counts["train"].any():
        raise UserError(
            "no pixel of a training mask has a class, all are ignored: check data.ignore and the masks"
        )
    known = {"schema": SCHEMA, "fingerprint": found, "class_names": images.class_names}
    pixels = {split: count.tolist() for split, count in counts.items()}
    return {**known, "images": listed, "bad": bad, "pixels": pixels}


def _attempt(images: MaskedImages, item: Pair, max_pixels: int) -> tuple[tuple[str, str], _Ready | BadImage]:
    """Return the checksums of a pair's files, and what is stored of it, or why it cannot be used."""
    try:
        contents = _read(item.image), _read(item.mask)
    except BadImage as error:
        return (UNREADABLE, UNREADABLE), error
    sums = sha256(contents[0]).hexdigest(), sha256(contents[1]).hexdigest()
    try:
        height, width = decode(BytesIO(contents[0]), max_pixels=max_pixels).shape[:2]
        mask = _of_mask(lambda: decode_mask(contents[1], max_pixels))
        if mask.shape != (height, width):
            raise BadImage(f"has {width} x {height} pixels and its mask {mask.shape[1]} x {mask.shape[0]}")
        labels = _of_mask(lambda: images.labels(mask))
    except BadImage as error:
        return sums, error
    counts = np.bincount(labels.reshape(-1), minlength=256)[: len(images.class_names)]
    return sums, _Ready(contents[0], encode_mask(labels), (height, width), counts)


def _read(read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror or error})") from error


def _of_mask(work: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the result, and say of an error that it is about the mask."""
    try:
        return work()
    except BadImage as error:
        raise BadImage(f"has a mask that {error}") from error
