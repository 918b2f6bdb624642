"""Decoded images on disk: each file is decoded once, ever, and then read through a memory map.

A store is a folder `<fingerprint>-<short side>` with `pixels.bin` (uint8 [h, w, 3] images one after the other) and
`manifest.json` (schema version, fingerprint, and key, label, split, height and width of each image). It is written into
a temporary folder beside and renamed at the end, so that a store that exists is whole.
"""

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np

from visprompt.data.folder import BadImage, Item, decode
from visprompt.data.pixels import resize_short_side
from visprompt.errors import UserError

SCHEMA = 1
_CHUNK = 64  # images decoded ahead of the writer: bounds memory
_ABANDONED = 3600.0  # seconds without a write after which a temporary folder is that of a killed process

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Store:
    """A store that is whole.

    Attributes:
        folder: Where it is.
        short_side: Of all images, in pixels.
        keys: One per image.
        labels: int64 [n].
        splits: "train", "val" or "test" per image.
        shapes: int64 [n, 2], height and width.
        bad: Key and reason of the files that were left out.
    """

    folder: Path
    short_side: int
    keys: tuple[str, ...]
    labels: np.ndarray
    splits: np.ndarray
    shapes: np.ndarray
    bad: tuple[tuple[str, str], ...]

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry all pixels into each data worker.
        return {name: value for name, value in self.__dict__.items() if name != "_pixels"}

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [n + 1], where each image begins in `pixels.bin`, in bytes."""
        return np.concatenate([[0], np.cumsum(self.shapes.prod(axis=1) * 3)]).astype(np.int64)

    @cached_property
    def _pixels(self) -> np.ndarray:
        return np.memmap(self.folder / "pixels.bin", np.uint8, mode="r")

    def image(self, row: int) -> np.ndarray:
        """Returns one image, uint8 [h, w, 3], as a read-only view of the file."""
        return self._pixels[self.offsets[row] : self.offsets[row + 1]].reshape(*self.shapes[row], 3)


def open_store(items: Sequence[Item], fingerprint: str, short_side: int, store_dir: Path, skip_bad: bool) -> Store:
    """Opens the store of some images, after building it if there is none that is whole.

    Any number of processes may do this at once: the first that is ready wins and the others use its store.

    Args:
        items: The images.
        fingerprint: Of the images; decides the store's name together with the short side.
        short_side: Of the stored images, in pixels.
        store_dir: Where stores lie.
        skip_bad: Leave out files that cannot be decoded, with a warning, instead of refusing them.

    Returns:
        The store.

    Raises:
        UserError: If files cannot be decoded, or the disk is full.
    """
    folder = store_dir / f"{fingerprint[:20]}-{short_side}"
    store = _usable(folder, fingerprint, skip_bad)
    if store is None:
        _log.info("decoding %d images once, into %s", len(items), folder)
        _build(folder, items, fingerprint, short_side, skip_bad)
        store = _usable(folder, fingerprint, skip_bad)
    if store is None:
        raise UserError(f"the store {folder} vanished while it was opened: start again")
    if store.bad:
        _log.warning("%d of %d images left out: %s", len(store.bad), len(items), _named(store.bad))
    return store


def _usable(folder: Path, fingerprint: str, skip_bad: bool) -> Store | None:
    """Reads a store; None if there is none, it is damaged, or it lacks images that the caller wants named."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA or manifest["fingerprint"] != fingerprint:
            return None
        keys, labels, splits, heights, widths = zip(*manifest["images"], strict=True)
        store = Store(
            folder=folder,
            short_side=manifest["short_side"],
            keys=keys,
            labels=np.array(labels, np.int64),
            splits=np.array(splits),
            shapes=np.stack([heights, widths], axis=1).astype(np.int64),
            bad=tuple((key, reason) for key, reason in manifest["bad"]),
        )
        whole = (folder / "pixels.bin").stat().st_size == store.offsets[-1]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return store if whole and (skip_bad or not store.bad) else None


def _build(folder: Path, items: Sequence[Item], fingerprint: str, short_side: int, skip_bad: bool) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temporary = folder.with_name(f"{folder.name}.tmp-{uuid4().hex[:12]}")
        temporary.mkdir()
    except OSError as error:
        raise _explained(error, folder.parent) from error
    try:
        _write(temporary, items, fingerprint, short_side, skip_bad)
        _publish(temporary, folder, fingerprint, skip_bad)
    except OSError as error:
        raise _explained(error, folder.parent) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _explained(error: OSError, store_dir: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"the disk of {store_dir} is full: free space there or set data.store_dir to another disk")
    return UserError(f"cannot write to {store_dir} ({error.strerror or error}): set data.store_dir to another folder")


def _write(folder: Path, items: Sequence[Item], fingerprint: str, short_side: int, skip_bad: bool) -> None:
    images: list[tuple[str, int, str, int, int]] = []
    bad: list[tuple[str, str]] = []
    with (folder / "pixels.bin").open("wb") as file:
        for item, result in zip(items, _decoded(items, short_side), strict=True):
            if isinstance(result, BadImage):
                bad.append((item.key, str(result)))
            else:
                images.append((item.key, item.label, item.split, result.shape[0], result.shape[1]))
                _append(file, result)
    if bad and (not skip_bad or not images):
        raise UserError(
            f"{len(bad)} of {len(items)} images cannot be used ({_named(bad)}): "
            "mend or remove them, or set data.skip_bad=true to leave them out"
        )
    manifest = {"schema": SCHEMA, "fingerprint": fingerprint, "short_side": short_side, "images": images, "bad": bad}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _append(file: IO[bytes], image: np.ndarray) -> None:
    file.write(np.ascontiguousarray(image).data)


def _decoded(items: Sequence[Item], short_side: int) -> Iterator[np.ndarray | BadImage]:
    """Decodes in threads (Pillow releases the interpreter while it decodes and resizes), a chunk at a time."""

    def load(item: Item) -> np.ndarray | BadImage:
        try:
            return resize_short_side(decode(item.path), short_side)
        except BadImage as bad:
            return bad

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), _CHUNK):
            yield from pool.map(load, items[start : start + _CHUNK])


def _named(bad: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{key} {reason}" for key, reason in bad[:5]) + ("; ..." if len(bad) > 5 else "")


def _publish(temporary: Path, folder: Path, fingerprint: str, skip_bad: bool) -> None:
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        if _usable(folder, fingerprint, skip_bad) is not None:
            return  # another process was faster: its store is as good
        folder.rename(temporary / "replaced")  # damaged: it goes when the temporary folder is removed
        temporary.rename(folder)
        shutil.rmtree(folder / "replaced", ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Removes what killed processes left behind of this store."""
    for rest in folder.parent.glob(f"{folder.name}.tmp-*"):
        newest = max((path.stat().st_mtime for path in (rest, *rest.glob("*"))), default=0.0)
        if time.time() - newest > _ABANDONED:
            shutil.rmtree(rest, ignore_errors=True)
