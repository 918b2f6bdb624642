"""Look up values in a recipe's table: in the row of the task, else of its family, else in the default row."""

import logging
import re
from collections.abc import Set
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from visprompt.data import catalog
from visprompt.errors import UserError, is_finite
from visprompt.runs import recipe_table
from visprompt.runs.paths import CONFIGS

log = logging.getLogger(__name__)


_NONE = object()


def _row(key: str, default: Any = _NONE, *, _root_: DictConfig) -> Any:
    """Resolve `${row:lr}`: look up a value in the row of the task, of its family, or in the default row.

    `${row:head,linear}` is "linear" if no row has the key.
    """
    for row in _rows(_root_):
        if key in row:
            return row[key]
    if default is not _NONE:
        return default
    raise UserError(f"the chosen recipe has no {key}: take the method's own recipe, or give {key} yourself")


def _rows(cfg: DictConfig) -> list[DictConfig]:
    """Return the rows that apply to a config's task, the most specific first: task, family, default."""
    spec = catalog.TASKS.get(str(cfg.task))
    names = [cfg.task, spec.family if spec else None, "default"]
    return [cfg.recipe.rows[name] for name in names if name and name in cfg.recipe.rows]


OmegaConf.register_new_resolver("row", _row)


@cache
def row_options(method: str) -> frozenset[str]:
    """Return the options of a method that a recipe chooses for each task.

    Those that are `${row:...}` in its config.

    Args:
        method: Name of a method; one that has no config (of an older version) has no such options.

    Returns:
        For example {"num_tokens", "dropout"} of "vpt_deep".
    """
    file = CONFIGS / "method" / f"{method}.yaml"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return frozenset(re.findall(r"^(\w+): \$\{row:", text, re.MULTILINE))


def apply_table(cfg: DictConfig) -> None:
    """Merge the settings that the user's `recipe.table` has for the task and method into the task's row.

    Raises:
        UserError: The file cannot be used, or has no row for the task and method.
    """
    recipe = cfg.recipe
    if recipe.table is None:
        return
    # not all of recipe.rows, because `grid=paper` has entries there that are not rows
    families = (spec.family for spec in catalog.TASKS.values())
    names = {*catalog.TASKS, *families, "default"} & set(recipe.rows)
    known = {str(key) for name in names for key in recipe.rows[name]} - {"grid", "source"}
    values = recipe_table.read(Path(recipe.table), str(cfg.task), cfg.method.name, known)
    with open_dict(cfg):
        recipe.rows[cfg.task] = OmegaConf.merge(recipe.rows.get(cfg.task, {}), values)


def apply_row(cfg: DictConfig, given: Set[str]) -> None:
    """Set the warm-up and the grid of a resolved job from its row, and remove the table from the recipe.

    Args:
        cfg: A job's config, still with the recipe's table.
        given: Keys that the command line sets.
    """
    _shorten_warmup(cfg, given)
    _apply_grid(cfg, given)
    with open_dict(cfg):
        del cfg.recipe.rows, cfg.recipe.table


def _shorten_warmup(cfg: DictConfig, given: Set[str]) -> None:
    """Shorten the row's warm-up in proportion if it would not fit into the epochs that the user chose."""
    recipe, rows = cfg.recipe, _rows(cfg)
    epochs, warmup = (
        next((row[name] for row in rows if name in row), None) for name in ("epochs", "warmup_epochs")
    )
    numbers = (recipe.epochs, recipe.warmup_epochs, epochs, warmup)
    if "recipe.warmup_epochs" in given or recipe.warmup_epochs != warmup or not all(map(is_finite, numbers)):
        return
    if 0 < recipe.epochs <= warmup < epochs:
        share = warmup * recipe.epochs / epochs
        recipe.warmup_epochs = share // 1 if recipe.schedule == "per_epoch" else share
        log.info(
            "recipe.warmup_epochs is %g in a run of recipe.epochs=%s, in proportion to the recipe's %g of "
            "%s epochs",
            *(recipe.warmup_epochs, recipe.epochs, warmup, epochs),
        )


def _apply_grid(cfg: DictConfig, given: Set[str]) -> None:
    """Set a job's grid: the grid of its row, updated by the user's `recipe.grid`.

    A key that the command line sets to a value (`recipe.lr=0.1`) is not tried: it has that value alone.
    """
    users = OmegaConf.create() if cfg.recipe.grid is None and "recipe.grid" not in given else cfg.recipe.grid
    if not OmegaConf.is_dict(users):  # null means no grid; anything else is refused by `protocol.grid_points`
        return
    default: Any = next((row.grid for row in _rows(cfg) if "grid" in row), {})
    if not OmegaConf.is_dict(default):  # not a grid: `protocol.grid_points` refuses it and shows it
        cfg.recipe.grid = users or default
        return
    grid = {**default, **users}
    cfg.recipe.grid = grid | {key: [OmegaConf.select(cfg, key)] for key in grid if key in given}
