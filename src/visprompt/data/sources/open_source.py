"""Open the source of a task: download and unpack missing files, or say how to get them."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from visprompt.data.catalog.task import SourceFile, in_bytes
from visprompt.data.sources.ade20k import ade20k
from visprompt.data.sources.archive import unpack, unpacked
from visprompt.data.sources.content import Content
from visprompt.data.sources.download import obtain
from visprompt.data.sources.fgvc import fgvc, fgvc_root
from visprompt.data.sources.hf import hub
from visprompt.data.sources.images import ImageFolder
from visprompt.data.sources.masked_images import MaskedImages
from visprompt.data.sources.prepared import prepared
from visprompt.data.sources.readers import read_original
from visprompt.data.stores.plan import Plan, has_json
from visprompt.errors import UserError
from visprompt.files import alone, explained, publish

CIRCULATED = SourceFile(
    name="vtab-1k.zip",
    urls=("https://huggingface.co/datasets/XiN0919/VTAB-1k/resolve/main/vtab-1k.zip",),
    roughly=4_700_000_000,
)
"""The vtab-1k folder as one archive; its checksum is not published, but stores record it"""

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
_DONE = ".unpacked"  # an empty file, written after all archives were unpacked

_log = logging.getLogger(__name__)


def open_source(plan: Plan) -> tuple[Content, Mapping[str, Any]]:
    """Open the source of a VTAB task.

    Args:
        plan: The task, its source and the folders.

    Returns:
        Its content and its origin: checksums of the files, or the mirror and its commit.

    Raises:
        UserError: A file is missing, wrong or damaged.
    """
    if plan.source == "hf":
        if plan.root is None:
            _may_fetch(plan, f"mirror {plan.spec.mirror.repo if plan.spec.mirror else ''}")
        content, revision = hub(plan.spec, plan.root, plan.revision)
        return content, {"mirror": plan.spec.mirror.repo if plan.spec.mirror else "", "revision": revision}
    if plan.source == "prepared":
        origin = _circulated(plan)
        return prepared(plan.files_dir, plan.spec), origin
    checksums = {file.name: _obtained(plan, file) for file in plan.spec.files}
    return read_original(plan.spec, plan.files_dir), {"sha256": checksums}


def list_images(plan: Plan) -> tuple[ImageFolder, str]:
    """List the images of an FGVC dataset; unpack its archives first, where that has not been done.

    Args:
        plan: The dataset and the folders.

    Returns:
        Its images, and which lists were read: "json" (of the Visual Prompt Tuning authors) or "lists"
        (official).

    Raises:
        UserError: A file is missing, wrong or damaged.
    """
    if plan.root is None and _to_unpack(plan):
        try:
            with alone(plan.files_dir / ".unpacking.lock", f"unpacking in {plan.files_dir}"):
                if _to_unpack(plan):  # no other process has done it
                    _unpack_all(plan)
        except OSError as error:
            raise explained(error, plan.files_dir, "data_dir") from error
    return fgvc(plan.files_dir, plan.spec), "json" if has_json(plan) else "lists"


@contextmanager
def open_masked(plan: Plan) -> Iterator[MaskedImages]:
    """Open the images and masks of a dataset for segmentation, which are read from its archive or its folder.

    Args:
        plan: The dataset and the folders.

    Yields:
        Its images with their masks.

    Raises:
        UserError: A file is missing, wrong or damaged.
    """
    if not (plan.files_dir / "images").is_dir():
        for file in plan.spec.files:
            if unpacked(plan.files_dir / file.name) == plan.files_dir / file.name:
                _obtained(plan, file)
    with ade20k(plan.files_dir, plan.spec) as images:
        yield images


def _unpack_all(plan: Plan) -> None:
    for file in plan.spec.files:
        _obtained(plan, file)
        if file.name.endswith(_ARCHIVES):
            unpack(plan.files_dir / file.name, plan.files_dir)
    (plan.files_dir / _DONE).touch()


def _to_unpack(plan: Plan) -> bool:
    """Return whether there are archives that were not completely unpacked, or neither archives nor images."""
    if (plan.files_dir / _DONE).exists():
        return False
    if any(
        (plan.files_dir / file.name).exists() for file in plan.spec.files if file.name.endswith(_ARCHIVES)
    ):
        return True
    try:
        return not fgvc_root(plan.files_dir, plan.spec).is_dir()
    except UserError:
        return True


def _may_fetch(plan: Plan, what: str) -> None:
    """Raise where a download is not allowed, and log the licence where it is."""
    if plan.root is not None:
        raise UserError(f"{plan.root} has no {what}: put it there, or leave root out to have it downloaded")
    if not plan.download:
        raise UserError(f"{plan.spec.id} is not prepared and data.download=false: run `{plan.command}`")
    _log.info("%s: downloading %s; licence: %s", plan.spec.id, what, plan.spec.licence)


def _obtained(plan: Plan, file: SourceFile) -> str:
    """Return the checksum of a file of the raw source, which is downloaded first where it is missing."""
    path = plan.files_dir / file.name
    if not file.urls and unpacked(path) != path:
        return ""  # unpacked by hand: readers accept the folder
    there = path.exists()
    if not there and file.urls:
        _may_fetch(plan, f"{file.name} ({in_bytes(file.size or file.roughly)})")
    try:
        return obtain(file, plan.files_dir, download=plan.download)
    except UserError as error:
        if there or not plan.spec.how_to_get:
            raise
        raise UserError(f"{str(error).rstrip('.')}. {plan.spec.how_to_get}") from error


def _circulated(plan: Plan) -> Mapping[str, Any]:
    """Unpack the vtab-1k folder where it is missing, and return its archive's checksum where there is one."""
    archive = plan.data_dir / CIRCULATED.name
    if plan.files_dir.is_dir():
        known = plan.root is None and archive.exists()
        return (
            {"sha256": {CIRCULATED.name: obtain(CIRCULATED, plan.data_dir, download=False)}} if known else {}
        )
    if plan.root is not None:
        raise UserError(
            f"root={plan.root} is not a folder: give the one that holds the folders of the vtab-1k tasks"
        )
    if not archive.exists():
        _may_fetch(plan, f"{CIRCULATED.name} ({in_bytes(CIRCULATED.roughly)})")
    checksum = obtain(CIRCULATED, plan.data_dir, download=plan.download)

    def write(folder: Path) -> None:
        unpack(archive, folder)
        lists = [path for depth in ("*/test.txt", "*/*/test.txt") for path in sorted(folder.glob(depth))]
        if not lists:
            raise UserError(
                f"{archive} holds no <task>/test.txt: it is not the vtab-1k archive, get it again"
            )
        if (tasks := lists[0].parents[1]) != folder:  # the archive may hold the folder or its content
            for path in list(tasks.iterdir()):
                path.replace(folder / path.name)

    with alone(plan.data_dir / f".{plan.files_dir.name}.lock", f"unpacking {archive}"):
        if not plan.files_dir.is_dir():
            publish(plan.files_dir, write, plan.files_dir.is_dir, option="data_dir")
    return {"sha256": {CIRCULATED.name: checksum}}
