"""Find finished runs that differ from a new one only in the number of epochs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visprompt.runs.result import Result, read_result

_LENGTH = ("epochs", "warmup_epochs")  # a short run's warm-up is shortened with it


def finished(folder: Path, identity: Mapping[str, Any]) -> list[tuple[int, Path]]:
    """Return the finished runs next to a new run's folder that differ from it only in their length.

    Args:
        folder: The new run's folder.
        identity: Everything that decides the new run's numbers, see `identity.identity_of`.

    Returns:
        Their numbers of epochs and their folders, sorted.
    """
    expected = json.loads(json.dumps(identity, default=list))
    found = []
    for path in folder.parent.glob("*/result.json"):
        result = read_result(path.parent, hashed=False)
        if result is not None and result.status == "finished" and _alike(result, expected):
            found.append((int(result.recipe["epochs"]), path.parent))
    return sorted(found)


def _alike(result: Result, expected: Mapping[str, Any]) -> bool:
    """Return whether a result is of a run with this identity, but for its number of epochs."""
    whole = ("task", "split", "seed", "precision", "method", "trainer")
    if any(getattr(result, name) != expected[name] for name in whole):
        return False
    for name in ("data", "backbone"):  # the result records more of them than the identity
        recorded = getattr(result, name)
        if any(recorded.get(key) != value for key, value in expected[name].items()):
            return False
    return _without_length(result.recipe) == _without_length(expected["recipe"]) and (
        result.recipe["epochs"] != expected["recipe"]["epochs"]
        and all((key in result.data) == (key in expected["data"]) for key in ("augment", "kind"))
    )


def _without_length(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if name not in _LENGTH}
