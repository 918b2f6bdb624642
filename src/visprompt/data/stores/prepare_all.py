"""The command `python src/prepare.py`: show terms and sizes, prepare the tasks, report failures."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from visprompt.data.catalog.task import SourceFile, in_bytes
from visprompt.data.sources.archive import unpacked
from visprompt.data.sources.images import ImageFolder, Item
from visprompt.data.sources.open_source import CIRCULATED
from visprompt.data.stores.checks import Check, check, check_keys, check_pixels
from visprompt.data.stores.masked import MaskStore
from visprompt.data.stores.plan import AnyStore, Plan, find, load
from visprompt.data.stores.prepare import check_folder, prepare, warn_lossy
from visprompt.data.stores.ragged import RaggedStore
from visprompt.data.stores.square import SquareStore
from visprompt.errors import UserError
from visprompt.text import Terminal

console = Terminal()


def prepare_all(plans: Sequence[Plan]) -> None:
    """Prepare tasks; a failure does not stop the others.

    Args:
        plans: The tasks.

    Raises:
        UserError: Some tasks could not be prepared; the others are.
    """
    _announce(plans)
    failed = []
    for plan in plans:
        started = time.monotonic()
        try:
            there = find(plan) is not None
            store = prepare(plan)
        except UserError as error:
            failed.append(f"{plan.spec.id}: {error}")
            console.print(f"{plan.spec.id}: left undone")
            continue
        if isinstance(store, SquareStore):
            warn_lossy(plan, store)
        took = "was there" if there else f"ready after {time.monotonic() - started:.0f} s"
        size = (store.folder / "pixels.bin").stat().st_size
        line = f"{plan.spec.id}: {took}, {len(store.keys):,} images, {in_bytes(size)} in {store.folder}"
        console.print(line, soft_wrap=True)
    if failed:
        raise UserError(f"{len(failed)} of {len(plans)} tasks are not prepared: " + "; ".join(failed))


def verify_all(plans: Sequence[Plan]) -> None:
    """Report missing tasks and how to get them, and check the pixels and records of the others.

    Args:
        plans: The tasks; nothing is downloaded or written.

    Raises:
        UserError: A store fails a check.
    """
    stores: list[tuple[Plan, AnyStore | None]] = []
    wrong = []
    for plan in plans:
        try:
            stores.append((plan, load(plan)))
        except UserError as error:  # damaged, or of another plan
            wrong.append(f"{plan.spec.id}: {error}")
    missing = [plan for plan, store in stores if store is None]
    if missing:
        _announce(missing)
        for plan in missing:
            _say_how(plan)
    for plan, store in stores:
        if store is not None:
            checks = [_check_pixels(store), *_check_store(plan, store)]
            _show(plan, store.folder, checks)
            wrong += [
                f"{plan.spec.id}: {found.name} is {found.detail}"
                for found in checks
                if found.fatal and not found.good
            ]
    console.print(f"{len(stores) - len(missing)} of {len(plans)} tasks are prepared")
    if wrong:
        raise UserError(
            f"{len(wrong)} checks failed: {'; '.join(wrong)}: delete those stores and prepare them again"
        )


def _announce(plans: Sequence[Plan]) -> None:
    table = Table(title="terms and sizes")
    for column in ("task", "source", "download", "licence"):
        table.add_column(column, overflow="fold")
    wanted: dict[Path, SourceFile] = {}
    for plan in plans:
        if find(plan):
            size = "none: prepared"
        elif plan.source == "hf":
            size = in_bytes(None)
        else:
            files = {_place(plan) / file.name: file for file in _files(plan)}
            files = {
                path: file for path, file in files.items() if unpacked(path) == path and not path.exists()
            }
            hands = any(not file.urls for file in files.values())
            again = bool(files) and files.keys() <= wanted.keys()
            size = "shared" if again else _sum(list(files.values())) + (", by hand" if hands else "")
            wanted |= files
        table.add_row(plan.spec.id, plan.source, size, plan.spec.licence)
    console.print(table)
    if len(plans) > 1 and wanted:
        console.print(f"together: {_sum(list(wanted.values()))}")


def _say_how(plan: Plan) -> None:
    lines = [f"{plan.spec.id}: {plan.spec.source}", f"  {plan.spec.homepage}"]
    for file in _files(plan):
        urls = " or ".join(file.urls) if file.urls else "to be fetched by hand"
        proof = next((f"{kind} {value}" for kind, value in file.checksums.items()), "no known checksum")
        lines.append(f"  {file.name} ({_sum([file])}, {proof}) into {_place(plan)}: {urls}")
    if plan.source == "hf" and plan.spec.mirror:
        lines.append(f"  https://huggingface.co/datasets/{plan.spec.mirror.repo}")
    if plan.source == "raw" and plan.spec.how_to_get:
        lines.append(f"  by hand: {plan.spec.how_to_get}")
    lines.append(f"  then: {plan.command}")
    console.print("\n".join(lines), soft_wrap=True)


def _files(plan: Plan) -> tuple[SourceFile, ...]:
    return {"raw": plan.spec.files, "prepared": (CIRCULATED,), "hf": ()}[plan.source]


def _place(plan: Plan) -> Path:
    return plan.data_dir if plan.source == "prepared" else plan.files_dir


def _sum(files: Sequence[SourceFile]) -> str:
    if not files:
        return "none"
    total = in_bytes(sum(file.size or file.roughly or 0 for file in files) or None)
    return total if all(file.size for file in files) else f"about {total}" if total[0].isdigit() else total


def _check_pixels(store: AnyStore) -> Check:
    """Check all pixels of a store against their checksums."""
    name = "pixels unchanged"
    if store.chunks is None:
        return Check(
            name, False, "unknown: an older version made it, and its next use writes checksums", fatal=False
        )
    size, damaged = in_bytes((store.folder / "pixels.bin").stat().st_size), store.pixels.damaged()
    return Check(
        name, not damaged, f"{damaged} of {len(store.chunks)} parts of {size} differ" if damaged else size
    )


def _check_store(plan: Plan, store: AnyStore) -> list[Check]:
    if isinstance(store, MaskStore):
        listed = {name: list(np.array(store.keys)[store.splits == name]) for name in plan.spec.split_sizes}
        return [*check_keys(plan.spec, listed), *check_pixels(plan.spec, store.pixels_of)]
    if isinstance(store, RaggedStore):
        rows = zip(store.keys, store.labels.tolist(), store.splits.tolist(), strict=True)
        items = tuple(Item(Path(key), key, label, split) for key, label, split in rows)
        return check_folder(plan.spec, ImageFolder(store.class_names, items))
    keys = {name: list(store.keys[start:stop]) for name, (start, stop) in store.sets.items()}
    labels = {name: np.asarray(store.labels[plan.spec.id][slice(*rows)]) for name, rows in store.sets.items()}
    return check(plan.spec, keys, labels, ordered=plan.source != "prepared")


def _show(plan: Plan, folder: Path, checks: Sequence[Check]) -> None:
    table = Table(title=f"{plan.spec.id}, {folder}")
    for column in ("check", "outcome", "found"):
        table.add_column(column, overflow="fold")
    for found in checks:
        table.add_row(found.name, "pass" if found.good else "FAIL" if found.fatal else "look", found.detail)
    console.print(table)
