"""The learning curve of a run shows the figures of its metrics.csv."""

from types import SimpleNamespace

import pytest

from visprompt.reports import curves
from visprompt.reports.figures import DARK, LIGHT

HEADER = "epoch,step,train/loss,train/acc,val/loss,val/acc\n"
ROWS = ("0,4,2.0,0.25,2.5,0.2\n", "1,8,1.0,0.5,1.5,0.4\n", "2,12,0.5,0.75,1.25,0.45\n")
RESULT = SimpleNamespace(kind="single_label", files={})


def plot(folder, *lines):
    (folder / "metrics.csv").write_text("".join(lines))
    return curves.plots(folder, RESULT, "linear, pets, seed 0")


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_loss_and_score_are_drawn_for_training_and_val(tmp_path, theme):
    (one,) = plot(tmp_path, HEADER, *ROWS)
    loss, score = one.draw(theme).axes
    drawn = [[list(line.get_ydata()) for line in axes.lines] for axes in (loss, score)]
    assert drawn == [[[2.0, 1.0, 0.5], [2.5, 1.5, 1.25]], [[25.0, 50.0, 75.0], [20.0, 40.0, 45.0]]]
    assert list(loss.lines[0].get_xdata()) == [1, 2, 3]
    assert [line.get_color() for line in loss.lines] == list(theme.colours[:2])
    assert (loss.get_ylabel(), score.get_ylabel()) == ("loss", "accuracy (%)")
    (legend,) = one.draw(theme).legends
    assert [text.get_text() for text in legend.get_texts()] == ["train", "val"]


def test_words_and_numbers_are_those_of_the_curve(tmp_path):
    (one,) = plot(tmp_path, HEADER, *ROWS)
    assert one.title == "Learning curve, linear, pets, seed 0"
    assert one.alt == (
        "Learning curve over 3 epochs: train/loss from 2 to 0.5; val/loss from 2.5 to 1.25; train/acc from 0.25 to "
        "0.75; val/acc from 0.2 to 0.45."
    )
    assert one.values.header == ("epoch", "train/loss", "val/loss", "train/acc", "val/acc")
    assert [entry if isinstance(entry, str) else entry.value for entry in one.values.rows[2]] == [
        *("3", 0.5, 1.25, 0.75, 0.45)
    ]


def test_a_run_that_trains_on_val_has_no_line_for_it(tmp_path):
    (one,) = plot(tmp_path, "epoch,step,train/loss,train/acc\n", "0,4,2.0,0.25\n", "1,8,1.0,0.5\n")
    assert [len([*line.get_xdata()]) for axes in one.draw(LIGHT).axes for line in axes.lines] == [2, 0, 2, 0]
    assert one.draw(LIGHT).legends == []
    assert "val" not in one.caption


def test_a_single_epoch_or_no_file_is_no_curve(tmp_path):
    assert curves.plots(tmp_path, RESULT, "a") == []
    assert plot(tmp_path, HEADER, ROWS[0]) == []
