"""What a user did wrong, said in one sentence: what is wrong, where, and what to do.

And what a value may be.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import PlainValidator, ValidationError

_LISTED = 40  # more choices than this (timm's backbones) would bury the sentence


class UserError(Exception):
    """An error that its message explains in full; entry points print the message alone, without a traceback.

    PyTorch hands on an error of a process that loads data as the text of its traceback, which ends with the
    message.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        in_a_worker = text.startswith("Caught ") and " in DataLoader worker process " in text
        super().__init__(text.rstrip().rpartition("\n")[2].partition(": ")[2] if in_a_worker else text)


def unknown(kind: str, word: object, choices: Iterable[str]) -> UserError:
    """Build the error for a word that is not among the valid ones.

    Args:
        kind: What the word should have named, for example "task".
        word: What was given, of whatever kind.
        choices: The valid words.

    Returns:
        The error to raise: it names the nearest valid choices first, and all of them unless they are too many
        to read.
    """
    word, names = str(word), sorted(set(choices))
    near = get_close_matches(word.lower(), names, n=3, cutoff=0.5)
    listed = ", ".join(names[:_LISTED]) + (f" or {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    if near:
        rest = f" (all: {listed})" if len(names) <= _LISTED else ""
        return UserError(f"unknown {kind} {word!r}: did you mean {' or '.join(near)}?{rest}")
    return UserError(f"unknown {kind} {word!r}: choose one of {listed}")


def reason(error: BaseException) -> str:
    """Return in one line why a library refuses something.

    Nothing where Python itself complains of a type or a name.

    Example:
        `ValueError("Only token and avg pooling are supported.")` gives its text,
        `TypeError("'int' object is not iterable")` gives "".
    """
    of_python = isinstance(error, TypeError | AttributeError | LookupError | NameError | ArithmeticError)
    return "" if of_python or "invalid literal" in str(error) else " ".join(str(error).split())


def in_one_line(error: Exception) -> str:
    """Return an exception's text without line breaks."""
    return " ".join(str(error).split())


@dataclass(frozen=True)
class Kind:
    """What a value may be.

    Attributes:
        words: What to give, for the error: "true or false".
        fits: Whether a value, in plain containers, is of this kind.
    """

    words: str
    fits: Callable[[Any], bool]

    def __or__(self, other: "Kind") -> "Kind":
        return Kind(f"{self.words} or {other.words}", lambda value: self.fits(value) or other.fits(value))

    @property
    def type(self) -> PlainValidator:
        """As the type of a pydantic field: `seed: Annotated[int, whole(0, 99).type]`."""
        return PlainValidator(self._take)

    def _take(self, value: Any) -> Any:
        if not self.fits(value):
            raise _Misfit(self)
        return value

    def _is_unquoted(self, value: Any) -> bool:
        """Return whether a text was meant that reads as a number or a switch."""
        return type(value) in (int, float, bool) and self.fits("text")

    def error(self, key: str, value: Any) -> UserError:
        """Return the sentence for a value that does not fit."""
        quote = f"; text that reads as a number or a switch is quoted: \"{key}='...'\""
        hint = quote if self._is_unquoted(value) else ""
        return UserError(f"{key}={shown(value)} does not fit: give {self.words}{hint}")


class _Misfit(ValueError):
    """A value is not of a kind; pydantic gathers it."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(f"give {kind.words}")
        self.kind = kind


def sentence(error: ValidationError, prefix: str = "") -> UserError:
    """Return the one sentence for the first value that a model refuses.

    Args:
        error: Of a model whose fields are of kinds.
        prefix: Of the keys, for example "recipe.".
    """
    first = error.errors(include_url=False)[0]
    key = prefix + ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return UserError(f"{key} has no value: give {key}=...")
    misfit = first.get("ctx", {}).get("error")
    if isinstance(misfit, _Misfit):
        return misfit.kind.error(key, first["input"])
    return UserError(f"{key} does not fit: {first['msg']}")


def shown(value: Any) -> str:
    """Return a value as it is typed: null, true."""
    return "null" if value is None else str(value).lower() if type(value) is bool else str(value)


def whole(least: int, most: int) -> Kind:
    """Return the kind of whole numbers in a range."""
    return Kind(
        f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most
    )


def number(words: str, fits: Callable[[float], bool]) -> Kind:
    """Return the kind of finite numbers, whole or not, that fit."""
    return Kind(words, lambda value: is_finite(value) and fits(value))


def is_finite(value: Any) -> bool:
    """Return whether a value is a number, not true or false, that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def list_of(kind: Kind, words: str) -> Kind:
    """Return the kind of lists whose entries are all of one kind."""
    return Kind(words, lambda value: isinstance(value, list | tuple) and all(map(kind.fits, value)))


def one_of(*choices: Any) -> Kind:
    """Return the kind of a few words or numbers."""
    listed = ", ".join(str(choice) for choice in choices)
    return Kind(f"one of {listed}", lambda value: any(type(value) is type(c) and value == c for c in choices))


NULL = Kind("null", lambda value: value is None)
SWITCH = Kind("true or false", lambda value: type(value) is bool)
TEXT = Kind("text", lambda value: isinstance(value, str))
PATH = Kind("a path", lambda value: isinstance(value, str) and value != "" and "\0" not in value)
MAPPING = Kind("a mapping", lambda value: isinstance(value, Mapping))
WORDS = list_of(TEXT, "a list of words")
