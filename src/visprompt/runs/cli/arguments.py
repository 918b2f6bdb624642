"""Parse `key=value` with Hydra's grammar, and say how to quote a text that the grammar cannot read."""

import re
import shlex
from collections.abc import Sequence
from functools import cache
from typing import Any, get_args

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from visprompt.errors import UserError
from visprompt.runs.paths import LISTS, TEXTS, expand_argument

WHOLE = frozenset(
    (
        *(
            "seed",
            "seeds",
            "resume_every_n_epochs",
            "recipe.epochs",
            "recipe.max_steps",
            "recipe.batch_size",
            "batch_size",
            "image_size",
        ),
        *(
            "data.num_workers",
            "data.short_side",
            "top",
            "data.white_level",
            "data.max_pixels",
            "data.ignore",
            "max_pixels",
            "backbone.image_size",
        ),
        *(f"trainer.{name}" for name in ("devices", "num_nodes", "accumulate_grad_batches")),
        *("trainer.check_val_every_n_epoch", "trainer.log_every_n_steps"),
        *("port", "budget", "points"),
        *(f"engine.{name}" for name in ("runs_per_gpu", "cpus_per_run", "max_concurrent", "retries")),
        *(f"limits.{name}" for name in ("image_bytes", "image_pixels", "images", "batch", "queue")),
        *("limits.request_bytes", "limits.held_bytes"),
    )
)
"""Keys whose values are whole numbers, beside options of methods: W&B's agents write some of them as 2.0."""

_ONE_OF_LIST = r"(?P<before>^|[\[,]\s*){}(?=\s*(?:[,\]]|$))"
_NONE = re.compile(_ONE_OF_LIST.format("None"))
_FLOAT = re.compile(_ONE_OF_LIST.format(r"(?P<whole>[+-]?\d+)\.0*"))
_KEY = re.compile(r"[+~]{0,2}[\w.$/@:-]+")
_MODEL = re.compile(r"^([+~]{0,2})model(?=[.=]|$)")  # what lightning-hydra-template calls the group


def plain(argument: str) -> str:
    """Rewrite an argument for Hydra: write out `~`, and replace Python spellings that W&B agents use.

    Args:
        argument: For example `method.depth=None`, `model.num_tokens=10.0` or `data.root=~/birds`.

    Returns:
        `method.depth=null`, `method.num_tokens=10` or `data.root=/home/me/birds`.
    """
    key, equals, value = expand_argument(_MODEL.sub(r"\1method", argument)).partition("=")
    value = _NONE.sub(r"\g<before>null", value)
    if _FLOAT.search(value) and is_whole(key.lstrip("+")):
        value = _FLOAT.sub(r"\g<before>\g<whole>", value)
    return f"{key}{equals}{value}"


def is_whole(key: str) -> bool:
    """Return whether the values of a key are whole numbers; of a method's option its annotation says so."""
    group, _, option = key.partition(".")
    return key in WHOLE or (group == "method" and option in _whole_options())


@cache
def _whole_options() -> frozenset[str]:
    # imports torch, which most command lines do without
    from visprompt.models.methods import METHODS, option_kinds

    kinds = (pair for method in METHODS for pair in option_kinds(method).items())
    return frozenset(option for option, kind in kinds if _is_of_whole_numbers(kind))


def _is_of_whole_numbers(kind: Any) -> bool:
    """Return whether an annotation names int, also in a union or a sequence, and nothing with fractions."""
    parts = get_args(kind)
    return not {Any, float}.intersection(parts) and (kind is int or any(map(_is_of_whole_numbers, parts)))


def quoted(key: str, text: str) -> str:
    """Return what to type in a shell so that Hydra reads a text unchanged.

    Args:
        key: The setting's key.
        text: The setting's value.

    Returns:
        For example `"data.root='/data/my birds [v2]'"`.
    """
    argument = f"{key}={QuotedString(text, Quote.single).with_quotes()}"
    unchanged = not re.search(r'[$`"!\n]|\\["\\]', argument)  # by a shell, between double quotes
    return f'"{argument}"' if unchanged else shlex.quote(argument)


def parse(settings: Sequence[str], script: str, multirun: bool) -> list[Override]:
    """Parse settings with Hydra's grammar.

    Args:
        settings: The settings of a command line, as `plain` returns them.
        script: The entry point, for example "train".
        multirun: Whether `key=a,b` means one run for each value.

    Returns:
        The parsed settings, in the same order.

    Raises:
        UserError: A setting cannot be read, is a free text that Hydra would take for something else, or
            needs `-m`.
    """
    parsed = []
    for number, setting in enumerate(settings):
        key, _, text = setting.partition("=")
        try:
            if not _KEY.fullmatch(key):
                raise ValueError
            override = OverridesParser.create().parse_override(setting)
        except (HydraException, ValueError):  # ValueError: a function with bad arguments, as in range(1,2,0)
            raise _unreadable(settings, number) from None
        if key.lstrip("+") in TEXTS:
            _check_text(key, text, override, multirun)
        if override.is_sweep_override() and not multirun:
            raise _needs_multirun(setting, script)
        parsed.append(override)
    return parsed


def _unreadable(settings: Sequence[str], number: int) -> UserError:
    setting = settings[number]
    key, equals, text = setting.partition("=")
    if not equals:
        before = [i for i, earlier in enumerate(settings[:number]) if "=" in earlier]
        owner, _, start = settings[before[-1]].partition("=") if before else ("", "", "")
        if owner.lstrip("+") not in TEXTS:
            return UserError(f"{setting!r} is not key=value: settings are typed as seed=1, for example")
        rest = settings[before[-1] + 1 :]
        end = next((i for i, word in enumerate(rest) if "=" in word), len(rest))
        whole = quoted(owner, " ".join([start, *rest[:end]]))
        return UserError(f"{setting!r} is not key=value: a value with spaces is quoted: type {whole}")
    if not _KEY.fullmatch(key) or not _can_be_quoted(key, text):
        return UserError(f"{setting!r} cannot be read: settings are typed as key=value, such as seed=1")
    return UserError(f"{setting} cannot be read: type {quoted(key, text)}")


def _can_be_quoted(key: str, text: str) -> bool:
    try:
        OverridesParser.create().parse_override(shlex.split(quoted(key, text))[0])
    except HydraException:
        return False
    return True


def _check_text(key: str, text: str, override: Override, multirun: bool) -> None:
    """Refuse a free text that Hydra takes for something else, unless it is quoted or has backslashes."""
    if override.is_sweep_override():
        if multirun:
            return
        reading = "several values, for which -m is missing"
    else:
        value: Any = override.value()
        reading = _other_reading(value, text, key.lstrip("+") in LISTS)
    if reading:
        raise UserError(f"{key}={text} is read as {reading}: for a text type {quoted(key, text)}")


def _other_reading(value: Any, text: str, list_is_right: bool) -> str:
    if isinstance(value, str):
        literal = value == text or text[:1] in ("'", '"') or "\\" in text
        return "" if literal else repr(value)
    if isinstance(value, list):
        return "" if list_is_right else "a list"
    if isinstance(value, dict):
        return "a mapping"
    return "" if value is None else str(value).lower() if isinstance(value, bool) else f"the number {value}"


def _needs_multirun(setting: str, script: str) -> UserError:
    command = shlex.join(["python", f"src/{script}.py", "-m", setting])
    key, _, text = setting.partition("=")
    as_list = (
        f"{key}=[{text}] for one command with all of them, or "
        if key in ("tasks", "methods", "seeds")
        else ""
    )
    return UserError(f"{setting} gives several values: type {as_list}{command} for a run with each")
