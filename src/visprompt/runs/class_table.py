"""Print the worst classes and the most common mistakes of a scoring."""

from collections.abc import Sequence

from rich.table import Table
from torch import Tensor

from visprompt.models.task_kind import TaskKind
from visprompt.text import Terminal

MOST = 10  # classes and pairs of classes that are printed


def print_classes(console: Terminal, kind: TaskKind, confusion: Tensor, names: Sequence[str]) -> None:
    """Print a table of the classes with the lowest F1, and one of the pairs that are confused most often.

    Args:
        console: Where to print.
        kind: The kind of the task.
        confusion: The counts of the scoring, see `TaskKind.figures`.
        names: Names of the classes.
    """
    known = [
        (score.f1, name, score)
        for name, score in zip(names, kind.class_scores(confusion), strict=True)
        if score.f1 is not None
    ]
    worst = sorted(known, key=lambda one: one[0])[:MOST]
    every = len(worst) == len(names)
    title = f"the {len(names)} classes" if every else f"the {len(worst)} worst of {len(names)} classes"
    table = Table("class", title=f"{title}, by F1 (%)")
    for column in (kind.unit, "precision", "recall", "F1"):
        table.add_column(column, justify="right")
    for _, name, score in worst:
        figures = (score.precision, score.recall, score.f1)
        shown = ["" if figure is None else f"{100 * figure:.1f}" for figure in figures]
        table.add_row(name, f"{score.count:,}", *shown)
    console.print(table)
    if pairs := kind.confused(confusion, MOST):
        mistakes = Table("class", "taken for", title="the most common mistakes")
        mistakes.add_column(kind.unit, justify="right")
        for true, taken, count in pairs:
            mistakes.add_row(names[true], names[taken], f"{count:,}")
        console.print(mistakes)
