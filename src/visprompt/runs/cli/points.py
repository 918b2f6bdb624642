"""List the settings of a multirun's jobs, so that all of them are checked before the first one runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override

from visprompt.errors import UserError
from visprompt.runs.cli.words import options

# the most combinations (0.1 to 0.3 s each) and values of one setting (15 ms each) that are checked
_COMBINATIONS, _VALUES = 25, 200


@dataclass(frozen=True)
class Axis:
    """A setting of a command line with all its values; a setting that is not swept has one.

    Attributes:
        key: The key as typed, for example `+data.crop`.
        settings: `key=value` for each value.
        is_group: Whether the setting chooses an option of a config group.
    """

    key: str
    settings: tuple[str, ...]
    is_group: bool


def axes(overrides: Sequence[Override]) -> list[Axis]:
    """List the settings of a command line with their values.

    Args:
        overrides: The parsed settings, in order. An interval, from which some sweepers draw values, counts
            as its start.

    Returns:
        One axis for each key; of a key that is typed twice the last values count.
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
        is_group = bool(options(override.key_or_group))
        axes_by_key.pop(key, None)
        axes_by_key[key] = Axis(key, settings, is_group)
    return list(axes_by_key.values())


def _values(override: Override, key: str) -> tuple[str, ...]:
    try:
        settings = tuple(f"{key}={value}" for value in islice(override.sweep_string_iterator(), _VALUES))
    except ValueError:  # range(1,2,0)
        settings = ()
    if not settings:
        raise UserError(f"{override.input_line} gives no value: a sweep needs at least one")
    return settings


def combinations(given: Sequence[Axis]) -> list[list[str]]:
    """List combinations of the options of config groups, all other settings at their first value.

    Every option is in at least one combination; of all possible combinations at most `_COMBINATIONS` follow.

    Example:
        `data=a,b method=c,d seed=1,2` gives [data=a, method=c, seed=1], [data=b, method=c, seed=1],
        [data=a, method=d, seed=1] and [data=b, method=d, seed=1].
    """
    choices = [axis.settings if axis.is_group else axis.settings[:1] for axis in given]
    first = [options[0] for options in choices]
    single = [
        [*first[:i], option, *first[i + 1 :]] for i, options in enumerate(choices) for option in options[1:]
    ]
    several = [list(point) for point in islice(product(*choices), _COMBINATIONS)]
    return [first, *single, *(point for point in several if point != first and point not in single)]


def other_values(given: Sequence[Axis]) -> list[tuple[str, ...]]:
    """List the values of each swept setting that is not a config group, the first value last."""
    swept = [axis.settings for axis in given if not axis.is_group and len(axis.settings) > 1]
    return [(*settings[1:], settings[0]) for settings in swept]
