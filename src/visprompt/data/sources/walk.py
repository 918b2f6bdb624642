"""Walk through folders of images; training and prediction leave out the same files."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from visprompt.errors import UserError

_SYSTEM = frozenset({"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found"})
"""Files and folders that Windows, macOS and network disks add, in lower case"""


def entries(folder: Path, left_out: Counter[str] | None = None) -> tuple[list[os.DirEntry[str]], list[str]]:
    """Return the folders and the names of the files directly in a folder, both sorted by name.

    Args:
        folder: The folder.
        left_out: A counter of hidden and system files and folders by kind, which is updated.

    Raises:
        UserError: The folder cannot be read.
    """
    folders, files = [], []
    try:
        with os.scandir(folder) as found:  # has the type of each of a million files without a system call
            for entry in found:
                if reason := _reason(entry):
                    if left_out is not None:
                        left_out[reason] += 1
                elif entry.is_dir():
                    folders.append(entry)
                else:
                    files.append(entry.name)
    except OSError as error:
        raise UserError(
            f"the folder {folder} cannot be read ({error.strerror}): change its permissions"
        ) from error
    return sorted(folders, key=lambda entry: entry.name), sorted(files)


def _reason(entry: os.DirEntry[str]) -> str:
    """Return the kind of an entry that is left out, in the plural; "" for others."""
    if entry.name.startswith("."):
        return "hidden folders" if entry.is_dir() else "hidden files"
    return "system files" if entry.name.lower() in _SYSTEM else ""


def folders_in(folder: Path) -> list[Path]:
    """Return the visible folders directly in a folder, sorted by name."""
    return [folder / entry.name for entry in entries(folder)[0]]


def files_below(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    """Yield the visible files at any depth; linked folders are followed, and each folder is entered once.

    Args:
        folder: The folder.
        left_out: A counter of what is left out by kind, which is updated.
    """
    seen: set[tuple[int, int]] = set()
    links: list[Path] = []
    yield from _walk(folder, seen, links, left_out)
    while links:  # after the real folders, so that a link to one of them is left out
        link = links.pop(0)
        if _place(link) in seen:
            left_out["links to folders that were read already"] += 1
        else:
            yield from _walk(link, seen, links, left_out)


def _walk(
    folder: Path, seen: set[tuple[int, int]], links: list[Path], left_out: Counter[str]
) -> Iterator[Path]:
    pending = [folder]
    while pending:
        here = pending.pop()
        seen.add(_place(here))
        folders, files = entries(here, left_out)
        links += [here / entry.name for entry in folders if entry.is_symlink()]
        pending += [here / entry.name for entry in reversed(folders) if not entry.is_symlink()]
        yield from (here / name for name in files)


def _place(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
