"""The table of a recipe: a value comes from the row of the task, else from its family's, else from the default row."""

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

log = logging.getLogger(__name__)

_METHODS = Path(__file__).resolve().parents[3] / "configs" / "method"


def _row(key: str, *, _root_: DictConfig) -> Any:
    """`${row:lr}`: a value of the recipe's table, from the row of the task, of its family, or the default row."""
    for row in _rows(_root_):
        if key in row:
            return row[key]
    raise UserError(f"the chosen recipe has no {key}: take the method's own recipe, or give {key} yourself")


def _rows(cfg: DictConfig) -> list[DictConfig]:
    """Return the rows of a recipe's table that are for a config's task, the nearest first."""
    spec = catalog.TASKS.get(str(cfg.task))
    names = [cfg.task, spec.family if spec else None, "default"]
    return [cfg.recipe.rows[name] for name in names if name and name in cfg.recipe.rows]


OmegaConf.register_new_resolver("row", _row)


@cache
def row_options(method: str) -> frozenset[str]:
    """Return the options of a method that a recipe chooses for each task: those that are `${row:...}` in its config.

    Args:
        method: Name of a method; one that has no config (of an older version) has no such options.

    Returns:
        For example {"num_tokens", "dropout"} of "vpt_deep".
    """
    file = _METHODS / f"{method}.yaml"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return frozenset(re.findall(r"^(\w+): \$\{row:", text, re.MULTILINE))


def apply_table(cfg: DictConfig) -> None:
    """Put what the user's own `recipe.table` says of a config's task and method into the recipe's row for it.

    Raises:
        UserError: The file cannot be used, or says nothing of them.
    """
    recipe = cfg.recipe
    if recipe.table is None:
        return
    names = {*catalog.TASKS, "vtab", "fgvc", "default"} & set(
        recipe.rows
    )  # `grid=paper` has other entries there
    known = {str(key) for name in names for key in recipe.rows[name]} - {"grid", "source"}
    values = recipe_table.read(Path(recipe.table), str(cfg.task), cfg.method.name, known)
    with open_dict(cfg):
        recipe.rows[cfg.task] = OmegaConf.merge(recipe.rows.get(cfg.task, {}), values)


def apply_row(cfg: DictConfig, said: Set[str]) -> None:
    """Settle what of a resolved job's recipe depends on its row: a warm-up in proportion, and the grid.

    Args:
        cfg: A job whose recipe still has its table.
        said: Keys of the command line.

    Raises:
        UserError: A value would have no effect.
    """
    _shorten_warmup(cfg, said)
    _apply_grid(cfg, said)
    with open_dict(cfg):
        del cfg.recipe.rows, cfg.recipe.table


def _shorten_warmup(cfg: DictConfig, said: Set[str]) -> None:
    """Give a run of fewer epochs than its row has a warm-up in proportion, where the row's would not fit into it."""
    recipe, rows = cfg.recipe, _rows(cfg)
    epochs, warmup = (
        next((row[name] for row in rows if name in row), None) for name in ("epochs", "warmup_epochs")
    )
    numbers = (recipe.epochs, recipe.warmup_epochs, epochs, warmup)
    if "recipe.warmup_epochs" in said or recipe.warmup_epochs != warmup or not all(map(is_finite, numbers)):
        return
    if 0 < recipe.epochs <= warmup < epochs:
        share = warmup * recipe.epochs / epochs
        recipe.warmup_epochs = share // 1 if recipe.schedule == "per_epoch" else share
        log.info(
            "recipe.warmup_epochs is %g in a run of recipe.epochs=%s, in proportion to the recipe's %g of "
            "%s epochs",
            *(recipe.warmup_epochs, recipe.epochs, warmup, epochs),
        )


def _apply_grid(cfg: DictConfig, said: Set[str]) -> None:
    """Give a job its grid: that of its row, with the user's own keys beside it and in place of the same ones.

    Nothing is tried of what the command line gives: such a key keeps its own value alone.
    """
    own = OmegaConf.create() if cfg.recipe.grid is None and "recipe.grid" not in said else cfg.recipe.grid
    if not OmegaConf.is_dict(own):  # the user's null is no grid; the protocol refuses anything else
        return
    rows: Any = next((row.grid for row in _rows(cfg) if "grid" in row), {})
    if not OmegaConf.is_dict(rows):  # a text in place of a grid: the protocol refuses it with that text
        cfg.recipe.grid = own or rows
        return
    found = {**rows, **own}
    cfg.recipe.grid = found | {key: [OmegaConf.select(cfg, key)] for key in found if key in said}
