"""Errors for the user, each one sentence (what is wrong, where, what to do), and checks of single values."""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import PlainValidator, ValidationError

_LISTED = 40  # more choices than this (timm's backbones) would bury the sentence


class UserError(Exception):
    """An error that its message explains in full; entry points print the message alone, without a traceback.

    When a DataLoader worker fails, PyTorch raises the error again, with the worker's whole traceback as its
    message. Of such a message only the last line is kept, without the name of the exception.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        in_a_worker = text.startswith("Caught ") and " in DataLoader worker process " in text
        super().__init__(text.rstrip().rpartition("\n")[2].partition(": ")[2] if in_a_worker else text)


def unknown(what: str, word: object, choices: Iterable[str]) -> UserError:
    """Build the error for a word that is not among the valid ones.

    Args:
        what: What the word should have named, for example "task".
        word: The word given; a value of any type.
        choices: The valid words.

    Returns:
        The error to raise. It names the valid choices most similar to the word, and all of them unless there
        are more than 40.
    """
    word, names = str(word), sorted(set(choices))
    if not names:
        return UserError(f"unknown {what} {word!r}: there is none yet")
    near = get_close_matches(word.lower(), names, n=3, cutoff=0.5)
    listed = ", ".join(names[:_LISTED]) + (f" or {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    if near:
        rest = f" (all: {listed})" if len(names) <= _LISTED else ""
        return UserError(f"unknown {what} {word!r}: did you mean {' or '.join(near)}?{rest}")
    return UserError(f"unknown {what} {word!r}: choose one of {listed}")


def reason(error: BaseException) -> str:
    """Return a library's error message in one line, or "" if Python itself raised the error.

    Python's own messages (a wrong type, an unknown name) explain nothing to a user.

    Example:
        `ValueError("Only token and avg pooling are supported.")` gives its text,
        `TypeError("'int' object is not iterable")` gives "".
    """
    by_python = isinstance(error, TypeError | AttributeError | LookupError | NameError | ArithmeticError)
    return "" if by_python or "invalid literal" in str(error) else " ".join(str(error).split())


def in_one_line(error: Exception) -> str:
    """Return an exception's text without line breaks."""
    return " ".join(str(error).split())


@dataclass(frozen=True)
class Allowed:
    """What a value may be.

    Attributes:
        words: The allowed values in words, for the error: "true or false".
        fits: Returns whether a value (in plain Python containers) is allowed.

    Example:
        `whole(0, 9) | NULL` allows 0, 1, ..., 9 and null.
    """

    words: str
    fits: Callable[[Any], bool]

    def __or__(self, other: "Allowed") -> "Allowed":
        return Allowed(f"{self.words} or {other.words}", lambda value: self.fits(value) or other.fits(value))

    @property
    def type(self) -> PlainValidator:
        """Validator for a pydantic field: `seed: Annotated[int, whole(0, 99).type]`."""
        return PlainValidator(self._validate)

    def _validate(self, value: Any) -> Any:
        if not self.fits(value):
            raise _NotAllowed(self)
        return value

    def _is_unquoted_text(self, value: Any) -> bool:
        """Return whether text is allowed, and the value given was parsed as a number or a boolean."""
        return type(value) in (int, float, bool) and self.fits("text")

    def error(self, key: str, value: Any) -> UserError:
        """Build the error for a value that is not allowed."""
        quote = f"; text that reads as a number or a switch is quoted: \"{key}='...'\""
        hint = quote if self._is_unquoted_text(value) else ""
        return UserError(f"{key}={shown(value)} does not fit: give {self.words}{hint}")


class _NotAllowed(ValueError):
    """A field's value is not allowed; pydantic collects this error into its `ValidationError`."""

    def __init__(self, allowed: Allowed) -> None:
        super().__init__(f"give {allowed.words}")
        self.allowed = allowed


def sentence(error: ValidationError, prefix: str = "") -> UserError:
    """Build a one-sentence error for the first field that a pydantic model refused.

    Args:
        error: What the model raised.
        prefix: Put before the field's name, for example "recipe.".
    """
    first = error.errors(include_url=False)[0]
    key = prefix + ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return UserError(f"{key} has no value: give {key}=...")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, _NotAllowed):
        return cause.allowed.error(key, first["input"])
    return UserError(f"{key} does not fit: {first['msg']}")


def shown(value: Any) -> str:
    """Return a value as it is typed on the command line: null for None, true for True."""
    return "null" if value is None else str(value).lower() if type(value) is bool else str(value)


def whole(least: int, most: int) -> Allowed:
    """Allow the whole numbers from `least` to `most`."""
    return Allowed(
        f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most
    )


def number(words: str, fits: Callable[[float], bool]) -> Allowed:
    """Allow the finite numbers, whole or not, for which `fits` returns true."""
    return Allowed(words, lambda value: is_finite(value) and fits(value))


def is_finite(value: Any) -> bool:
    """Return whether a value is a number (not a boolean) that a float can hold: not nan, inf or 10**400."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def list_of(entry: Allowed, words: str) -> Allowed:
    """Allow lists of which every entry is allowed by `entry`."""
    return Allowed(words, lambda value: isinstance(value, list | tuple) and all(map(entry.fits, value)))


def one_of(*choices: Any) -> Allowed:
    """Allow a few words or numbers; 1, 1.0 and True are different here."""
    listed = ", ".join(str(choice) for choice in choices)
    return Allowed(
        f"one of {listed}", lambda value: any(type(value) is type(c) and value == c for c in choices)
    )


NULL = Allowed("null", lambda value: value is None)
SWITCH = Allowed("true or false", lambda value: type(value) is bool)
TEXT = Allowed("text", lambda value: isinstance(value, str))
PATH = Allowed("a path", lambda value: isinstance(value, str) and value != "" and "\0" not in value)
MAPPING = Allowed("a mapping", lambda value: isinstance(value, Mapping))
WORDS = list_of(TEXT, "a list of words")
