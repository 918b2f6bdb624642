"""The only list of tasks and their facts. docs/add-a-dataset.md: a record, two class lines, one YAML."""

from collections.abc import Iterator, Sequence

from visprompt.data.catalog import demo, fgvc, other, segmentation, vtab
from visprompt.data.catalog.task import TaskSpec
from visprompt.errors import UserError, unknown

_RECORDS = (*vtab.RECORDS, *fgvc.RECORDS, *segmentation.RECORDS, *demo.RECORDS, *other.RECORDS)

TASKS: dict[str, TaskSpec] = {spec.id: spec for spec in _RECORDS}


def _suite(family: str, group: str | None = None) -> tuple[str, ...]:
    return tuple(spec.id for spec in _RECORDS if spec.family == family and group in (None, spec.group))


SUITES: dict[str, tuple[str, ...]] = {
    "vtab_natural": _suite("vtab", "natural"),
    "vtab_specialized": _suite("vtab", "specialized"),
    "vtab_structured": _suite("vtab", "structured"),
    "vtab_all": _suite("vtab"),
    "fgvc": _suite("fgvc"),
    "all": _suite("vtab") + _suite("fgvc"),
    "segmentation": _suite("segmentation"),
    "demo": tuple(task for task in _suite("demo") if TASKS[task].kind == "single_label"),
}

ALIASES = {alias: spec.id for spec in _RECORDS for alias in spec.aliases}


def resolve(tasks: str | Sequence[str]) -> list[TaskSpec]:
    """Return the records of the tasks that `tasks=` names.

    Args:
        tasks: Ids, aliases or suites: one, several separated by commas, or a sequence of such strings.

    Returns:
        The tasks in the given order, each once.

    Raises:
        UserError: `tasks` is empty, or a word is neither a task nor a suite.
    """
    texts = [tasks] if isinstance(tasks, str) else tasks
    words = [word.strip() for text in texts for word in text.split(",") if word.strip()]
    if not words:
        raise UserError(f"tasks= is empty: name a task or a suite ({', '.join([*SUITES, *TASKS])})")
    return [TASKS[task] for task in dict.fromkeys(task for word in words for task in _expand(word))]


def _expand(word: str) -> Iterator[str]:
    if word in SUITES:
        yield from SUITES[word]
    elif (task := ALIASES.get(word, word)) in TASKS:
        yield task
    else:
        raise unknown("task", word, [*TASKS, *SUITES])
