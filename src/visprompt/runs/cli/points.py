"""What the points of a multirun say, so that the words of each are checked before the first one runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override

from visprompt.errors import UserError

_COMBINATIONS, _VALUES = (
    25,
    200,
)  # at most so many are checked: a composition takes 0.1 to 0.3 s, a value 15 ms


@dataclass(frozen=True)
class Axis:
    """A setting with its values, one where it is not swept.

    Attributes:
        key: `+key` where it is typed so.
        settings: `key=value` for each value.
        is_group: Whether it chooses an option of a config group.
    """

    key: str
    settings: tuple[str, ...]
    is_group: bool


def axes(overrides: Sequence[Override]) -> list[Axis]:
    """List what each setting of a command line says.

    Args:
        overrides: Parsed, in their order; of an interval, which another sweeper draws from, the start is
            taken.

    Returns:
        One axis for each key; a key that is typed twice has its last values, at its last place.
    """
    loader = GlobalHydra.instance().config_loader()
    axes_by_key: dict[str, Axis] = {}
    for override in overrides:
        override.config_loader = loader
        key = override.get_key_element()
        settings: tuple[str, ...]
        if override.is_interval_sweep():
            settings = (f"{key}={override.value().start}",)  # type: ignore[union-attr]  # an interval has a start
        elif override.is_discrete_sweep():
            settings = _values(override, key)
        else:
            settings = (str(override.input_line),)
        group = override.key_or_group
        is_group = bool(loader.get_group_options(group))
        axes_by_key.pop(key, None)
        axes_by_key[key] = Axis(key, settings, is_group)
    return list(axes_by_key.values())


def _values(override: Override, key: str) -> tuple[str, ...]:
    try:
        settings = tuple(f"{key}={value}" for value in islice(override.sweep_string_iterator(), _VALUES))
    except ValueError:  # range(1,2,0)
        settings = ()
    if not settings:
        raise UserError(f"{override.input_line} gives no value: a sweep needs one at least")
    return settings


def combinations(given: Sequence[Axis]) -> list[list[str]]:
    """List the settings of points that differ in the options of groups.

    Other settings have their first value.

    Every option is in one of them at least; what else could be combined is there up to a number.
    """
    choices = [axis.settings if axis.is_group else axis.settings[:1] for axis in given]
    first = [options[0] for options in choices]
    single = [
        [*first[:i], option, *first[i + 1 :]] for i, options in enumerate(choices) for option in options[1:]
    ]
    several = [list(point) for point in islice(product(*choices), _COMBINATIONS)]
    return [first, *single, *(point for point in several if point != first and point not in single)]


def other_values(given: Sequence[Axis]) -> list[tuple[str, ...]]:
    """List the values of each swept setting that chooses no option, the first one last."""
    swept = [axis.settings for axis in given if not axis.is_group and len(axis.settings) > 1]
    return [(*settings[1:], settings[0]) for settings in swept]
