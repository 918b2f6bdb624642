"""The notebooks run from top to bottom, and none is stored with what it printed."""

import base64
import io
import json
import os
import re
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
NAMES = ("ablation", "own_folder", "results", "tour")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class Executed:
    """A notebook that was run for real, one epoch of a tenth of the images a run, all output in one folder."""

    def __init__(self, name, logs, cwd=FOLDER, **settings):
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        env = os.environ | {"LOGS": str(logs), "EPOCHS": "1", "FRACTION": "0.1"} | settings
        client = nbclient.NotebookClient(
            notebook, kernel_name="python3", timeout=250, resources={"metadata": {"path": str(cwd)}}
        )
        client.execute(env=env)
        self.outputs = {cell["id"]: cell["outputs"] for cell in notebook.cells if cell["cell_type"] == "code"}
        self.runs = sorted(path.parent.relative_to(logs) for path in logs.rglob("result.json"))

    def printed(self, cell):
        return "".join(output["text"] for output in self.outputs[cell] if output.get("name") == "stdout")

    def shown(self, cell, kind):
        return [output["data"][kind] for output in self.outputs[cell] if kind in output.get("data", {})]

    def table(self, cell):
        """Rows of all tables of a cell, by the names of their columns."""
        rows = []
        for text in self.shown(cell, "text/markdown"):
            lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
            rows += [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
        return rows

    def figures(self, cell):
        """The figures of a cell; each has something on it."""
        found = [
            np.array(Image.open(io.BytesIO(base64.b64decode(png)))) for png in self.shown(cell, "image/png")
        ]
        assert all(min(figure.shape[:2]) > 200 and np.ptp(figure[..., :3]) > 100 for figure in found)
        return found


def number(text):
    """The number of a cell, which an interval may follow: "41.2 (37.8 to 44.7)"."""
    return float(text.partition(" (")[0].replace(",", ""))


def test_there_are_four():
    assert tuple(sorted(path.stem for path in FOLDER.glob("*.ipynb"))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_run_is_stored(name):
    stored = json.loads((FOLDER / f"{name}.ipynb").read_text())
    assert (stored["nbformat"], stored["nbformat_minor"]) == (4, 5)
    assert stored["metadata"] == METADATA
    ids = [cell["id"] for cell in stored["cells"]]
    assert len(set(ids)) == len(ids)
    # words: an editor's own ids would change
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", id_) for id_ in ids)
    for cell in stored["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_it_shows_how_long_it_takes_and_what_can_be_set(name):
    first, title, settings, *others = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    about = "".join(first["source"])
    assert about.startswith("# ")
    assert "What it shows" in about
    assert re.search(r"It takes (some )?\w+", about)
    assert "environment variable" in "".join(title["source"])
    for variable in ("EPOCHS", "FRACTION", "LOGS"):
        assert re.search(
            rf'^{variable} = .*os\.environ\.get\("{variable}"', "".join(settings["source"]), re.MULTILINE
        )
    assert all(
        "".join(cell["source"]).startswith("## ") for cell in others if cell["cell_type"] == "markdown"
    )
    assert not any("os.environ" in "".join(cell["source"]) for cell in others)


@pytest.mark.slow
def test_the_tour(tmp_path):
    tour = Executed("tour", tmp_path / "logs", cwd=ROOT)
    assert "80 images to train on, 200 held out, each (3, 64, 64)" in tour.printed("data")
    losses = re.findall(r"step +(\d+) of 2: loss (\d\.\d+)", tour.printed("loop"))
    assert losses[0] == ("1", "2.303")  # log 10: a head of zeros tells nothing yet
    assert losses[-1][0] == "2"
    assert re.search(r"accuracy on the images held out: \d+\.\d %", tour.printed("loop-result"))
    assert "tuned: 11,520 parameters (0.42 % of the backbone) and 1,930 of the head" in tour.printed(
        "loop-result"
    )
    rows = tour.table("table")
    tuned = {row["method"]: number(row["tuned parameters"]) for row in rows}
    assert tuned == {"linear": 0, "bias": 13_056, "vpt_shallow": 10 * 192, "vpt_deep": 6 * 10 * 192}
    assert all(0 < number(row["test accuracy (%)"]) < 100 for row in rows)
    assert len(tour.figures("attention")) == 1
    assert len(tour.figures("tsne")) == 2
    assert [run.parts[:2] for run in tour.runs] == [("digits", method) for method in sorted(tuned)]


@pytest.mark.slow
def test_the_own_folder(tmp_path):
    own = Executed("own_folder", tmp_path, EPOCHS="2", FRACTION="0.2")
    assert "287 images to train on, 72 held out, 10 classes" in own.printed("data")
    # ten classes: one in ten is right by chance
    assert number(re.search(r"held out: (\d+\.\d) %", own.printed("tune"))[1]) > 20
    assert re.match(r"\d+ kB\nlabels: (\d, ){4}\d; folders: (\d, ){4}\d\n", own.printed("label"))


@pytest.mark.slow
def test_the_ablation(tmp_path):
    ablation = Executed("ablation", tmp_path, LENGTHS="1,4", DEPTHS="1,2")
    rows = ablation.table("table")
    assert [row["validation accuracy (%)"] for row in rows] == ["1 tokens", "4 tokens"]
    assert all(0 < number(row[f"depth {depth}"]) < 100 for row in rows for depth in (1, 2))
    assert len(ablation.figures("length")) == len(ablation.figures("depth")) == 1
    results = [json.loads((tmp_path / run / "result.json").read_text()) for run in ablation.runs]
    assert [result["split"] for result in results] == ["tune"] * 4
    assert not any(name.startswith("test/") for result in results for name in result["metrics"])


@pytest.mark.slow
def test_the_results(tmp_path):
    # no runs are there yet: some are made first, in their own place
    none, made = (
        tmp_path / "logs",
        tmp_path / "made",
    )
    results = Executed("results", made, LOGS=str(none), EXAMPLES=str(made))
    assert not none.exists()
    assert "6 runs; those of split=final make 2 rows" in results.printed("runs")
    tasks = ("digits", "digits_crowded", "digits_loc")
    rows = results.table("accuracy")
    assert [row["method"] for row in rows] == ["linear", "bias"]
    assert all(0 < number(row[task]) < 100 for row in rows for task in tasks)
    stored = json.loads((made / results.runs[0] / "result.json").read_text())
    assert number(rows[1]["digits"]) == round(100 * stored["metrics"]["test/acc"], 1)
    assert [number(row["tuned parameters"]) for row in results.table("cost")] == [0, 13_056]
    assert len(results.figures("pareto")) == 1
    assert "With 3 tasks the two-sided signed-rank test cannot go below p = 0.25." in results.printed("test")
    (test,) = results.table("test")
    assert number(test["smallest p"]) == 0.25
    assert number(test["Wilcoxon p"]) >= 0.25
    assert "out of reach" in results.shown("test", "text/markdown")[0]
    assert [run.parts[:2] for run in results.runs] == [
        (task, method) for task in tasks for method in ("bias", "linear")
    ]
