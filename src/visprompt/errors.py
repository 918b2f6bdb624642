"""What a user did wrong, said in one sentence: what is wrong, where, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches

_LISTED = 40  # more choices than this (timm's backbones) would bury the sentence


class UserError(Exception):
    """An error that its message explains in full; entry points print the message alone, without a traceback.

    PyTorch hands on an error of a process that loads data as the text of its traceback, which ends with the message.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        in_a_worker = text.startswith("Caught ") and " in DataLoader worker process " in text
        super().__init__(text.rstrip().rpartition("\n")[2].partition(": ")[2] if in_a_worker else text)


def unknown(kind: str, word: object, choices: Iterable[str]) -> UserError:
    """Builds the error for a word that is not among the valid ones.

    Args:
        kind: What the word should have named, for example "task".
        word: What was given, of whatever kind.
        choices: The valid words.

    Returns:
        The error to raise: it names the nearest valid choices first, and all of them unless they are too many to read.
    """
    word, names = str(word), sorted(set(choices))
    near = get_close_matches(word.lower(), names, n=3, cutoff=0.5)
    listed = ", ".join(names[:_LISTED]) + (f" or {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    if near:
        rest = f" (all: {listed})" if len(names) <= _LISTED else ""
        return UserError(f"unknown {kind} {word!r}: did you mean {' or '.join(near)}?{rest}")
    return UserError(f"unknown {kind} {word!r}: choose one of {listed}")


def reason(error: BaseException) -> str:
    """Return in one line why a library refuses something; nothing where Python itself complains of a type or a name.

    Example:
        `ValueError("Only token and avg pooling are supported.")` gives its text, `TypeError("'int' object is not
        iterable")` gives "".
    """
    of_python = isinstance(error, TypeError | AttributeError | LookupError | NameError | ArithmeticError)
    return "" if of_python or "invalid literal" in str(error) else " ".join(str(error).split())


def in_one_line(error: Exception) -> str:
    """Return an exception's text without line breaks."""
    return " ".join(str(error).split())
