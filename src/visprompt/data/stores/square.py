"""Stores of decoded images of one size, one per dataset (or task), source, size and interpolation.

A store is a folder with `pixels.bin` (uint8 [n, c, h, w]) and `manifest.json`: first and last row of each
split set, key of each image, labels by task (tasks of one dataset share the pixels), and the origin. Split
sets are concatenated, so train800val200 is the first thousand images. A store that exists is complete. Its
manifest has a digest, compared whenever it is opened, and checksums of the pixels (see `mapped`).
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visprompt.data.sources.content import Content, Found
from visprompt.data.sources.images import BadImage
from visprompt.data.stores.manifest import Store, check_size, read_manifest, write_manifest
from visprompt.data.stores.threads import in_threads
from visprompt.errors import UserError
from visprompt.files import DamagedRecord

SCHEMA = 1
_NAMES = frozenset({"schema", "shape", "sets", "labels", "images", "record", "keys"})


class Selection(NamedTuple):
    """The images of one split set.

    Attributes:
        split: Their official split.
        keys: Their keys in it.
        labels: Task -> int64 [n].
    """

    split: str
    keys: Sequence[str]
    labels: Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class SquareStore(Store):
    """An open store of images of one size.

    Attributes:
        shape: Number of images, channels, height and width.
        sets: Split set -> its first row and the row after its last one.
        keys: Official split and key of every image, "train/16399" for example.
        labels: Task -> int64 [n].
        images: sha256 (hex) of the source's images, before they were decoded or resized.
        record: The origin: source, form ("lossless" or "lossy"), dataset and checksums or commit.
    """

    shape: tuple[int, int, int, int]
    sets: Mapping[str, tuple[int, int]]
    keys: tuple[str, ...]
    labels: Mapping[str, np.ndarray]
    images: str
    record: Mapping[str, Any]

    def rows(self, sets: Sequence[str]) -> np.ndarray:
        """Return the rows of some split sets, int64 [n], concatenated."""
        return np.concatenate([np.arange(*self.sets[name]) for name in sets])

    def take(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Copy some images, uint8 [b, c, h, w], out of the memory map.

        Raises:
            UserError: An image has changed since the store was made.
        """
        images, size = self.pixels.bytes.reshape(self.shape), math.prod(self.shape[1:])
        for row in np.asarray(rows, np.int64).tolist():
            self.pixels.compare(row * size, (row + 1) * size)
        taken = images[rows]
        self.pixels.release()
        return taken

    def fingerprint(self, task: str) -> str:
        """Return the sha256 (hex) of a task's images, split sets, keys and labels, at any stored size."""
        content = [self.images, self.sets, self.keys, self.labels[task].tolist()]
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_square(folder: Path) -> SquareStore | None:
    """Read a store; return None where the folder holds no store of this schema.

    Raises:
        DamagedRecord: The store is damaged; the message says why.
    """
    manifest = read_manifest(folder, SCHEMA, _NAMES)
    if manifest is None:
        return None
    try:
        count, channels, height, width = manifest["shape"]
        store = SquareStore(
            folder=folder,
            shape=(count, channels, height, width),
            sets={name: (start, stop) for name, (start, stop) in manifest["sets"].items()},
            keys=tuple(manifest["keys"]),
            labels={task: np.array(labels, np.int64) for task, labels in manifest["labels"].items()},
            images=manifest["images"],
            record=manifest["record"],
            chunks=None if manifest["chunks"] is None else tuple(manifest["chunks"]),
            made_for=manifest["made_for"],
        )
        lengths = {len(store.keys), *map(len, store.labels.values())}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedRecord(
            f"{folder / 'manifest.json'} is damaged: it is not the manifest of a store"
        ) from error
    if lengths != {count}:
        raise DamagedRecord(
            f"{folder / 'manifest.json'} is damaged: it needs one key and one label for each image"
        )
    check_size(folder / "pixels.bin", math.prod(store.shape))
    return store


def write_square(
    folder: Path,
    content: Content,
    selections: Mapping[str, Selection],
    convert: Callable[[np.ndarray], np.ndarray],
    record: Mapping[str, Any],
    watch: Callable[[Iterable[Found]], Iterable[Found]],
    made_for: str,
) -> None:
    """Read the selected images once, in the order of the files, and write each at its row.

    Args:
        folder: An empty folder.
        content: The opened source.
        selections: Split set -> its images.
        convert: Converts uint8 [h, w, c] to uint8 [c, h, w]; raises `BadImage`.
        record: See `SquareStore`.
        watch: Wraps the images in a progress bar.
        made_for: See `write_manifest`.

    Raises:
        UserError: An image is missing or cannot be decoded.
        OSError: The folder cannot be written.
    """
    keys = [(s.split, key) for s in selections.values() for key in s.keys]
    places = {key: row for row, key in enumerate(keys)}
    wanted: dict[str, set[str]] = {}
    for split, key in keys:
        wanted.setdefault(split, set()).add(key)
    digests = np.zeros((len(keys), 32), np.uint8)
    images = _converted(watch(content.read(wanted)), content, convert)
    shape = _write_pixels(folder / "pixels.bin", places, images, digests)
    stops = np.cumsum([len(s.keys) for s in selections.values()]).tolist()
    sets = dict(zip(selections, zip([0, *stops[:-1]], stops, strict=True), strict=True))
    tasks = next(iter(selections.values())).labels
    manifest = {
        "schema": SCHEMA,
        "shape": [len(keys), *shape],
        "sets": sets,
        "labels": {
            task: np.concatenate([s.labels[task] for s in selections.values()]).tolist() for task in tasks
        },
        "images": sha256(digests.data).hexdigest(),
        "record": record,
        "keys": [f"{split}/{key}" for split, key in keys],
    }
    write_manifest(folder, manifest, made_for)


class _Ready(NamedTuple):
    key: tuple[str, str]  # official split and key
    image: np.ndarray
    digest: np.ndarray


def _write_pixels(
    path: Path, places: Mapping[tuple[str, str], int], images: Iterator[_Ready], digests: np.ndarray
) -> tuple[int, ...]:
    """Write images and digests at their rows, in any order, and return the shape of an image."""
    missing = set(places)
    shape: tuple[int, ...] = ()
    with path.open("wb") as file:
        for key, image, digest in images:
            shape = shape or image.shape
            if image.shape != shape:
                raise UserError(
                    f"image {key[1]} ({key[0]}) has the shape {image.shape}, others {shape}: the files are "
                    "not the right ones, get them again"
                )
            file.seek(places[key] * image.size)
            file.write(image.data)
            digests[places[key]] = digest
            missing.discard(key)
    if missing:
        split, lost = min(missing)
        raise UserError(
            f"{len(missing)} of {len(places)} images that the lists name are not in the files, the first is "
            f"{lost} ({split}): the files are incomplete, get them again"
        )
    return shape


def _converted(
    images: Iterable[Found], content: Content, convert: Callable[[np.ndarray], np.ndarray]
) -> Iterator[_Ready]:
    """Yield the resized images, decoded and resized in threads."""

    def work(found: Found) -> _Ready:
        data = found.image if isinstance(found.image, bytes) else np.ascontiguousarray(found.image).data
        digest = np.frombuffer(sha256(data).digest(), np.uint8)
        try:
            image = content.decode(found.image) if isinstance(found.image, bytes) else found.image
            return _Ready((found.split, found.key), np.ascontiguousarray(convert(image)), digest)
        except BadImage as error:
            raise UserError(
                f"image {found.key} ({found.split}) {error}: the file that holds it is damaged, get it again"
            ) from error

    return in_threads(work, images)
