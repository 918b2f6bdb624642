"""Reader of a dataset that is one archive with a folder of images for each class.

It needs no reader for itself.
"""

from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np

from visprompt.data.catalog.task import TaskSpec
from visprompt.data.sources.archive import members, pick
from visprompt.data.sources.content import Content, Part
from visprompt.errors import UserError

_IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})


def class_folders(root: Path, spec: TaskSpec) -> Content:
    """Open an archive (tar, zip) whose images lie in folders that are named like the record's classes.

    Args:
        root: The folder with the archive.
        spec: The record: `files[0]` is the archive, and `class_names` are the names of the folders.

    Returns:
        One official split, "train". Keys are class and file name, `daisy/100080576_f52e8ee070_n.jpg`, in
        sorted order. Files that are not images, and images that lie in no folder of a class, are left out.

    Raises:
        UserError: The archive is missing or damaged, holds no image of a class, or holds two of the same key.
    """
    path, index = root / spec.files[0].name, {name: label for label, name in enumerate(spec.class_names)}

    def key_of(name: str) -> str | None:
        file = PurePosixPath(name)
        is_image = file.suffix.lower() in _IMAGES and not file.name.startswith(".")  # macOS writes ._name.jpg
        return f"{file.parent.name}/{file.name}" if is_image and file.parent.name in index else None

    keys = sorted(key for member in members(path) if (key := key_of(member.name)))
    if missing := index.keys() - {key.partition("/")[0] for key in keys}:
        raise UserError(
            f"{path} has no images in a folder {min(missing)}/: it is not the official file, get it again"
        )
    if len(set(keys)) < len(keys):
        double = next(key for key, after in pairwise(keys) if key == after)
        raise UserError(f"{path} has two images {double}: it is not the official file, get it again")
    labels = np.array([index[key.partition("/")[0]] for key in keys], np.int64)
    return Content(
        {"train": Part(keys, {spec.id: labels})}, lambda wanted: pick(members(path), key_of, wanted)
    )
