"""Mirrors on the Hugging Face hub, read with `datasets`: pinned revision, checked order of the labels."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from visprompt.data.catalog.task import Mirror, TaskSpec
from visprompt.data.sources.content import Content, Found, Part, Wanted, check_labels
from visprompt.errors import UserError

_LOSSLESS_ORIGINALS = frozenset(
    {"cifar", "svhn", "clevr", "dsprites", "kitti", "smallnorb", "patch_camelyon"}
)
_JPEG = b"\xff\xd8\xff"
ADVICE = "check the network and the name, or give the folder of a local clone"


def hub(spec: TaskSpec, root: Path | None, revision: str) -> tuple[Content, str]:
    """Open a task's mirror.

    Args:
        spec: The task; it must have a mirror.
        root: A local clone of the mirror; None to download it into the cache of `datasets`.
        revision: The commit to read; "" for the commit in the record or, where it has none, the newest one.

    Returns:
        The content, with the labels of all tasks in the mirror's record (only this task's are checked for
        their range), and the commit that was read; for a clone, the given `revision`.

    Raises:
        UserError: The task has no mirror; the hub cannot be reached or has no such dataset; a split or column
            is missing; labels are out of range or in another order than the record's class names.
    """
    mirror = spec.mirror
    if mirror is None:
        raise UserError(
            f"no mirror of {spec.id} on the Hugging Face hub is known: take data.source=raw or prepared"
        )
    if root is None:
        revision = revision or mirror.revision or _newest(mirror)
    tables = _tables(mirror, root, revision)
    where = f"the mirror {root or mirror.repo}"
    parts = {split: _part(spec, mirror, table, f"{where}, {split}") for split, table in tables.items()}
    images = {split: _undecoded(table, mirror, f"{where}, {split}") for split, table in tables.items()}
    lossy = spec.dataset in _LOSSLESS_ORIGINALS and any(_is_jpeg(table, mirror) for table in images.values())
    return Content(parts, partial(_read, mirror, images, parts), lossy=lossy), revision


def unreadable(what: str, error: Exception, advice: str) -> UserError:
    """Return the error of a data set that a library could not read, with the first line of its reason."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return UserError(f"{what} cannot be read ({reason}): {advice}")


def _newest(mirror: Mirror) -> str:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(mirror.repo).sha or ""
    except Exception as error:  # of the HTTP library, the hub or the system
        raise unreadable(f"the Hugging Face dataset {mirror.repo}", error, ADVICE) from error


def _tables(mirror: Mirror, root: Path | None, revision: str) -> dict[str, Any]:
    from datasets import load_dataset

    what = f"the clone {root}" if root else f"the Hugging Face dataset {mirror.repo} at {revision}"
    if root and not root.is_dir():
        raise UserError(f"there is no folder {root}: give the folder of a clone of {mirror.repo}")
    try:
        # or `datasets` would take what it cached of another folder of the same name
        fresh: Any = (
            {"download_mode": "reuse_cache_if_exists", "verification_mode": "no_checks"} if root else {}
        )
        found = load_dataset(
            str(root or mirror.repo), mirror.config, revision=None if root else revision, **fresh
        )
    except Exception as error:  # of pyarrow, fsspec, the HTTP library, the hub or the system
        raise unreadable(what, error, "get it again" if root else ADVICE) from error
    if missing := [name for name in mirror.splits.values() if name not in found]:
        raise UserError(
            f"{what} has no split {missing[0]!r} (it has {', '.join(found)}): it is not the right one"
        )
    return {split: found[name] for split, name in mirror.splits.items()}


def _part(spec: TaskSpec, mirror: Mirror, table: Any, where: str) -> Part:
    for name in (mirror.image, *mirror.labels.values(), *filter(None, [mirror.key])):
        if name not in table.features:
            raise UserError(f"{where} has no column {name!r} (it has {', '.join(table.features)})")
    keys = [str(key) for key in (_column(table, mirror.key) if mirror.key else range(len(table)))]
    labels = {task: _integers(table, name, where) for task, name in mirror.labels.items()}
    _check_order(spec, getattr(table.features[mirror.labels[spec.id]], "names", None) or (), where)
    check_labels(labels[spec.id], spec.num_classes, keys, where)
    return Part(keys, labels)


def _column(table: Any, name: str) -> list[Any]:
    return table.data.column(name).to_pylist()


def _integers(table: Any, name: str, where: str) -> np.ndarray:
    try:
        return np.asarray(_column(table, name)).astype(np.int64, casting="same_kind")
    except TypeError as error:
        raise UserError(
            f"{where}: the column {name!r} holds other things than labels: check the mirror"
        ) from error


def _check_order(spec: TaskSpec, names: Sequence[str], where: str) -> None:
    """Check the order of class names, ignoring case, spaces, underscores and hyphens."""
    if not names or not spec.class_names or list(names) == [str(number) for number in range(len(names))]:
        return
    for label, (theirs, ours) in enumerate(zip_longest(names, spec.class_names)):
        if _plain(theirs) != _plain(ours):
            raise UserError(
                f"{where} gives label {label} to the class {theirs!r}, not to {ours!r} as {spec.id} does: "
                "it is another dataset or order, take another source"
            )


def _plain(name: str | None) -> str | None:
    return None if name is None else re.sub(r"[\s_-]", "", name.casefold())


def _undecoded(table: Any, mirror: Mirror, where: str) -> Any:
    """Return the column of images, as the bytes of their files."""
    from datasets import Image

    try:
        return table.select_columns([mirror.image]).cast_column(mirror.image, Image(decode=False))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"{where}: the column {mirror.image!r} holds no images, check the record's mirror"
        ) from error


def _is_jpeg(table: Any, mirror: Mirror) -> bool:
    rows = {0, len(table) // 2, len(table) - 1} if len(table) else set()
    return any(_bytes(table, mirror, row).startswith(_JPEG) for row in rows)


def _bytes(table: Any, mirror: Mirror, row: int) -> bytes:
    """Return the file in a cell; empty where the mirror has only a path or no image."""
    return (table[row][mirror.image] or {}).get("bytes") or b""


def _read(
    mirror: Mirror, images: Mapping[str, Any], parts: Mapping[str, Part], wanted: Wanted
) -> Iterator[Found]:
    for split, table in images.items():
        chosen = frozenset(wanted.get(split, ()))
        for row, key in enumerate(parts[split].keys):
            data = _bytes(table, mirror, row) if key in chosen else b""
            if data:
                yield Found(split, key, data)
