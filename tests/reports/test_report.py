"""The command: what it writes and where, that it is all or nothing, and what it refuses in one sentence."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace
from weakref import ref

import numpy as np
import pytest
from hydra import compose

from helpers.cli import call, frozen, tiny_run
from helpers.written_runs import result, write
from visprompt.errors import UserError
from visprompt.reports import closeups
from visprompt.reports import report as module
from visprompt.reports.closeups import typical
from visprompt.reports.inspection import Features
from visprompt.reports.load import read_runs
from visprompt.reports.report import FORMATS, report
from visprompt.reports.rows import rows
from visprompt.runs import run
from visprompt.runs.compose import composing


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Three methods on three tasks, and a sweep of lengths."""
    folder = tmp_path_factory.mktemp("logs")
    for task in ("digits", "digits_crowded", "digits_loc"):
        for number, method in enumerate(("linear", "bias", "ssf")):
            write(folder, result(task, method, 0.5 + number / 10, tuned={"parameters": 100 * number}))
    for tokens in (1, 10):
        write(folder, result("digits", "vpt_deep", 0.5, split="tune", options={"num_tokens": tokens}))
    return folder


def made(logs, output, *options):
    with composing():
        cfg = compose("report", [f"runs={logs}", f"output={output}", *options])
    return report(cfg)


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def output(logs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "report"
    assert made(logs, folder) == folder
    return folder


CHARTS = {"accuracy_by_parameters_mean_of_3_tasks_demo", "accuracy_by_prompt_length_digits_validation"}
TABLES = {"accuracy_demo", "means", "cost", "tests", "ranks", "choices"}


def test_a_report_is_a_page_and_files_for_a_paper(output):
    endings = (".svg", "_dark.svg", ".png", ".csv")
    assert files(output) == {
        *("index.html", "report.md", "report.tex"),
        *(f"tables/{name}.csv" for name in TABLES),
        *(f"figures/{name}{ending}" for name in CHARTS for ending in endings),
    }
    assert oct(output.stat().st_mode)[-3:] == "755"


def test_the_files_say_the_same_as_the_page(output):
    with (output / "tables" / "accuracy_demo.csv").open(newline="") as file:
        table = {row["method"]: row for row in csv.DictReader(file)}
    assert table["ssf"]["digits"] == "0.7" or float(table["ssf"]["digits"]) == pytest.approx(70)
    text = (output / "report.md").read_text()
    assert text.startswith(
        "# Visual prompt tuning: report\n\n- **Tasks**: 3: digits, digits_crowded, digits_loc\n- **Meth"
    )
    assert "\n- **Runs**: 11: 9 of split=final, 2 of split=tune\n" in text
    assert re.search(
        r"\n- \*\*Protocol\*\*:\n  - Test scores are [^\n]+\.\n  - Settings of a method [^\n]+\.\n- \*\*",
        text,
    )
    assert "| ssf | 70.0 | 70.0 | 70.0 | 70.00 |" in text
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert {Path(link).name for link in links} == {f"{name}.png" for name in CHARTS}
    assert all((output / link).is_file() for link in links)
    latex = (output / "report.tex").read_text()
    assert latex.startswith("% needs \\usepackage{array, booktabs, graphicx}\n\\begin{table}")
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == len(TABLES)
    page = (output / "index.html").read_text()
    assert page.count("<table>") == len(TABLES)
    assert "70.0" in page


def test_the_same_runs_make_the_same_files_but_for_the_time(logs, output, tmp_path):
    again = made(logs, tmp_path / "report")
    for name in sorted(files(output) - {"index.html", "report.md"}):
        assert (again / name).read_bytes() == (output / name).read_bytes(), name


def test_formats_and_methods_can_be_chosen(logs, tmp_path):
    folder = made(logs, tmp_path / "report", "formats=[markdown,png]", "against=bias")
    assert files(folder) == {"report.md", *(f"figures/{name}.png" for name in CHARTS)}
    assert "**Against bias**" in (folder / "report.md").read_text()
    assert made(logs, folder, "formats=[csv]") == folder
    assert "report.md" not in files(folder), "the older report is gone"
    assert list(tmp_path.iterdir()) == [folder]


def test_pictures_in_markdown_are_svg_where_there_is_no_png(logs, tmp_path):
    text = (made(logs, tmp_path / "report", "formats=[markdown,svg]") / "report.md").read_text()
    assert sorted(re.findall(r"\]\(figures/([^)]+)\)", text)) == sorted(f"{name}.svg" for name in CHARTS)


def test_a_folder_in_brackets_is_said_as_it_is(logs, tmp_path, capsys):
    folder = tmp_path / "[bold]mine[/bold]"
    made(logs, f"'{folder}'", "formats=[csv]")
    assert capsys.readouterr().out == f"report of 11 runs: {folder}\n"


def test_a_report_takes_several_folders(logs, tmp_path):
    write(tmp_path / "more", result("digits", "full", 0.9, tuned={"parameters": 10**8}))
    folder = made(f"[{logs},{tmp_path / 'more'}]", tmp_path / "report", "formats=[csv]")
    assert "full" in (folder / "tables" / "accuracy_demo.csv").read_text()


def test_what_cannot_be_written_leaves_the_older_report(logs, tmp_path, monkeypatch):
    folder = made(logs, tmp_path / "report", "formats=[csv]")
    before = files(folder)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "csv_text", full)
    with pytest.raises(
        UserError, match=r"cannot write .*report: .*No space left on device; name another folder"
    ):
        made(logs, folder, "formats=[csv]")
    assert files(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_with_anything_else_is_not_replaced(logs, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        UserError, match=r"holds thesis\.tex, which is not part of a report: .* output=FOLDER"
    ):
        made(logs, tmp_path)
    with pytest.raises(UserError, match=r"thesis\.tex is a file: name another folder"):
        made(logs, tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(UserError, match="cannot write"):
        made(logs, tmp_path / "thesis.tex" / "report")


def test_nothing_to_report_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"there is no finished run below .*: name folders .* runs=FOLDER"):
        made(tmp_path, tmp_path / "report")
    (tmp_path / "digits" / "linear" / ("a" * 12) / "resume").mkdir(parents=True)
    with pytest.raises(UserError, match=r"\(1 are unfinished, damaged or of debugging\)"):
        made(tmp_path, tmp_path / "report")
    with pytest.raises(UserError, match="there is no folder"):
        made(tmp_path / "nowhere", tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("formats=[htm]", "unknown format 'htm': did you mean html"),
        ("formats=[]", "leaves nothing to write: give some of html, markdown"),
        ("against=biass", "unknown method to compare with among these runs 'biass': did you mean bias"),
        ("paper=vtp", "unknown paper 'vtp': did you mean vpt"),
        ("runs=[]", r"runs=\[\] names no folder"),
        ("runs=null", "runs=None names no folder"),
        ("inspect=nowhere", "nowhere holds no finished run"),
    ],
)
def test_a_wrong_value_is_one_sentence(logs, tmp_path, option, message):
    with pytest.raises(UserError, match=message):
        made(logs, tmp_path / "report", option)
    assert not (tmp_path / "report").exists()


def test_what_nothing_can_be_tested_against_is_said_before_any_run_is_opened(logs, tmp_path):
    folder = tmp_path / "logs"
    for task, method in (
        ("digits", "linear"),
        ("digits", "bias"),
        ("digits_loc", "bias"),
        ("digits_crowded", "linear"),
    ):
        write(folder, result(task, method))
    message = (
        "^there is nothing to test against linear: no other row under its protocol shares two tasks with "
        "it; leave against=linear out, or train it on more of their tasks$"
    )
    with pytest.raises(UserError, match=message):
        made(folder, tmp_path / "report", "against=linear", "inspect=nowhere")
    write(folder, result("digits_loc", "linear"))
    with pytest.raises(UserError, match="nowhere holds no finished run"):
        made(folder, tmp_path / "report", "against=linear", "inspect=nowhere")
    write(tmp_path / "tried", result(split="tune"))
    with pytest.raises(
        UserError,
        match=r"^against=linear needs runs of split=final, and found no such run: leave it out, or ",
    ):
        made(tmp_path / "tried", tmp_path / "report", "against=linear")


def test_a_wrong_word_is_said_before_anything_is_loaded():
    done = call("report", "outptu=x")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown key 'outptu': did you mean output")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_command_writes_the_report_and_says_where(logs, tmp_path):
    done = call("report", f"runs={logs}", f"paths.log_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"report of 11 runs: {tmp_path}/report/index.html\n"
    assert done.stderr == ""
    assert len(files(tmp_path / "report")) == 3 + len(TABLES) + 4 * len(CHARTS)
    assert not list(tmp_path.glob("report/.*"))


# runs seen closely


def test_typical_runs_are_one_of_each_row_on_the_task_that_most_have(logs):
    assert [(path.parts[-3], path.parts[-2]) for path in typical(rows(read_runs([logs])))] == [
        ("digits", "linear"),
        ("digits", "bias"),
        ("digits", "ssf"),
    ]
    assert typical([]) == []


def test_a_run_that_stands_in_two_rows_is_opened_once(tmp_path):
    """Of two tasks each has two runs, and validation chose another on each.

    The chosen stand in three rows.
    """
    for task, best in (("digits", 1.0), ("digits_loc", 0.5)):
        for rate in (1.0, 0.5):
            for split in ("tune", "final"):
                write(
                    tmp_path,
                    result(task, "bias", 0.6 if rate == best else 0.4, split=split, recipe={"lr": rate}),
                )
    runs = read_runs([tmp_path])
    made_rows = rows(runs)
    assert [sorted(row.cells) for row in made_rows] == [["digits", "digits_loc"]] * 3
    rates = {folder: result.recipe["lr"] for folder, result in zip(runs.folder, runs.result, strict=True)}
    assert sorted(rates[folder] for folder in typical(made_rows)) == [0.5, 1.0]


class Opened:
    """A run of which nothing can be seen."""

    def __init__(self, folder, classes=10):
        self.folder, self.result, self.set_name = folder, result("digits"), "test"
        self.dataset = range(5)
        self.datamodule = SimpleNamespace(class_names=tuple(f"class {i}" for i in range(classes)))


def refuse(*_):
    raise UserError("there is nothing to see")


def test_a_run_is_let_go_before_the_next_is_opened(monkeypatch):
    before = []

    def open_run(folder, *_, **__):
        assert [run() for run in before] == [None] * len(before)
        before.append(ref(one := Opened(folder)))
        return one

    monkeypatch.setattr(closeups.inspection, "open_run", open_run)
    monkeypatch.setattr(closeups, "show_scores", refuse)
    for name in ("features", "attention", "latency"):
        monkeypatch.setattr(closeups.inspection, name, refuse)
    seen = closeups.look([Path("a"), Path("b")], {}, "cpu", data_dir=None, weights=None)
    whats = ("scoring", "t-SNE", "attention", "latency")
    expected = [(name, f"{what} is not shown: there is nothing to see") for name in "ab" for what in whats]
    assert [(str(one.folder), one.why) for one in seen.left_out] == expected
    assert (seen.plots, seen.tables, seen.latency) == ((), {}, None)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (24, "The 24 classes differ in colour and shape."),
        (100, "The 100 classes are too many for a legend, and some of them share colour or shape."),
    ],
)
def test_words_for_a_map_say_whether_its_classes_can_be_told_apart(monkeypatch, number, words):
    features = np.zeros((5, 2), np.float32)
    monkeypatch.setattr(closeups.inspection, "open_run", lambda folder, *_, **__: Opened(folder, number))
    monkeypatch.setattr(
        closeups.inspection, "features", lambda _: Features(features, features, np.arange(5), np.arange(5))
    )
    monkeypatch.setattr(closeups, "show_scores", refuse)
    for name in ("attention", "latency"):
        monkeypatch.setattr(closeups.inspection, name, refuse)
    before, after = closeups.look([Path("a")], {}, "cpu", data_dir=None, weights=None).plots
    about = "5 images of test; distances between groups mean little in t-SNE."
    assert before.alt == after.alt == f"Points in the plane for {about} {words}"
    assert before.caption == f"Features of the frozen backbone: {about}" + (
        f" {words}" if number > 24 else ""
    )


@pytest.mark.slow
@frozen
def test_runs_are_opened_and_shown_where_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(closeups.inspection, "latency", short(closeups.inspection.latency))
    monkeypatch.setattr(closeups.inspection, "features", few(closeups.inspection.features))
    for options in ((), ("method=linear",)):
        one = tiny_run(tmp_path / "logs", "recipe.epochs=2", *options)
        run.run_job(one)
    output = made(
        tmp_path / "logs", tmp_path / "report", "inspect=auto", "device=cpu", "formats=[html,csv,markdown]"
    )
    with (output / "tables" / "latency.csv").open(newline="") as file:
        latency = list(csv.DictReader(file))
    assert [(row["run"], row["images at a time"]) for row in latency] == [
        (f"{method}, digits, seed 0", size) for method in ("linear", "vpt_deep") for size in ("1", "64")
    ]
    for row in latency:
        assert float(row["images per second"]) == pytest.approx(1000 / float(row["ms per image"]), rel=1e-6)
    page = (output / "index.html").read_text()
    for kind in (
        "Learning curve",
        "Confusion matrix",
        "Reliability",
        "The most confident mistakes",
        "t-SNE before tuning",
        "t-SNE after tuning",
        "Attention in the last block",
    ):
        assert f"<h3>{kind}, vpt_deep, digits, seed 0</h3>" in page
    assert re.search(r"Confusion matrix of 10 classes: \d+ of 797 images are right", page)
    assert re.search(r"alt=\"Attention of the class token to 4 images\. [^\"]*prompts \d+ %", page)
    assert "<caption>Classes, vpt_deep, digits, seed 0</caption>" in page
    with (output / "figures" / "confusion_matrix_vpt_deep_digits_seed_0.csv").open(newline="") as file:
        counts = list(csv.reader(file))
    assert sum(float(entry) for row in counts[1:] for entry in row[1:]) == 797


@frozen
def test_what_cannot_be_opened_is_left_out_and_says_why(logs, tmp_path, capsys):
    folder = next((logs / "digits" / "ssf").iterdir())
    output = made(logs, tmp_path / "report", f"inspect={folder}", "formats=[csv]")
    with (output / "tables" / "left_out.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["folder"] == str(folder)
    assert row["why"].startswith("not seen closely: ")
    assert f"{folder}: not seen closely" in capsys.readouterr().out


def short(latency):
    return lambda opened: latency(opened, repeats=3, seconds=0.0)


def few(features):
    return lambda opened: features(opened, limit=60)


def test_the_formats_of_the_config_are_all_there_are():
    with composing():
        assert tuple(compose("report").formats) == FORMATS
