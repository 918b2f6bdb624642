"""Read a table that lists own images (CSV or Parquet): path, label and, optionally, split."""

import csv
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from visprompt.data.sources.label_sets import SEPARATOR, name_of
from visprompt.data.sources.split_folders import as_argument, guess_splits, named_splits, split_of, words_of
from visprompt.data.splits import SPLITS
from visprompt.errors import UserError, unknown

COLUMNS = ("path", "label", "split")
_FALSE, _TRUE = frozenset({"", "0", "0.0", "false", "no"}), frozenset({"1", "1.0", "true", "yes"})
_SPLIT_COLUMNS = frozenset(
    {"split", "splits", "fold", "folds", "subset", "set", "dataset", "phase", "partition", "usage"}
)
_MOST_SPLITS = 20  # a column with more different values is not taken for splits or folds

Row = dict[str, str | None]
_Columns = dict[str, str | list[str] | None]


class Found(NamedTuple):
    """An image file in a folder or a CSV.

    Attributes:
        path: Path of the file.
        key: POSIX path relative to the data (Unicode NFC), the same on every machine.
        name: Name of its class (Unicode NFC), or of its set of classes (see `label_sets`).
        split: "train", "val" or "test"; "" where no split is given.
    """

    path: Path
    key: str
    name: str
    split: str


class _Line(NamedTuple):
    number: int
    given: str
    path: Path
    label: str
    split: str


def read_csv(
    root: Path,
    table: Path,
    columns: Mapping[str, Any] | None,
    split_names: Mapping[str, Any] | str | None,
    multi_label: bool = False,
) -> tuple[list[Found], list[str]]:
    """Read the images that a table lists.

    Args:
        root: Folder that paths are relative to; they may be relative to the table or absolute, too.
        table: The CSV or Parquet file, relative to the working directory or to the root.
        columns: Names of the columns: `{path: file, label: class, split: fold}`; `split: null` reads no
            splits. For multi-label data `label` may be a list of columns, each a class, that hold 0 or 1.
        split_names: Names of the splits: `{train: Training, test: Testing}`.
        multi_label: Whether an image may have several classes, or no class: "beach;sea" in the column
            `label`, or a list in Parquet.

    Returns:
        The images, and the names of the columns that were not read.

    Raises:
        UserError: The CSV has an error, or a column that is not read looks like the splits.
    """
    table = table if table.is_file() else root / table
    if not table.is_file():
        raise UserError(
            f"data.csv={table} is not a file: give a CSV with the columns path,label or path,label,split"
        )
    if split_names == "none":
        raise UserError(
            "data.split_names=none is for folders: give 'data.csv_columns={split: null}' to read no splits "
            "from the CSV"
        )
    names = _column_names(columns, multi_label)
    is_parquet = table.suffix.lower() == ".parquet"
    labels = names["label"]
    label_columns = labels if isinstance(labels, list) else [str(labels)]
    rows, header = _parquet_rows(table, label_columns, multi_label) if is_parquet else _rows(table)
    read = [str(names["path"]), *label_columns]
    if not set(read) <= set(header):
        named = " and ".join(read) if isinstance(labels, str) else ", ".join(sorted({*read} - {*header}))
        raise UserError(
            f"data.csv={table} has no columns named {named}, only "
            f"{', '.join(header)}: "
            "give 'data.csv_columns={path: NAME, label: NAME}' or write path,label[,split] as first line"
        )
    split_column = None if names["split"] is None else str(names["split"])
    unread = [name for name in header if name not in (*read, split_column)]
    has_splits = any(_cell(row, split_column) for row in rows)
    if not has_splits and "split" not in (columns or {}):
        for name in unread:
            _refuse_splits(table, name, {_cell(row, name) for row in rows} - {""})
    called = named_splits(split_names) if split_names is not None else dict(zip(SPLITS, SPLITS, strict=True))
    parse = partial(_line, root, table, names=names, called=called, multi_label=multi_label)
    lines = [parse(number, row) for number, row in enumerate(rows, start=1 if is_parquet else 2)]
    if odd := [line for line in lines if bool(line.split) != bool(lines[0].split)]:
        raise UserError(f"data.csv={table}, line {odd[0].number}: give a split for all images or for none")
    keys = _keys(root, [line.path for line in lines])
    found = [Found(line.path, key, line.label, line.split) for line, key in zip(lines, keys, strict=True)]
    _refuse_repeated(table, lines)
    return found, unread


def _column_names(columns: Mapping[str, Any] | None, multi_label: bool) -> _Columns:
    names: _Columns = dict(zip(COLUMNS, COLUMNS, strict=True))
    if columns is not None and not isinstance(columns, Mapping):
        raise UserError(
            f"data.csv_columns={columns} names no columns: give 'data.csv_columns={{split: NAME}}'"
        )
    for column, name in (columns or {}).items():
        if column not in COLUMNS:
            raise unknown("column in data.csv_columns", column, COLUMNS)
        if name is None and column != "split":
            raise UserError(f"data.csv_columns.{column}=null: the CSV must have it, give its name")
        listed = isinstance(name, Sequence) and not isinstance(name, str)
        if listed and not (multi_label and column == "label"):
            raise UserError(
                f"data.csv_columns.{column}={list(name)} names several columns: give one, or for several "
                "classes of an image data.kind=multi_label and a list of label columns"
            )
        names[column] = None if name is None else [*map(str, name)] if listed else str(name)
    return names


def _parquet_rows(table: Path, labels: Sequence[str], multi_label: bool) -> tuple[list[Row], list[str]]:
    """Read the plain columns of a Parquet file as text; lists of labels become names of label sets.

    Args:
        table: The file.
        labels: The columns of labels; no other column is read if it holds lists.
        multi_label: Whether these may hold lists.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        fields = [field for field in parquet.read_schema(table) if _is_plain(_inner(field.type))]
        lists = {field.name for field in fields if field.type != _inner(field.type)}
        if not multi_label and not lists.isdisjoint(labels):
            raise UserError(
                f"data.csv={table}: the column {labels[0]!r} holds lists: give data.kind=multi_label, by "
                "which an image may have several classes"
            )
        plain = [field for field in fields if field.name not in lists or field.name in labels]
        content = parquet.read_table(table, columns=[field.name for field in plain])
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"data.csv={table} is not a Parquet file ({reason}): save it again") from error
    rows = [
        {name: _as_text(value, name, table) for name, value in row.items()} for row in content.to_pylist()
    ]
    if not rows:
        raise UserError(f"data.csv={table} lists no images: it needs one row per image, with path and label")
    return rows, list(content.column_names)


def _inner(kind: Any) -> Any:
    """Return what a list holds, or the type itself."""
    from pyarrow import types

    return kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind


def _is_plain(kind: Any) -> bool:
    """Return whether a column of this type is read: not images, nor anything nested."""
    from pyarrow import types

    return not (types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind))


def _as_text(value: Any, column: str, table: Path) -> str | None:
    if not isinstance(value, list):
        return None if value is None else str(value)
    if odd := [one for one in value if one is None or SEPARATOR in str(one)]:
        raise UserError(
            f"data.csv={table}: a list in the column {column!r} holds {odd[0]!r}, which cannot name a class: "
            f"rename it, without {SEPARATOR!r}"
        )
    return name_of(map(str, value))


def _rows(table: Path) -> tuple[list[Row], list[str]]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte-order mark
            reader = csv.DictReader(file, skipinitialspace=True)
            rows = []
            for row in reader:
                if any(row.pop(None, ())):  # cells beyond the columns; empty ones are a spreadsheet's
                    raise UserError(
                        f"data.csv={table}, line {reader.line_num} has more cells than the first line has "
                        "columns: put names that have a comma in double quotes"
                    )
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data.csv={table} is not a CSV in UTF-8 ({error}): save it as one") from error
    except OSError as error:
        raise UserError(f"data.csv={table} cannot be read ({error.strerror})") from error
    if not rows:
        raise UserError(
            f"data.csv={table} lists no images: its first line is path,label[,split], then one per image"
        )
    return rows, [str(name) for name in reader.fieldnames or ()]


def _cell(row: Row, column: str | None) -> str:
    value = row.get(column) if column is not None else None
    return value.strip() if isinstance(value, str) else ""


def _refuse_splits(table: Path, column: str, values: set[str]) -> None:
    """Raise an error with the option to type where a column that is not read looks like the splits."""
    says = bool(values) and all(split_of(value) for value in values)
    named = bool(_SPLIT_COLUMNS.intersection(words_of(column))) and 2 <= len(values) <= _MOST_SPLITS
    if not says and not named:
        return
    take = f"'data.csv_columns={{split: {column}}}'"
    if not values <= set(SPLITS):
        take += f" and {as_argument(guess_splits(sorted(values)))}"
    listed = ", ".join(sorted(values)[:4]) + (", ..." if len(values) > 4 else "")
    raise UserError(
        f"data.csv={table} has no column split, but a column {column!r} ({listed}): give {take} to read it, "
        "or 'data.csv_columns={split: null}' to cut every class 80/10/10"
    )


def _line(
    root: Path,
    table: Path,
    number: int,
    row: Row,
    names: _Columns,
    called: Mapping[str, str],
    multi_label: bool,
) -> _Line:
    where = f"data.csv={table}, line {number}"
    given = _cell(row, str(names["path"]))
    split = "" if names["split"] is None else _cell(row, str(names["split"]))
    label = _label_set(row, names["label"], where) if multi_label else _cell(row, str(names["label"]))
    if not given or not (label or multi_label):
        raise UserError(f"{where}: the path or the label is empty, fill it in or remove the line")
    if split and split not in called:
        if split_of(split):
            raise UserError(f"{where}: the split is called {split!r}: give {_example(split)}")
        raise UserError(f"{where}: {unknown('split', split, called)}")
    path = next((path for path in _places(root, table, given) if _is_file(path)), None)
    if path is None:
        raise UserError(f"{where}: there is no file {given}, neither below {root} nor next to the CSV")
    return _Line(number, given, path, unicodedata.normalize("NFC", label), called[split] if split else "")


def _label_set(row: Row, columns: str | list[str] | None, where: str) -> str:
    """Return the name of an image's set of classes."""
    if not isinstance(columns, list):
        return name_of(_cell(row, str(columns)).split(SEPARATOR))
    chosen = []
    for column in columns:
        value = _cell(row, column).lower()
        if value not in _FALSE | _TRUE:
            raise UserError(f"{where}: the column {column!r} holds {value!r}: give 1 or 0")
        if SEPARATOR in column:
            raise UserError(f"{where}: the column {column!r} names a class with a {SEPARATOR!r}: rename it")
        chosen += [column] * (value in _TRUE)
    return name_of(chosen)


def _example(split: str) -> str:
    names = {"train": ["NAME"], "test": ["NAME"]} | {split_of(split): [split]}
    return as_argument({known: names[known] for known in SPLITS if known in names})


def _places(root: Path, table: Path, given: str) -> Iterator[Path]:
    """Yield the places where a path may be; file system and CSV may encode accents differently."""
    forms = dict.fromkeys([given, unicodedata.normalize("NFC", given), unicodedata.normalize("NFD", given)])
    for form in forms:
        home = [Path(form).expanduser()] if form.startswith("~/") else []
        yield from (root / form, table.parent / form, *home)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # its name is too long
        return False


def _keys(root: Path, paths: Sequence[Path]) -> list[str]:
    """Return paths relative to the root, or to their common folder where some are outside the root."""
    relative = [_below(path, root) for path in paths]
    if None in relative:
        real = [_resolved(path) for path in paths]
        base = os.path.commonpath([path.parent for path in real])
        relative = [path.relative_to(base) for path in real]
    return [unicodedata.normalize("NFC", path.as_posix()) for path in relative if path is not None]


def _below(path: Path, root: Path) -> Path | None:
    """Return a path relative to the root, after resolving links and dots; None where it is outside."""
    if ".." not in path.parts and path.absolute().is_relative_to(root.absolute()):
        return path.absolute().relative_to(root.absolute())
    real, place = _resolved(path), root.resolve()
    return real.relative_to(place) if real.is_relative_to(place) else None


def _resolved(path: Path) -> Path:
    return path.parent.resolve() / path.name  # a link to a file keeps its name


def _refuse_repeated(table: Path, lines: Sequence[_Line]) -> None:
    """Raise where a file is listed twice, also in another spelling or through a link."""
    seen: dict[tuple[int, int], _Line] = {}
    for line in lines:
        status = line.path.stat()
        first = seen.setdefault((status.st_dev, status.st_ino), line)
        if first is not line:
            what = (
                "is listed twice"
                if line.given == first.given
                else f"is the file of line {first.number}, {first.given}"
            )
            raise UserError(
                f"data.csv={table}, line {line.number}: {line.given} {what}: remove one of the lines"
            )
