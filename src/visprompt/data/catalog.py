"""The only list of tasks and their facts. Adding a task: a record here, two class lines, one YAML."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from visprompt.errors import UserError, unknown


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """Everything that is known about a task without opening its data.

    Attributes:
        id: The one name that configs, folders, results and tables use.
        aliases: Other names in circulation; `tasks=` accepts them.
        group: VTAB's kind of task: "natural", "specialized" or "structured".
        family: The folder of its config below `configs/data/`.
        class_names: In the order of the labels.
        split_sizes: Number of images of each disjoint split set.
        source: Where the pixels and labels come from.
        licence: Terms of the data.
        homepage: Page of the data.
        citation: Who to cite.
        description: What is seen and what is asked, in a sentence or two.
        how_to_get: What a user has to do before the first run.
    """

    id: str
    aliases: tuple[str, ...] = ()
    group: str
    family: str
    class_names: tuple[str, ...]
    split_sizes: Mapping[str, int]
    source: str
    licence: str
    homepage: str
    citation: str
    description: str
    how_to_get: str

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def config(self) -> str:
        """What `data=` takes for this task."""
        return f"{self.family}/{self.id}"


def _digits(task: str, group: str, class_names: tuple[str, ...], description: str) -> TaskSpec:
    return TaskSpec(
        id=task,
        group=group,
        family="demo",
        class_names=class_names,
        split_sizes={"train800": 800, "val200": 200, "test": 797},
        source="the 1,797 scans (8 x 8 pixels, 17 grey levels) that scikit-learn bundles as load_digits",
        licence="CC BY 4.0 (data); scikit-learn's copy is distributed with its BSD 3-clause licence",
        homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
        citation="E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning "
        "Repository, 1998, doi:10.24432/C50P49",
        description=description,
        how_to_get="nothing to do: it is installed with scikit-learn and composed in memory",
    )


_DIGIT_NAMES = tuple(str(digit) for digit in range(10))
_RECORDS = (
    _digits("digits", "natural", _DIGIT_NAMES, "A handwritten digit, enlarged to 64 x 64: which one is it?"),
    _digits(
        "digits_crowded",
        "specialized",
        _DIGIT_NAMES,
        "As in SVHN: a handwritten digit in the middle, between the halves of two others: which one is in the middle?",
    ),
    _digits(
        "digits_loc",
        "structured",
        tuple(f"row{cell // 4}_col{cell % 4}" for cell in range(16)),
        "A small handwritten digit in one of 4 x 4 cells, black elsewhere: in which cell is it?",
    ),
)

TASKS: dict[str, TaskSpec] = {spec.id: spec for spec in _RECORDS}

SUITES: dict[str, tuple[str, ...]] = {
    "demo": ("digits", "digits_crowded", "digits_loc"),
}

_ALIASES = {alias: spec.id for spec in _RECORDS for alias in spec.aliases}


def resolve(tasks: str | Sequence[str]) -> list[TaskSpec]:
    """Turns what `tasks=` was given into records.

    Args:
        tasks: Ids, aliases or suites: one, several separated by commas, or a sequence of such texts.

    Returns:
        The tasks in the order given, each once.

    Raises:
        UserError: If nothing was given or a word names no task and no suite.
    """
    texts = [tasks] if isinstance(tasks, str) else tasks
    words = [word.strip() for text in texts for word in text.split(",") if word.strip()]
    if not words:
        raise UserError(f"tasks= is empty: name a task or a suite ({', '.join([*SUITES, *TASKS])})")
    return [TASKS[task] for task in dict.fromkeys(task for word in words for task in _expand(word))]


def _expand(word: str) -> Iterator[str]:
    if word in SUITES:
        yield from SUITES[word]
    elif (task := _ALIASES.get(word, word)) in TASKS:
        yield task
    else:
        raise unknown("task", word, [*TASKS, *SUITES])
