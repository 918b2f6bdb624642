"""Names of every kind as text: shown, in a CSV, in Markdown, in a terminal and in a log."""

import csv
import io
import logging
import re
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from helpers.names import NASTY
from helpers.written_runs import result
from visprompt.errors import UserError
from visprompt.runs import unit
from visprompt.runs.cli import one_sentence_errors
from visprompt.runs.result import markdown_table
from visprompt.text import PlainFormatter, Terminal, csv_cell, in_markdown, visible

ROOT = Path(__file__).resolve().parents[1]
ANY = st.text(st.characters(exclude_categories=()), max_size=20)


def is_harmless(text):
    text.encode()
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("red\x1b[31m", r"red\x1b[31m"),
        ("nul\x00", r"nul\x00"),
        ("new\nline\r\t", r"new\nline\r\t"),
        ("caf\udce9", r"caf\xe9"),
        ("\ud800", r"\ud800"),
        ("a\u2028b\x85", r"a\u2028b\x85"),
        ("right\u202eleft", r"right\u202eleft"),
        ("\ufffe", r"\ufffe"),
        *(
            (text, text)
            for text in ("", "a b", "\u00dcn\u00efcode", "\u540d\u524d", "\U0001f431\u200d", "\\x1b", "\xa0")
        ),
    ],
)
def test_control_characters_are_shown_as_escapes(text, shown):
    assert visible(text) == shown
    assert visible(text, keep="\n") == (shown if "\n" not in text else "new\nline\\r\\t")


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        *(("=1+1", "'=1+1"), ("+cmd", "'+cmd"), ("-1+1", "'-1+1"), ("@SUM(A1)", "'@SUM(A1)"), ("-", "'-")),
        *(
            ("\t=1", r"'\t=1"),
            ("\rx", r"'\rx"),
            ("\uff1d1", "'\uff1d1"),
            ("-5 birds", "'-5 birds"),
            ("-inf", "'-inf"),
        ),
        *((text, text) for text in ("-5", "+1", "-1.5e-07", "0.25", "", "a=b", "'=1", "x-y", "\u540d\u524d")),
    ],
)
def test_what_a_spreadsheet_would_run_begins_with_an_apostrophe(text, cell):
    assert csv_cell(text) == cell


@given(ANY)
def test_any_text_is_harmless_in_every_form(text):
    for form in (visible, csv_cell, in_markdown):
        assert is_harmless(form(text))
    out = io.StringIO(newline="")
    csv.writer(out).writerow([csv_cell(text), "end"])
    (row,) = csv.reader(io.StringIO(out.getvalue(), newline=""))
    assert row == [csv_cell(text), "end"]
    assert row[0].removeprefix("'") == visible(text).removeprefix("'")


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("vpt_deep _of_ <b> [1](x) a*b*", r"vpt_deep \_of\_ \<b> \[1\](x) a\*b\*"),
        ("`c` | \\ __init__", r"\`c\` \| \\ \_\_init\_\_"),
        ("$x$ ~~y~~ &amp;", r"\$x\$ \~\~y\~\~ \&amp;"),
        ("new\nline", r"new\\nline"),
    ],
)
def test_text_in_markdown_is_no_markup(text, written):
    assert in_markdown(text) == written


def test_a_markdown_table_s_cells_are_no_markup():
    assert markdown_table(["a|b", "*c*"], [["<x>", "1 \u00b1 2"]]) == (
        "| a\\|b | \\*c\\* |\n| :-- | --: |\n| \\<x> | 1 \u00b1 2 |\n"
    )


@pytest.mark.parametrize("name", NASTY)
def test_a_name_reaches_the_terminal_as_it_is(name):
    out = io.StringIO()
    terminal = Terminal(file=out, width=600, force_terminal=True, color_system=None)
    table = Table(title=f"title {name}")
    table.add_column(f"column {name}")
    table.add_row(f"cell {name}")
    terminal.print(f"folder: {name}", soft_wrap=True)
    terminal.print(table)
    printed = out.getvalue()
    shown = visible(name, keep="\n\t").expandtabs(8)
    if "\n" not in name and "\t" not in name:
        assert all(f"{what} {shown}" in printed for what in ("folder:", "title", "column", "cell"))
    assert is_harmless(printed.replace("\n", "").replace("\t", ""))


@pytest.mark.parametrize("name", NASTY)
def test_a_name_reaches_a_log_and_an_error_as_it_is(name, capsys):
    record = logging.LogRecord("x", logging.INFO, "file", 1, "left out: %s", (name,), None)
    assert PlainFormatter("%(message)s").format(record) == f"left out: {visible(name, keep=chr(10) + chr(9))}"
    with pytest.raises(SystemExit), one_sentence_errors():
        raise UserError(f"there is no folder {name}")
    assert capsys.readouterr().err == f"error: there is no folder {visible(name, keep=chr(10))}\n"


def test_one_console_prints_everything():
    """A console of rich's own would read a user's brackets as markup."""
    sources = {path: path.read_text() for path in (ROOT / "src").rglob("*.py") if path.name != "text.py"}
    assert [
        path
        for path, text in sources.items()
        if re.search(r"rich\.console|rich import|from_markup|Console\(", text)
    ] == []
    columns = [column for text in sources.values() for column in re.findall(r"TextColumn\(.*?\)", text)]
    assert columns
    assert [column for column in columns if "markup=False" not in column] == []


@pytest.mark.parametrize("name", ["birds [v2]", "a[/b]", ":cat:", "$x$"])
def test_a_run_s_table_shows_its_folder_and_names_as_they_are(name, capsys, monkeypatch):
    monkeypatch.setattr(unit.console, "_width", 400)
    folder = Path("/logs") / name / "linear" / "0123"
    unit.show(result(name), SimpleNamespace(folder=folder))
    printed = capsys.readouterr().out
    assert f"{name}, linear, split=final, seed=42" in printed
    assert printed.endswith(f"folder: {folder}\n")
