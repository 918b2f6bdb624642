"""Writes tiny data on disk in the form that a user's or a dataset's own files have.

For tests and first steps.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_folder(
    root: Path,
    classes: Sequence[str] = ("cat", "dog"),
    per_class: int = 10,
    *,
    splits: Sequence[str] = (),
    size: tuple[int, int] = (40, 32),
    seed: int = 0,
) -> Path:
    """Writes class folders of PNG images whose colour tells the class, so that a model can learn them.

    Args:
        root: Folder to make.
        classes: Names of the classes.
        per_class: Images per class (and per split).
        splits: Split folders around the class folders; none by default.
        size: Width and height in pixels.
        seed: Seed of the noise.

    Returns:
        The root.
    """
    draw = np.random.default_rng(seed)
    colours = np.random.default_rng(0).integers(40, 216, (len(classes), 3))
    for parent in [root / split for split in splits] or [root]:
        for name, colour in zip(classes, colours, strict=True):
            (parent / name).mkdir(parents=True, exist_ok=True)
            for number in range(per_class):
                noise = draw.integers(-40, 40, (size[1], size[0], 3))
                Image.fromarray((colour + noise).astype(np.uint8)).save(parent / name / f"{number:04d}.png")
    return root
