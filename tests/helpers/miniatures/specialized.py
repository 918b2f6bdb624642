"""Writes miniatures of the original files of VTAB's specialized datasets, in the manner of `synthetic.natural`."""

import gzip
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np

from helpers.miniatures.natural import class_labels, encoded, picture, write_zip
from visprompt.data.catalog.class_names import class_names


def patch_camelyon(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes a miniature of PatchCamelyon; each image is 96 x 96, as the real ones."""
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        labels = class_labels(counts[split], 2)
        images = np.stack([picture(int(label), 96, 96, draw) for label in labels])
        _write_hdf5(root / f"camelyonpatch_level_2_split_{name}_x.h5.gz", "x", images)
        _write_hdf5(
            root / f"camelyonpatch_level_2_split_{name}_y.h5.gz",
            "y",
            labels.astype(np.uint8).reshape(-1, 1, 1, 1),
        )
    return {split: counts[split] for split in ("train", "validation", "test")}


def _write_hdf5(path: Path, name: str, values: np.ndarray) -> None:
    import h5py

    file = BytesIO()
    with h5py.File(file, "w") as opened:
        opened.create_dataset(
            name, data=values, chunks=(min(4, len(values)), *values.shape[1:]), compression="gzip"
        )
    path.write_bytes(gzip.compress(file.getvalue(), 1, mtime=0))


def eurosat(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes a miniature of EuroSAT, of 64 x 64 images as the real ones; it has one official split."""
    return _class_folders(root / "EuroSAT.zip", "eurosat", "2750/{0}/{0}_{1}.jpg", 64, counts["train"], draw)


def resisc45(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes a miniature of RESISC45, of images smaller than the real ones; it has one official split."""
    pattern = "NWPU-RESISC45/{0}/{0}_{1:03d}.jpg"
    return _class_folders(root / "NWPU-RESISC45.zip", "resisc45", pattern, 48, counts["train"], draw)


def _class_folders(
    path: Path, task: str, pattern: str, side: int, count: int, draw: np.random.Generator
) -> dict[str, int]:
    names = class_names(task)
    files = [
        (pattern.format(names[label], row // 4 + 1), encoded(picture(label, side, side, draw)))
        for row, label in enumerate(class_labels(count, len(names)).tolist())
    ]
    write_zip(path, [(f"{files[0][0].split('/')[0]}/", b""), *files])
    return {"train": count}


def diabetic_retinopathy(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes a miniature of the retinopathy photographs.

    The higher the level, the stronger the stripes of an eye.
    """
    splits = ("train", "validation", "test")
    levels = {split: class_labels(counts[split], 5).tolist() for split in splits}
    train = [
        (f"{row // 2 + 1}_{'left' if row % 2 == 0 else 'right'}", level)
        for row, level in enumerate(levels["train"])
    ]
    tests = [(level, "Public") for level in levels["validation"]] + [
        (level, "Private") for level in levels["test"]
    ]
    test = [(f"{1000 + row}_left", *tests[row]) for row in draw.permutation(len(tests))]
    _write_table(root / "trainLabels.csv", ["image,level", *(f"{key},{level}" for key, level in train)])
    rows = [f"{key},{level},{usage}" for key, level, usage in test]
    _write_table(root / "retinopathy_solution.csv", ["image,level,Usage", *rows])
    write_zip(root / "train.zip", [(f"train/{key}.jpeg", encoded(_eye(level, draw))) for key, level in train])
    write_zip(root / "test.zip", [(f"test/{key}.jpeg", encoded(_eye(level, draw))) for key, level, _ in test])
    return {split: counts[split] for split in splits}


def _write_table(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _eye(level: int, draw: np.random.Generator) -> np.ndarray:
    """Draws an eyeball, uint8 [72, 96, 3], on black: a disc of radius 32 with stripes four pixels wide."""
    y, x = np.mgrid[:72, :96]
    stripes = np.where((x // 4) % 2, 12 * level, -12 * level)[..., None] + draw.integers(-6, 6, (72, 96, 3))
    inside = (x - 48) ** 2 + (y - 36) ** 2 <= 32**2
    return np.where(inside[..., None], np.array([150, 90, 60]) + stripes, 0).clip(0, 255).astype(np.uint8)
