"""Several classes for each image (multi-label data), written as one text: "beach;sea".

Lists of images, stores and splits know one name for each image. For multi-label data this is the name of its
set of classes, and only the data module takes the sets apart.
"""

from collections.abc import Iterable, Sequence

import numpy as np

SEPARATOR = ";"


def name_of(classes: Iterable[str]) -> str:
    """Return the name of a set of classes: the sorted classes, joined; "" for the empty set."""
    return SEPARATOR.join(sorted({name for name in map(str.strip, classes) if name}))


def classes_in(name: str) -> list[str]:
    """Return the classes of a set with a name."""
    return [part for part in name.split(SEPARATOR) if part]


def all_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Return the sorted classes of all sets."""
    return tuple(sorted({part for name in names for part in classes_in(name)}))


def targets(names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Return for each set which classes it has, int64 [sets, classes] of 0 and 1."""
    position = {name: i for i, name in enumerate(classes)}
    out = np.zeros((len(names), len(classes)), np.int64)
    for row, name in enumerate(names):
        out[row, [position[part] for part in classes_in(name)]] = 1
    return out
