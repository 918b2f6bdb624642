"""What commands print: plain text, in which nothing is read as markup and no control character reaches the terminal."""

import logging
from typing import Any

from rich.console import Console
from rich.text import Text

from visprompt.text import visible

_LAYOUT = "\n\t"


class Terminal(Console):
    """rich's console for a user's text: brackets, `:cat:` and control characters in it are shown as they are."""

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
