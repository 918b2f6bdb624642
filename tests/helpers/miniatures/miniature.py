"""A tiny copy of any VTAB task or FGVC dataset in the form of its source, with the records that fit the copy."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from helpers.miniatures import circulated, fgvc, masks, natural, specialized, structured
from helpers.miniatures.natural import class_folders
from visprompt.data.catalog import TASKS
from visprompt.data.catalog.task import Cut, SourceFile, TaskSpec
from visprompt.data.sources.readers import READERS, read_original

_COUNTS = {"train": 48, "validation": 16, "test": 24}  # per official split, as far as the dataset has it
_WRITERS = {
    name: vars(m)[name] for m in (natural, specialized, structured) for name in READERS if name in vars(m)
}


def write(task: str, source: str, data_dir: Path) -> dict[str, TaskSpec]:
    """Writes the files of a source where `prepare` looks for them.

    Args:
        task: Id of a VTAB task or an FGVC dataset.
        source: "raw", "prepared" or "hf" (a clone of the mirror in `data_dir/mirror`, to be given as root).
        data_dir: See `Plan`.

    Returns:
        Records that fit the copy, of all tasks whose images it holds: fewer images, no checksums, no golden
        values.
    """
    spec, draw = TASKS[task], np.random.default_rng(0)
    if source == "prepared":
        sizes = circulated.prepared(
            data_dir / "vtab-1k", spec, {"train800": 24, "val200": 8, "test": 24}, draw
        )
        return {task: replace(spec, split_sizes=sizes, golden={})}
    if source == "hf":
        counts = circulated.mirror(data_dir / "mirror", spec, _COUNTS, draw)
        return _shrunk(spec, counts, counts)
    folder = data_dir / "raw" / spec.dataset
    folder.mkdir(parents=True)
    if spec.family == "segmentation":
        return {task: _shrunk_masks(spec, masks.ade20k(folder, {"training": 12, "validation": 4}, draw))}
    if spec.family == "fgvc":
        return {task: _shrunk_fgvc(spec, vars(fgvc)[task](folder, _COUNTS, draw))}
    if spec.dataset in _WRITERS:
        written = _WRITERS[spec.dataset](folder, _COUNTS, draw)
    else:
        written = class_folders(folder / spec.files[0].name, spec.class_names, _COUNTS["train"], draw)
    return _shrunk(
        spec, written, {split: len(part.keys) for split, part in read_original(spec, folder).parts.items()}
    )


def _shrunk(spec: TaskSpec, written: Mapping[str, int], official: Mapping[str, int]) -> dict[str, TaskSpec]:
    """Fits the records of a VTAB dataset to a copy.

    The split sets stay in the official splits where they belong.

    Args:
        spec: One of the tasks.
        written: Official split -> number of images that are there, the first ones of its lists.
        official: Official split -> number of images that its lists name.
    """
    free = dict.fromkeys(written, 0)
    cuts = {}
    for name, size in (("train800", 24), ("val200", 8), ("test", None)):
        split = spec.cuts[name].split
        stop = written[split] if size is None else free[split] + size
        cuts[name] = Cut(split, free[split], stop)
        free[split] = stop
    sizes = {name: cut.stop - cut.start for name, cut in cuts.items() if cut.stop}
    tasks = [task for task in TASKS.values() if task.dataset == spec.dataset and task.family == spec.family]
    facts = {"official_sizes": official, "cuts": cuts, "split_sizes": sizes, "golden": {}}
    return {task.id: replace(task, files=_unchecked(task), **facts) for task in tasks}  # type: ignore[arg-type]  # kinds


def _shrunk_fgvc(spec: TaskSpec, written: Mapping[str, int]) -> TaskSpec:
    sizes = {"train": written["train"], "val": written.get("validation", 0), "test": written["test"]}
    classes = {"num_classes": 4, "class_names": spec.class_names[:4]}  # the writers' number
    return replace(spec, split_sizes=sizes, files=_unchecked(spec), golden={}, **classes)  # type: ignore[arg-type]  # kinds


def _shrunk_masks(spec: TaskSpec, written: Mapping[str, int]) -> TaskSpec:
    train = written["training"] - 3
    cuts = {"train": Cut("training", 0, train), "val": Cut("training", train), "test": Cut("validation")}
    sizes = {"train": train, "val": 3, "test": written["validation"]}
    return replace(spec, official_sizes=written, cuts=cuts, split_sizes=sizes, files=_unchecked(spec))


def _unchecked(spec: TaskSpec) -> tuple[SourceFile, ...]:
    return tuple(replace(file, size=None, sha256="", sha1="", md5="") for file in spec.files)
