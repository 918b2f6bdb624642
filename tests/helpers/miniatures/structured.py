"""Miniatures of the original files of VTAB's structured tasks, in their real containers.

Each writer takes the folder to write into, the number of images wanted in each official split (what the
dataset does not have is left out) and the source of the noise, and returns the number written. Equal draws
give equal files.
"""

import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from visprompt.data.sources.structured import (
    CLEVR,
    DMLAB,
    DSPRITES,
    KITTI_DEVKIT,
    KITTI_IMAGES,
    KITTI_LABELS,
    NORB_DTYPES,
    SMALLNORB,
    kitti_splits,
)
from visprompt.data.sources.tfrecord import ExampleMessage, masked_crc32c


def _flat(colour: Iterable[int], size: tuple[int, int], draw: np.random.Generator) -> Image.Image:
    """Makes a picture of one colour and some noise; size is width and height."""
    noise = draw.integers(-12, 13, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array([*colour]) + noise, 0, 255).astype(np.uint8))


def _file(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def _zip(path: Path, files: Mapping[str, bytes | str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # with a fixed date


def clevr(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes CLEVR_v1.0.zip: red tells the number of objects, green the nearest depth."""
    files: dict[str, bytes | str] = {"CLEVR_v1.0/": "", "CLEVR_v1.0/README.txt": "A miniature.\n"}
    for split, name in (("train", "train"), ("validation", "val")):
        scenes = []
        for number in range(counts[split]):
            image, count, distance = f"CLEVR_{name}_{number:06d}.png", number % 8, int(draw.integers(6))
            picture = _flat((30 + 28 * count, 30 + 38 * distance, 90), (48, 32), draw)
            files[f"CLEVR_v1.0/images/{name}/{image}"] = _file(picture, "png")
            scenes.append(
                _scene(image, number, name, count + 3, (7.5, 8.2, 8.7, 9.2, 9.7, 10.5)[distance], draw)
            )
        files[f"CLEVR_v1.0/scenes/CLEVR_{name}_scenes.json"] = json.dumps(
            {"info": {"split": name}, "scenes": scenes}
        )
    files["CLEVR_v1.0/images/test/CLEVR_test_000000.png"] = _file(_flat((9, 9, 9), (48, 32), draw), "png")
    _zip(root / CLEVR, files)
    return {split: counts[split] for split in ("train", "validation")}


def _scene(
    image: str, number: int, split: str, count: int, nearest: float, draw: np.random.Generator
) -> dict:
    depths = [nearest, *(nearest + draw.uniform(0, 3, count - 1))]
    objects = [
        {
            "color": "red",
            "size": "large",
            "rotation": 12.5,
            "3d_coords": [0.5, 1.5, 0.7],
            "pixel_coords": [24, 16, depth],
        }
        for depth in draw.permutation(depths).tolist()
    ]
    relations = {"relationships": {"left": [[] for _ in objects]}, "directions": {"left": [-0.6, -0.7, 0.0]}}
    return {"image_index": number, "objects": objects, **relations, "image_filename": image, "split": split}


def record(data: bytes) -> bytes:
    """Returns the TFRecord that holds some data."""
    length = struct.pack("<Q", len(data))
    return length + masked_crc32c(length) + data + masked_crc32c(data)


def build_example(features: Mapping[str, bytes | int]) -> bytes:
    """Returns the tf.train.Example that holds one text or integer per feature."""
    example = ExampleMessage()
    for name, value in features.items():
        entry = example.features.feature.add(key=name)
        (entry.value.bytes_list if isinstance(value, bytes) else entry.value.int64_list).value.append(value)
    return example.SerializeToString()


def dmlab(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes dmlab.tar.gz with two TFRecord shards per split: the colour tells the label."""
    colours = np.random.default_rng(0).integers(40, 216, (6, 3))
    with (
        gzip.GzipFile(root / DMLAB, "w", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for split in ("train", "validation", "test"):
            shards = [b"", b""]
            for number in range(counts[split]):
                label = number % 6
                image = _file(_flat(colours[label], (48, 36), draw), "jpeg")
                name = f"{split}_{number:06d}.jpg".encode()
                shards[number % 2] += record(
                    build_example({"image": image, "filename": name, "label": label})
                )
            for shard, data in enumerate(shards):
                _add(archive, f"dmlab-{split}.tfrecord-{shard:05d}-of-00002", data)
    return {split: counts[split] for split in ("train", "validation", "test")}


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def kitti(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes KITTI's three archives with ten videos, one of them test and one validation.

    Brightness tells the label.

    There are eight training videos, so train has eight images or more and the other splits one or more.
    """
    names = [f"2011_09_26_drive_{number:04d}_sync" for number in range(10)]
    written, images = {}, []
    for split, videos in kitti_splits(names).items():
        written[split] = max(len(videos), counts[split])
        images += [(names[videos[n % len(videos)]], n % 4) for n in range(written[split])]
    images = [images[row] for row in draw.permutation(len(images))]
    pictures: dict[str, bytes | str] = {
        "testing/image_2/000000.png": _file(_flat((9, 9, 9), (62, 19), draw), "png")
    }
    notes: dict[str, bytes | str] = {}
    for number, (_, label) in enumerate(images):
        grey = [30 + 60 * label] * 3
        pictures[f"training/image_2/{number:06d}.png"] = _file(_flat(grey, (62, 19), draw), "png")
        notes[f"training/label_2/{number:06d}.txt"] = _annotation(label, draw)
    _zip(root / KITTI_IMAGES, pictures)
    _zip(root / KITTI_LABELS, notes)
    _zip(root / KITTI_DEVKIT, _mapping([video for video, _ in images], draw))
    return written


def _annotation(label: int, draw: np.random.Generator) -> str:
    kind = ("Car", "Van", "Truck", "Tram")[label]  # a tram is no vehicle here
    metres = (2, 9, 21, 5)[label] + draw.uniform(0, 6)
    things = [
        ("Pedestrian", 1.5),
        (kind, metres),
        ("Car" if label < 3 else "Misc", metres + 30),
        ("DontCare", -1000),
    ]
    box = "0.00 0 -1.58 587.01 173.33 614.12 200.12 1.65 1.67 3.64 -0.65 1.71"
    return "".join(f"{name} {box} {z:.2f} -1.59\n" for name, z in things)


def _mapping(videos: list[str], draw: np.random.Generator) -> dict[str, bytes | str]:
    order = draw.permutation(len(videos))  # the line of each image
    lines = [""] * len(videos)
    for image, line in enumerate(order):
        lines[line] = f"2011_09_26 {videos[image]} {image:010d}\n"
    numbers = ",".join(str(line + 1) for line in order)
    return {
        "readme.txt": "",
        "mapping/train_rand.txt": f"{numbers}\n",
        "mapping/train_mapping.txt": "".join(lines),
    }


def dsprites(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes the HDF5 file: a wedge whose place and direction are the labels; all images are train."""
    import h5py

    rows = np.arange(counts["train"])
    classes = np.stack(
        [rows * 0, rows % 3, rows % 6, draw.integers(0, 40, len(rows)), rows * 5 % 32, rows % 32], axis=1
    )
    y, x = np.mgrid[:64, :64][:, None] - np.linspace(10, 53, 32)[classes[:, [5, 4]].T][..., None, None]
    angle = (classes[:, 3] * np.pi / 20)[:, None, None]
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    images = (along > -4) & (along < 9) & (2.5 * abs(across) < 9 - along)
    with h5py.File(root / DSPRITES, "w") as file:
        file.create_dataset("imgs", data=images.astype(np.uint8), chunks=True, compression="gzip")
        file["latents/classes"] = classes.astype(np.int64)
        file["latents/values"] = classes.astype(np.float64)
    return {"train": len(rows)}


def smallnorb(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes the six .mat.gz files.

    A bright block whose column is the azimuth and whose row is the elevation.
    """
    for split, name in SMALLNORB.items():
        rows = np.arange(counts[split])
        info = np.stack([rows % 10, rows * 4 % 9, rows % 18 * 2, rows % 6], axis=1)
        pairs = draw.integers(0, 60, (len(rows), 2, 96, 96)).astype(np.uint8)
        for row, (_, elevation, azimuth, _) in enumerate(info):
            pairs[row, :, elevation * 10 : elevation * 10 + 10, azimuth * 5 // 2 : azimuth * 5 // 2 + 6] += (
                180
            )
        for kind, matrix in (("dat", pairs), ("cat", rows % 5), ("info", info)):
            _matrix(root / name.format(kind), matrix)
    return {split: counts[split] for split in SMALLNORB}


def _matrix(path: Path, matrix: np.ndarray) -> None:
    dtype = np.dtype(np.uint8) if matrix.dtype == np.uint8 else np.dtype("<i4")
    magic = next(number for number, known in NORB_DTYPES.items() if known == dtype)
    shape = [*matrix.shape, 1, 1][: max(3, matrix.ndim)]
    head = np.array([magic, matrix.ndim, *shape], "<i4").tobytes()
    with gzip.GzipFile(path, "w", mtime=0) as file:
        file.write(head + matrix.astype(dtype).tobytes())
