"""The figures of a run's scoring: what they show of predictions that were made up, and of a run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from helpers.cli import frozen, tiny_run
from helpers.miniatures.masks import write_masks
from visprompt.models.kind import SINGLE_LABEL
from visprompt.reports import closeups, inspection, score_figures
from visprompt.reports.figures import LIGHT
from visprompt.reports.scored import Scored, reliability, scored
from visprompt.reports.writers import Table
from visprompt.runs import run

NAMES = ("cat", "dog", "eel")


def made(names=NAMES, temperature=2.0, set_name="test"):
    return Scored(
        labels=np.array([0, 0, 0, 1, 1, 2]),
        predicted=np.array([0, 1, 1, 1, 0, 2]),
        confidences=np.array([0.9, 0.7, 0.8, 0.6, 0.95, 0.5], np.float32),
        plain=np.array([0.99, 0.8, 0.9, 0.7, 0.99, 0.6], np.float32),
        temperature=temperature,
        class_names=names,
        set_name=set_name,
        kind=SINGLE_LABEL,
    )


def shown(monkeypatch, found):
    monkeypatch.setattr(score_figures, "scored", lambda _: found)
    monkeypatch.setattr(score_figures, "pictures", lambda _, rows: np.zeros((len(rows), 4, 4, 3)))
    return {
        one.title: one
        for one in score_figures.show_scores(
            SimpleNamespace(result=SimpleNamespace(kind="single_label")), "linear"
        )
    }


def test_mistakes_are_the_most_confident_first():
    assert made().mistakes(2).tolist() == [4, 2]
    assert made().mistakes(9).tolist() == [4, 2, 1]
    assert made().counts.tolist() == [[1, 2, 0], [1, 1, 0], [0, 0, 1]]


def test_bins_are_those_of_torchmetrics():
    draw = np.random.default_rng(0)
    shares = draw.dirichlet(np.full(4, 0.5), 500).astype(np.float32)
    labels = draw.integers(0, 4, 500)
    found = reliability(shares.max(1), shares.argmax(1) == labels)
    expected = multiclass_calibration_error(torch.from_numpy(shares), torch.from_numpy(labels), 4)
    assert found.error == pytest.approx(float(expected), abs=1e-6)
    assert found.count.sum() == 500
    certain = reliability(np.array([1.0, 1.0]), np.array([True, False]))
    assert (certain.confidence.tolist(), certain.accuracy.tolist()) == ([1.0], [0.5])


def test_the_recorded_error_is_that_of_the_report_also_where_the_model_is_certain():
    logits = torch.cat(
        [torch.tensor([[40.0, 0.0]]).repeat(1000, 1), torch.tensor([[3.0, 0.0]]).repeat(100, 1)]
    )
    labels = torch.zeros(1100, dtype=torch.int64)
    labels[:10] = 1
    figures = SINGLE_LABEL.figures(2)
    figures.update(logits, labels, torch.ones(1100))
    shares = logits.softmax(1).amax(1).numpy()
    found = reliability(shares, (logits.argmax(1) == labels).numpy())
    # all are in the last bin: 0.99 * 1000 + 1.0 * 100 are right
    expected = abs((990 + 100) / 1100 - float(shares.mean()))
    assert (
        figures.compute()["ece"] == pytest.approx(found.error, abs=1e-5) == pytest.approx(expected, abs=1e-5)
    )


def test_a_few_classes_are_a_table_and_figures(monkeypatch):
    found = shown(monkeypatch, made())
    assert list(found) == [
        f"{what}, linear"
        for what in ("Classes", "Confusion matrix", "Reliability", "The most confident mistakes")
    ]
    table = found["Classes, linear"]
    lines = [tuple(map(str, row)) for row in table.rows]
    assert lines[0] == ("cat", "3", "50.0", "33.3", "40.0")
    assert [line[0] for line in lines] == ["cat", "dog", "eel"]
    assert (
        "Most often: cat taken for dog (2), dog taken for cat (1)."
        in found["Confusion matrix, linear"].caption
    )
    mistakes = found["The most confident mistakes, linear"]
    assert (
        mistakes.alt == "3 images. dog taken for cat, 95 %; cat taken for dog, 80 %; cat taken for dog, 70 %."
    )
    titles = [axes.get_title() for axes in mistakes.draw(LIGHT).axes]
    assert titles == ["dog\n\u2192 cat\n95.0 %", "cat\n\u2192 dog\n80.0 %", "cat\n\u2192 dog\n70.0 %"]


@pytest.mark.parametrize(
    ("temperature", "set_name", "kinds", "fitted"),
    [(2.0, "test", 2, False), (2.0, "val", 2, True), (1.0, "val", 1, False)],
)
def test_reliability_says_with_which_temperature(monkeypatch, temperature, set_name, kinds, fitted):
    plot = shown(monkeypatch, made(temperature=temperature, set_name=set_name))["Reliability, linear"]
    assert ("fitted on these images" in plot.caption) == fitted
    upper, lower = plot.draw(LIGHT).axes
    assert len(upper.lines) == kinds + 1, "and the diagonal"
    assert [text.get_text().partition(":")[0] for text in upper.get_legend().get_texts()] == [
        "logits as they are",
        "temperature 2.00",
    ][:kinds]
    assert sum(lower.lines[0].get_ydata()) == pytest.approx(100)


def test_many_classes_are_tables_of_the_worst(monkeypatch):
    names = tuple(f"class {i}" for i in range(25))
    found = shown(monkeypatch, made(names))
    assert "Confusion matrix, linear" not in found
    pairs = found["The most common mistakes, linear"]
    assert isinstance(pairs, Table)
    assert [tuple(map(str, row)) for row in pairs.rows] == [
        ("class 0", "class 1", "2", "66.7"),
        ("class 1", "class 0", "1", "50.0"),
    ]
    assert len(found["Classes, linear"].rows) == 3, "classes without images and predictions have no figures"


@frozen
def test_the_pictures_of_mistakes_are_what_the_backbone_saw(tmp_path):
    one = tiny_run(tmp_path, "split=tune", "recipe.epochs=1", "recipe.warmup_epochs=0", "method=linear")
    run.run_job(one)
    opened = inspection.open_run(one.folder)
    found = scored(opened)
    assert found.temperature == opened.classifier.temperature != 1
    rows = found.mistakes(3)
    images = inspection.pictures(opened, rows.tolist())
    normalised = (torch.from_numpy(images).permute(0, 3, 1, 2) - 0.5) / 0.5
    with torch.no_grad():
        logits = opened.classifier(normalised)
    assert logits.argmax(1).tolist() == found.predicted[rows].tolist()
    shares = opened.classifier.probabilities(logits).amax(1)
    assert shares.numpy() == pytest.approx(found.confidences[rows], abs=1e-5)


@frozen
def test_of_a_segmentation_run_pixels_are_counted_and_the_rest_is_left_out_with_a_sentence(tmp_path):
    root = write_masks(tmp_path / "streets", size=(90, 120))  # scored in windows of 64 pixels
    given = ("data=segmentation/folder", f"data.root={root}", "method=linear", "split=tune")
    more = ("recipe.epochs=2", "recipe.warmup_epochs=0", f"paths.data_dir={tmp_path}")
    one = tiny_run(tmp_path / "logs", *given, *more)
    result = run.run_job(one)
    found = closeups.look([one.folder], {}, "cpu", data_dir=str(tmp_path), weights=None)
    (classes,) = found.tables.values()
    assert classes.header[1] == "pixels"
    assert classes.notes[0] == "Of the pixels of val; the lowest F1 first."
    counted = int(result.metrics["val/count"]) * 90 * 116
    assert sum(int(str(row[1]).replace(",", "")) for row in classes.rows) == counted
    curve, confusion = found.plots
    assert (curve.title.partition(",")[0], confusion.title.partition(",")[0]) == (
        "Learning curve",
        "Confusion matrix",
    )
    assert (
        f"{round(result.metrics['val/pixel_acc'] * counted)} of {counted} pixels are right" in confusion.alt
    )
    texts = [text.get_text() for text in confusion.draw(LIGHT).axes[0].texts]
    assert sum(map(int, texts)) == pytest.approx(300, abs=5), "per cent of each of three classes"
    assert [one.why for one in found.left_out] == [
        "t-SNE is not shown: it needs one class for each image, and here each pixel has one",
        "attention is not shown: it is drawn for the tokens that an image's class is read from, and here each "
        "pixel has one",
    ]
    assert found.latency is not None
