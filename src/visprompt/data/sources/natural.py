"""Readers of the original files of VTAB's natural datasets. `root` is the folder that holds the files."""

import lzma
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import numpy as np

from visprompt.data.catalog.class_names import class_names
from visprompt.data.sources.archive import Member, damaged, members, pick, readable, texts, unpacked
from visprompt.data.sources.arrays import mat
from visprompt.data.sources.content import Content, Found, Part, Wanted, check_labels, decode_rgb
from visprompt.data.sources.images import BadImage, open_image
from visprompt.errors import UserError

_CIFAR_ROW = 2 + 32 * 32 * 3  # coarse label, fine label, pixels
_CIFAR_FILES = {"cifar-100-binary/train.bin": "train", "cifar-100-binary/test.bin": "test"}
_CALTECH_INNER = "caltech-101/101_ObjectCategories.tar.gz"
# no leading dot: metadata of macOS
_CALTECH_IMAGE = re.compile(r"101_ObjectCategories/([^./][^/]*/[^./][^/]*\.jpg)")
_CALTECH_TRAIN = 30  # per class
_SUN397_PIXELS = 120_000


def folder_labels(path: Path, task: str, keys: Sequence[str], folder_of: Callable[[str], str]) -> np.ndarray:
    """Return the labels, int64 [n], of images whose folder is named after the class.

    Args:
        path: The archive, for errors.
        task: Task with the class names.
        keys: The images.
        folder_of: Returns the class name of a key.

    Raises:
        UserError: A folder's name is not a class.
    """
    index = {name: label for label, name in enumerate(class_names(task))}
    folders = [folder_of(key) for key in keys]
    for key, folder in zip(keys, folders, strict=True):
        if folder not in index:
            raise UserError(
                f"{path} holds {key}, whose class {folder!r} is not one of the {len(index)} of {task}: "
                "it is not the official file, get it again"
            )
    return np.array([index[folder] for folder in folders], np.int64)


def _top(key: str) -> str:
    return key.rsplit("/", 1)[0]


def cifar(root: Path) -> Content:
    """Open CIFAR-100, `cifar-100-binary.tar.gz`, with its fine labels; keys are row numbers."""
    path = root / "cifar-100-binary.tar.gz"
    labels: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    for split, _, rows in _cifar_rows(path):
        labels[split].append(rows[:, 1])
    parts = {}
    for name, split in _CIFAR_FILES.items():
        if split not in labels:
            raise UserError(f"{path} holds no images in {name}: it is not the official file, get it again")
        fine = np.concatenate(labels[split])
        keys = [str(row) for row in range(len(fine))]
        parts[split] = Part(keys, {"cifar": check_labels(fine, 100, keys, f"{path} ({split})")})
    return Content(parts, lambda wanted: _read_cifar(path, wanted))


def _cifar_rows(path: Path) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield the split, the number of the first row, and blocks of rows, uint8 [up to 1000, 3074]."""
    for member in members(path):
        if member.name not in _CIFAR_FILES:
            continue
        first = 0
        with readable(path), member.open() as file:
            while block := file.read(1000 * _CIFAR_ROW):
                if len(block) % _CIFAR_ROW:
                    raise damaged(path, f"{member.name} ends within an image")
                rows = np.frombuffer(block, np.uint8).reshape(-1, _CIFAR_ROW)
                yield _CIFAR_FILES[member.name], first, rows
                first += len(rows)


def _read_cifar(path: Path, wanted: Wanted) -> Iterator[Found]:
    sets = {split: set(keys) for split, keys in wanted.items()}
    for split, first, rows in _cifar_rows(path):
        for number, row in enumerate(rows, start=first):
            if (key := str(number)) in sets.get(split, ()):
                # planes of red, green and blue
                yield Found(split, key, np.ascontiguousarray(row[2:].reshape(3, 32, 32).transpose(1, 2, 0)))


def caltech101(root: Path) -> Content:
    """Open Caltech101, `caltech-101.zip`; keys are `Dir/image_0001.jpg`.

    30 images of each class are train, the rest is test. The official split draws them with numpy (seed 1234,
    one generator for all classes) from an unsorted directory listing, which cannot be reproduced. Here
    folders and their .jpg files are sorted before the same draw, so the images differ.
    """
    path = root / "caltech-101.zip"
    folders: defaultdict[str, set[str]] = defaultdict(set)
    for member in _caltech_members(path):
        if key := _caltech_key(member.name):
            folders[_top(key)].add(key)
    if not folders:
        raise UserError(
            f"{path} holds no images in 101_ObjectCategories: it is not the official file, get it again"
        )
    split_keys = _caltech_draw(path, folders)
    return Content(
        {
            split: Part(
                keys, {"caltech101": folder_labels(path, "caltech101", keys, lambda key: _top(key).lower())}
            )
            for split, keys in split_keys.items()
        },
        lambda wanted: pick(_caltech_members(path), _caltech_key, wanted),
    )


def _caltech_members(path: Path) -> Iterator[Member]:
    for outer in members(path):
        if outer.name == _CALTECH_INNER:
            with readable(path), outer.open() as stream:
                yield from members(path, stream)
            return
    raise UserError(f"{path} holds no {_CALTECH_INNER}: it is not the official file, get it again")


def _caltech_key(name: str) -> str | None:
    found = _CALTECH_IMAGE.fullmatch(name)
    return found[1] if found else None


def _caltech_draw(path: Path, folders: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    draw = np.random.RandomState(1234)  # the official draw's generator
    split_keys: dict[str, list[str]] = {"train": [], "test": []}
    for folder, found in sorted(folders.items()):
        keys = sorted(found)
        if len(keys) < _CALTECH_TRAIN:
            raise UserError(
                f"{path} holds {len(keys)} images of {folder}, fewer than the {_CALTECH_TRAIN} that train "
                "takes: it is not the official file, get it again"
            )
        chosen = set(draw.choice(keys, _CALTECH_TRAIN, replace=False).tolist())
        split_keys["train"] += [key for key in keys if key in chosen]
        split_keys["test"] += [key for key in keys if key not in chosen]
    return split_keys


def dtd(root: Path) -> Content:
    """Open the first fold of DTD, `dtd-r1.0.1.tar.gz`; keys are `banded/banded_0002.jpg`."""
    path = root / "dtd-r1.0.1.tar.gz"
    lists = texts(path, *(f"dtd/labels/{name}1.txt" for name in ("train", "val", "test")))
    keys_of = {
        split: text.split() for split, text in zip(("train", "validation", "test"), lists, strict=True)
    }
    return Content(
        {
            split: Part(keys, {"dtd": folder_labels(path, "dtd", keys, _top)})
            for split, keys in keys_of.items()
        },
        lambda wanted: pick(members(path), lambda name: name.removeprefix("dtd/images/"), wanted),
    )


def flowers_lists(root: Path) -> Mapping[str, tuple[list[str], np.ndarray]]:
    """Read the official split of the 102 Oxford flowers from `setid.mat` and `imagelabels.mat`.

    Args:
        root: Folder with the two files.

    Returns:
        "train", "validation" and "test" -> file names (`image_00001.jpg`) and their labels, int64 [n],
        0-based.

    Raises:
        UserError: A file is missing or damaged, or the two do not match.
    """
    path = root / "imagelabels.mat"
    all_labels = mat(path, "labels")[0].ravel().astype(np.int64) - 1
    numbers = mat(root / "setid.mat", "trnid", "valid", "tstid")
    lists = {}
    for split, ids in zip(("train", "validation", "test"), numbers, strict=True):
        ids = ids.ravel().astype(np.int64)
        if ids.size and (ids.min() < 1 or ids.max() > len(all_labels)):
            raise UserError(
                f"{root / 'setid.mat'} names images outside the 1..{len(all_labels)} that {path} labels: "
                "one of the two is not the official file, get both again"
            )
        names = [f"image_{number:05d}.jpg" for number in ids]
        lists[split] = names, check_labels(all_labels[ids - 1], 102, names, str(path))
    return lists


def oxford_flowers102(root: Path) -> Content:
    """Open Oxford Flowers, `102flowers.tgz`, `imagelabels.mat`, `setid.mat`; keys are `image_00001.jpg`."""
    path = root / "102flowers.tgz"
    return Content(
        {
            split: Part(keys, {"oxford_flowers102": labels})
            for split, (keys, labels) in flowers_lists(root).items()
        },
        lambda wanted: pick(members(path), lambda name: name.removeprefix("jpg/"), wanted),
    )


def oxford_iiit_pet(root: Path) -> Content:
    """Open Oxford-IIIT Pets, `images.tar.gz` and `annotations.tar.gz`; keys are `Abyssinian_100.jpg`."""
    path, lists = root / "images.tar.gz", root / "annotations.tar.gz"
    names = {"train": "annotations/trainval.txt", "test": "annotations/test.txt"}
    parts = {}
    for (split, name), text in zip(names.items(), texts(lists, *names.values()), strict=True):
        keys, labels = _pet_list(lists, name, text)
        parts[split] = Part(keys, {"oxford_iiit_pet": check_labels(labels, 37, keys, f"{lists} ({name})")})
    return Content(
        parts, lambda wanted: pick(members(path), lambda name: name.removeprefix("images/"), wanted)
    )


def _pet_list(path: Path, name: str, text: str) -> tuple[list[str], np.ndarray]:
    rows = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if strange := [row for row in rows if len(row) != 4 or not row[1].isdecimal()]:
        raise damaged(
            path, f"{name} has the line {' '.join(strange[0])!r} instead of name, class, species and breed"
        )
    return [f"{row[0]}.jpg" for row in rows], np.array([int(row[1]) - 1 for row in rows], np.int64)


def svhn(root: Path) -> Content:
    """Open SVHN's cropped digits, `{train,test}_32x32.mat`; keys are row numbers, and class 10 becomes 0.

    scipy reads a variable as a whole: the images of one split are in memory at once (225 MB for train).
    """
    parts = {}
    for split in ("train", "test"):
        path = root / f"{split}_32x32.mat"
        labels = mat(path, "y")[0].ravel()
        keys = [str(row) for row in range(len(labels))]
        parts[split] = Part(
            keys, {"svhn": check_labels(np.where(labels == 10, 0, labels), 10, keys, str(path))}
        )
    return Content(parts, lambda wanted: _read_svhn(root, parts, wanted))


def _read_svhn(root: Path, parts: Mapping[str, Part], wanted: Wanted) -> Iterator[Found]:
    for split, part in parts.items():
        keys = set(wanted.get(split, ()))
        if not keys:
            continue
        path, count = root / f"{split}_32x32.mat", len(part.keys)
        images = mat(path, "X")[0]
        if images.shape != (32, 32, 3, count) or images.dtype != np.uint8:
            raise damaged(path, f"its images are {images.dtype} {images.shape}, its labels {count}")
        for row, key in enumerate(part.keys):
            if key in keys:
                yield Found(split, key, np.ascontiguousarray(images[..., row]))


def sun397_keys() -> dict[str, list[str]]:
    """Return the keys of SUN397 that VTAB-1k needs: 800 train, 200 validation, all 21,750 test, in md5 order.

    Source: the lists sun397_tfds_{tr,va,te}.txt of TensorFlow Datasets. They do not include the two images
    that its builder leaves out because they cannot be decoded.
    """
    data = lzma.decompress((files(__package__) / "sun397_keys.txt.xz").read_bytes())
    keys: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for line in data.decode().splitlines():
        if not line.startswith("#"):
            split, key = line.split(" ")
            keys[split].append(key)
    return keys


def sun397(root: Path) -> Content:
    """Open SUN397, `SUN397.tar.gz`; keys are `/a/abbey/sun_x.jpg`, only those that VTAB-1k needs."""
    path = unpacked(root / "SUN397.tar.gz")
    keys_of = sun397_keys()
    return Content(
        {
            split: Part(keys, {"sun397": folder_labels(path, "sun397", keys, _top)})
            for split, keys in keys_of.items()
        },
        lambda wanted: pick(members(path), lambda name: f"/{name.removeprefix('SUN397/')}", wanted),
        decode=decode_sun397,
    )


def decode_sun397(data: bytes) -> np.ndarray:
    """Decode an image of SUN397 as the official task does: shrunk to 120,000 pixels, re-encoded as JPEG.

    OpenCV decodes, resizes bilinearly and encodes with its default quality; the result is decoded again.
    OpenCV could not decode the GIF files (whose names end in .jpg too) at that time; another decoder read
    them with red and blue swapped, and so they are swapped here.

    Args:
        data: The file's bytes: JPEG, PNG, BMP or GIF.

    Returns:
        uint8 [h, w, 3], RGB.

    Raises:
        BadImage: The bytes are damaged or of an unknown format.
    """
    import cv2

    gif = data.startswith(b"GIF8")  # OpenCV reads GIF since 4.11
    image = None if gif else opencv_decoded(data)
    if image is None:
        image = decode_rgb(data)
    if (pixels := image.shape[0] * image.shape[1]) > _SUN397_PIXELS:
        factor = float(np.sqrt(_SUN397_PIXELS / pixels))
        image = cv2.resize(image, dsize=None, fx=factor, fy=factor)
    return decode_rgb(cv2.imencode(".jpg", image)[1].tobytes())


def opencv_decoded(data: bytes) -> np.ndarray | None:
    """Decode an image with OpenCV and the flags of the official tasks.

    Returns:
        uint8 (uint16 for 16-bit files) [h, w, 3], BGR, with its EXIF orientation applied; None if OpenCV
        cannot.
    """
    import cv2

    try:
        open_image(BytesIO(data)).close()  # limits the pixels
    except BadImage:
        raise
    except Exception:  # Pillow cannot read it, OpenCV may
        pass
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error:  # of no bytes, or of more pixels than it allows
        return None
