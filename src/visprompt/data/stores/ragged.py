"""Stores of decoded images that differ in size: each file is decoded once and then read through a memory map.

A store is a folder with `pixels.bin` (uint8 [h, w, 3] images of one short side, concatenated) and
`manifest.json` (schema version, fingerprint, class names, and key, label, split, height and width of each
image). It is written into a temporary folder and renamed at the end, so that a store that exists is complete.
Its manifest has a digest, compared whenever it is opened, and checksums of the pixels (see `mapped`). The
original files may be deleted.
"""

import errno
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from visprompt.data.sources.images import BadImage, ImageFolder, Item, decode
from visprompt.data.stores.manifest import (
    Store,
    adopt,
    check_place,
    check_size,
    read_manifest,
    whole,
    write_manifest,
)
from visprompt.data.stores.threads import in_threads
from visprompt.data.transforms import resize_short_side
from visprompt.errors import UserError
from visprompt.files import DamagedRecord, alone, explained, publish

SCHEMA = 2
_NAMES = frozenset({"schema", "fingerprint", "class_names", "origin", "images", "bad"})

_log = logging.getLogger(__name__)
_S = TypeVar("_S")


@dataclass(frozen=True, kw_only=True)
class RaggedStore(Store):
    """An open store of images that differ in size.

    Attributes:
        fingerprint: `ImageFolder.fingerprint` of the original files.
        class_names: In the order of the labels.
        origin: Which lists were read, where there are several.
        keys: One per image.
        labels: int64 [n].
        splits: "train", "val" or "test" per image.
        shapes: int64 [n, 2], height and width.
        bad: Key and reason of the files that were left out.
        notes: Counts made while the files were decoded.
    """

    fingerprint: str
    class_names: tuple[str, ...]
    origin: str
    keys: tuple[str, ...]
    labels: np.ndarray
    splits: np.ndarray
    shapes: np.ndarray
    bad: tuple[tuple[str, str], ...]
    notes: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Return the first byte of each image in `pixels.bin`, int64 [n + 1]."""
        return np.concatenate([[0], np.cumsum(self.shapes.prod(axis=1) * 3)]).astype(np.int64)

    @property
    def short_side(self) -> int:
        """Return the short side of all images in pixels; 0 where it differs."""
        sides = np.unique(self.shapes.min(axis=1))
        return int(sides[0]) if len(sides) == 1 else 0

    def image(self, row: int) -> np.ndarray:
        """Return one image, uint8 [h, w, 3], as a read-only view of the file.

        Raises:
            UserError: The image has changed since the store was made.
        """
        start, stop = self.offsets[row : row + 2].tolist()
        pixels = self.pixels.bytes
        self.pixels.compare(start, stop)
        return pixels[start:stop].reshape(*self.shapes[row], 3)

    def release(self) -> None:
        """Release the memory of the images read so far; called once per batch."""
        self.pixels.release()


def open_store(
    images: ImageFolder,
    folder: Path,
    short_side: int,
    *,
    interpolation: str = "bicubic",
    resampling: str = "pillow",
    decode: Callable[[Path], np.ndarray] = decode,
    skip_bad: bool = False,
    advice: str = "repair or remove them, or set data.skip_bad=true to leave them out",
    origin: str = "",
    notes: Callable[[], Mapping[str, int]] = dict,
    made_for: str = "",
) -> RaggedStore:
    """Open the store of some images; write it first where it is missing or damaged.

    Any number of processes may call this at once: one decodes, the others wait for its store.

    Args:
        images: The images.
        folder: The store's folder; its name must differ for each short side and interpolation.
        short_side: Short side of the stored images in pixels.
        interpolation: See `resize_short_side`.
        resampling: See `resize_short_side`.
        decode: Reads one file; raises `BadImage`.
        skip_bad: Skip files that cannot be decoded, with a warning, instead of raising.
        advice: What the error tells the user to do about files that cannot be decoded.
        origin: See `RaggedStore`.
        notes: Returns the notes (see `RaggedStore`) after all files are decoded.
        made_for: See `write_manifest`; by default the folder's name.

    Returns:
        The store.

    Raises:
        UserError: A file cannot be decoded, or the disk is full.
    """

    def load(item: Item) -> np.ndarray:
        return resize_short_side(decode(item.path), short_side, interpolation, resampling)

    made_for = made_for or folder.name

    def write(temporary: Path) -> None:
        content = _write(temporary, images, load, skip_bad, advice)
        write_manifest(temporary, {**content, "origin": origin, "notes": dict(notes())}, made_for)

    def usable() -> RaggedStore | None:
        store: RaggedStore | None = whole(lambda: read_store(folder))
        if store is None or store.fingerprint != images.fingerprint or (store.bad and not skip_bad):
            return None
        check_place(folder, store.made_for, made_for)
        return store if store.short_side == short_side else None

    store = usable()
    if store and store.chunks is None:
        adopt(folder, made_for)
        store = usable()
    if store is None:
        store = written(folder, len(images.items), write, usable)
    if store is None:
        raise UserError(f"the store {folder} vanished while it was opened: start again")
    if store.bad:
        _log.warning("%d of %d images left out: %s", len(store.bad), len(images.items), named(store.bad))
    return store


def written(
    folder: Path,
    count: int,
    write: Callable[[Path], None],
    usable: Callable[[], _S | None],
    doing: str = "decoding",
) -> _S | None:
    """Write a store, unless another process has written it while this one waited, and return it.

    Args:
        folder: The store's folder.
        count: Number of its images, for the log.
        write: Fills the temporary folder that it is given.
        usable: Returns the store, or None where it is missing or not the right one.
        doing: What is done with the images, for the log.

    Raises:
        UserError: The disk is full, or the place cannot be written to.
    """
    try:
        # the ranks that srun or torchrun starts come here together
        with alone(folder.with_name(f".{folder.name}.decoding.lock"), f"{doing} images into {folder}"):
            if (store := usable()) is not None:
                return store
            _log.info("%s %d images once, into %s", doing, count, folder)
            publish(folder, write, lambda: usable() is not None)
            return usable()
    except OSError as error:
        # no locks here: each process decodes, and the first store to be ready is taken
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
            publish(folder, write, lambda: usable() is not None)
            return usable()
        raise explained(error, folder.parent) from error


def read_store(folder: Path) -> RaggedStore | None:
    """Read a store; return None where the folder holds no store of this schema.

    Raises:
        DamagedRecord: The store is damaged; the message says why.
    """
    manifest = read_manifest(folder, SCHEMA, _NAMES, optional=("notes",))
    if manifest is None:
        return None
    try:
        keys, labels, splits, heights, widths = zip(*manifest["images"], strict=True)
        store = RaggedStore(
            folder=folder,
            fingerprint=manifest["fingerprint"],
            class_names=tuple(manifest["class_names"]),
            origin=manifest["origin"],
            keys=keys,
            labels=np.array(labels, np.int64),
            splits=np.array(splits),
            shapes=np.stack([heights, widths], axis=1).astype(np.int64),
            bad=tuple((key, reason) for key, reason in manifest["bad"]),
            chunks=None if manifest["chunks"] is None else tuple(manifest["chunks"]),
            made_for=manifest["made_for"],
            notes={str(what): int(count) for what, count in manifest.get("notes", {}).items()},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedRecord(
            f"{folder / 'manifest.json'} is damaged: it is not the manifest of a store"
        ) from error
    check_size(folder / "pixels.bin", int(store.offsets[-1]))
    return store


def _write(
    folder: Path, source: ImageFolder, load: Callable[[Item], np.ndarray], skip_bad: bool, advice: str
) -> dict[str, Any]:
    """Decode all images into a folder's pixels.bin and return the content of the manifest."""
    images: list[tuple[str, int, str, int, int]] = []
    bad: list[tuple[str, str]] = []
    items = source.items

    def attempt(item: Item) -> np.ndarray | BadImage:
        try:
            return load(item)
        except BadImage as error:
            return error

    with (folder / "pixels.bin").open("wb") as file:
        for item, result in zip(items, in_threads(attempt, items), strict=True):
            if isinstance(result, BadImage):
                bad.append((item.key, str(result)))
            else:
                images.append((item.key, item.label, item.split, result.shape[0], result.shape[1]))
                file.write(np.ascontiguousarray(result).data)
    if bad and (not skip_bad or not images):
        raise UserError(f"{len(bad)} of {len(items)} images cannot be used ({named(bad)}): {advice}")
    known = {"schema": SCHEMA, "fingerprint": source.fingerprint, "class_names": source.class_names}
    return {**known, "images": images, "bad": bad}


def named(bad: Sequence[tuple[str, str]]) -> str:
    """Return the keys and reasons of up to five files that cannot be used, as text."""
    return "; ".join(f"{key} {reason}" for key, reason in bad[:5]) + ("; ..." if len(bad) > 5 else "")
