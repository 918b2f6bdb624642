"""The command: what it writes and where, that it is all or nothing, and what it refuses in one sentence."""

import csv
import re
from pathlib import Path

import pytest
from hydra import compose
from written_runs import result, write

from cli import call, frozen, tiny_run
from visprompt import run
from visprompt.compose import composing
from visprompt.errors import UserError
from visprompt.reports import closeups
from visprompt.reports import report as module
from visprompt.reports.closeups import typical
from visprompt.reports.collect import read_runs, rows
from visprompt.reports.report import FORMATS, report


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
    assert text.startswith("# Visual prompt tuning: report\n\n- **Tasks**: 3: digits, digits\\_crowded")
    assert "| ssf | 70.0 | 70.0 | 70.0 | 70.00 |" in text
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert {Path(link).stem for link in links} == CHARTS
    assert all((output / link).is_file() for link in links)
    latex = (output / "report.tex").read_text()
    assert latex.startswith("% needs \\usepackage{booktabs}\n\\begin{table}")
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
    with pytest.raises(UserError, match=r"cannot write .*report: .*No space left on device; name another folder"):
        made(logs, folder, "formats=[csv]")
    assert files(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_with_anything_else_is_not_replaced(logs, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.tex, which is no part of a report: .* output=FOLDER"):
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
    with pytest.raises(UserError, match=r"\(1 are unfinished or damaged\)"):
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


@frozen
def test_runs_are_opened_and_shown_where_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(closeups.inspect, "latency", short(closeups.inspect.latency))
    monkeypatch.setattr(closeups.inspect, "features", few(closeups.inspect.features))
    for options in ((), ("method=linear",)):
        one = tiny_run(tmp_path / "logs", "recipe.epochs=2", *options)
        run.run_job(one)
    output = made(tmp_path / "logs", tmp_path / "report", "inspect=auto", "device=cpu", "formats=[html,csv,markdown]")
    with (output / "tables" / "latency.csv").open(newline="") as file:
        latency = list(csv.DictReader(file))
    assert [(row["run"], row["images at a time"]) for row in latency] == [
        (f"{method}, digits, seed 0", size) for method in ("linear", "vpt_deep") for size in ("1", "64")
    ]
    for row in latency:
        assert float(row["images per second"]) == pytest.approx(1000 / float(row["ms per image"]), rel=1e-6)
    page = (output / "index.html").read_text()
    for kind in ("Confusion matrix", "t-SNE before tuning", "t-SNE after tuning", "Attention in the last block"):
        assert f"<h3>{kind}, vpt_deep, digits, seed 0</h3>" in page
    assert re.search(r"Confusion matrix of 10 classes: \d+ of 797 images are right", page)
    assert re.search(r"alt=\"Attention of the class token to 4 images\. [^\"]*prompts \d+ %", page)
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
