"""A user's text where it is shown or written.

Names of folders, classes, files and tasks are never read as markup.
"""

import logging
import re
from typing import Any

from rich.console import Console
from rich.text import Text

# control characters, ends of lines and paragraphs, and what turns the direction of the text behind it
_CONTROL = "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_UNSEEN = re.compile(
    f"[{_CONTROL}\ud800-\udc7f\udd00-\udfff\ufffe\uffff]"
)  # and what UTF-8 or XML cannot write
_UNSHOWN = re.compile(
    f"[{_CONTROL}\ud800-\udfff\ufffe\uffff]"
)  # and how Python holds a byte that is no UTF-8
_FORMULA = frozenset("=+-@\uff1d\uff0b\uff0d\uff20")  # what a spreadsheet runs begins with one of them
_LAYOUT = "\n\t"
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")


def has_control(text: str) -> bool:
    """Return whether a text holds characters that are not seen and steer a terminal, a page or a table.

    Bytes of a folder's name that are no UTF-8 are no such characters.
    """
    return _UNSEEN.search(text) is not None


def visible(text: str, keep: str = "") -> str:
    r"""Return text in which control characters and bytes that are no Unicode are shown as escapes.

    Args:
        text: Any. An escape character is returned as `\x1b`, the end of a line as `\n`, and a byte of a
            file's name that is no UTF-8 (0xE9, which Python holds as U+DCE9) as `\xe9`.
        keep: Characters that are left as they are, such as the ends of lines.
    """
    return _UNSHOWN.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python holds a byte of a name that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def csv_cell(text: str) -> str:
    """Return text as a cell of a CSV: what a spreadsheet would run as a formula begins with an apostrophe.

    Args:
        text: Any, such as "=1+1", which is returned as "'=1+1". Numbers, such as "-1.5", stay numbers.
    """
    shown = visible(text)
    is_formula = text[:1] in ("\t", "\r") or (shown[:1] in _FORMULA and not _NUMBER.fullmatch(shown))
    return f"'{shown}" if is_formula else shown


def in_markdown(text: str) -> str:
    """Return text on one line of Markdown, in which nothing of it is markup."""
    # an underscore between letters or digits is no markup; $ and ~ are on GitHub
    return re.sub(r"([\\|*`<\[\]&~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", visible(text))


class Terminal(Console):
    """rich's console for a user's text.

    Brackets, `:cat:` and control characters in it are shown as they are.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False} | options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string, a cell or a title of a table for example, as rich's text."""
        return super().render_str(visible(text, _LAYOUT), **options)


class PlainFormatter(logging.Formatter):
    """Formats what is logged, without control characters: names of files and classes are in it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return visible(super().format(record), _LAYOUT)
