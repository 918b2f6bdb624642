"""Writes miniatures of the original files of VTAB's natural datasets.

Real names, real containers, tiny images.

Each writer takes the folder to fill, about how many images to write of each official split, and a generator,
and returns how many it wrote. The colour of an image tells its class.
"""

import gzip
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from visprompt.data.catalog.class_names import class_names
from visprompt.data.sources.natural import sun397_keys

Files = Iterable[tuple[str, bytes]]
"""Names and contents of an archive's members."""

_CALTECH_TRAIN = 30  # per class, as in the official split


def picture(label: int, height: int, width: int, draw: np.random.Generator) -> np.ndarray:
    """Draws an image, uint8 [height, width, 3], of a colour of its class, with noise."""
    colour = np.random.default_rng(label).integers(40, 216, 3)
    return (colour + draw.integers(-40, 40, (height, width, 3))).astype(np.uint8)


def encoded(image: np.ndarray, kind: str = "JPEG") -> bytes:
    """Returns an image as the bytes of a file."""
    file = BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def jpeg(label: int, draw: np.random.Generator) -> bytes:
    """Draws a small photograph of a class, of a size that varies."""
    height, width = draw.integers(32, 49, 2)
    return encoded(picture(label, int(height), int(width), draw))


def class_labels(count: int, num_classes: int) -> np.ndarray:
    """Returns the labels of a split, int64 [count]: four classes in turn, so that each has a few images."""
    return np.arange(count) % min(4, num_classes)


def tar_bytes(files: Files, *, packed: bool = True) -> bytes:
    """Returns a tar archive, the same for the same files; packed with gzip or plain."""
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    return gzip.compress(file.getvalue(), 1, mtime=0) if packed else file.getvalue()


def write_zip(path: Path, files: Files) -> None:
    """Writes a zip archive, the same for the same files."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files:
            archive.writestr(zipfile.ZipInfo(name), data)


def class_folders(path: Path, names: Sequence[str], count: int, draw: np.random.Generator) -> dict[str, int]:
    """Writes an archive with a folder of small photographs for each class, a few more than one for each."""
    labels = [*range(len(names)), *class_labels(count - len(names), len(names)).tolist()]
    top = path.name.partition(".")[0]
    files = [(f"{top}/{names[label]}/{row}.jpg", jpeg(label, draw)) for row, label in enumerate(labels)]
    files.append((f"{top}/LICENSE.txt", b"terms"))
    if path.suffix == ".zip":
        write_zip(path, files)
    else:
        path.write_bytes(tar_bytes(files, packed=path.suffix != ".tar"))
    return {"train": len(labels)}


def write_mat(path: Path, **arrays: np.ndarray) -> None:
    """Writes a MATLAB file, the same for the same arrays."""
    from scipy.io import savemat

    file = BytesIO()
    savemat(file, arrays, do_compression=True)
    header = b"MATLAB 5.0 MAT-file".ljust(116)  # scipy's own holds the time
    path.write_bytes(header + file.getvalue()[len(header) :])


def cifar(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes a miniature of CIFAR-100 in its binary form; a coarse class holds five classes."""
    files = [("cifar-100-binary/fine_label_names.txt", "\n".join(class_names("cifar")).encode())]
    for split in ("train", "test"):
        labels = class_labels(counts[split], 100)
        planes = (picture(int(label), 32, 32, draw).transpose(2, 0, 1).tobytes() for label in labels)
        rows = (
            bytes([label // 5, label]) + pixels for label, pixels in zip(labels.tolist(), planes, strict=True)
        )
        files.append((f"cifar-100-binary/{split}.bin", b"".join(rows)))
    (root / "cifar-100-binary.tar.gz").write_bytes(tar_bytes(files))
    return {split: counts[split] for split in ("train", "test")}


def caltech101(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes a miniature of Caltech101: 30 train images a class, and what else lies in the real archive."""
    folders = ["BACKGROUND_Google", "accordion", "airplanes", "Faces_easy"][
        : max(2, counts["train"] // _CALTECH_TRAIN)
    ]
    tests = np.bincount(np.arange(counts["test"]) % len(folders), minlength=len(folders))
    index = {name: label for label, name in enumerate(class_names("caltech101"))}
    files = [("101_ObjectCategories/BACKGROUND_Google/tmp", b"no image")]
    for folder, more in zip(folders, tests.tolist(), strict=True):
        files.append((f"101_ObjectCategories/{folder}/._image_0001.jpg", b"left by macOS"))
        for number in draw.permutation(_CALTECH_TRAIN + more) + 1:
            image = jpeg(index[folder.lower()], draw)
            files.append((f"101_ObjectCategories/{folder}/image_{number:04d}.jpg", image))
    outer = [
        ("caltech-101/show_annotation.m", b"% MATLAB"),
        ("caltech-101/101_ObjectCategories.tar.gz", tar_bytes(files)),
        ("__MACOSX/caltech-101/._101_ObjectCategories.tar.gz", b"left by macOS"),
    ]
    write_zip(root / "caltech-101.zip", outer)
    return {"train": _CALTECH_TRAIN * len(folders), "test": int(tests.sum())}


def dtd(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes a miniature of DTD, whose archive is a plain tar by a packed one's name."""
    names = class_names("dtd")
    lists: list[tuple[str, bytes]] = []
    images: list[tuple[str, bytes]] = []
    for split, short in (("train", "train"), ("validation", "val"), ("test", "test")):
        keys = []
        for number, label in enumerate(class_labels(counts[split], len(names)).tolist()):
            name = names[label]
            keys.append(f"{name}/{name}_{len(images) + 1:04d}.jpg")
            images.append((f"dtd/images/{keys[number]}", jpeg(label, draw)))
        lists.append((f"dtd/labels/{short}1.txt", "".join(f"{key}\n" for key in keys).encode()))
    (root / "dtd-r1.0.1.tar.gz").write_bytes(tar_bytes(images + lists, packed=False))
    return {split: counts[split] for split in ("train", "validation", "test")}


def oxford_flowers102(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes a miniature of the 102 Oxford flowers."""
    splits = ("train", "validation", "test")
    total = sum(counts[split] for split in splits)
    numbers = np.split(draw.permutation(total) + 1, np.cumsum([counts[split] for split in splits])[:2])
    labels = np.zeros(total, np.int64)
    for ids in numbers:
        labels[ids - 1] = class_labels(len(ids), 102)
    write_mat(root / "imagelabels.mat", labels=(labels[None] + 1).astype(np.uint8))
    ids_of = zip(("trnid", "valid", "tstid"), numbers, strict=True)
    write_mat(root / "setid.mat", **{name: ids[None].astype(np.uint16) for name, ids in ids_of})
    files = [(f"jpg/image_{row + 1:05d}.jpg", jpeg(int(label), draw)) for row, label in enumerate(labels)]
    (root / "102flowers.tgz").write_bytes(tar_bytes(files))
    return {split: counts[split] for split in splits}


def oxford_iiit_pet(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes a miniature of the Oxford-IIIT pets.

    The species and breed in its lists are not those of the class.
    """
    names = class_names("oxford_iiit_pet")
    lists: list[tuple[str, bytes]] = []
    images: list[tuple[str, bytes]] = []
    for split, short in (("train", "trainval"), ("test", "test")):
        lines = []
        for label in class_labels(counts[split], len(names)).tolist():
            key = f"{names[label]}_{len(images) + 1}"
            lines.append(f"{key} {label + 1} 1 1\n")
            images.append((f"images/{key}.jpg", jpeg(label, draw)))
        lists.append((f"annotations/{short}.txt", "".join(lines).encode()))
    (root / "images.tar.gz").write_bytes(tar_bytes(images))
    (root / "annotations.tar.gz").write_bytes(tar_bytes(lists))
    return {split: counts[split] for split in ("train", "test")}


def svhn(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes a miniature of SVHN, in which the digit 0 has the label 10."""
    for split in ("train", "test"):
        labels = class_labels(counts[split], 10)
        images = np.stack([picture(int(label), 32, 32, draw) for label in labels], axis=3)
        write_mat(
            root / f"{split}_32x32.mat",
            X=images,
            y=np.where(labels == 0, 10, labels).astype(np.uint8)[:, None],
        )
    return {split: counts[split] for split in ("train", "test")}


def sun397(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes a miniature of SUN397: the first images of the lists that VTAB-1k uses.

    The others are not there.

    Every fifth file is a PNG, as some of the real ones are, and has the name of a JPEG all the same.
    """
    index = {name: label for label, name in enumerate(class_names("sun397"))}
    files, written = [], {}
    for split, keys in sun397_keys().items():
        chosen = keys[: counts[split]]
        written[split] = len(chosen)
        for number, key in enumerate(chosen):
            image = picture(index[key.rsplit("/", 1)[0]], 40, 48, draw)
            files.append((f"SUN397{key}", encoded(image, "PNG" if number % 5 == 4 else "JPEG")))
    files.sort()  # as in the real archive: by class, the splits mixed
    (root / "SUN397.tar.gz").write_bytes(tar_bytes(files))
    return written
