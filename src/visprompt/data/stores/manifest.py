"""manifest.json of a store: its content, a digest, checksums of its pixels, and the folder it was made for.

Stores of older versions lack the last three. They are read unchecked, and get them once (`adopt`), so that
nothing has to be prepared again.
"""

import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from visprompt.data.stores.mapped import MappedFile, checksums
from visprompt.errors import UserError
from visprompt.files import DamagedRecord, alone, read_record, record_text


@dataclass(frozen=True, kw_only=True)
class Store:
    """What an open store of any kind has.

    Attributes:
        folder: Its folder.
        chunks: Checksums of the pixels; None in a store of an older version, which is read unchecked.
        made_for: See `write_manifest`; None in a store of an older version.
    """

    folder: Path
    chunks: tuple[str, ...] | None
    made_for: str | None

    @cached_property
    def pixels(self) -> MappedFile:
        """Return the file with the pixels, which is mapped when it is first read."""
        return MappedFile(self.folder / "pixels.bin", self.chunks)


_LATER = frozenset({"chunks", "made_for"})  # missing in stores of older versions, as is the digest
_log = logging.getLogger(__name__)
_said: set[str] = set()


def read_manifest(
    folder: Path, schema: int, names: Collection[str], optional: Collection[str] = ()
) -> dict[str, Any] | None:
    """Read a store's manifest and compare it with its digest.

    Args:
        folder: The store's folder.
        schema: The schema to read.
        names: All names in a manifest of an older version.
        optional: Names that may be missing.

    Returns:
        The manifest, with "chunks" and "made_for" (None in a store of an older version); None where the file
        is missing or has another schema.

    Raises:
        DamagedRecord: The manifest is damaged; the message says why.
    """
    path = folder / "manifest.json"
    manifest = read_record(path)
    if manifest is None:
        return None
    stored = set(manifest) - {"digest"} - set(optional)
    if stored != (set(names) | _LATER if "digest" in manifest else set(names)):
        raise DamagedRecord(f"{path} is damaged: it is not the manifest of a store")
    if manifest["schema"] != schema:
        return None
    return dict.fromkeys(_LATER) | manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any], made_for: str) -> None:
    """Write a manifest with its digest and the checksums of the pixels.

    Args:
        folder: The store's folder, with `pixels.bin`.
        manifest: The content of the store.
        made_for: Folder that it is made for, by data, size and filter: "dtd/raw-224-bilinear" for example.

    Raises:
        OSError: The folder cannot be written.
    """
    added = {"chunks": checksums(folder / "pixels.bin"), "made_for": made_for}
    temporary = folder / ".manifest.json.new"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(record_text({**manifest, **added}))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / "manifest.json")


def adopt(folder: Path, made_for: str) -> None:
    """Add checksums to a store of an older version; warn where its folder is read-only.

    Args:
        folder: The store's folder.
        made_for: See `write_manifest`.
    """
    size = (folder / "pixels.bin").stat().st_size
    try:
        with alone(folder.with_name(f".{folder.name}.lock"), f"writing the checksums of {folder}"):
            manifest = read_record(folder / "manifest.json")
            if manifest is not None and "digest" not in manifest:
                _log.info("writing once the checksums of the store %s, %.1f GB", folder, size / 1e9)
                write_manifest(folder, manifest, made_for)
    except OSError as error:
        say_once(
            f"the store {folder} is of an older version without checksums, and none can be written "
            f"({error.strerror}): it is read unchecked"
        )


def check_size(path: Path, expected: int) -> None:
    """Raise `DamagedRecord` where a store's pixels are missing or have the wrong size."""
    size = path.stat().st_size if path.is_file() else 0
    if size != expected:
        raise DamagedRecord(f"{path} is damaged: it has {size:,} bytes, not {expected:,}")


def check_place(folder: Path, made_for: str | None, expected: str) -> None:
    """Check that a store is in the folder that it was made for.

    Args:
        folder: The folder.
        made_for: What the store was made for; None in a store of an older version.
        expected: What the folder is for.

    Raises:
        UserError: They differ.
    """
    if made_for not in (None, expected):
        raise UserError(
            f"{folder} holds the store {made_for}, not {expected}: move it to its own place or delete it"
        )


def whole(read: Callable[[], Any]) -> Any:
    """Return what a function reads from a store; log why and return None where the store is damaged."""
    try:
        return read()
    except DamagedRecord as error:
        say_once(f"{error}: the store is written again from the original files")
        return None


def say_once(sentence: str) -> None:
    """Log a warning once per process."""
    if sentence not in _said:
        _said.add(sentence)
        _log.warning("%s", sentence)
