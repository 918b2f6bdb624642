"""The settings of runs, as text by dotted key, and the words by which labels distinguish runs."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from visprompt.data.catalog import TASKS
from visprompt.data.catalog.task import TaskSpec
from visprompt.models import recipe
from visprompt.models.kind import KINDS, SEGMENTATION, SINGLE_LABEL
from visprompt.models.methods import METHODS
from visprompt.models.recipe import Recipe
from visprompt.runs.recipe_rows import row_options
from visprompt.runs.result import Result, is_stacked

UNRECORDED = "not recorded"
NEUTRAL = "neutral"  # a trainer without settings that change the numbers
OF_EACH_TASK = "of each task"
OWN_IMAGES = "own images"
TRAINING = tuple(f"recipe.{name}" for name in ("optimizer", "epochs", "batch_size", "head_init"))
# read by name, so the table has these columns even if no run recorded them
FIXED_COLUMNS = frozenset(
    {"method.num_tokens", "method.depth", *TRAINING}
    | {f"data.{name}" for name in ("source", "form", "fraction", "fingerprint", "preprocessing.size")}
)
# settings of later versions: a record without one is of a run that had this value
ADDED_LATER = {"data.augment": "none", "data.kind": SINGLE_LABEL.name, "machine.stacked": "no"} | {
    f"recipe.{name}": str(Recipe.model_fields[name].default) for name in recipe.ADDED_LATER
}
# facts of a task's images, and what follows from the method: may differ between tasks, not within one
_OF_TASK = frozenset(
    {"data.fingerprint", "data.kind", "data.sizes", "data.preprocessing.decode", "data.preprocessing.native"}
    | {"backbone.carried_blocks", "machine.stacked"}
)
# the same for all tasks of a family: VTAB-1k squashes images, fine-grained tasks crop them
_OF_FAMILY = frozenset({"data.source", "data.form", "data.augment"}) | {
    f"data.preprocessing.{name}" for name in ("resize", "short_side", "crop", "flip", "resampling")
}
_OF_A_SEED = frozenset({"token_mask", "segment_mask", "initial"})  # each seed prunes separately
# set only after the grid of settings
_PRUNING = frozenset({"method.prune", "method.prune_tokens", "method.prune_segments"})
_NAMES = {
    **{"backbone.name": "backbone", "backbone.sha256": "weights"},
    **{"data.fraction": "fraction", "precision": "precision", "machine.stacked": "stacked"},
}
_NO_SETTINGS = frozenset({"backbone.pooling", "data.summary"})  # determined by the method, and by the data
_HASHES = frozenset({"backbone.sha256", "data.fingerprint"})
# beginnings of keys, in the order in which labels prefer them
_FIRST = (
    "backbone.name",
    "method.",
    "data.source",
    "data.form",
    "data.fraction",
    "precision",
    "data.",
    "recipe.",
)


def settings(result: Result) -> dict[str, str]:
    """Return all settings of a run except task, method, split and seed, as text by dotted key.

    Example: {"recipe.lr": "1.0", "data.preprocessing.size": "224", ...}. What depends on the seed is left
    out, as in `result.cell`: the masks of pruning, and the hash of random weights. A depth of null is
    replaced by the number of blocks.
    """
    trainer = "; ".join(f"{name}={text(value)}" for name, value in sorted(result.trainer.items())) or NEUTRAL
    found = {"precision": text(result.precision), "trainer": trainer}
    found |= {"machine.stacked": "yes"} if is_stacked(result) else {}  # never averaged with single runs
    options = {
        name: value for name, value in built(result).method.items() if name not in {"name", *_OF_A_SEED}
    }
    parts = {"method": options, "recipe": result.recipe, "data": result.data, "backbone": result.backbone}
    for key, value in (
        (f"{part}.{name}", value) for part, own in parts.items() for name, value in own.items()
    ):
        if key == "data.preprocessing":
            found |= {f"{key}.{name}": text(inner) for name, inner in value.items()}
        elif key not in _NO_SETTINGS:
            found[key] = text(value)
    if found.get("backbone.pretrained") == "false":
        found["backbone.sha256"] = "random"
    return found


def built(result: Result) -> Result:
    """Return a result with the method's depth as a number of blocks if it was null, which means all."""
    if result.method.get("depth", 0) is not None or "depth" not in result.tuned:
        return result
    return result.model_copy(update={"method": result.method | {"depth": result.tuned["depth"]}})


def before_the_choice(found: Mapping[str, str]) -> dict[str, str]:
    """Return a final run's settings as its grid's runs have them: without pruning, not trained on val."""
    left = {key: value for key, value in found.items() if key not in _PRUNING}
    if "data.source" in left:
        left["data.source"] = left["data.source"].removesuffix(":train+val")
    return left


@cache
def scope(key: str, method: str) -> str:
    """Return for which runs of a row a setting must be the same.

    Returns:
        "row": for all. "family": for those on the tasks of a family. "task": for those on a task; it is a
        fact about the task. "chosen": for those on a task; a grid or a recipe's row chose it for the task.
    """
    part, _, option = key.partition(".")
    if part == "recipe" or (part == "method" and option in row_options(method)):
        return "chosen"
    if key in _OF_TASK:
        return "task"
    return "family" if key in _OF_FAMILY else "row"


def is_protocol(key: str) -> bool:
    """Return whether comparable methods must share a setting: those of backbone, data and precision."""
    return not key.startswith(("method.", "recipe."))


def label(task: str, kind: str) -> str:
    """Return a task as tables name it: with its score in words, such as "(mean IoU)", if not the accuracy."""
    return task if kind == SINGLE_LABEL.name else f"{task} ({KINDS[kind].words})"


CATALOGUED: Mapping[str, TaskSpec] = {label(spec.id, spec.kind): spec for spec in TASKS.values()}
"""The tasks of the catalog by their labels."""


def family(task: str, kind: str) -> str:
    """Return "segmentation" for all tasks of that kind; else "vtab", "fgvc" or "demo", or `OWN_IMAGES`."""
    if kind == SEGMENTATION.name:
        return kind
    spec = CATALOGUED.get(label(task, kind))
    return spec.family if spec else OWN_IMAGES


def method_place(method: str) -> tuple[int, str]:
    """Return a key that sorts methods as `METHODS` does, unknown ones after them."""
    return _place(method, METHODS)


def task_place(task: str) -> tuple[int, str]:
    """Return a key that sorts tasks as the catalog does, the user's own after them."""
    return _place(task, CATALOGUED)


def _place(name: str, known: Iterable[str]) -> tuple[int, str]:
    names = list(known)
    return names.index(name) if name in names else len(names), name


def text(value: Any) -> str:
    """Return a value of JSON as one short text."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def words(key: str, value: str = "") -> str:
    """Return a setting in words, "weights e08e28ad" for example; of "key (family)" the family is kept."""
    name, _, bracket = key.partition(" ")
    plain = _NAMES.get(name) or name.removeprefix("method.").removeprefix("recipe.").replace(".", " ")
    return " ".join(part for part in (plain, bracket, _shown(name, value)) if part)


def _shown(name: str, value: str) -> str:
    if name in _HASHES and value != UNRECORDED:
        return value[:8]
    return "all" if (name, value) == ("method.depth", "null") else value


def telling(things: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
    """Return words that distinguish things; a setting that distinguishes no further things is left out.

    Args:
        things: The settings of each thing. If a thing lacks a key, its words do not mention it.

    Returns:
        The words for each; "older record" if others recorded a setting and this one did not.
    """
    values = _values(things)
    needed: list[str] = []
    for key in (key for key, found in values.items() if len(found) > 1):
        if _kinds(things, [*needed, key]) > _kinds(things, needed):
            needed.append(key)
    return [tuple(dict.fromkeys(_told(thing, needed, values))) for thing in things]


def _told(thing: Mapping[str, str], needed: Iterable[str], values: Mapping[str, set[str]]) -> Iterator[str]:
    for key in needed:
        if thing.get(key) == UNRECORDED:
            yield "older record"
        elif thing.get(key, OF_EACH_TASK) != OF_EACH_TASK and len(values[key] - {UNRECORDED}) > 1:
            yield words(key, thing[key])


def differences(things: Sequence[Mapping[str, str]]) -> list[str]:
    """Return all settings in which things differ, in words, with the others' values; "" if there are none."""
    values = {key: found for key, found in _values(things).items() if len(found) > 1}

    def said(key: str, value: str) -> str:
        others = ", ".join(_shown(key.partition(" ")[0], other) for other in sorted(values[key] - {value}))
        return f"{words(key, value)} (others: {others})"

    return ["; ".join(said(key, thing[key]) for key in values if key in thing) for thing in things]


def labels(names: Sequence[Sequence[str]]) -> list[str]:
    """Join words, each word once; labels that are still the same are numbered."""
    joined = [", ".join(dict.fromkeys(name)) for name in names]
    return [
        label if joined.count(label) == 1 else f"{label} ({1 + joined[:i].count(label)})"
        for i, label in enumerate(joined)
    ]


def _values(things: Sequence[Mapping[str, str]]) -> dict[str, set[str]]:
    keys = sorted({key for thing in things for key in thing}, key=_rank)
    return {key: {thing[key] for thing in things if key in thing} for key in keys}


def _kinds(things: Iterable[Mapping[str, str]], keys: Sequence[str]) -> int:
    return len({tuple(thing.get(key) for key in keys) for thing in things})


def _rank(key: str) -> tuple[int, str]:
    if key == "backbone.sha256":
        return len(_FIRST) + 1, key  # last: most other differences of a backbone imply it
    return next((i for i, start in enumerate(_FIRST) if key.startswith(start)), len(_FIRST)), key
