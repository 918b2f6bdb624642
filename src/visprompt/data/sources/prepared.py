"""The vtab-1k folder in circulation: `<task>/{train800,val200,train800val200,test}.txt` and `<task>/images/`.

Labels are 0-based labels of the tasks, and the splits are cut already. All images were re-encoded as JPEG of
quality 75.
"""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from visprompt.data.catalog.task import TaskSpec
from visprompt.data.sources.archive import inside, readable
from visprompt.data.sources.content import Content, Found, Part, Wanted, check_labels
from visprompt.errors import UserError

_LOSSLESS = frozenset({".bmp", ".png"})

_log = logging.getLogger(__name__)


class _Line(NamedTuple):
    key: str
    label: int


def prepared(root: Path, spec: TaskSpec) -> Content:
    """Open a task of the prepared folder.

    Where train800val200.txt is the only training list, its first lines become train800 and the rest val200:
    the union is that of the benchmark, the cut may differ from that of other papers.

    Args:
        root: The folder of all tasks, each under its id or an alias, or the folder of this task.
        spec: The task.

    Returns:
        The parts train800, val200 and test; keys are the paths in the lists. Lossy unless all images are PNG
        or BMP.

    Raises:
        UserError: The folder or a list is missing, or a line is wrong or names a missing image.
    """
    folder = _folder(root, spec)
    lines = _lists(folder, spec)
    parts = {part: _part(folder, spec, part, found) for part, found in lines.items()}
    names = [line.key for found in lines.values() for line in found]
    lossless = all(Path(name).suffix.lower() in _LOSSLESS for name in names)
    return Content(parts, partial(_read, folder, parts), lossy=not lossless)


def _folder(root: Path, spec: TaskSpec) -> Path:
    names = (spec.id, *spec.aliases)
    for folder in (*(root / name for name in names), root):
        if (folder / "test.txt").is_file():
            return folder
    raise UserError(
        f"{root} holds no folder {' or '.join(names)} with test.txt: "
        "give the folder into which vtab-1k.zip was unpacked, or the folder of this task"
    )


def _lists(folder: Path, spec: TaskSpec) -> dict[str, list[_Line]]:
    if (folder / "train800.txt").is_file() or not (folder / "train800val200.txt").is_file():
        return {part: _list(folder, f"{part}.txt") for part in ("train800", "val200", "test")}
    both, cut = _list(folder, "train800val200.txt"), spec.split_sizes["train800"]
    _log.warning(
        "%s has no train800.txt: the first %d lines of train800val200.txt are taken for it", folder, cut
    )
    return {"train800": both[:cut], "val200": both[cut:], "test": _list(folder, "test.txt")}


def _list(folder: Path, name: str) -> list[_Line]:
    path = folder / name
    with readable(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    lines: dict[str, _Line] = {}
    for number, row in enumerate(text.splitlines(), start=1):
        if row.strip():
            line = _line(folder, path, number, row)
            if line.key in lines:
                raise UserError(f"{path}, line {number}: {line.key} is listed twice, get the folder again")
            lines[line.key] = line
    return list(lines.values())


def _line(folder: Path, path: Path, number: int, row: str) -> _Line:
    try:
        name, label = row.rsplit(maxsplit=1)
        line = _Line(inside(path, name.strip()).as_posix(), int(label))
    except ValueError as error:
        raise UserError(
            f"{path}, line {number}: {row!r} is not a path and a label, get the folder again"
        ) from error
    if not (folder / line.key).is_file():
        raise UserError(
            f"{path}, line {number}: there is no image {line.key} in {folder}, get the folder again"
        )
    return line


def _part(folder: Path, spec: TaskSpec, part: str, lines: list[_Line]) -> Part:
    keys = [line.key for line in lines]
    labels = np.array([line.label for line in lines], np.int64)
    return Part(
        keys, {spec.id: check_labels(labels, spec.num_classes, keys, f"{folder}: the list of {part}")}
    )


def _read(folder: Path, parts: dict[str, Part], wanted: Wanted) -> Iterator[Found]:
    for name, part in parts.items():
        chosen = frozenset(wanted.get(name, ()))
        for key in part.keys:
            if key in chosen:
                with readable(folder / key):
                    data = (folder / key).read_bytes()
                yield Found(name, key, data)
