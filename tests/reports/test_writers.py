"""The four forms in which tables are written, and the words of errors and numbers."""

import csv
import io
from html.parser import HTMLParser

import pytest

from visprompt.reports.writers import (
    Missing,
    Number,
    Table,
    csv_text,
    decimal,
    html,
    latex,
    markdown,
    p_value,
)

TABLE = Table(
    title="A & B_1 <50 %>",
    header=("method", "acc", "why"),
    rows=(
        ("vpt_deep", decimal(87.0347, 1, 2.66), 'he said "x | y", so'),
        ("-1 {x}", decimal(-1234.5, 1), "50 % & more"),
        ("none", Missing("missing (5 of 7)"), "~ ^ \\ # $"),
    ),
    notes=("± is the <deviation>.",),
)


def test_markdown():
    assert markdown(TABLE, bold=(1,)) == (
        "**A \\& B_1 \\<50 %>**\n"
        "\n"
        "| method | acc | why |\n"
        "| :-- | --: | :-- |\n"
        '| vpt_deep | **87.0 ± 2.7** | he said "x \\| y", so |\n'
        "| -1 {x} | -1,234.5 | 50 % \\& more |\n"
        "| none | missing (5 of 7) | \\~ ^ \\\\ # \\$ |\n"
        "\n"
        "- ± is the \\<deviation>.\n"
    )


def test_an_interval_is_shown_with_its_number_and_has_columns_in_a_csv():
    table = Table(
        "t",
        ("m", "a", "b"),
        (("x", decimal(81.25, ends=(78.94, 83.2)), decimal(1)), ("y", decimal(5), decimal(2))),
    )
    assert "| x | 81.2 (78.9 to 83.2) | 1.0 |" in markdown(table)
    assert csv_text(table) == "m,a,a low,a high,b\r\nx,81.25,78.94,83.2,1\r\ny,5,,,2\r\n"


def test_csv_is_rfc_4180_with_numbers_in_full_and_nothing_where_they_are_missing():
    text = csv_text(TABLE)
    assert text.splitlines()[1] == 'vpt_deep,87.0347,2.66,"he said ""x | y"", so"'
    assert text.count("\r\n") == 4
    assert list(csv.reader(io.StringIO(text))) == [
        ["method", "acc", "acc std", "why"],
        ["vpt_deep", "87.0347", "2.66", 'he said "x | y", so'],
        ["'-1 {x}", "-1234.5", "", "50 % & more"],
        ["none", "", "", "~ ^ \\ # $"],
    ]


def test_latex():
    assert latex(TABLE, bold=(1,)) == (
        "\\begin{table}[ht]\n"
        "\\centering\n"
        "\\caption{A \\& B\\_1 $<$50 \\%$>$}\n"
        "\\begin{tabular}{lrl}\n"
        "\\toprule\n"
        "method & acc & why \\\\\n"
        "\\midrule\n"
        'vpt\\_deep & \\textbf{87.0 $\\pm$ 2.7} & he said "x $|$ y", so \\\\\n'
        "$-$1 \\{x\\} & $-$1,234.5 & 50 \\% \\& more \\\\\n"
        "none & missing (5 of 7) & \\textasciitilde{} \\textasciicircum{} \\textbackslash{} \\# \\$ \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
        "\\par{\\footnotesize $\\pm$ is the $<$deviation$>$.}\n"
        "\\end{table}\n"
    )


class Reader(HTMLParser):
    """Collects tags with their attributes, and text."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data.strip())


def test_html():
    reader = Reader()
    text = html(TABLE, bold=(1,))
    reader.feed(text)
    right = {"style": "text-align: right"}
    assert [tag for tag in reader.tags if tag[0] in ("th", "td")][:6] == [
        ("th", {"scope": "col"}),
        ("th", {"scope": "col"} | right),
        ("th", {"scope": "col"}),
        ("th", {"scope": "row"}),
        ("td", right),
        ("td", {}),
    ]
    assert "<strong>87.0 ± 2.7</strong>" in text
    assert "<caption>A &amp; B_1 &lt;50 %&gt;</caption>" in text
    assert 'he said "x | y", so' in reader.text
    assert "± is the <deviation>." in reader.text


def test_bold_is_an_option_and_ties_share_it():
    table = Table(
        "t",
        ("m", "a"),
        (("x", decimal(50.04)), ("y", decimal(50.01)), ("z", decimal(49.0)), ("w", Missing())),
    )
    assert markdown(table).count("**") == 2  # the title's
    assert markdown(table, bold=(1,)).count("**50.0**") == 2


def test_a_table_without_rows_is_a_table_all_the_same():
    table = Table("t", ("m", "a"), ())
    assert markdown(table).endswith("| m | a |\n| :-- | :-- |\n")
    assert "<tbody>\n</tbody>" in html(table)
    assert r"\midrule" not in latex(table)
    assert csv_text(table) == "m,a\r\n"


def test_a_row_that_does_not_fit_its_header_is_a_mistake():
    with pytest.raises(ValueError, match="table 't': a row does not have the 2 entries of its header"):
        Table("t", ("m", "a"), (("x",),))


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (decimal(1234567, 0), "1,234,567"),
        (decimal(0.5, 2, sign=True), "+0.50"),
        (decimal(-0.5, 2, sign=True), "-0.50"),
        (decimal(0.5, 1, 0.26), "0.5 ± 0.3"),
        (p_value(3.8147e-06), "3.81e-06"),
        (p_value(0.125), "0.125"),
        (p_value(1.0), "1"),
        (Number(2, "2 of 4"), "2 of 4"),
        (Missing(), "missing"),
    ],
)
def test_numbers_as_they_are_read(number, shown):
    assert str(number) == shown


def test_a_table_is_as_wide_as_a_page_of_latex_at_most():
    long = "runs of digits differ in recipe.lr: " * 20
    made = latex(
        Table("Why", ("row", "value", "why"), (("[1, 2]", decimal(1.0), long), ("* b", decimal(2.0), "a/b")))
    )
    lines = made.splitlines()
    assert lines[3] == r"\begin{tabular}{lr>{\raggedright\arraybackslash}p{16em}}"
    assert lines[7].startswith("{[}1, 2] & 1.0 & runs of digits")
    assert lines[8] == r"{*} b & 2.0 & a/\allowbreak{}b \\"
    many = Table(
        "Cost", ("row", *(f"column {i}" for i in range(9))), (("a", *(decimal(i) for i in range(9))),)
    )
    lines = latex(many).splitlines()
    assert lines[3:5] == [r"\resizebox{\linewidth}{!}{%", r"\begin{tabular}{lrrrrrrrrr}"]
    assert lines[-2] == r"\end{tabular}}"
