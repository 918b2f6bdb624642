"""Splits that need no seed: the order of keys is that of their md5 values, as in TensorFlow Datasets."""

from collections import defaultdict
from collections.abc import Sequence
from hashlib import md5
from typing import TypeVar

from visprompt.errors import UserError

SPLITS = ("train", "val", "test")

Key = TypeVar("Key", int, str)


def md5_int(text: str) -> int:
    """Return the md5 value of a text as one big integer, the source of every "random" choice about data.

    The text is a file's name, for example: UTF-8, or what other bytes the name has.
    """
    return int(md5(text.encode(errors="surrogateescape"), usedforsecurity=False).hexdigest(), 16)


def md5_order(keys: Sequence[Key], salt: str) -> list[Key]:
    """Sort keys by `md5(salt + str(key))`.

    TensorFlow Datasets stores a split in this order (the salt is the name of the split), so VTAB's `train[:800]` are
    its first 800 keys: the rows 0..49999 of CIFAR with salt "train" begin 16399, 1680, 47917, 17307.

    Args:
        keys: Row numbers or file names.
        salt: Text put before each key.

    Returns:
        The keys in md5 order.
    """
    return sorted(keys, key=lambda key: md5_int(f"{salt}{key}"))


def stratified(keys: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Cut every class 80/10/10 into train, val and test, in md5 order of the keys with the empty salt.

    Of n images of a class, max(1, n / 10 rounded half up) are val, as many are test, and the rest is train. In md5
    order train comes first, then val, then test. No seed: a key's place depends on the keys of its class alone.

    Args:
        keys: One distinct text per image (the POSIX path relative to the data's root).
        classes: The class name of each image.

    Returns:
        "train", "val" or "test" for each image.

    Raises:
        UserError: If a class has fewer than three images.
    """
    rows_of: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for row, (key, name) in enumerate(zip(keys, classes, strict=True)):
        rows_of[name][key] = row
    parts = ["train"] * len(keys)
    for name, rows in sorted(rows_of.items()):
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
    """Keep a share of each class, for studies of the amount of training data; smaller shares lie within larger ones.

    Of n images of a class the first max(1, n * fraction rounded half up) in md5 order of the keys (empty salt) stay.

    Args:
        keys: One distinct text per image.
        labels: The class of each image.
        fraction: Above 0 and at most 1.

    Returns:
        The rows that stay, in their order.
    """
    rows_of: defaultdict[int, dict[str, int]] = defaultdict(dict)
    for row, (key, label) in enumerate(zip(keys, labels, strict=True)):
        rows_of[label][key] = row
    kept = []
    for rows in rows_of.values():
        number = max(1, int(len(rows) * fraction + 0.5))
        kept += [rows[key] for key in md5_order(list(rows), "")[:number]]
    return sorted(kept)
