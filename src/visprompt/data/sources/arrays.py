"""Arrays in MATLAB and HDF5 files."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from visprompt.data.sources.archive import damaged, readable
from visprompt.errors import UserError

if TYPE_CHECKING:
    import h5py


def mat(path: Path, *names: str) -> list[np.ndarray]:
    """Read arrays of a MATLAB file (version 5, which cannot hold Python objects).

    Args:
        path: The .mat file.
        names: The variables.

    Returns:
        Their arrays, in the order of the names.

    Raises:
        UserError: The file is missing or damaged, or lacks a variable.
    """
    from scipy.io import loadmat

    with readable(path), path.open("rb") as file:
        try:
            arrays = loadmat(file, variable_names=names)
        except Exception as error:  # scipy raises errors of many kinds where bytes are damaged
            raise damaged(path, error) from error
    if missing := [name for name in names if name not in arrays]:
        raise damaged(path, f"it holds no variable {missing[0]}")
    return [arrays[name] for name in names]


@contextmanager
def hdf5(path: Path, file: IO[bytes] | None = None) -> Iterator["h5py.File"]:
    """Open an HDF5 file.

    Args:
        path: The file, or the archive that holds it.
        file: The decompressed content, where `path` is an archive.

    Raises:
        UserError: The file is missing or damaged.
    """
    import h5py

    with readable(path):
        try:
            with h5py.File(file or path, "r") as opened:
                yield opened
        except (UserError, FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # h5py raises errors of many kinds where bytes are damaged
            raise damaged(path, error) from error


def dataset(path: Path, file: "h5py.File", name: str) -> "h5py.Dataset":
    """Return a dataset of an HDF5 file.

    Raises:
        UserError: The file has no such dataset.
    """
    if name not in file:
        raise UserError(f"{path} holds no dataset {name!r}: it is not the official file, get it again")
    return file[name]


def rows_of(images: "h5py.Dataset", wanted: Collection[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the wanted rows in ascending order; each chunk of the file is decompressed once."""
    step = images.chunks[0] if images.chunks else 1
    for start in range(0, len(images), step):
        if rows := [row for row in range(start, min(start + step, len(images))) if row in wanted]:
            block = images[start : start + step]
            for row in rows:
                yield row, block[row - start]
