"""Images with masks: pairs of files, and how the numbers in the masks become labels."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from visprompt.data.masks import IGNORED
from visprompt.data.sources.images import BadImage


class Pair(NamedTuple):
    """An image and its mask.

    Attributes:
        key: The same on every machine: the POSIX path of the image, without what all paths have in common.
        split: "train", "val" or "test".
        image: Returns the content of the image's file; raises `OSError`.
        mask: Returns the content of the mask's file; raises `OSError`.
    """

    key: str
    split: str
    image: Callable[[], bytes]
    mask: Callable[[], bytes]


@dataclass(frozen=True)
class MaskedImages:
    """The images of one segmentation task.

    Attributes:
        class_names: In the order of the labels.
        items: All images, sorted by key.
        label_of: Number in a mask -> label, or `IGNORED`; other numbers have no class.
    """

    class_names: tuple[str, ...]
    items: tuple[Pair, ...]
    label_of: Mapping[int, int]

    @cached_property
    def _table(self) -> np.ndarray:
        table = np.full(256, -1, np.int16)  # -1 where a number has no class
        table[list(self.label_of)] = list(self.label_of.values())
        return table

    def labels(self, mask: np.ndarray) -> np.ndarray:
        """Return the labels, uint8 [h, w], that the numbers in a mask, uint8 [h, w], stand for.

        Raises:
            BadImage: A number has no class.
        """
        labels = self._table[mask]
        if (labels < 0).any():
            value = int(mask[labels < 0].min())
            others = ", ".join(str(number) for number, label in self.label_of.items() if label == IGNORED)
            raise BadImage(
                f"has a pixel of value {value}, for which there is no class: the {len(self.class_names)} "
                f"classes have the values {self._values()}" + (f", and {others} is ignored" if others else "")
            )
        return labels.astype(np.uint8)

    def _values(self) -> str:
        numbers = sorted(number for number, label in self.label_of.items() if label != IGNORED)
        return f"{numbers[0]} to {numbers[-1]}"

    def digest(self, checksums: Iterable[tuple[str, str]]) -> str:
        """Return the sha256 (hex) of classes, keys, splits and content: the fingerprint of the data.

        Args:
            checksums: The sha256 (hex) of the image's and the mask's file of each pair.
        """
        digest = sha256()
        rules = [f"{number}={label}" for number, label in sorted(self.label_of.items())]
        digest.update(_line([*self.class_names, *rules]))
        for item, pair in zip(self.items, checksums, strict=True):
            digest.update(_line([item.key, item.split, *pair]))
        return digest.hexdigest()


def _line(fields: Sequence[str]) -> bytes:
    return ("\0".join(fields) + "\n").encode(errors="surrogateescape")
