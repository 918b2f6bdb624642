"""The original files of ADE20K's scene parsing benchmark: ADEChallengeData2016.zip, or unpacked."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from visprompt.data.catalog.task import TaskSpec
from visprompt.data.masks import IGNORED
from visprompt.data.sources.archive import Member, by_name, damaged, unpacked
from visprompt.data.sources.masked_images import MaskedImages, Pair
from visprompt.data.splits import md5_order
from visprompt.errors import UserError

_FILE = re.compile(r"(?:.*/)?(images|annotations)/(training|validation)/([^/]+)\.(?:jpg|png)")
_CLASSES = "objectInfo150.txt"

_log = logging.getLogger(__name__)


@contextmanager
def ade20k(root: Path, spec: TaskSpec) -> Iterator[MaskedImages]:
    """Open the files, and cut the official training images into train and val as the record says.

    Args:
        root: The folder with the archive, with the folder that it unpacks to, or that folder.
        spec: The record.

    Yields:
        The images with their annotations, which can be read in the `with`.

    Raises:
        UserError: The archive is missing or damaged, or has other images than the record says.
    """
    path = root if (root / "images").is_dir() else unpacked(root / spec.files[0].name)
    with by_name(path) as files:
        found: dict[tuple[str, str], dict[str, Member]] = {}  # official split and name -> its two files
        for name, member in files.items():
            if match := _FILE.fullmatch(name):
                kind, split, stem = match.groups()
                found.setdefault((split, stem), {})[kind] = member
        for (split, stem), pair in found.items():
            if len(pair) < 2:
                lost = "annotation" if "images" in pair else "image"
                raise UserError(f"{path} has no {lost} of {split}/{stem}: it is incomplete, get it again")
        for split, size in spec.official_sizes.items():
            if (count := sum(official == split for official, _ in found)) != size:
                raise UserError(
                    f"the {split} split of {spec.id} has {count:,} images, expected {size:,}: the files in "
                    f"{path} are not the right ones, get them again"
                )
        _compare_names(path, files, spec)
        items = tuple(sorted(_pairs(found, spec), key=lambda pair: pair.key))
        labels = {0: IGNORED} | {number + 1: number for number in range(spec.num_classes)}
        yield MaskedImages(spec.class_names, items, labels)


def _pairs(found: Mapping[tuple[str, str], Mapping[str, Member]], spec: TaskSpec) -> Iterator[Pair]:
    """Yield the images of each split set, a slice of an official split in md5 order of the file names."""
    for split_set, (official, start, stop) in spec.cuts.items():
        names = [f"{stem}.jpg" for split, stem in found if split == official]
        for name in md5_order(names, official)[start:stop]:
            files = found[official, name.removesuffix(".jpg")]
            yield Pair(f"{official}/{name}", split_set, files["images"].read, files["annotations"].read)


def _compare_names(path: Path, files: Mapping[str, Member], spec: TaskSpec) -> None:
    """Warn where the archive's list of classes has other names than the record.

    The list is a table of tabs whose last column has the names of a class, separated by commas.
    """
    for name, member in files.items():
        if name.rpartition("/")[2] == _CLASSES:
            try:
                lines = member.read().decode().splitlines()[1:]
            except UnicodeDecodeError as error:
                raise damaged(path, f"{name} is not a text file") from error
            listed = tuple(line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip())
            if listed != spec.class_names:
                _log.warning("%s: %s has other names of classes than this project", spec.id, name)
