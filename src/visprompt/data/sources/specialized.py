"""Readers of the original files of VTAB's specialized datasets. `root` is the folder that holds the files."""

import csv
import gzip
import io
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from visprompt.data.sources.archive import damaged, members, pick, readable, unpacked
from visprompt.data.sources.arrays import dataset, hdf5, rows_of
from visprompt.data.sources.content import Content, Found, Part, Wanted, check_labels, decode_rgb
from visprompt.data.sources.images import BadImage
from visprompt.data.sources.natural import folder_labels, opencv_decoded
from visprompt.errors import UserError

# official split -> its name in files and keys
_PCAM = {"train": "train", "validation": "valid", "test": "test"}
_RADIUS = 300  # of the eyeball, in pixels
_SHOWN = int(_RADIUS * 0.9)  # radius of what the mask leaves
_GREY = 128


def patch_camelyon(root: Path) -> Content:
    """Open PatchCamelyon, `camelyonpatch_level_2_split_*_{x,y}.h5.gz`; keys are `train_0`, `valid_0`.

    HDF5 needs random access: to read images, a split's file (7 GB for train) is decompressed into a temporary
    file in the archive's folder. The file has no name, so the system removes it even if the process is
    killed.
    """
    parts = {}
    for split, name in _PCAM.items():
        path = _pcam_file(root, name, "y")
        with readable(path), gzip.open(path) as file, hdf5(path, io.BytesIO(file.read())) as labels:
            values = dataset(path, labels, "y")[...].ravel()
        keys = [f"{name}_{row}" for row in range(len(values))]
        parts[split] = Part(keys, {"patch_camelyon": check_labels(values, 2, keys, str(path))})
    return Content(parts, lambda wanted: _read_pcam(root, parts, wanted))


def _pcam_file(root: Path, name: str, kind: str) -> Path:
    return root / f"camelyonpatch_level_2_split_{name}_{kind}.h5.gz"


def _read_pcam(root: Path, parts: Mapping[str, Part], wanted: Wanted) -> Iterator[Found]:
    for split, name in _PCAM.items():
        keys = set(wanted.get(split, ()))
        if not keys:
            continue
        path, count = _pcam_file(root, name, "x"), len(parts[split].keys)
        with _decompressed(path) as plain, hdf5(path, plain) as file:
            images = dataset(path, file, "x")
            if images.shape != (count, 96, 96, 3):
                raise damaged(path, f"its images are {images.shape}, its labels {count}")
            for row, image in rows_of(images, {row for row in range(count) if f"{name}_{row}" in keys}):
                yield Found(split, f"{name}_{row}", image)


@contextmanager
def _decompressed(path: Path) -> Iterator[IO[bytes]]:
    with readable(path), gzip.open(path) as packed, ExitStack() as stack:
        with _written_beside(path):
            plain = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
            shutil.copyfileobj(packed, plain, 1 << 20)
            plain.seek(0)
        yield plain


@contextmanager
def _written_beside(path: Path) -> Iterator[None]:
    try:
        yield
    except gzip.BadGzipFile:  # an OSError too, but one of reading
        raise
    except OSError as error:
        raise UserError(
            f"{path} cannot be decompressed into a temporary file in its folder ({error.strerror or error}): "
            "allow writing and free several GB there, or move the data to another disk"
        ) from error


def eurosat(root: Path) -> Content:
    """Open EuroSAT (RGB), `EuroSAT.zip`; keys are class and file name: `Forest_Forest_687.jpg`."""
    return _class_folders(root / "EuroSAT.zip", "eurosat", "2750")


def resisc45(root: Path) -> Content:
    """Open RESISC45, `NWPU-RESISC45.zip`; keys are class and file name: `airplane_airplane_001.jpg`."""
    return _class_folders(root / "NWPU-RESISC45.zip", "resisc45", "NWPU-RESISC45")


def _class_folders(path: Path, task: str, top: str) -> Content:
    # no leading dot: metadata of macOS
    image = re.compile(rf"{re.escape(top)}/([^./][^/]*)/([^./][^/]*\.jpg)")

    def key_of(name: str) -> str | None:
        found = image.fullmatch(name)
        return f"{found[1]}_{found[2]}" if found else None

    folder_of: dict[str, str] = {}
    for member in members(path):
        if key := key_of(member.name):
            folder_of[key] = member.name.split("/")[-2]
    if not folder_of:
        raise UserError(
            f"{path} holds no images in {top}/<class>/: it is not the official file, get it again"
        )
    keys = sorted(folder_of)
    labels = folder_labels(path, task, keys, folder_of.__getitem__)
    return Content({"train": Part(keys, {task: labels})}, lambda wanted: pick(members(path), key_of, wanted))


def diabetic_retinopathy(root: Path) -> Content:
    """Open Diabetic Retinopathy, `trainLabels.csv`, `retinopathy_solution.csv` and images; keys: `10_left`.

    The images are in `train.zip` and `test.zip`, or unpacked in the folders `train` and `test`. Test images
    of the public leaderboard are the official validation split, those of the private leaderboard the test
    split.
    """
    train, test = root / "trainLabels.csv", root / "retinopathy_solution.csv"
    parts = {
        "train": _levels(train, _table(train, ("image", "level"))),
        "validation": _levels(test, _table(test, ("image", "level", "Usage"), "Public")),
        "test": _levels(test, _table(test, ("image", "level", "Usage"), "Private")),
    }
    return Content(parts, lambda wanted: _read_eyes(root, wanted), decode=decode_retina)


def _table(path: Path, columns: tuple[str, ...], usage: str = "") -> list[tuple[str, str]]:
    """Return the image and level of each row of a CSV, or of the rows with a given usage."""
    with readable(path), path.open(encoding="utf-8-sig", newline="") as file:
        try:
            rows = list(csv.DictReader(file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise damaged(path, error) from error
    if not rows:
        raise damaged(path, "it lists no images")
    for number, row in enumerate(rows, start=2):
        if not all(row.get(column) for column in columns):
            raise damaged(path, f"line {number} has no {' and '.join(c for c in columns if not row.get(c))}")
        if usage and row["Usage"] not in ("Public", "Private"):
            raise damaged(path, f"line {number} has the Usage {row['Usage']!r} instead of Public or Private")
    return [(row["image"], row["level"]) for row in rows if not usage or row["Usage"] == usage]


def _levels(path: Path, rows: list[tuple[str, str]]) -> Part:
    keys = [image for image, _ in rows]
    if strange := [image for image, level in rows if not level.isdecimal()]:
        raise damaged(path, f"image {strange[0]} has a level that is not a number")
    labels = np.array([int(level) for _, level in rows], np.int64)
    return Part(keys, {"diabetic_retinopathy": check_labels(labels, 5, keys, str(path))})


def _read_eyes(root: Path, wanted: Wanted) -> Iterator[Found]:
    for name, splits in (("train", ("train",)), ("test", ("validation", "test"))):
        path = unpacked(root / f"{name}.zip")
        chosen = {split: wanted[split] for split in splits if wanted.get(split)}
        yield from pick(members(path), _eye, chosen)


def _eye(name: str) -> str | None:
    file = name.rsplit("/", 1)[-1]
    return file.removesuffix(".jpeg") if file.endswith(".jpeg") else None


def decode_retina(data: bytes) -> np.ndarray:
    """Decode a photograph of an eye as the official task does (its configuration btgraham-300).

    The eyeball is scaled to a radius of 300 pixels; the local average (Gaussian blur, sigma 10) is subtracted
    and the contrast multiplied by four, around grey; pixels farther than 270 pixels from the centre become
    grey, and the image is cropped to them; the result is encoded as JPEG of quality 72 and decoded again.

    Args:
        data: The JPEG file's bytes.

    Returns:
        uint8 [up to 540, up to 540, 3], RGB; smaller where the photograph does not show the whole eyeball.

    Raises:
        BadImage: The bytes are damaged or of an unknown format.
    """
    import cv2

    image = opencv_decoded(data)
    if image is None:
        raise BadImage("cannot be decoded (OpenCV cannot read it)")
    try:
        image = _enhanced(image)
        return decode_rgb(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 72])[1].tobytes())
    except cv2.error as error:  # an eyeball of a few pixels would be enlarged beyond the memory
        raise BadImage(f"cannot be scaled to an eyeball of {_RADIUS} pixels ({error})") from error


def _enhanced(image: np.ndarray) -> np.ndarray:
    import cv2

    scale = _RADIUS / _eyeball_radius(image)
    image = cv2.resize(image, dsize=None, fx=scale, fy=scale)
    return _masked(cv2.addWeighted(image, 4, cv2.GaussianBlur(image, (0, 0), _RADIUS / 30), -4, _GREY))


def _eyeball_radius(image: np.ndarray) -> float:
    """Return half the number of pixels in the middle row that are brighter than a tenth of its mean."""
    row = image[len(image) // 2].sum(axis=1)
    radius = float((row > row.mean() / 10).sum()) / 2
    return radius if radius >= 1 else len(image) / 2  # a black row: some photographs are broken


def _masked(image: np.ndarray) -> np.ndarray:
    """Set the pixels outside the circle to grey and crop to it; OpenCV draws it as the official task does."""
    import cv2

    height, width = image.shape[:2]
    x, y = width // 2, height // 2
    shown = cv2.circle(np.zeros((height, width), np.uint8), (x, y), _SHOWN, 1, -1)
    image = np.where(shown[..., None] == 1, image, np.uint8(_GREY))
    return image[max(y - _SHOWN, 0) : y + _SHOWN, max(x - _SHOWN, 0) : x + _SHOWN]
