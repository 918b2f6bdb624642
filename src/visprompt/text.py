"""Show and write a user's text (names of folders, classes, tasks) so that it is never read as markup."""

import logging
import re
from typing import Any

from rich.console import Console
from rich.text import Text

# control characters, line and paragraph separators, and characters that change the direction of the text
_CONTROL = "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
# these, and what cannot be written as UTF-8 or XML, without the surrogates by which Python keeps a byte of a
# file's name that is not UTF-8 (U+DC80 to U+DCFF)
_UNSEEN = re.compile(f"[{_CONTROL}\ud800-\udc7f\udd00-\udfff\ufffe\uffff]")
_ESCAPED = re.compile(f"[{_CONTROL}\ud800-\udfff\ufffe\uffff]")  # the same with those surrogates
# a spreadsheet runs a cell that begins with one of these characters
_FORMULA = frozenset("=+-@\uff1d\uff0b\uff0d\uff20")
_LAYOUT = "\n\t"
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")


def has_control(text: str) -> bool:
    """Return whether a text holds invisible characters that control a terminal, a page or a table.

    Bytes of a folder's name that are not UTF-8 do not count.
    """
    return _UNSEEN.search(text) is not None


def visible(text: str, keep: str = "") -> str:
    r"""Return text with control characters, and bytes that are not UTF-8, written as escapes.

    Args:
        text: Any text. An escape character is returned as `\x1b`, a line break as `\n`, and a byte of a
            file's name that is not UTF-8 (0xE9, which Python keeps as U+DCE9) as `\xe9`.
        keep: Characters to leave as they are, such as line breaks.
    """
    return _ESCAPED.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def csv_cell(text: str) -> str:
    """Return text for a cell of a CSV file; one that a spreadsheet would run as a formula gets an apostrophe.

    Args:
        text: Any text: "=1+1" is returned as "'=1+1". Numbers such as "-1.5" stay as they are.
    """
    shown = visible(text)
    is_formula = text[:1] in ("\t", "\r") or (shown[:1] in _FORMULA and not _NUMBER.fullmatch(shown))
    return f"'{shown}" if is_formula else shown


def in_markdown(text: str) -> str:
    """Return text on one line, escaped so that Markdown reads no markup in it."""
    # an underscore between letters or digits is not markup; $ and ~ are markup on GitHub
    return re.sub(r"([\\|*`<\[\]&~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", visible(text))


class Terminal(Console):
    """A rich console that shows brackets and `:cat:` as they are, and control characters as escapes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False} | options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string, for example a table's cell or title, to a rich `Text`."""
        return super().render_str(visible(text, _LAYOUT), **options)


class PlainFormatter(logging.Formatter):
    """A log formatter that escapes control characters, because messages hold names of files and classes."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's line, with control characters as escapes."""
        return visible(super().format(record), _LAYOUT)
