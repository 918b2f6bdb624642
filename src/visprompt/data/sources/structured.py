"""Readers of the original files of VTAB's structured datasets. `root` is the folder that holds the files.

Labels are those of the official tasks (google-research/task_adaptation, task_adaptation/data); official
splits and keys are those of TensorFlow Datasets. Archives are read without being unpacked.
"""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from visprompt.data.sources.archive import damaged, members, readable
from visprompt.data.sources.arrays import hdf5, rows_of
from visprompt.data.sources.content import Content, Found, Part, Wanted, check_labels
from visprompt.data.sources.tfrecord import Example, parse_example, read_records


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise one sentence that names the file for every error of reading or parsing it."""
    with readable(path):
        try:
            yield
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise damaged(path, error) from error


CLEVR = "CLEVR_v1.0.zip"
_CLEVR_SPLITS = {"train": "train", "val": "validation"}  # the test images have no scenes
_CLEVR_DISTANCES = np.array([0, 8, 8.5, 9, 9.5, 10, 100], np.float32)  # lower ends of the bins


def clevr(root: Path) -> Content:
    """Open CLEVR v1.0: train (70,000) and validation (15,000 images); keys are file names.

    clevr_count is the number of objects minus 3; clevr_dist is the bin of the nearest object's depth.
    TensorFlow Datasets pairs the sorted images with the scenes by position; the field `image_filename` gives
    the same pairs.
    """
    path = root / CLEVR
    scenes = dict(_clevr_scenes(path))
    if len(scenes) < len(_CLEVR_SPLITS):
        raise damaged(path, "it lacks scenes/CLEVR_train_scenes.json or CLEVR_val_scenes.json")
    return Content({split: _clevr_part(path, scenes[split]) for split in scenes}, partial(_read_clevr, path))


class _Scene(NamedTuple):
    image: str
    objects: int
    nearest: float


def _clevr_scenes(path: Path) -> Iterator[tuple[str, list[_Scene]]]:
    with _reading(path):
        for member in members(path):
            if found := re.search(r"scenes/CLEVR_(train|val)_scenes\.json$", member.name):
                yield _CLEVR_SPLITS[found[1]], json.loads(member.read(), object_hook=_clevr_digest)["scenes"]


def _clevr_digest(found: dict[str, Any]) -> Any:
    # reduce while parsing: as Python objects the training scenes take several GB
    if "pixel_coords" in found:
        return float(found["pixel_coords"][2])
    if "image_filename" in found:
        return _Scene(found["image_filename"], len(found["objects"]), min(found["objects"], default=0.0))
    return found


def _clevr_part(path: Path, scenes: Sequence[_Scene]) -> Part:
    keys = [scene.image for scene in scenes]
    nearest = np.array([scene.nearest for scene in scenes], np.float32)
    labels = {
        "clevr_count": check_labels(np.array([scene.objects for scene in scenes]) - 3, 8, keys, str(path)),
        "clevr_dist": check_labels(np.searchsorted(_CLEVR_DISTANCES, nearest) - 1, 6, keys, str(path)),
    }
    return Part(keys, labels)


def _read_clevr(path: Path, wanted: Wanted) -> Iterator[Found]:
    with _reading(path):
        for member in members(path):
            *_, kind, folder, key = ("", "", *member.name.split("/"))
            split = _CLEVR_SPLITS.get(folder, "") if kind == "images" else ""
            if key in wanted.get(split, ()):
                yield Found(split, key, member.read())


DMLAB = "dmlab.tar.gz"


def dmlab(root: Path) -> Content:
    """Open DMLab's frames: train, validation and test (22,735 images); keys are the field `filename`.

    The archive is read from start to end, record by record: once for the labels and once for the images.
    """
    path = root / DMLAB
    keys: defaultdict[str, list[str]] = defaultdict(list)
    labels: defaultdict[str, list[int]] = defaultdict(list)
    with _reading(path):
        for split, example in _dmlab_examples(path):
            keys[split].append(example.text("filename").decode())
            labels[split].append(example.number("label"))
    if missing := {"train", "validation", "test"} - set(keys):
        raise damaged(path, f"it holds no records in dmlab-{min(missing)}.tfrecord*")
    checked = {split: check_labels(np.array(labels[split]), 6, keys[split], str(path)) for split in keys}
    return Content(
        {split: Part(keys[split], {"dmlab": checked[split]}) for split in keys}, partial(_read_dmlab, path)
    )


def _dmlab_examples(path: Path) -> Iterator[tuple[str, Example]]:
    for member in members(path):
        if found := re.match(r"dmlab-(train|validation|test)\.tfrecord", PurePosixPath(member.name).name):
            with member.open() as stream:  # a shard is too large to be read at once
                for data in read_records(stream, f"{path}: {member.name}"):
                    yield found[1], parse_example(data)


def _read_dmlab(path: Path, wanted: Wanted) -> Iterator[Found]:
    with _reading(path):
        for split, example in _dmlab_examples(path):
            key = example.text("filename").decode()
            if key in wanted.get(split, ()):
                yield Found(split, key, example.text("image"))


KITTI_IMAGES, KITTI_LABELS, KITTI_DEVKIT = (
    "data_object_image_2.zip",
    "data_object_label_2.zip",
    "devkit_object.zip",
)
# metres; images without a vehicle have a larger distance
_KITTI_DISTANCES = np.array([8, 20, 999], np.float32)


def kitti(root: Path) -> Content:
    """Open KITTI's 2D object images: train, validation and test, split by video; keys are `000001.png`.

    The label is the bin of the distance to the nearest car, van or truck: up to 8 m, up to 20 m, farther, no
    vehicle.
    """
    labels = dict(_kitti_labels(root / KITTI_LABELS))
    parts = {}
    for split, images in kitti_splits(_kitti_videos(root / KITTI_DEVKIT)).items():
        keys = [f"{image:06d}.png" for image in images]
        if missing := [key for key in keys if key not in labels]:
            raise damaged(root / KITTI_LABELS, f"it holds no annotation of {missing[0]}")
        parts[split] = Part(keys, {"kitti": np.array([labels[key] for key in keys], np.int64)})
    owner = {key: split for split, part in parts.items() for key in part.keys}
    return Content(parts, partial(_read_kitti, root / KITTI_IMAGES, owner))


def kitti_splits(videos: Sequence[str]) -> dict[str, list[int]]:
    """Split images by video as TensorFlow Datasets does: 10 % of the videos are test, as many are validation.

    Args:
        videos: The name of each image's video.

    Returns:
        The rows of each split, ascending.
    """
    names = sorted(set(videos))
    held = max(1, len(names) // 10)
    draw = np.random.RandomState(123)  # draws the same numbers as the official np.random.seed(123)
    test = set(draw.choice(names, held, replace=False).tolist())
    rest = [name for name in names if name not in test]
    validation = set(draw.choice(rest, held, replace=False).tolist())
    rows: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for row, video in enumerate(videos):
        rows["test" if video in test else "validation" if video in validation else "train"].append(row)
    return rows


def _kitti_videos(path: Path) -> list[str]:
    """Return the video of each training image."""
    texts = {}
    with _reading(path):
        for member in members(path):
            if member.name.endswith(("mapping/train_rand.txt", "mapping/train_mapping.txt")):
                texts[PurePosixPath(member.name).name] = member.read().decode()
        lines = texts["train_mapping.txt"].splitlines()
        videos = [
            lines[int(number) - 1].split()[1] for number in texts["train_rand.txt"].strip(" \r\n,").split(",")
        ]
    if len(set(videos)) < 3:
        raise damaged(path, "its mapping names less than three videos")
    return videos


def _kitti_labels(path: Path) -> Iterator[tuple[str, int]]:
    with _reading(path):
        for member in members(path):
            if found := re.search(r"(?:^|/)training/label_2/(\d{6})\.txt$", member.name):
                yield f"{found[1]}.png", _kitti_label(member.read().decode())


def _kitti_label(text: str) -> int:
    objects = [line.split() for line in text.splitlines()]
    nearest = min((float(o[13]) for o in objects if o and o[0] in ("Car", "Van", "Truck")), default=1000.0)
    return int(np.searchsorted(_KITTI_DISTANCES, np.float32(nearest)))


def _read_kitti(path: Path, owner: Mapping[str, str], wanted: Wanted) -> Iterator[Found]:
    with _reading(path):
        for member in members(path):
            *_, half, camera, key = ("", "", *member.name.split("/"))
            split = owner.get(key, "") if (half, camera) == ("training", "image_2") else ""
            if key in wanted.get(split, ()):
                yield Found(split, key, member.read())


DSPRITES = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.hdf5"


def dsprites(root: Path) -> Content:
    """Open dSprites: one official split, train (737,280 images); keys are row numbers. Images are 0 or 255.

    dsprites_loc is the column's class of 32, halved; dsprites_ori is floor(orientation / 2.5) of 40.
    """
    path = root / DSPRITES
    with hdf5(path) as file:
        classes = np.asarray(file["latents/classes"])  # color, shape, scale, orientation, x, y
        shape = file["imgs"].shape
    if classes.shape != (len(classes), 6) or shape != (len(classes), 64, 64):
        raise damaged(path, f"it holds images of shape {shape} and classes of shape {classes.shape}")
    keys = [str(row) for row in range(len(classes))]
    labels = {
        "dsprites_loc": check_labels(classes[:, 4] // 2, 16, keys, str(path)),
        "dsprites_ori": check_labels(classes[:, 3] * 2 // 5, 16, keys, str(path)),
    }
    return Content({"train": Part(keys, labels)}, partial(_read_dsprites, path))


def _read_dsprites(path: Path, wanted: Wanted) -> Iterator[Found]:
    rows = {int(key) for key in wanted.get("train", ())}
    with hdf5(path) as file:
        for row, image in rows_of(file["imgs"], rows):
            if image.max() > 1:
                raise damaged(path, "it holds pixels other than 0 and 1")
            yield Found("train", str(row), image[..., None] * np.uint8(255))


SMALLNORB = {
    "train": "smallnorb-5x46789x9x18x6x2x96x96-training-{}.mat.gz",
    "test": "smallnorb-5x01235x9x18x6x2x96x96-testing-{}.mat.gz",
}
# magic number -> type
NORB_DTYPES: dict[int, np.dtype] = {0x1E3D4C55: np.dtype("u1"), 0x1E3D4C54: np.dtype("<i4")}


def smallnorb(root: Path) -> Content:
    """Open smallNORB: the left camera's images of train and test (24,300 each); keys are row numbers.

    smallnorb_azi is the azimuth / 2 (18 classes), smallnorb_ele the elevation (9 classes).
    """
    return Content({split: _norb_part(root, split) for split in SMALLNORB}, partial(_read_smallnorb, root))


def _norb_part(root: Path, split: str) -> Part:
    path, images = (root / SMALLNORB[split].format(kind) for kind in ("info", "dat"))
    with _reading(path), gzip.open(path) as file:
        shape, dtype = _norb_header(path, file)
        info = np.frombuffer(_exactly(file, int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
    with _reading(images), gzip.open(images) as file:
        count = _norb_header(images, file)[0][0]
    if shape != (count, 4):  # instance, elevation, azimuth, lighting
        raise damaged(path, f"its shape is {shape}, and there are {count} images in {images.name}")
    keys = [str(row) for row in range(count)]
    azimuth = check_labels(info[:, 2] // 2, 18, keys, str(path))
    return Part(
        keys, {"smallnorb_azi": azimuth, "smallnorb_ele": check_labels(info[:, 1], 9, keys, str(path))}
    )


def _norb_header(path: Path, file: gzip.GzipFile) -> tuple[tuple[int, ...], np.dtype]:
    magic, dimensions = np.frombuffer(_exactly(file, 8), "<i4").tolist()
    if magic not in NORB_DTYPES or not 1 <= dimensions <= 8:
        raise damaged(path, f"it begins with {magic} and {dimensions}, not with smallNORB's numbers")
    shape = np.frombuffer(_exactly(file, 4 * max(3, dimensions)), "<i4").tolist()[:dimensions]
    if min(shape) < 0 or (dimensions == 4 and shape[1:] != [2, 96, 96]):
        raise damaged(path, f"its shape is {shape}")
    return tuple(shape), NORB_DTYPES[magic]


def _exactly(file: gzip.GzipFile, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError(f"it ends {size - len(data)} bytes too early")
    return data


def _read_smallnorb(root: Path, wanted: Wanted) -> Iterator[Found]:
    for split, name in SMALLNORB.items():
        rows = {int(key) for key in wanted.get(split, ())}
        path = root / name.format("dat")
        with _reading(path), gzip.open(path) as file:
            shape, _ = _norb_header(path, file)
            for row in range(min(shape[0], max(rows, default=-1) + 1)):
                pair = _exactly(file, 2 * 96 * 96)
                if row in rows:
                    yield Found(split, str(row), np.frombuffer(pair, np.uint8, 96 * 96).reshape(96, 96, 1))
