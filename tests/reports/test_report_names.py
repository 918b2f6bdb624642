"""Names of every kind through a whole report: page, Markdown, CSV, LaTeX, figures; none is read as markup."""

import csv
import io
import re
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from hydra import compose

from helpers.names import NASTY
from helpers.written_runs import changed, result, write
from visprompt.reports import closeups, score_figures
from visprompt.reports.figures import LIGHT, Plot, png, svg
from visprompt.reports.report import report
from visprompt.reports.writers import Number, Table, csv_text, html, latex, markdown
from visprompt.runs.compose import composing
from visprompt.runs.result import write_result
from visprompt.text import csv_cell, in_markdown, visible

CHARTED = (
    "birds [v2]",
    "$\\alpha$",
    "_private",
    "\u540d\u524d",
    "\x1b[31mred",
    "new\nline",
    "x" * 230,
    "caf\udce9",
)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    for number, name in enumerate(NASTY):
        records = [result("own", method, 0.5 + number / 1000) for method in ("linear", "bias")]
        if name in CHARTED:
            options = [{"num_tokens": tokens, "depth": None} for tokens in (1, 10)]
            records += [result("own", "vpt_deep", 0.5, split="tune", options=option) for option in options]
        for record in records:
            folder = write(logs / f"{number}", record)
            write_result(folder, changed(record, task=name))
    folder = tmp_path_factory.mktemp("out") / "report [v2] 50% #1"
    with composing():
        cfg = compose("report", [f"runs={logs}", f"output='{folder}'"])
    assert report(cfg) == folder
    return folder


class Texts(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.texts += [value for _, value in attrs if value]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_shows_every_name_and_has_no_element_of_one(output):
    text = (output / "index.html").read_bytes().decode()
    page = Texts(text)
    assert not page.tags & {"script", "b", "i"}
    cells = set(page.texts)
    assert [name for name in NASTY if visible(name) not in cells] == []
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e\u2028]", text)


def unescaped(cell):
    return re.sub(r"\\([\\|*`<\[\]&~$_])", r"\1", cell)


def test_markdown_has_every_name_in_a_cell_of_its_own_and_links_that_lead_somewhere(output):
    text = (output / "report.md").read_bytes().decode()
    rows = [re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    cells = {unescaped(cell.strip(" ")) for row in rows for cell in row}
    assert [name for name in NASTY if visible(name).strip() not in cells and not name.endswith("\\")] == []
    links = re.findall(r"(?<!\\)!\[.*?(?<!\\)\]\((.*?)\)", text)
    assert len(links) > len(CHARTED)
    assert all((output / unquote(link)).is_file() for link in links)


def test_csvs_hold_every_name_and_no_formula(output):
    cells = set()
    for file in output.rglob("*.csv"):
        rows = list(csv.reader(io.StringIO(file.read_bytes().decode(), newline="")))
        assert len({len(row) for row in rows}) == 1
        cells.update(cell for row in rows for cell in row)
    assert [name for name in NASTY if csv_cell(name) not in cells] == []
    number = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")
    assert [cell for cell in cells if cell[:1] in "=+-@\t\r" and cell and not number.fullmatch(cell)] == []


def plain_latex(text):
    """What LaTeX prints of escaped text; a special character that is not escaped stops it."""
    commands = {
        "textbackslash": "\\",
        "textasciitilde": "~",
        "textasciicircum": "^",
        "textasciigrave": "`",
        "allowbreak": "",
    }
    maths = {"$-$": "-", "$<$": "<", "$>$": ">", "$|$": "|", "$\\pm$": "\u00b1", "$\\times$": "\u00d7"}
    out, place = [], 0
    while place < len(text):
        rest = text[place:]
        if match := re.match(r"\\([a-z]+)\{\}", rest):
            out.append(commands[match[1]])
        elif match := re.match(r"\\([&%$#_{}])|\{([\[*])\}|-(\{\})(?=-)", rest):
            out.append(match[1] or match[2] or "-")
        elif match := re.match(r"\$[^$]*\$", rest):
            out.append(maths[match[0]])
        else:
            assert rest[0] not in "\\{}$&#%_^~`", f"{rest[0]!r} in {text!r}"
            match = re.match(r"(?s).", rest)
            out.append(match[0])
        place += len(match[0])
    return "".join(out)


def test_latex_prints_every_name(output):
    text = (output / "report.tex").read_bytes().decode()
    rows = [line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if line.endswith(r" \\")]
    cells = {plain_latex(re.sub(r"^\\textbf\{(.*)\}$", r"\1", cell)) for row in rows for cell in row}
    assert [name for name in NASTY if visible(name) not in cells] == []


@pytest.mark.parametrize("name", NASTY)
def test_a_table_keeps_a_name_in_every_form(name):
    table = Table(f"of {name}", (name, "n"), ((name, Number(-1.5, "-1.5")),), (f"note {name}",))
    page = Texts(html(table))
    assert {visible(name), f"of {visible(name)}", f"note {visible(name)}", "-1.5"} <= set(page.texts)
    assert f"| {in_markdown(name)} | -1.5 |" in markdown(table)
    assert list(csv.reader(io.StringIO(csv_text(table), newline=""))) == [
        [csv_cell(name), "n"],
        [csv_cell(name), "-1.5"],
    ]
    caption = latex(table).splitlines()[2]
    assert plain_latex(caption.removeprefix(r"\caption{").removesuffix("}")) == f"of {visible(name)}"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CHARTED)
def test_a_figure_draws_a_class_s_name(name):
    counts, names = np.eye(2, dtype=int), (name, "other")
    for draw in (
        lambda theme: score_figures.draw_confusion(counts, names, theme),
        lambda theme: closeups.draw_map(np.eye(2), np.arange(2), names, theme),
    ):
        text = svg(Plot("c", name, name, name, draw), LIGHT)
        ElementTree.fromstring(text)
        comments = re.findall(r"<!-- (.*?) -->", text, re.DOTALL)
        shown = visible(name)
        expected = ("\u200b" if shown.startswith("_") else "") + (
            shown if len(shown) <= 22 else f"{shown[:21]}\u2026"
        )
        assert expected.replace("--", "- -") in list(map(plain_xml, comments))
    assert png(Plot("c", name, name, name, draw)).startswith(b"\x89PNG")


def plain_xml(text):
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
