"""Write the store of a task from its original files, after checking them against the record."""

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from visprompt.data.catalog import TASKS
from visprompt.data.catalog.task import TaskSpec
from visprompt.data.sources.content import Content, Found
from visprompt.data.sources.decoders import DECODERS
from visprompt.data.sources.images import BadImage, ImageFolder
from visprompt.data.sources.open_source import list_images, open_masked, open_source
from visprompt.data.splits import md5_order
from visprompt.data.stores.checks import Check, check, check_keys
from visprompt.data.stores.manifest import adopt
from visprompt.data.stores.masked import MaskStore, open_masks
from visprompt.data.stores.plan import AnyStore, Plan, find
from visprompt.data.stores.ragged import RaggedStore, open_store
from visprompt.data.stores.square import Selection, SquareStore, write_square
from visprompt.data.transforms import squash
from visprompt.errors import UserError
from visprompt.files import alone, explained, publish
from visprompt.text import Terminal, visible

_log = logging.getLogger(__name__)
_warned: set[str] = set()


def prepare_square(plan: Plan) -> SquareStore:
    """Open the store of a VTAB task; write it first where it is missing.

    Any number of processes may call this at once: one writes, the others wait.

    Args:
        plan: The task, its source and form, and the folders.

    Returns:
        The store.

    Raises:
        UserError: Files are missing, wrong or damaged, or the disk is full.
    """
    return cast(SquareStore, _prepare(plan, _make_square))


def prepare_ragged(plan: Plan) -> RaggedStore:
    """Open the store of an FGVC dataset; write it first where it is missing."""
    return cast(RaggedStore, _prepare(plan, _make_ragged))


def prepare_masked(plan: Plan) -> MaskStore:
    """Open the store of a dataset for segmentation; write it first where it is missing."""
    return cast(MaskStore, _prepare(plan, _make_masked))


def prepare(plan: Plan) -> AnyStore:
    """Open the store of any task; write it first where it is missing."""
    if plan.spec.family == "segmentation":
        return prepare_masked(plan)
    return prepare_ragged(plan) if plan.spec.family == "fgvc" else prepare_square(plan)


def _prepare(plan: Plan, make: Callable[[Plan], None]) -> AnyStore:
    store = find(plan) or _made(plan, make)
    if store.chunks is None:  # of an older version: it gets its checksums now
        adopt(plan.folder, plan.place)
        return find(plan) or store
    return store


def _made(plan: Plan, make: Callable[[Plan], None]) -> AnyStore:
    try:
        with alone(plan.folder.with_name(f".{plan.folder.name}.lock"), f"preparing {plan.name}"):
            store = find(plan)  # another process may have written it by now
            if store is None:
                if others := plan.others():
                    _log.warning(
                        "%s: its images are resized as preprocessing.resampling=%s does, into a new store "
                        "of %.2g GB (%s); %s, resized in another way, is neither used nor deleted",
                        *(plan.spec.id, plan.resampling, plan.bytes / 1e9, plan.command),
                        " and ".join(str(path) for path in others),
                    )
                make(plan)
                store = find(plan)
    except OSError as error:
        raise explained(error, plan.folder.parent) from error
    if store is None:
        raise UserError(f"the store {plan.folder} vanished while it was opened: start again")
    return store


def _make_square(plan: Plan) -> None:
    content, origin = open_source(plan)
    selections = select(plan, content)
    _refuse(plan, check_selections(selections, ordered=plan.source != "prepared"))
    form = "lossy" if content.lossy else "lossless"
    record = {"source": plan.source, "form": form, "dataset": plan.name, "from": origin}
    total = sum(len(s.keys) for s in selections.values())

    def write(folder: Path) -> None:
        write_square(
            folder, content, selections, _converter(plan), record, _watch(plan.name, total), plan.place
        )

    publish(plan.folder, write, lambda: find(plan) is not None)


def _make_ragged(plan: Plan) -> None:
    images, origin = list_images(plan)
    _refuse(plan, check_folder(plan.spec, images))
    shutil.rmtree(plan.folder, ignore_errors=True)  # it may have been made from other lists
    open_store(
        images,
        plan.folder,
        plan.size,
        interpolation=plan.interpolation,
        decode=DECODERS[plan.spec.decode],
        advice="get the dataset's files again",
        origin=origin,
        made_for=plan.place,
    )


def _make_masked(plan: Plan) -> None:
    with open_masked(plan) as images:
        listed = {name: [i.key for i in images.items if i.split == name] for name in plan.spec.split_sizes}
        _refuse(plan, check_keys(plan.spec, listed))
        open_masks(
            images, plan.folder, advice="get the dataset's files again", origin="raw", made_for=plan.place
        )


def warn_lossy(plan: Plan, store: SquareStore) -> None:
    """Warn once that small lossless images were re-encoded as JPEG, which costs accuracy."""
    if (
        store.record["form"] == "lossy"
        and plan.spec.dataset in ("cifar", "svhn")
        and plan.spec.id not in _warned
    ):
        _warned.add(plan.spec.id)
        _log.warning(
            "%s is read from JPEG files made of its lossless images, which costs accuracy (CIFAR-100: 10 to "
            "20 points): do not compare with lossless results; data.source=raw gives the exact pixels",
            plan.spec.id,
        )


def select(plan: Plan, content: Content) -> dict[str, Selection]:
    """Select the split sets of a VTAB task from its official splits, in md5 order.

    Args:
        plan: The task and its source.
        content: The opened source.

    Returns:
        Split set -> its images; the prepared folder lists them.

    Raises:
        UserError: An official split has another number of images than the record says.
    """
    spec = plan.spec
    if plan.source == "prepared":
        return {name: Selection(name, *content.parts[name]) for name in spec.split_sizes}
    for split, size in spec.official_sizes.items():
        if (found := len(content.parts[split].keys) if split in content.parts else 0) != size:
            raise UserError(
                f"the {split} split of {spec.dataset} has {found:,} images, expected {size:,}: the files in "
                f"{plan.files_dir} are not the right ones, get them again"
            )
    rows = {split: {key: row for row, key in enumerate(part.keys)} for split, part in content.parts.items()}
    order = {cut.split: md5_order(list(rows[cut.split]), cut.split) for cut in spec.cuts.values()}
    selections = {}
    for name, (split, start, stop) in spec.cuts.items():
        keys = order[split][start:stop]
        places = [rows[split][key] for key in keys]
        labels = {task: values[places] for task, values in content.parts[split].labels.items()}
        selections[name] = Selection(split, keys, labels)
    return selections


def check_selections(selections: Mapping[str, Selection], *, ordered: bool) -> list[Check]:
    """Check the split sets of all tasks of a dataset against their records."""
    keys = {name: [f"{s.split}/{key}" for key in s.keys] for name, s in selections.items()}
    tasks = next(iter(selections.values())).labels
    return [
        found
        for task in tasks
        for found in check(
            TASKS[task], keys, {n: s.labels[task] for n, s in selections.items()}, ordered=ordered
        )
    ]


def check_folder(spec: TaskSpec, images: ImageFolder) -> list[Check]:
    """Check an FGVC dataset against its record; train and val, which are cut in two ways, are added up."""
    parts = {"train": "train+val", "val": "train+val", "test": "test"}
    sizes = {
        "train+val": spec.split_sizes["train"] + spec.split_sizes["val"],
        "test": spec.split_sizes["test"],
    }
    rows = [(parts[item.split], item) for item in images.items]
    keys = {name: [item.key for part, item in rows if part == name] for name in sizes}
    labels = {name: np.array([item.label for part, item in rows if part == name], np.int64) for name in sizes}
    classes = len(images.class_names)
    wrong = "" if classes == spec.num_classes else f", expected {spec.num_classes}"
    whole = Check("number of classes", not wrong, f"{classes}{wrong}")
    return [whole, *check(replace(spec, split_sizes=sizes), keys, labels)]


def _refuse(plan: Plan, checks: list[Check]) -> None:
    wrong = [f"{found.name} is {found.detail}" for found in checks if found.fatal and not found.good]
    if wrong:
        raise UserError(
            f"{plan.spec.id} in {plan.files_dir} is not the right data: {'; '.join(wrong[:3])}; "
            "get its files again from the source that docs/datasets.md names"
        )


def _converter(plan: Plan) -> Callable[[np.ndarray], np.ndarray]:
    native = plan.spec.native

    def keep(image: np.ndarray) -> np.ndarray:
        if image.shape[:2] != (native, native):
            raise BadImage(f"is {image.shape[1]} x {image.shape[0]} pixels, not {native} x {native}")
        return image.transpose(2, 0, 1)

    def fit(image: np.ndarray) -> np.ndarray:
        return squash(image, plan.size, plan.interpolation, plan.resampling)

    return keep if plan.native else fit


def _watch(name: str, total: int) -> Callable[[Iterable[Found]], Iterable[Found]]:
    console = Terminal(stderr=True)

    def watch(images: Iterable[Found]) -> Iterable[Found]:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
            yield from shown.track(images, total, description=visible(name))

    return watch
