"""Lists of the five fine-grained datasets (FGVC), read from their unpacked files; no pixels are read.

Where `train.json`, `val.json` and `test.json` are next to the images, they are the splits: those of the
Visual Prompt Tuning paper (Jia et al., ECCV 2022), each `{image path: class id}`. Labels are the positions of
the ids in the sorted ids of train. Otherwise the official lists are the splits, and val is cut from the
official train: in each class, in md5 order (salt "val"), the first n / 10 images, rounded half up, at least
one and never all. Oxford Flowers has an official val of 1,020 images, so nothing is cut there. The published
sizes (CUB 5,394 + 600, NABirds 21,536 + 2,393, Dogs 10,800 + 1,200, Cars 7,329 + 815) are those of the json
files; with official lists train and val may differ from them by a few images, test does not.

Stanford Cars has two layouts that number its images differently: `car_ims/000001.jpg` to `016185.jpg` with
`cars_annos.mat`, and `cars_train/00001.jpg`, `cars_test/00001.jpg` with a devkit. The same number is another
image in the other layout, so the json files (which number `car_ims`) are valid for the first layout only.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visprompt.data.catalog.task import TaskSpec
from visprompt.data.sources.archive import damaged, readable
from visprompt.data.sources.arrays import mat
from visprompt.data.sources.content import check_labels
from visprompt.data.sources.images import ImageFolder, Item
from visprompt.data.sources.natural import flowers_lists
from visprompt.data.splits import SPLITS, md5_order
from visprompt.errors import UserError, unknown

Id = int | str


class _List(NamedTuple):
    """A list of a dataset: its file, its split, and image path (relative to the image folder) -> class id."""

    path: Path
    split: str
    ids: Mapping[str, Id]


class _Layout(NamedTuple):
    """The layout of a dataset: folders of images, reader of official lists, names of classes."""

    marks: tuple[str, ...]  # one of these is in the dataset's root
    folders: tuple[str, ...]  # folders of images; paths in lists are relative to one of them
    lists: Callable[[Path, TaskSpec], list[_List]]
    namer: Callable[[Path], Callable[[str, Id], str]]  # image and class id -> name of the class
    prefix: str = ""  # of paths, which json files may have or lack
    hint: str = ""  # for the error that images are missing


def fgvc(root: Path, spec: TaskSpec) -> ImageFolder:
    """List a fine-grained dataset.

    Args:
        root: Folder of the dataset's unpacked files, or the folder that contains it.
        spec: Record of the task. Fewer classes than `num_classes` are accepted: the caller compares all
            counts.

    Returns:
        All images, sorted by key; a key is the path in the lists (for Flowers the file's name). Names of
        classes are those of the record; where it has none, those of the folders or of `classes.txt`.

    Raises:
        UserError: A list is missing, damaged or contradicts another one, a label is out of range, or a listed
            image is missing.
    """
    layout, found = _layout(spec), fgvc_root(root, spec)
    lists = _splits(layout, root, found, spec)
    label_of = _class_map(lists, spec)
    folders = [found / folder for folder in layout.folders]
    items = []
    for listed in lists:
        paths = _located(listed, folders, layout.hint)
        items += [Item(paths[key], key, label_of[id_], listed.split) for key, id_ in listed.ids.items()]
    items.sort(key=lambda item: item.key)
    names = spec.class_names
    if len(names) != len(label_of):
        name, examples = (
            layout.namer(found),
            {id_: key for listed in lists for key, id_ in listed.ids.items()},
        )
        names = tuple(name(examples[id_], id_) for id_ in label_of)
    return ImageFolder(names, tuple(items))


def fgvc_root(root: Path, spec: TaskSpec) -> Path:
    """Return the folder of an unpacked dataset: `root` or a folder in it, such as `CUB_200_2011`.

    Raises:
        UserError: Neither `root` nor a folder in it holds the dataset's images.
    """
    marks = _layout(spec).marks
    below = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    for place in (root, *below):
        if any((place / mark).exists() for mark in marks):
            return place
    raise UserError(
        f"{root} does not hold the images of {spec.id} (there is no {' or '.join(marks)} in it or in a "
        f"folder in it): unpack {' and '.join(file.name for file in spec.files) or 'its archives'} there"
    )


def _layout(spec: TaskSpec) -> _Layout:
    if spec.id not in _LAYOUTS:
        raise unknown("fine-grained dataset", spec.id, _LAYOUTS)
    return _LAYOUTS[spec.id]


def _splits(layout: _Layout, root: Path, found: Path, spec: TaskSpec) -> list[_List]:
    for place in (found, root):  # the archive may be unpacked below the json files
        if (place / "train.json").is_file():
            lists = [_json_list(place / f"{split}.json", split, layout.prefix) for split in SPLITS]
            break
    else:
        lists = _hold_out(layout.lists(found, spec))
    seen: dict[str, Path] = {}
    for listed in lists:
        for key in listed.ids:
            if seen.setdefault(key, listed.path) is not listed.path:
                raise UserError(
                    f"{seen[key]} and {listed.path} both list {key}: get the lists again, one is wrong"
                )
    return lists


def _json_list(path: Path, split: str, prefix: str) -> _List:
    with readable(path):
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise damaged(path, error) from error
    if not isinstance(given, dict) or not all(isinstance(id_, int | str) for id_ in given.values()):
        raise UserError(f"{path} is not of the form {{image path: class id}}: get the split files again")
    numbers = all(str(id_).isdecimal() for id_ in given.values())
    ids = {key.removeprefix("./").removeprefix(prefix): id_ for key, id_ in given.items()}
    return _List(path, split, {key: int(id_) if numbers else str(id_) for key, id_ in ids.items()})


def _hold_out(lists: list[_List]) -> list[_List]:
    if any(listed.split == "val" for listed in lists):
        return lists
    train, *others = lists
    keys_of: defaultdict[Id, list[str]] = defaultdict(list)
    for key, id_ in train.ids.items():
        keys_of[id_].append(key)
    val: dict[str, Id] = {}
    for id_, keys in keys_of.items():
        held = min(len(keys) - 1, max(1, (len(keys) + 5) // 10))
        val |= dict.fromkeys(md5_order(keys, "val")[:held], id_)
    rest = {key: id_ for key, id_ in train.ids.items() if key not in val}
    return [train._replace(ids=rest), _List(train.path, "val", val), *others]


def _class_map(lists: Iterable[_List], spec: TaskSpec) -> dict[Id, int]:
    train = next(listed for listed in lists if listed.split == "train")
    label_of = {id_: label for label, id_ in enumerate(sorted(set(train.ids.values()), key=_order))}
    if not 0 < len(label_of) <= spec.num_classes:
        raise UserError(
            f"{train.path} has {len(label_of)} classes where {spec.id} has {spec.num_classes}: get the "
            "right list"
        )
    for listed in lists:
        for key, id_ in listed.ids.items():
            if id_ not in label_of:
                raise UserError(
                    f"{listed.path} gives image {key} the class {id_}, of which {train.path} has no image: "
                    "get the lists again, they do not belong together"
                )
    return label_of


def _order(id_: Id) -> tuple[bool, Id]:
    return isinstance(id_, str), id_


def _located(listed: _List, folders: Sequence[Path], hint: str) -> dict[str, Path]:
    paths = {key: next((f / key for f in folders if (f / key).is_file()), None) for key in listed.ids}
    found = {key: path for key, path in paths.items() if path}
    if missing := sorted(set(paths) - set(found)):
        raise UserError(
            f"{listed.path} lists {len(missing)} image(s) that are not in {folders[0]} (first: "
            f"{missing[0]}): unpack the dataset's archive again{hint}"
        )
    return found


# ---- official lists


def _table(path: Path) -> dict[str, str]:
    """Read lines that consist of a key, a space and a value."""
    with readable(path):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise damaged(path, error) from error
    rows = [line.strip().partition(" ") for line in lines if line.strip()]
    if bad := [key for key, _, value in rows if not value]:
        raise damaged(path, f"the line of {bad[0]!r} has one column of two")
    return {key: value.strip() for key, _, value in rows}


def _bird_lists(root: Path, spec: TaskSpec) -> list[_List]:
    """Read the lists of CUB-200-2011 and NABirds: four text files whose first column is the image's id."""
    path, labels = root / "images.txt", root / "image_class_labels.txt"
    images, class_of, trained = _table(path), _table(labels), _table(root / "train_test_split.txt")
    classes = _table(root / "classes.txt")
    ids: dict[str, dict[str, Id]] = {"1": {}, "0": {}}
    for image, key in images.items():
        if image not in class_of or trained.get(image) not in ids:
            raise UserError(
                f"{path} names image {image}, which {labels} or train_test_split.txt lacks: unpack again"
            )
        if class_of[image] not in classes or not class_of[image].isdecimal():
            raise UserError(
                f"{labels} gives image {key} the class {class_of[image]}, unknown to classes.txt: "
                "the file is not the right one or is damaged, unpack the archive again"
            )
        ids[trained[image]][key] = int(class_of[image])
    return [_List(path, "train", ids["1"]), _List(path, "test", ids["0"])]


def _dog_lists(root: Path, spec: TaskSpec) -> list[_List]:
    """Read the lists of Stanford Dogs, `train_list.mat` and `test_list.mat`."""
    lists = []
    for split in ("train", "test"):
        path = _first(root / "lists" / f"{split}_list.mat", root / f"{split}_list.mat")
        files, labels = mat(path, "file_list", "labels")
        lists.append(
            _numbered(path, split, [str(cell.item()) for cell in files.ravel()], labels.ravel(), spec)
        )
    return lists


def _flower_lists(root: Path, spec: TaskSpec) -> list[_List]:
    """Read the official split of Oxford Flowers, the same as VTAB's."""
    names = {"train": "train", "validation": "val", "test": "test"}
    return [
        _List(root / "setid.mat", names[split], dict(zip(keys, labels.tolist(), strict=True)))
        for split, (keys, labels) in flowers_lists(root).items()
    ]


def _car_lists(root: Path, spec: TaskSpec) -> list[_List]:
    """Read the lists of Stanford Cars in either layout; `cars_test_annos.mat` has no classes."""
    if (root / "car_ims").is_dir():
        path = root / "cars_annos.mat"
        files, classes, tested = _annotations(path, "relative_im_path", "class", "test")
        numbered = _numbered(path, "all", files, classes, spec)
        of = dict(zip(files, tested, strict=True))
        return [
            _List(
                path,
                split,
                {key: id_ for key, id_ in numbered.ids.items() if bool(of[key]) == (split == "test")},
            )
            for split in ("train", "test")
        ]
    lists = []
    for split, name in (("train", "cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        path = _first(root / "devkit" / name, root / name)
        files, classes = _annotations(path, "fname", "class")
        lists.append(_numbered(path, split, [f"cars_{split}/{file}" for file in files], classes, spec))
    return lists


def _first(path: Path, other: Path) -> Path:
    return path if path.is_file() else other


def _annotations(path: Path, *names: str) -> list[list[Any]]:
    table = mat(path, "annotations")[0].ravel()
    if missing := set(names) - set(table.dtype.names or ()):
        raise UserError(
            f"{path} has no field {min(missing)}: it is not the file with all labels, get that one"
        )
    return [[cell.item() for cell in table[name]] for name in names]


def _numbered(path: Path, split: str, keys: list[str], classes: Any, spec: TaskSpec) -> _List:
    """Return a list, given classes that are numbered from 1."""
    if len(keys) != len(classes):
        raise damaged(path, f"{len(keys)} images have {len(classes)} labels")
    labels = check_labels(np.array([int(one) - 1 for one in classes]), spec.num_classes, keys, str(path))
    return _List(path, split, dict(zip(keys, labels.tolist(), strict=True)))


# ---- names of classes


def _folder_names(separator: str) -> Callable[[Path], Callable[[str, Id], str]]:
    """Name classes after folders, without the number: `001.Black_footed_Albatross`, `n02085620-Chihuahua`."""
    return lambda root: lambda key, id_: key.partition("/")[0].partition(separator)[2] or str(id_)


def _nabirds_names(root: Path) -> Callable[[str, Id], str]:
    """Name classes as `classes.txt` does; the folder `0817` is class 817, whatever its id in a json file."""
    names = _table(root / "classes.txt")
    return lambda key, id_: names.get(key.partition("/")[0].lstrip("0") or "0", str(id_))


def _numbers(root: Path) -> Callable[[str, Id], str]:
    return lambda key, id_: str(id_)


_LAYOUTS = {
    "cub200": _Layout(("images",), ("images",), _bird_lists, _folder_names(".")),
    "nabirds": _Layout(("images",), ("images",), _bird_lists, _nabirds_names),
    "oxford_flowers": _Layout(
        ("jpg", "image_00001.jpg"), ("jpg", ""), _flower_lists, _numbers, prefix="jpg/"
    ),
    "stanford_dogs": _Layout(("Images",), ("Images",), _dog_lists, _folder_names("-")),
    "stanford_cars": _Layout(
        ("car_ims", "cars_train"),
        ("", "cars_train", "cars_test"),  # some copies are nested: cars_train/cars_train/00001.jpg
        _car_lists,
        _numbers,
        hint=" (the json files and cars_annos.mat number the images of car_ims, not those of cars_train and "
        "cars_test)",
    ),
}
