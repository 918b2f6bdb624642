"""Opens the source of a task: fetches and unpacks what is missing, or says how to get it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visprompt.data.catalog.task import SourceFile, in_bytes
from visprompt.data.sources.archive import unpack, unpacked
from visprompt.data.sources.content import Content
from visprompt.data.sources.download import obtain
from visprompt.data.sources.fgvc import fgvc, fgvc_root
from visprompt.data.sources.hf import hub
from visprompt.data.sources.images import ImageFolder
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
"""The vtab-1k folder as one archive; nobody publishes its checksum, so the one that was seen is recorded."""

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
_DONE = ".unpacked"  # an empty file that says that all archives were unpacked to their end

_log = logging.getLogger(__name__)


def open_source(plan: Plan) -> tuple[Content, Mapping[str, Any]]:
    """Opens the source of a VTAB task.

    Args:
        plan: The task, its source and where things lie.

    Returns:
        Its content, and where it came from: checksums of the files, or the mirror and its commit.

    Raises:
        UserError: Something is missing, wrong or damaged.
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
    """Lists an FGVC dataset, after unpacking its archives where that was not done yet.

    Args:
        plan: The dataset and where things lie.

    Returns:
        Its images, and which lists were read: "json" (of the Visual Prompt Tuning authors) or "lists" (official).

    Raises:
        UserError: Something is missing, wrong or damaged.
    """
    if plan.root is None and _to_unpack(plan):
        try:
            with alone(plan.files_dir / ".unpacking.lock", f"unpacking in {plan.files_dir}"):
                if _to_unpack(plan):  # nobody has done it meanwhile
                    _unpack_all(plan)
        except OSError as error:
            raise explained(error, plan.files_dir, "data_dir") from error
    return fgvc(plan.files_dir, plan.spec), "json" if has_json(plan) else "lists"


def _unpack_all(plan: Plan) -> None:
    for file in plan.spec.files:
        _obtained(plan, file)
        if file.name.endswith(_ARCHIVES):
            unpack(plan.files_dir / file.name, plan.files_dir)
    (plan.files_dir / _DONE).touch()


def _to_unpack(plan: Plan) -> bool:
    """Whether archives are there that were not unpacked to their end, or neither archives nor images are."""
    if (plan.files_dir / _DONE).exists():
        return False
    if any((plan.files_dir / file.name).exists() for file in plan.spec.files if file.name.endswith(_ARCHIVES)):
        return True
    try:
        return not fgvc_root(plan.files_dir, plan.spec).is_dir()
    except UserError:
        return True


def _may_fetch(plan: Plan, what: str) -> None:
    """Refuses a download that is not allowed, and says terms before one that is."""
    if plan.root is not None:
        raise UserError(f"{plan.root} has no {what}: put it there, or leave root out to have it downloaded")
    if not plan.download:
        raise UserError(f"{plan.spec.id} is not prepared and data.download=false: run `{plan.command}`")
    _log.info("%s: downloading %s; licence: %s", plan.spec.id, what, plan.spec.licence)


def _obtained(plan: Plan, file: SourceFile) -> str:
    """Returns the checksum of a file of the raw source; where it has to be fetched by hand the error says how."""
    path = plan.files_dir / file.name
    if not file.urls and unpacked(path) != path:
        return ""  # fetched and unpacked by hand; readers take a folder for the archive
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
    """Unpacks the vtab-1k folder where it is not there, and returns its archive's checksum where that is."""
    archive = plan.data_dir / CIRCULATED.name
    if plan.files_dir.is_dir():
        known = plan.root is None and archive.exists()
        return {"sha256": {CIRCULATED.name: obtain(CIRCULATED, plan.data_dir, download=False)}} if known else {}
    if plan.root is not None:
        raise UserError(f"root={plan.root} is not a folder: give the one that holds the folders of the vtab-1k tasks")
    if not archive.exists():
        _may_fetch(plan, f"{CIRCULATED.name} ({in_bytes(CIRCULATED.roughly)})")
    checksum = obtain(CIRCULATED, plan.data_dir, download=plan.download)

    def write(folder: Path) -> None:
        unpack(archive, folder)
        lists = [path for depth in ("*/test.txt", "*/*/test.txt") for path in sorted(folder.glob(depth))]
        if not lists:
            raise UserError(f"{archive} holds no <task>/test.txt: it is not the vtab-1k archive, get it again")
        if (tasks := lists[0].parents[1]) != folder:  # the archive may hold the folder itself or what is in it
            for path in list(tasks.iterdir()):
                path.replace(folder / path.name)

    with alone(plan.data_dir / f".{plan.files_dir.name}.lock", f"unpacking {archive}"):
        if not plan.files_dir.is_dir():
            publish(plan.files_dir, write, plan.files_dir.is_dir, option="data_dir")
    return {"sha256": {CIRCULATED.name: checksum}}
