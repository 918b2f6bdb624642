"""Writes miniatures of the original archives of the five fine-grained datasets: real names, real containers.

Each writer takes the folder to fill, about how many images to write of each official split (all but Flowers
have train and test only), and a generator, and returns how many it wrote. The colour of an image tells its
class.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from helpers.miniatures.natural import class_labels, jpeg, oxford_flowers102, tar_bytes, write_mat
from visprompt.data.sources.images import Item
from visprompt.data.splits import SPLITS

__all__ = [
    "cub200",
    "json_splits",
    "nabirds",
    "oxford_flowers",
    "stanford_cars",
    "stanford_cars_devkit",
    "stanford_dogs",
]

_BIRDS = ("Black_footed_Albatross", "Laysan_Albatross", "Sooty_Albatross", "Groove_billed_Ani")
_NABIRDS = {
    0: "Birds",
    295: "Common Eider",
    817: "Oak Titmouse (Adult)",
    818: "Juniper Titmouse",
    1010: "Verdin",
}
_BREEDS = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02085936-Maltese_dog", "n02086079-Pekinese")

oxford_flowers = oxford_flowers102  # the same files


def _images(counts: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Yields split and label of each image, class by class as the datasets list theirs."""
    labels = [
        (split, label) for split in ("train", "test") for label in class_labels(counts[split], 4).tolist()
    ]
    yield from sorted(labels, key=lambda image: image[1])


def _written(counts: Mapping[str, int]) -> dict[str, int]:
    return {split: counts[split] for split in ("train", "test")}


def _birds(
    folder: str,
    rows: Iterable[tuple[str, str, int, str, int]],
    classes: Mapping[int, str],
    draw: np.random.Generator,
) -> bytes:
    """Builds an archive of CUB's form.

    Args:
        folder: Its top folder.
        rows: Image id, path, class id, split and the label that the colour shows.
        classes: Class id -> name.
        draw: Source of the noise.
    """
    tables: dict[str, list[str]] = {name: [] for name in ("images", "image_class_labels", "train_test_split")}
    files = []
    for image, path, number, split, label in rows:
        tables["images"].append(f"{image} {path}\n")
        tables["image_class_labels"].append(f"{image} {number}\n")
        tables["train_test_split"].append(f"{image} {int(split == 'train')}\n")
        files.append((f"{folder}/images/{path}", jpeg(label, draw)))
    tables["classes"] = [f"{number} {name}\n" for number, name in classes.items()]
    texts = [(f"{folder}/{name}.txt", "".join(lines).encode()) for name, lines in tables.items()]
    return tar_bytes(texts + files)


def cub200(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes a miniature of CUB-200-2011: `CUB_200_2011.tgz`."""
    rows = [
        (
            f"{number}",
            f"{label + 1:03d}.{_BIRDS[label]}/{_BIRDS[label]}_{number:04d}.jpg",
            label + 1,
            split,
            label,
        )
        for number, (split, label) in enumerate(_images(counts), 1)
    ]
    classes = {label: f"{label:03d}.{name}" for label, name in enumerate(_BIRDS, 1)}
    (root / "CUB_200_2011.tgz").write_bytes(_birds("CUB_200_2011", rows, classes, draw))
    return _written(counts)


def nabirds(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes a miniature of NABirds, `nabirds.tar.gz`.

    Class ids have gaps, and one class has no images of its own.
    """
    ids = sorted(_NABIRDS)[1:]
    rows = []
    for split, label in _images(counts):
        name = draw.bytes(16).hex()
        dashed = "-".join((name[:8], name[8:12], name[12:16], name[16:20], name[20:]))
        rows.append((dashed, f"{ids[label]:04d}/{name}.jpg", ids[label], split, label))
    (root / "nabirds.tar.gz").write_bytes(_birds("nabirds", rows, _NABIRDS, draw))
    return _written(counts)


def stanford_dogs(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes a miniature of Stanford Dogs: `images.tar` and `lists.tar`."""
    files, lists = [], []
    rows = [
        (split, label, f"{_BREEDS[label]}/{_BREEDS[label].partition('-')[0]}_{number}.jpg")
        for number, (split, label) in enumerate(_images(counts), 10_001)
    ]
    files = [(f"Images/{path}", jpeg(label, draw)) for _, label, path in rows]
    for split in ("train", "test"):
        paths = np.array([[path] for own, _, path in rows if own == split], object)
        labels = np.array([[label + 1.0] for own, label, _ in rows if own == split])
        member = root / f"{split}_list.mat"
        write_mat(member, file_list=paths, annotation_list=paths, labels=labels)
        lists.append((member.name, member.read_bytes()))
        member.unlink()
    (root / "images.tar").write_bytes(tar_bytes(files, packed=False))
    (root / "lists.tar").write_bytes(tar_bytes(lists, packed=False))
    return _written(counts)


def _annotations(path: Path, fields: Mapping[str, list]) -> None:
    table = np.empty((1, len(next(iter(fields.values())))), [(name, object) for name in fields])
    for name, values in fields.items():
        for row, value in enumerate(values):
            table[name][0, row] = value if isinstance(value, str) else np.uint8(value)
    write_mat(path, annotations=table)


def stanford_cars(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes a miniature of Stanford Cars as it first came: `car_ims.tgz` and `cars_annos.mat`."""
    rows = list(_images(counts))
    paths = [f"car_ims/{number:06d}.jpg" for number in range(1, len(rows) + 1)]
    files = [(path, jpeg(label, draw)) for path, (_, label) in zip(paths, rows, strict=True)]
    (root / "car_ims.tgz").write_bytes(tar_bytes(files))
    classes, tests = [label + 1 for _, label in rows], [split == "test" for split, _ in rows]
    _annotations(
        root / "cars_annos.mat",
        {"relative_im_path": paths, "bbox_x1": classes, "class": classes, "test": tests},
    )
    return _written(counts)


def stanford_cars_devkit(root: Path, counts: Mapping[str, int], draw: np.random.Generator) -> dict[str, int]:
    """Writes a miniature of Stanford Cars' second layout.

    Archives of train and test, a devkit, and the test labels.
    """
    kit = []
    for split in ("train", "test"):
        labels = [label for own, label in _images(counts) if own == split]
        draw.shuffle(labels)  # there the images of a class are not together
        names = [f"{number:05d}.jpg" for number in range(1, len(labels) + 1)]
        files = [
            (f"cars_{split}/{name}", jpeg(label, draw)) for name, label in zip(names, labels, strict=True)
        ]
        (root / f"cars_{split}.tgz").write_bytes(tar_bytes(files))
        fields: dict[str, list] = {
            "bbox_x1": [1] * len(labels),
            "class": [label + 1 for label in labels],
            "fname": names,
        }
        if split == "test":
            _annotations(root / "cars_test_annos_withlabels.mat", fields)
            del fields["class"]
        member = root / f"cars_{split}_annos.mat"
        _annotations(member, fields)
        kit.append((f"devkit/{member.name}", member.read_bytes()))
        member.unlink()
    (root / "car_devkit.tgz").write_bytes(tar_bytes(kit))
    return _written(counts)


def json_splits(folder: Path, items: Iterable[Item], prefix: str = "") -> None:
    """Writes `train.json`, `val.json` and `test.json` of the Visual Prompt Tuning authors' form.

    Args:
        folder: Where to.
        items: The images; class ids count from 1, as those of most datasets do.
        prefix: Put before each key (Flowers: "jpg/").
    """
    lists: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for item in items:
        lists[item.split][prefix + item.key] = item.label + 1
    for split, images in lists.items():
        (folder / f"{split}.json").write_text(json.dumps(images), encoding="utf-8")
