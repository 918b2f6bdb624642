"""Read settings that were chosen per task from a CSV file: `recipe.table=FILE.csv`.

    task,method,num_tokens,lr,weight_decay
    dtd,vpt_deep,10,2.5,0.001
    svhn,vpt_deep,50,2.5,0

A column has the name of a value in the recipes' rows (lr, weight_decay, batch_size, num_tokens, ...).
lr is the base learning rate, for a batch of 256. `task` is a task's id or an alias. A row applies to all
methods if the table has no column `method` or its cell is empty. An empty cell means the recipe's value.

VPT's authors published a table of the settings that they chose (vtab_all_release.csv); rename its columns as
above to use it.
"""

import csv
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from visprompt.data import catalog
from visprompt.errors import UserError, unknown

_NAMES = ("task", "method")  # columns that are not settings


def read(path: Path, task: str, method: str, known: Collection[str]) -> dict[str, Any]:
    """Read the settings of one task and method.

    Args:
        path: The CSV file.
        task: A task's id.
        method: A method's name.
        known: Names of the settings that this method's recipe has.

    Returns:
        Values by name, without empty cells: {"num_tokens": 10, "lr": 2.5, "weight_decay": 0.001}.

    Raises:
        UserError: The file cannot be read, names an unknown setting, or does not have exactly one row for
            the task and method.
    """
    rows = [row for row in _rows(path) if _applies_to(row, task, method)]
    if len(rows) != 1:
        how_many = "no row" if not rows else f"{len(rows)} rows"
        raise UserError(f"{path} has {how_many} for task {task} and method {method}: recipe.table needs one")
    filled = {name: cell.strip() for name, cell in rows[0].items() if cell.strip() and name not in _NAMES}
    for name in filled:
        if name not in known:
            raise unknown(f"setting of method {method} in {path}", name, sorted(known))
    return {name: _value(path, name, cell) for name, cell in filled.items()}


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [line for line in csv.reader(file) if any(cell.strip() for cell in line)]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"recipe.table={path} cannot be read ({error}): give a CSV file") from error
    header = [name.strip() for name in lines[0]] if lines else []
    if "task" not in header:
        raise UserError(
            f"{path} has no column task: its first line names the columns, as in task,lr,weight_decay"
        )
    if twice := next((name for name in header if header.count(name) > 1), None):
        raise UserError(f"{path} has two columns {twice!r}: leave one of them out")
    if bad := next((number for number, line in enumerate(lines, start=1) if len(line) != len(header)), None):
        raise UserError(
            f"{path} has {len(lines[bad - 1])} cells in row {bad} and {len(header)} columns: correct that row"
        )
    return [dict(zip(header, line, strict=True)) for line in lines[1:]]


def _applies_to(row: dict[str, str], task: str, method: str) -> bool:
    name = row["task"].strip()
    return catalog.ALIASES.get(name, name) == task and row.get("method", method).strip() in ("", method)


def _value(path: Path, name: str, cell: str) -> Any:
    try:
        value = yaml.safe_load(cell)
    except yaml.YAMLError:
        value = None
    if isinstance(value, str):
        try:
            return float(cell)  # YAML reads 1e-4 as a word
        except ValueError:
            return value
    if not isinstance(value, bool | int | float):
        raise UserError(f"{path} has {cell!r:.40} for {name}: give a number or a word")
    return value
