"""What a run was run with, setting by setting, and words for what tells runs apart."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from visprompt.data.catalog import TASKS
from visprompt.runs.recipe_rows import row_options
from visprompt.runs.result import Result

UNRECORDED = "not recorded"
NEUTRAL = "neutral"  # a trainer without settings that bear on the figures
OF_EACH_TASK = "of each task"
OWN_IMAGES = "own images"
# facts of a task's images, and what follows from the method: different from task to task, one within a task
_OF_TASK = frozenset(
    {"data.fingerprint", "data.sizes", "data.preprocessing.decode", "data.preprocessing.native"}
    | {"backbone.carried_blocks"}
)
# the same for all tasks of a family: VTAB-1k squashes images, fine-grained tasks crop them
_OF_FAMILY = frozenset({"data.source", "data.form"}) | {
    f"data.preprocessing.{name}" for name in ("resize", "short_side", "crop", "flip", "resampling")
}
_OF_A_SEED = frozenset({"token_mask", "segment_mask", "initial"})  # what a seed's own chain of pruning found
_PRUNING = frozenset({"method.prune", "method.prune_tokens", "method.prune_segments"})  # not yet while a grid is tried
_NAMES = {
    "backbone.name": "backbone",
    "backbone.sha256": "weights",
    "data.fraction": "fraction",
    "precision": "precision",
}
_NO_SETTINGS = frozenset({"backbone.pooling", "data.summary"})  # they follow from the method, and from the data
_HASHES = frozenset({"backbone.sha256", "data.fingerprint"})
# in the order in which they tell rows apart
_FIRST = ("backbone.name", "method.", "data.source", "data.form", "data.fraction", "precision", "data.", "recipe.")


def settings(result: Result) -> dict[str, str]:
    """All that a run was run with but task, method, split and seed.

    Args:
        result: Its result.

    Returns:
        Values as text by dotted key, "recipe.lr" or "data.preprocessing.size" for example. What follows from the seed
        is left out, as in `results.cell`: what pruning found, and the hash of weights that were drawn. A depth is that
        which was built, as far as it is recorded.
    """
    found = {"precision": text(result.precision), "trainer": _plainly(result.trainer)}
    options = {name: value for name, value in built(result).method.items() if name not in {"name", *_OF_A_SEED}}
    parts = {"method": options, "recipe": result.recipe, "data": result.data, "backbone": result.backbone}
    for part, values in parts.items():
        for name, value in values.items():
            if f"{part}.{name}" in _NO_SETTINGS:
                continue
            if f"{part}.{name}" == "data.preprocessing":
                found |= {f"data.preprocessing.{key}": text(inner) for key, inner in value.items()}
            else:
                found[f"{part}.{name}"] = text(value)
    if found.get("backbone.pretrained") == "false":
        found["backbone.sha256"] = "random"
    return found


def built(result: Result) -> Result:
    """A record with the number of blocks that its method's depth stands for, where it is null for all of them."""
    if result.method.get("depth", 0) is not None or "depth" not in result.tuned:
        return result
    return result.model_copy(update={"method": result.method | {"depth": result.tuned["depth"]}})


def _plainly(trainer: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}={text(value)}" for name, value in sorted(trainer.items())) or NEUTRAL


def before_the_choice(found: Mapping[str, str]) -> dict[str, str]:
    """Settings that a final run shares with the runs of its grid: those that nobody chose, without pruning."""
    kept = {key: value for key, value in found.items() if key not in _PRUNING}
    if "data.source" in kept:  # the images are the same; only the final run trains on val, too
        kept["data.source"] = kept["data.source"].removesuffix(":train+val")
    return kept


@cache
def scope(key: str, method: str) -> str:
    """How far a setting reaches within a row of a table.

    Returns:
        "row": the same in all of it. "family": in all tasks of a family. "task": in a task, of which it is a fact.
        "chosen": in a task, for which a grid or a recipe's row chose it.
    """
    part, _, option = key.partition(".")
    if part == "recipe" or (part == "method" and option in row_options(method)):
        return "chosen"
    if key in _OF_TASK:
        return "task"
    return "family" if key in _OF_FAMILY else "row"


def family(task: str) -> str:
    """Returns "vtab", "fgvc" or "demo", or `OWN_IMAGES`."""
    return TASKS[task].family if task in TASKS else OWN_IMAGES


def text(value: Any) -> str:
    """A value of JSON as one short text."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def words(key: str, value: str = "") -> str:
    """A setting in words, "weights e08e28ad" for example; a family in brackets behind its key is shown as it is."""
    name, _, bracket = key.partition(" ")
    plain = _NAMES.get(name) or name.removeprefix("method.").removeprefix("recipe.").replace(".", " ")
    return " ".join(part for part in (plain, bracket, _shown(name, value)) if part)


def _shown(name: str, value: str) -> str:
    if name in _HASHES and value != UNRECORDED:
        return value[:8]
    return "all" if (name, value) == ("method.depth", "null") else value


def is_protocol(key: str) -> bool:
    """Whether a setting is of backbone, data or precision: methods under different ones do not compare."""
    return not key.startswith(("method.", "recipe."))


def telling(things: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
    """What tells things apart, in words: of the settings in which they differ no more than are needed for it.

    Args:
        things: Settings of each. A key that one of them lacks says nothing about it.

    Returns:
        The words for each; "older record" where others record a setting and this one does not.
    """
    values = _values(things)
    needed: list[str] = []
    for key in (key for key, found in values.items() if len(found) > 1):
        if _kinds(things, [*needed, key]) > _kinds(things, needed):
            needed.append(key)
    return [tuple(dict.fromkeys(_told(thing, needed, values))) for thing in things]


def differences(things: Sequence[Mapping[str, str]]) -> list[str]:
    """All settings in which things differ, each thing's own in words with those of the others; "" where there is none.

    Args:
        things: As for `telling`.
    """
    values = _values(things)
    differing = [key for key, found in values.items() if len(found) > 1]
    return ["; ".join(_against(key, thing[key], values[key]) for key in differing if key in thing) for thing in things]


def labels(names: Sequence[Sequence[str]]) -> list[str]:
    """Puts words together, each word once; labels that are the same nevertheless are numbered."""
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


def _told(thing: Mapping[str, str], needed: Iterable[str], values: Mapping[str, set[str]]) -> Iterator[str]:
    for key in needed:
        if thing.get(key) == UNRECORDED:
            yield "older record"
        elif thing.get(key, OF_EACH_TASK) != OF_EACH_TASK and len(values[key] - {UNRECORDED}) > 1:
            yield words(key, thing[key])


def _against(key: str, value: str, values: set[str]) -> str:
    name = key.partition(" ")[0]
    return f"{words(key, value)} (others: {', '.join(_shown(name, other) for other in sorted(values - {value}))})"


def _rank(key: str) -> tuple[int, str]:
    if key == "backbone.sha256":
        return len(_FIRST) + 1, key  # follows from most other differences of a backbone
    return next((i for i, start in enumerate(_FIRST) if key.startswith(start)), len(_FIRST)), key
