"""A data set of the Hugging Face hub, or a local one of `datasets`, as files and a list of own images.

The images are written once, byte by byte as the data set has them, next to `labels.csv` (path, label, split),
so that everything after this treats them as the user's own images.
"""

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

from filelock import FileLock

from visprompt.data.sources.hf import ADVICE, unreadable
from visprompt.data.sources.images import FORMATS, decoding, open_image
from visprompt.data.sources.label_sets import SEPARATOR, name_of
from visprompt.data.splits import SPLITS
from visprompt.errors import UserError, unknown
from visprompt.files import explained, publish

TABLE = "labels.csv"
_ABOUT = "dataset.json"
# the names of splits in circulation
_SPLIT_NAMES = {
    "train": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "dev": "val",
    "test": "test",
}


@dataclass(frozen=True)
class HubImages:
    """Which images and labels of which data set are read.

    Attributes:
        dataset: "USER/NAME" on the hub, or a local folder: a clone, a folder of Parquet files, or one that
            `save_to_disk` wrote.
        subset: The data set's configuration, if it has several.
        revision: Branch, tag or commit on the hub.
        image: The column of images; None for the only one.
        label: The column of labels; None for the only column of class labels.
        splits: For each of train, val and test the name of a split, or a slice of one ("train[:90%]"); None
            for those whose names are known.
        multi_label: Whether the labels are lists of classes.
    """

    dataset: str
    subset: str | None = None
    revision: str = "main"
    image: str | None = None
    label: str | None = None
    splits: Mapping[str, str] | None = None
    multi_label: bool = False

    @property
    def local(self) -> Path | None:
        """Return the local folder; None for a data set on the hub."""
        folder = Path(self.dataset).expanduser()
        return folder if folder.is_dir() else None

    @property
    def name(self) -> str:
        """Return the last part of the data set's name."""
        return Path(self.dataset).expanduser().name

    def folder(self, place: Path) -> Path:
        """Return the folder below `place` that the images are written to, whether it exists or not."""
        key = [self.dataset, self.subset, self.revision, self.image, self.label, dict(self.splits or {})]
        files: list[Any] = []
        if (local := self.local) is not None:  # what changes there is written again
            paths = sorted(path for path in local.rglob("*") if path.is_file())
            files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        digest = sha256(json.dumps([*key, self.multi_label, files]).encode()).hexdigest()
        return place / f"{self.name}-{digest[:12]}"


def written(source: HubImages, place: Path, download: bool) -> Path:
    """Return the folder of the images and of `labels.csv`, which is written first if it is missing.

    Args:
        source: What is read.
        place: The folder of all such folders.
        download: Whether a data set on the hub may be downloaded.

    Raises:
        UserError: The data set cannot be read, or has no such split or column, or labels of another kind.
    """
    folder = source.folder(place)
    if not folder.is_dir():
        if source.local is None and not download:
            raise UserError(
                f"the images of {source.dataset} are not on this machine, and data.download=false: give "
                "data.download=true, or data.dataset= a local folder"
            )
        with ExitStack() as locks:  # processes of one run would each write a copy
            try:
                place.mkdir(parents=True, exist_ok=True)
                locks.enter_context(FileLock(place / f"{folder.name}.lock"))
            except OSError as error:
                raise explained(error, place, "paths.data_dir") from error
            if not folder.is_dir():
                write = partial(_write, source)
                publish(folder, write, folder.is_dir, option="paths.data_dir")
    return folder


def _write(source: HubImages, folder: Path) -> None:
    """Write the files, the list, and what they were made of."""
    from datasets import Image

    tables, places = _tables(source), _places(source)
    rows = []
    for split, table in tables.items():
        image, label = _columns(source, table)
        labels = _labels(source, table, label, split)
        table = table.select_columns([image]).cast_column(image, Image(decode=False))
        (folder / (split or "all")).mkdir()
        for row, (cell, name) in enumerate(zip(table, labels, strict=True)):
            content = _content(cell[image], places, f"row {row} of {split or 'the data'} in {source.dataset}")
            path = f"{split or 'all'}/{row:08d}.{_suffix(content)}"
            (folder / path).write_bytes(content)
            rows.append((path, name, split))
    with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    about = {"dataset": source.dataset, "subset": source.subset, "revision": source.revision}
    (folder / _ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")


def _tables(source: HubImages) -> dict[str, Any]:
    """Return the data set's tables by split; under "" if its splits are not known."""
    splits = source.splits
    if splits is not None and (odd := set(splits) - set(SPLITS)):
        raise unknown("split in data.split_names", min(odd), SPLITS)
    if splits is not None:
        return {split: _loaded(source, name) for split, name in splits.items()}
    tables: Mapping[str, Any] = _loaded(source, None)
    names = {name: _SPLIT_NAMES.get(name) for name in tables}
    known = [split for split in names.values() if split]
    if None in names.values() or len(set(known)) < len(known):
        raise UserError(
            f"{source.dataset} has the splits {', '.join(tables)}: give 'data.split_names={{train: NAME, "
            "val: NAME, test: NAME}', where a name may be a slice such as train[:90%]"
        )
    if known == ["train"]:  # as with own folders without splits
        return {"": tables[next(iter(tables))]}
    return {str(split): tables[name] for name, split in names.items()}


def _loaded(source: HubImages, split: str | None) -> Any:
    """Return one split of the data set, or all by name."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    local = source.local
    try:
        if local and any((local / name).is_file() for name in ("dataset_dict.json", "state.json")):
            found = load_from_disk(str(local))
            tables = found if isinstance(found, DatasetDict) else {"train": found}
            if split is not None and split not in tables:
                raise unknown("split in data.split_names (no slices here)", split, [*map(str, tables)])
            return tables if split is None else tables[split]
        # or `datasets` would take what it cached of another folder of the same name
        fresh: Any = {"verification_mode": "no_checks"} if local else {"revision": source.revision}
        return load_dataset(str(local or source.dataset), source.subset, split=split, **fresh)
    except UserError:
        raise
    except Exception as error:  # of pyarrow, fsspec, the HTTP library, the hub or the system
        what = f"the data set {source.dataset}" + (f", split {split}" if split else "")
        raise unreadable(
            what, error, "check data.dataset and data.split_names" if local else ADVICE
        ) from error


def _columns(source: HubImages, table: Any) -> tuple[str, str]:
    """Return the columns of the images and of the labels."""
    from datasets import ClassLabel, Image

    kinds = {name: _inner(feature) for name, feature in table.features.items()}
    chosen = []
    for what, given, kind in (("image", source.image, Image), ("label", source.label, ClassLabel)):
        fits = [name for name, feature in kinds.items() if isinstance(feature, kind)]
        if given is None and len(fits) != 1:
            raise UserError(
                f"{source.dataset} has {len(fits)} columns that can be data.{what}: give data.{what}= one of "
                f"{', '.join(fits or kinds)}"
            )
        if given is not None and given not in kinds:
            raise unknown(f"data.{what}", given, list(kinds))
        chosen.append(given or fits[0])
    return chosen[0], chosen[1]


def _inner(feature: Any) -> Any:
    """Return what a list holds, or the feature itself."""
    return _inner(feature.feature) if hasattr(feature, "feature") else feature


def _labels(source: HubImages, table: Any, column: str, split: str) -> Iterator[str]:
    """Yield the class of each row, or the name of its set of classes (see `label_sets`)."""
    feature = table.features[column]
    names = getattr(_inner(feature), "names", None)
    if hasattr(feature, "feature") != source.multi_label:
        kind = "single_label" if source.multi_label else "multi_label"
        holds = "one label" if source.multi_label else "a list of labels"
        raise UserError(
            f"the column {column!r} of {source.dataset} holds {holds} for each image: give data.kind={kind}"
        )

    def named(value: Any, row: int) -> str:
        if value is None or (names and not 0 <= value < len(names)):
            raise UserError(
                f"row {row} of {split or 'the data'} in {source.dataset} has no label ({value}): leave this "
                "split out with data.split_names"
            )
        name = str(names[value] if names else value)
        if source.multi_label and SEPARATOR in name:
            raise UserError(
                f"the class {name!r} of {source.dataset} has a {SEPARATOR!r}, which separates classes"
            )
        return name

    for row, value in enumerate(table.data.column(column).to_pylist()):
        yield name_of(named(one, row) for one in value or ()) if source.multi_label else named(value, row)


def _places(source: HubImages) -> list[Path]:
    """Return the folders in which the files of a data set may be: a path in it must not reach others."""
    import datasets
    from huggingface_hub import constants

    caches = (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
    return [Path(place).resolve() for place in (*caches, *filter(None, [source.local]))]


def _content(cell: Any, places: Sequence[Path], where: str) -> bytes:
    """Return the bytes of an image's file, which is in the data set or in one of some folders."""
    if cell and cell.get("bytes"):
        return bytes(cell["bytes"])
    path = Path(cell["path"]) if cell and cell.get("path") else None
    if path is not None and path.is_file():
        if not any(path.resolve().is_relative_to(folder) for folder in places):
            raise UserError(
                f"{where} names the file {path}, which is not a part of the data set: it is not read"
            )
        return path.read_bytes()
    raise UserError(f"{where} has no image: leave it out of the data set")


def _suffix(content: bytes) -> str:
    """Return the suffix of the file's format; what cannot be read is refused later, with all like it."""
    try:
        with decoding(), open_image(BytesIO(content), sys.maxsize) as image:
            name = str(image.format).lower()
            return "jpeg" if name == "mpo" else name  # a JPEG of a camera, with more than one picture
    except UserError:
        return FORMATS[0].lower()
