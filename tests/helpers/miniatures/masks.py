"""Writes miniatures of data for segmentation: images of which each pixel's colour tells its class."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from helpers.miniatures.natural import write_zip
from visprompt.data.catalog.class_names import class_names

COLOURS = ((230, 30, 30), (30, 230, 30), (30, 30, 230), (230, 230, 30), (30, 230, 230), (230, 30, 230))


def scene(values: np.ndarray) -> np.ndarray:
    """Returns an image, uint8 [h, w, 3], in which a pixel of class i has the i-th of `COLOURS`."""
    return np.array(COLOURS, np.uint8)[values % len(COLOURS)]


def quarters(classes: Sequence[int], height: int = 48, width: int = 64) -> np.ndarray:
    """Returns classes, int64 [height, width], one for each quarter of the image."""
    values = np.zeros((height, width), np.int64)
    down, right = height // 2, width // 2
    places = ((0, 0), (0, right), (down, 0), (down, right))
    for value, (top, left) in zip(classes, places, strict=True):
        values[top : top + down, left : left + right] = value
    return values


def png(values: np.ndarray, mode: str = "P") -> bytes:
    """Returns values of pixels as an indexed (P), grey (L) or bilevel (1) PNG."""
    image = Image.fromarray(values.astype(np.uint8))
    if mode == "P":
        image.putpalette([number % 251 for number in range(768)])
    return _file(image if mode != "1" else Image.fromarray(values.astype(bool)), "png")


def ade20k(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes a miniature of ADEChallengeData2016.zip.

    The annotations are indexed (training) or grey (validation), of classes 1 to 5, and a stripe of 0.
    """
    rows = [f"{i + 1}\t0.1\t10\t1\t{name}, other name" for i, name in enumerate(class_names("ade20k"))]
    files = [("objectInfo150.txt", "\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows, ""]).encode())]
    for split, count in counts.items():
        for number in range(1, count + 1):
            stem = f"ADE_{'train' if split == 'training' else 'val'}_{number:08d}"
            height, width = (int(side) for side in draw.integers(40, 80, 2) // 2 * 2)
            values = quarters(draw.integers(1, 6, 4).tolist(), height, width)
            image = _file(Image.fromarray(scene(values)), "JPEG", quality=95)
            values[:4] = 0
            files.append((f"images/{split}/{stem}.jpg", image))
            mode = "P" if split == "training" else "L"
            files.append((f"annotations/{split}/{stem}.png", png(values, mode)))
    write_zip(root / "ADEChallengeData2016.zip", [(f"ADEChallengeData2016/{name}", d) for name, d in files])
    return dict(counts)


def write_masks(
    root: Path,
    count: int = 12,
    *,
    splits: Sequence[str] = (),
    classes: Sequence[str] = ("ground", "tree", "sky"),
    size: tuple[int, int] = (48, 64),
) -> Path:
    """Writes a folder of own images and masks with a list of classes, and a stripe that is ignored.

    Args:
        root: Folder to make.
        count: Images (in each split).
        splits: Folders of splits in images/ and masks/; none by default.
        classes: Names of the classes.
        size: Height and width of all images.

    Returns:
        The root.
    """
    draw = np.random.default_rng(0)
    for split in splits or [""]:
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            values = quarters(draw.integers(0, len(classes), 4).tolist(), *size)
            values[0, :4] = range(4) if len(classes) > 3 else [0, 1, number % 2, 0]
            Image.fromarray(scene(values)).save(root / "images" / split / f"{number:03d}.png")
            values[:, -4:] = 255
            (root / "masks" / split / f"{number:03d}.png").write_bytes(png(values))
    (root / "classes.txt").write_text("\n".join([*classes, ""]), encoding="utf-8")
    return root


def _file(image: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
