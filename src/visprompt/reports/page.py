"""The report as one HTML page that loads nothing: style and figures are in it, and it runs no script."""

import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2

from visprompt.reports.contents import Contents
from visprompt.reports.render import Table, html
from visprompt.text import visible

_TEMPLATE = Path(__file__).with_name("page.html.j2")


@dataclass(frozen=True)
class Picture:
    """A figure as a page shows it.

    Attributes:
        light: Its SVG for light pages.
        dark: Its SVG for dark pages.
    """

    light: str
    dark: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in CSS pixels, which an SVG of matplotlib gives in points."""
        found = dict(re.findall(r' (width|height)="([\d.]+)pt"', self.light[: self.light.index("<metadata>")]))
        return round(float(found["width"]) * 96 / 72), round(float(found["height"]) * 96 / 72)

    def uri(self, theme: str) -> str:
        """The SVG of a theme as a data URI."""
        return "data:image/svg+xml;base64," + b64encode(getattr(self, theme).encode()).decode()


def page(report: Contents, pictures: Mapping[str, Picture]) -> str:
    """Renders a report.

    Args:
        report: What it says.
        pictures: Its figures by their names.

    Returns:
        A whole HTML document.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE.parent),
        autoescape=True,
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.get_template(_TEMPLATE.name)
    return template.render(report=report, pictures=pictures, table_html=_table_html)


def _visible(value: object) -> object:
    """Text of the report without control characters; what is HTML already is as it is."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _table_html(table: Table) -> str:
    """A table without its notes, which stand outside the box that it scrolls in."""
    return html(replace(table, notes=()))
