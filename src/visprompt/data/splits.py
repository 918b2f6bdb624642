"""Deterministic splits: keys are ordered by their md5 values, as in TensorFlow Datasets."""

from collections import defaultdict
from collections.abc import Sequence
from hashlib import md5
from typing import TypeVar

from visprompt.errors import UserError

SPLITS = ("train", "val", "test")

Key = TypeVar("Key", int, str)


def md5_int(text: str) -> int:
    """Return the md5 value of a string as an integer, the source of all "random" choices about data.

    The string may be a file name that is not valid UTF-8.
    """
    return int(md5(text.encode(errors="surrogateescape"), usedforsecurity=False).hexdigest(), 16)


def md5_order(keys: Sequence[Key], salt: str) -> list[Key]:
    """Return keys sorted by `md5(salt + str(key))`.

    TensorFlow Datasets stores a split in this order (the salt is the name of the split), so VTAB's
    `train[:800]` are the first 800 keys: the rows 0..49999 of CIFAR with salt "train" begin with 16399, 1680,
    47917, 17307.

    Args:
        keys: Row numbers or file names.
        salt: Prefix of each key.
    """
    return sorted(keys, key=lambda key: md5_int(f"{salt}{key}"))


def stratified(keys: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Split every class 80/10/10 into train, val and test, in md5 order of the keys with the empty salt.

    Of n images of a class, max(1, n / 10 rounded half up) are val, as many are test, and the rest is train.
    In md5 order train comes first, then val, then test. A key's split depends only on the keys of its class.

    Args:
        keys: One distinct string per image (the POSIX path relative to the data's root).
        classes: The class name of each image.

    Returns:
        "train", "val" or "test" for each image.

    Raises:
        UserError: A class has fewer than three images.
    """
    parts = ["train"] * len(keys)
    for name, rows in sorted(_rows_by_class(keys, classes).items()):
        if len(rows) < 3:
            raise UserError(
                f"class {name!r} has {len(rows)} of the 3 images that a train/val/test split needs: "
                "add images, remove the class, or give the splits yourself as train, val and test folders"
            )
        held = max(1, (len(rows) + 5) // 10)
        order = md5_order(list(rows), "")
        for key in order[-2 * held : -held]:
            parts[rows[key]] = "val"
        for key in order[-held:]:
            parts[rows[key]] = "test"
    return parts


def share(keys: Sequence[str], labels: Sequence[int], fraction: float) -> list[int]:
    """Return the rows of a share of each class; a smaller share is a subset of a larger one.

    Of n images of a class these are the first max(1, n * fraction rounded half up) in md5 order of the keys
    (empty salt).

    Args:
        keys: One distinct string per image.
        labels: The class of each image.
        fraction: Above 0 and at most 1.
    """
    kept = []
    for rows in _rows_by_class(keys, labels).values():
        number = max(1, int(len(rows) * fraction + 0.5))
        kept += [rows[key] for key in md5_order(list(rows), "")[:number]]
    return sorted(kept)


def _rows_by_class(keys: Sequence[str], classes: Sequence[Key]) -> dict[Key, dict[str, int]]:
    rows_of: defaultdict[Key, dict[str, int]] = defaultdict(dict)
    for row, (key, name) in enumerate(zip(keys, classes, strict=True)):
        rows_of[name][key] = row
    return rows_of
