"""The structure of all tables of the report, and its four formats: Markdown, CSV, LaTeX, HTML."""

import csv
import html as html_escapes
import io
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import chain, compress

from visprompt.text import csv_cell, in_markdown, visible

_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {character: "\\" + character for character in "&%$#_{}"}
_LATEX |= {"`": r"\textasciigrave{}"}
_LATEX |= {"[": "{[}", "*": "{*}"}  # not read as an argument of the line's end before them
_LATEX |= {"/": r"/\allowbreak{}"}  # of paths
_LATEX |= {"±": r"$\pm$", "\u00d7": r"$\times$", "<": r"$<$", ">": r"$>$", "|": r"$|$"}

LATEX_PACKAGES = r"\usepackage{array, booktabs, graphicx}"
_MOST_IN_LINE, _PARAGRAPH = 36, r">{\raggedright\arraybackslash}p{16em}"  # longer text is broken into lines
_MOST_ACROSS = 72  # characters of a row, at most, for which a page of LaTeX has room
_SUFFIXES = ("", " std", " low", " high")  # of the columns of a CSV


@dataclass(frozen=True)
class Number:
    """A number in a table.

    Attributes:
        value: The number in a CSV and in comparisons.
        shown: The number as text in the other formats, without the spread.
        spread: Standard deviation, in the unit of `value`; None for a single value.
        shown_spread: The spread as text in the other formats.
        ends: The ends of the 95 % interval of a single value, in the unit of `value`.
        shown_ends: The interval as text in the other formats.
    """

    value: float
    shown: str
    spread: float | None = None
    shown_spread: str = ""
    ends: tuple[float, float] | None = None
    shown_ends: str = ""

    def __str__(self) -> str:
        if self.ends is not None:
            return f"{self.shown} ({self.shown_ends})"
        return self.shown if self.spread is None else f"{self.shown} ± {self.shown_spread}"


@dataclass(frozen=True)
class Missing:
    """A missing number; empty in a CSV.

    Attributes:
        said: The text in the other formats.
    """

    said: str = "missing"

    def __str__(self) -> str:
        return self.said


Entry = str | Number | Missing


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        title: What it shows; plain text, like all texts of the table.
        header: Names of the columns.
        rows: Rows of one entry for each column; the first entry is the row's name.
        notes: What to know about it, in whole sentences.

    Raises:
        ValueError: A row does not have one entry for each column.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if any(len(row) != len(self.header) for row in self.rows):
            raise ValueError(
                f"table {self.title!r}: a row does not have the {len(self.header)} entries of its header"
            )

    def is_numeric(self, column: int) -> bool:
        """Return whether a column holds numbers, which are right-aligned."""
        return column > 0 and bool(self.rows) and not any(isinstance(row[column], str) for row in self.rows)


def decimal(
    value: float,
    digits: int = 1,
    spread: float | None = None,
    sign: bool = False,
    ends: tuple[float, float] | None = None,
) -> Number:
    """Return a number with fixed decimals and thousands separators, and with `sign` a plus above 0."""
    shown_ends = "" if ends is None else f"{ends[0]:,.{digits}f} to {ends[1]:,.{digits}f}"
    shown_spread = "" if spread is None else f"{spread:,.{digits}f}"
    shown = round(value, digits) + 0.0  # not "-0.0"
    text = f"{shown:{'+' if sign and shown else ''},.{digits}f}"
    return Number(value, text, spread, shown_spread, ends, shown_ends)


def p_value(value: float) -> Number:
    """Return a probability to three significant digits."""
    return Number(value, f"{value:.3g}")


def markdown(table: Table, bold: Collection[int] = ()) -> str:
    """Write the table as Markdown, under its title as a paragraph.

    Args:
        table: A table.
        bold: Columns whose largest number is shown in bold.
    """
    marks = [("--:" if table.is_numeric(column) else ":--") for column in range(len(table.header))]
    rows = [[in_markdown(name) for name in table.header], marks, *_texts(table, bold, in_markdown, "**{}**")]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    notes = [f"- {in_markdown(note)}" for note in table.notes]
    return "\n".join([f"**{in_markdown(table.title)}**", "", *lines, *(["", *notes] if notes else [])]) + "\n"


def csv_text(table: Table) -> str:
    """Write the table as CSV (RFC 4180) without title and notes, with numbers in full.

    A column "acc" with spreads is followed by "acc std", one with intervals by "acc low" and "acc high".
    """
    kept = [
        (True, *(any(_plain(row[column])[place] for row in table.rows) for place in (1, 2, 3)))
        for column in range(len(table.header))
    ]
    names = [
        compress([name + suffix for suffix in _SUFFIXES], places)
        for name, places in zip(table.header, kept, strict=True)
    ]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(csv_cell(name) for pair in names for name in pair)
    for row in table.rows:
        cells = (compress(_plain(entry), places) for entry, places in zip(row, kept, strict=True))
        writer.writerow(chain.from_iterable(cells))
    return out.getvalue()


def latex(table: Table, bold: Collection[int] = ()) -> str:
    r"""Write the table as LaTeX, as wide as a page at most; it needs `LATEX_PACKAGES`.

    Args:
        table: A table.
        bold: Columns whose largest number is shown in bold.
    """
    widths = [max(map(len, map(str, column))) for column in zip(table.header, *table.rows, strict=True)]
    columns = "".join(
        "r" if table.is_numeric(column) else "l" if width <= _MOST_IN_LINE else _PARAGRAPH
        for column, width in enumerate(widths)
    )
    is_wide = sum(min(width, _MOST_IN_LINE) + 3 for width in widths) > _MOST_ACROSS
    rows = [" & ".join(row) + r" \\" for row in _texts(table, bold, _latex, r"\textbf{{{}}}")]
    lines = [
        r"\begin{table}[ht]",
        r"\centering",
        rf"\caption{{{_latex(table.title)}}}",
        *([r"\resizebox{\linewidth}{!}{%"] if is_wide else []),
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(map(_latex, table.header)) + r" \\",
        *([r"\midrule", *rows] if rows else []),
        r"\bottomrule",
        r"\end{tabular}" + "}" * is_wide,
        *(rf"\par{{\footnotesize {_latex(note)}}}" for note in table.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def html(table: Table, bold: Collection[int] = ()) -> str:
    """Write the table as HTML that needs no style sheet, its notes as a list below it.

    Args:
        table: A table.
        bold: Columns whose largest number is shown in bold.
    """
    right = [' style="text-align: right"' if table.is_numeric(c) else "" for c in range(len(table.header))]
    head = "".join(
        f'<th scope="col"{style}>{_html(name)}</th>' for name, style in zip(table.header, right, strict=True)
    )
    lines = [
        "<table>",
        f"<caption>{_html(table.title)}</caption>",
        f"<thead><tr>{head}</tr></thead>",
        "<tbody>",
    ]
    for first, *others in _texts(table, bold, _html, "<strong>{}</strong>"):
        cells = "".join(f"<td{style}>{entry}</td>" for entry, style in zip(others, right[1:], strict=True))
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    lines += ["</tbody>", "</table>"]
    if table.notes:
        lines += ['<ul class="notes">', *(f"<li>{_html(note)}</li>" for note in table.notes), "</ul>"]
    return "\n".join(lines) + "\n"


def _texts(
    table: Table, bold: Collection[int], escape: Callable[[str], str], strong: str
) -> Iterator[list[str]]:
    """Yield entries as escaped text; in the columns `bold` the largest number, as it is shown, is bold."""
    best = {}
    for column in bold:
        numbers = [entry for row in table.rows if isinstance(entry := row[column], Number)]
        best[column] = max(numbers, key=lambda number: number.value).shown if numbers else None
    for row in table.rows:
        texts = []
        for column, entry in enumerate(row):
            shown = escape(str(entry))
            set_off = isinstance(entry, Number) and column in best and entry.shown == best[column]
            texts.append(strong.format(shown) if set_off else shown)
        yield texts


def _plain(entry: Entry) -> tuple[str, ...]:
    """Return an entry, its spread and the ends of its interval in a CSV."""
    if isinstance(entry, Number):
        numbers = (entry.value, entry.spread, *(entry.ends or (None, None)))
        return tuple("" if number is None else f"{number:.10g}" for number in numbers)
    return ("" if isinstance(entry, Missing) else csv_cell(entry)), "", "", ""


def _latex(text: str) -> str:
    escaped = "".join(_LATEX.get(character, character) for character in visible(text))
    # two would be one longer dash
    return re.sub(r"-(?=-)", "-{}", re.sub(r"(?<![\w.-])-(?=\d)", "$-$", escaped))


def _html(text: str) -> str:
    return html_escapes.escape(visible(text))
