"""Charts hold the numbers of the runs and say which they are; figures are the same bytes every time, for every page."""

import csv
import io
import xml.etree.ElementTree as ET
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from helpers.written_runs import result, write
from visprompt.reports import figures, pictures
from visprompt.reports.charts import Chart, Line, Point, front, in_parts
from visprompt.reports.collect import grids, rows
from visprompt.reports.figures import DARK, LIGHT, Plot, png, svg
from visprompt.reports.render import csv_text
from visprompt.reports.runs import Run
from visprompt.reports.series import by_parameters, history, training
from visprompt.reports.sweeps import DEPTH, FRACTION, LENGTH, along

SIZES = {"train800": 800, "val200": 200, "test": 1000}


def runs(*records):
    return [Run(Path(f"run{i}"), record) for i, record in enumerate(records)]


def deep(score, tokens=10, split="final", **changes):
    options = {"num_tokens": tokens} | changes.pop("options", {})
    data = {"sizes": SIZES} | changes.pop("data", {})
    return result("cifar", "vpt_deep", score, options=options, split=split, data=data, **changes)


def points(line):
    return [(p.x, pytest.approx(p.y), p.spread and pytest.approx(p.spread)) for p in line.points]


# along a setting


def test_test_accuracy_by_length_is_the_mean_over_seeds_with_their_spread():
    (chart,) = along(runs(deep(0.5, 1), deep(0.6, 10), deep(0.7, 10, seed=44), deep(0.8, 100)), LENGTH)
    (line,) = chart.lines
    assert line.label == "vpt_deep"
    assert [(p.x, p.spread) for p in line.points if p.spread is None] == [(1, None), (100, None)]
    assert line.points[1].y == pytest.approx(65)
    assert line.points[1].spread == pytest.approx(100 * np.std([0.6, 0.7], ddof=1))
    assert (chart.name, chart.x_scale) == ("accuracy_by_prompt_length_cifar", "log")
    assert (chart.x_label, chart.y_label) == ("number of prompt tokens", "test accuracy (%)")


def test_a_sweep_of_tune_runs_is_of_validation_accuracies_and_says_so():
    low = {"lr": 0.5}
    records = [
        deep(0.50, 1, "tune"),
        deep(0.60, 10, "tune"),
        deep(0.70, 10, "tune", recipe=low),
        deep(0.65, 50, "tune"),
        deep(0.10, 50, "tune", recipe=low, status="diverged"),
    ]
    (chart,) = along(runs(*records), LENGTH)
    assert chart.y_label == "validation accuracy, val200 (%)"
    assert chart.name.endswith("_validation")
    assert [(p.x, p.y) for p in chart.lines[0].points] == [(1, 50.0), (10, 70.0), (50, 65.0)]


def test_test_and_validation_accuracies_are_never_in_one_chart():
    sweep = [deep(0.1 * i, tokens, "tune") for i, tokens in enumerate((1, 5, 10), 1)]
    final = [deep(0.5, 1), deep(0.6, 10)]
    (chart,) = along(runs(*sweep, *final), LENGTH)
    assert "validation" in chart.y_label, "the sweep has more points"
    (chart,) = along(runs(*sweep, *final, deep(0.7, 5)), LENGTH)
    assert chart.y_label == "test accuracy (%)"
    shallow = [result("cifar", "vpt_shallow", s, options={"num_tokens": n}) for n, s in ((1, 0.3), (50, 0.4))]
    test, validation = along(runs(*sweep, *final, *shallow), LENGTH)
    assert [line.label for line in test.lines] == ["vpt_shallow"]
    assert [line.label for line in validation.lines] == ["vpt_deep"]


def test_of_several_recipes_at_one_length_the_one_that_validation_chose_stands_in_the_line():
    other = {"lr": 0.5}
    final = [deep(0.5, 1), deep(0.6, 10), deep(0.9, 10, recipe=other)]
    assert along(runs(*final), LENGTH) == [], "nothing chose, and one point is no line"
    tried = [deep(0.4, 10, "tune"), deep(0.3, 10, "tune", recipe=other)]
    (chart,) = along(runs(*final, *tried), LENGTH)
    assert [(p.x, p.y) for p in chart.lines[0].points] == [(1, 50.0), (10, 60.0)]


def test_depth_of_all_blocks_is_their_number_and_first_and_last_are_lines_of_their_own():
    def at(depth, start, score, built=None):
        tuned = {} if built is None else {"depth": built}
        return deep(score, split="tune", options={"depth": depth, "depth_from": start}, tuned=tuned)

    records = [at(3, "first", 0.5, 3), at(None, "first", 0.7, 12), at(3, "last", 0.4), at(6, "last", 0.6)]
    (chart,) = along(runs(*records), DEPTH)
    assert {line.label: [(p.x, p.y) for p in line.points] for line in chart.lines} == {
        "vpt_deep, depth_from first": [(3, 50.0), (12, 70.0)],
        "vpt_deep, depth_from last": [(3, 40.0), (6, 60.0)],
    }


def test_of_lengths_and_depths_that_are_varied_together_each_is_a_line_along_the_other():
    found = runs(
        *(
            deep(0.1 * depth + tokens / 100, tokens, "tune", options={"depth": depth})
            for depth in (1, 2, 3)
            for tokens in (5, 10)
        )
    )
    (by_depth,), (by_length,) = along(found, DEPTH), along(found, LENGTH)
    assert {line.label: [p.x for p in line.points] for line in by_depth.lines} == {
        "vpt_deep, num_tokens 10": [1, 2, 3],
        "vpt_deep, num_tokens 5": [1, 2, 3],
    }
    assert {line.label: [round(p.y, 6) for p in line.points] for line in by_length.lines} == {
        "vpt_deep, depth 1": [15, 20],
        "vpt_deep, depth 2": [25, 30],
        "vpt_deep, depth 3": [35, 40],
    }


def test_one_depth_that_was_written_in_two_ways_is_one_score_of_each_seed():
    def at(depth, score, built, **changes):
        return deep(score, options={"depth": depth}, tuned={"depth": built}, **changes)

    tried = [at(depth, score, depth or 12, split="tune") for depth, score in ((3, 0.5), (None, 0.7), (12, 0.7))]
    (chart,) = along(runs(*tried), DEPTH)
    assert points(chart.lines[0]) == [(3, 50, None), (12, 70, None)]
    final = [at(3, 0.5, 3), at(None, 0.7, 12), at(12, 0.6, 12, seed=44)]
    (chart,) = along(runs(*final), DEPTH)
    assert points(chart.lines[0]) == [(3, 50, None), (12, 65, 100 * np.std([0.7, 0.6], ddof=1))]


def test_fractions_are_shares_in_per_cent_and_differ_in_nothing_else():
    records = [deep(0.2 + f / 2, data={"fraction": f, "sizes": {"train": 1000 * f}}) for f in (0.1, 0.5, 1.0)]
    other = deep(0.9, data={"fraction": 0.1}, backbone={"name": "other", "sha256": "b" * 64})
    (chart,) = along(runs(*records, other), FRACTION)
    (line,) = chart.lines
    assert [(p.x, p.y) for p in line.points] == [
        (10, pytest.approx(25)),
        (50, pytest.approx(45)),
        (100, pytest.approx(70)),
    ]


def test_runs_on_other_images_are_lines_of_their_own():
    records = [deep(0.5 + n / 100, n) for n in (1, 10)]
    others = [deep(0.3 + n / 100, n, data={"fingerprint": "f" * 64}) for n in (1, 10)]
    (chart,) = along(runs(*records, *others), LENGTH)
    assert [[p.y for p in line.points] for line in chart.lines] in ([[51, 60], [31, 40]], [[31, 40], [51, 60]])
    assert len({line.label for line in chart.lines}) == 2


def test_every_task_has_a_chart_of_its_own_and_one_point_is_none():
    records = [result(task, "vpt_deep", 0.5, options={"num_tokens": n}) for task in ("svhn", "cifar") for n in (1, 2)]
    charts = along(runs(*records, result("dtd", "vpt_deep", 0.5, options={"num_tokens": 1})), LENGTH)
    assert [chart.title for chart in charts] == ["Accuracy by prompt length, cifar", "Accuracy by prompt length, svhn"]
    assert [chart.x_scale for chart in charts] == ["linear", "linear"]


# by tuned parameters


def one_point(label, x, y):
    return Line(label, (Point(x, y),))


def test_the_front_is_what_no_other_beats():
    lines = [one_point(*p) for p in (("a", 0, 50), ("b", 10, 40), ("c", 10, 60), ("d", 20, 60), ("e", 30, 70))]
    assert [line.label for line in front(lines)] == ["a", "c", "e"]


def test_parameters_are_means_of_the_tasks_for_rows_that_have_all_and_tasks_for_the_others():
    def of(method, score, tasks, parameters):
        return [result(task, method, score + i / 10, tuned={"parameters": parameters}) for i, task in enumerate(tasks)]

    tasks = ("digits", "digits_crowded", "digits_loc")
    records = [*of("linear", 0.5, tasks, 0), *of("bias", 0.6, tasks, 300), *of("ssf", 0.7, tasks[:1], 200)]
    mean, alone = by_parameters(rows(runs(*records)))
    assert (mean.title, mean.x_scale) == ("Accuracy by tuned parameters, mean of 3 tasks, demo", "symlog")
    assert {line.label: (line.points[0].x, pytest.approx(line.points[0].y)) for line in mean.lines} == {
        "linear": (0, 60),
        "bias": (300, 70),
    }
    assert alone.title == "Accuracy by tuned parameters, digits"
    assert {line.label: line.points[0].y for line in alone.lines} == {"linear": 50, "bias": 60, "ssf": 70}
    assert alone.alt.endswith("On the front: linear, ssf.")


def test_rows_under_two_protocols_stand_in_two_charts():
    def on(fraction):
        return [result("cifar", name, 0.5, data={"fraction": fraction}) for name in ("bias", "vpt_deep")]

    first, second = by_parameters(rows(runs(*on(0.5), *on(1.0))))
    assert {line.label for line in first.lines} == {line.label for line in second.lines} == {"bias", "vpt_deep"}
    assert {first.title, second.title} == {
        "Accuracy by tuned parameters, cifar, fraction 0.5",
        "Accuracy by tuned parameters, cifar, fraction 1.0",
    }
    assert first.x_scale == "log"


# training curves


def with_metrics(tmp_path, record, *lines):
    folder = write(tmp_path, record)
    (folder / "metrics.csv").write_text("epoch,train/loss,train/acc,val/acc\n" + "\n".join(lines) + "\n")
    return Run(folder, record)


def test_curves_are_means_over_seeds_and_validation_is_that_of_the_chosen_run(tmp_path):
    first = with_metrics(tmp_path, deep(0.5), "0,2.0,0.2,", "1,1.0,0.4,", "2,0.5,0.6,")
    second = with_metrics(tmp_path, deep(0.6, seed=44), "0,4.0,0.4,", "1,nan,0.6,", "2,1.5,0.8,")
    tried = with_metrics(tmp_path, deep(0.3, split="tune"), "0,2.0,0.2,0.25", "1,1.0,0.4,0.3")
    other = with_metrics(tmp_path, deep(0.2, split="tune", recipe={"lr": 9.0}), "0,2,0.2,0.1", "1,1,0.4,0.2")
    found = [first, second, tried, other]
    loss, accuracy, validation = training(rows(found), grids(found))
    assert points(loss.lines[0]) == [(1, 3.0, None), (3, 1.0, None)], "only epochs that both seeds have"
    assert points(accuracy.lines[0]) == [(1, 30, None), (2, 50, None), (3, 70, None)]
    assert points(validation.lines[0]) == [(1, 25, None), (2, 30, None)]
    assert (loss.y_scale, accuracy.y_scale) == ("linear", "linear")
    assert loss.caption == "Final runs, mean over seeds."
    assert (loss.title, validation.y_label) == ("Training loss, cifar", "validation accuracy (%)")


def test_a_loss_has_a_logarithmic_axis_where_it_spans_more_than_a_power_of_ten(tmp_path):
    for end, scale in ((0.25, "linear"), (0.19, "log")):
        run = with_metrics(tmp_path / scale, deep(0.5), "0,2.0,0.1,", f"1,{end},0.99,")
        loss, accuracy = training(rows([run]), [])
        assert (loss.y_scale, accuracy.y_scale) == (scale, "linear")


def test_a_curve_is_the_mean_of_the_seeds_whose_metrics_are_left_and_says_so(tmp_path):
    first = with_metrics(tmp_path, deep(0.5), "0,2.0,0.2,", "1,1.0,0.4,")
    gone = Run(write(tmp_path, deep(0.6, seed=44)), deep(0.6, seed=44))
    other = with_metrics(tmp_path, result("cifar", "bias"), "0,3.0,0.2,", "1,1.5,0.4,")
    loss, _ = training(rows([first, gone, other]), [])
    assert {line.label: points(line) for line in loss.lines} == {
        "vpt_deep": [(1, 2.0, None), (2, 1.0, None)],
        "bias": [(1, 3.0, None), (2, 1.5, None)],
    }
    assert loss.caption == (
        "Final runs, mean over seeds. Of some runs no such metrics are left, and these are in no mean; there are: "
        "vpt_deep 1 of 2."
    )


def test_a_folder_without_metrics_has_no_curve(tmp_path):
    run = Run(write(tmp_path, deep(0.5)), deep(0.5))
    assert training(rows([run]), []) == []
    assert history(run, "train/loss") == {}


def test_another_run_s_metrics_are_no_curve_of_a_run(tmp_path):
    run = with_metrics(tmp_path, deep(0.5), "0,2.0,0.2,", "1,1.0,0.4,")
    assert history(run, "train/loss") == {1: 2.0, 2: 1.0}, "older records hold no checksum of it"
    metrics = run.folder / "metrics.csv"
    kept = replace(run, result=replace(run.result, files={"metrics.csv": sha256(metrics.read_bytes()).hexdigest()}))
    assert history(kept, "train/loss") == {1: 2.0, 2: 1.0}
    metrics.write_bytes(metrics.read_bytes().replace(b"2.0", b"3.0"))
    assert history(kept, "train/loss") == {}


def test_many_lines_become_several_charts_with_about_as_many_in_each():
    def parts(number):
        lines = tuple(Line(f"m{i}", (Point(1, i), Point(2, i))) for i in range(number))
        made = in_parts(chart(lines=lines))
        assert tuple(line for part in made for line in part.lines) == lines
        return made

    counts = {number: [len(part.lines) for part in parts(number)] for number in (8, 9, 17, 25)}
    assert counts == {8: [8], 9: [5, 4], 17: [6, 6, 5], 25: [7, 7, 7, 4]}
    assert [(part.name, part.title) for part in parts(17)][1] == ("c_2", "C (2 of 3)")


# what is drawn


def chart(**changes):
    line = Line("vpt_deep", (Point(1, 50.0, 2.0), Point(10, 60.0), Point(50, 70.25)))
    values = {"name": "c", "title": "C", "x_label": "x", "y_label": "y (%)", "caption": "", "lines": (line,)}
    return Chart(**values | changes)


def scatter():
    lines = (one_point("linear", 0, 50), one_point("bias", 9000, 60), one_point("full", 8e7, 55))
    return chart(lines=lines, x_scale="symlog", front=True)


def drawn(*charts, theme=LIGHT):
    return [plot.draw(theme) for plot in figures.plots(list(charts))]


def test_a_chart_is_told_in_words_and_in_numbers():
    (plot,) = figures.plots([chart()])
    assert plot.alt == "y (%) against x. vpt_deep: 50 at 1, 60 at 10, 70.2 at 50."
    assert list(csv.reader(io.StringIO(csv_text(plot.values)))) == [
        ["line", "x", "y (%)", "y (%) std"],
        ["vpt_deep", "1", "50", "2"],
        ["vpt_deep", "10", "60", ""],
        ["vpt_deep", "50", "70.25", ""],
    ]
    long = Line("long", tuple(Point(x, x) for x in range(1, 31)))
    assert chart(lines=(long,)).alt == "y (%) against x. long: 1 at 1, 30 at 30."


def test_lines_are_drawn_at_their_values_with_every_value_at_the_axis():
    (figure,) = drawn(chart(x_scale="log"))
    (axes,) = figure.axes
    (line,) = [line for line in axes.lines if len(line.get_xdata()) == 3 and line.get_marker() != "_"]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 10, 50], [50.0, 60.0, 70.25])
    assert (axes.get_xscale(), [text.get_text() for text in axes.get_xticklabels()]) == ("log", ["1", "10", "50"])
    assert [text.get_text() for legend in figure.legends for text in legend.get_texts()] == ["vpt_deep"]


@pytest.mark.parametrize(
    ("low", "high", "shown"), [(0.2, 2.3, ["0.2", "0.5", "1", "2"]), (0.001, 2.0, ["0.001", "0.01", "0.1", "1"])]
)
def test_a_logarithmic_axis_has_several_numbers(low, high, shown):
    (figure,) = drawn(chart(lines=(Line("a", (Point(1, high), Point(2, low))),), y_scale="log"))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    bottom, top = axes.get_ylim()
    assert [t.get_text() for t in axes.get_yticklabels() if bottom <= t.get_position()[1] <= top] == shown


def test_lines_that_look_the_same_without_colours_are_numbered():
    many = tuple(one_point(f"method_{i}", 1000 * (i + 1), 50 + i) for i in range(15))
    (few,), (figure,) = drawn(chart(lines=many[:13], front=True)), drawn(chart(lines=many, front=True))
    assert [text.get_text() for text in few.axes[0].texts] == [line.label for line in many[:13]]
    assert [text.get_text() for text in figure.axes[0].texts] == [str(i) for i in range(1, 16)]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"{i}  method_{i - 1}" for i in range(1, 16)]
    curves = tuple(Line(f"m{i}", (Point(1, i), Point(2, i + 1))) for i in range(15))
    _, other, alike = drawn(*(chart(lines=lines) for lines in (curves, curves[:2], (curves[1], curves[14]))))
    assert list(other.axes[0].texts) == []
    assert [text.get_text() for text in alike.axes[0].texts] == ["1", "2"]


def test_points_are_labelled_where_they_stand_without_covering_each_other():
    crowd = tuple(one_point(f"method_{i}", 1000 + 40 * i, 50 + 0.3 * i) for i in range(6))
    (figure,) = drawn(chart(lines=crowd, x_scale="log", front=True))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert [text.get_text() for text in figure.axes[0].texts] == [line.label for line in crowd]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    frame = figure.bbox
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and box.y1 <= frame.y1 for box in boxes)


def test_the_front_is_filled_and_the_others_are_not_and_zero_has_a_place():
    (figure,) = drawn(scatter())
    (axes,) = figure.axes
    filled = {
        line.get_xdata()[0]: line.get_markerfacecolor() != "none" for line in axes.lines if len(line.get_xdata()) == 1
    }
    assert filled == {0: True, 9000: True, 8e7: False}
    assert [text.get_text() for text in axes.get_xticklabels()][:2] == ["0", "$10^{3}$"]


def test_a_label_looks_the_same_in_every_chart_and_no_two_look_alike():
    names = [f"m{i}" for i in range(40)]
    lines = [Line(name, (Point(1, 1), Point(2, 2))) for name in names]
    seen = {}
    for figure in drawn(*in_parts(chart(lines=tuple(lines))), chart(lines=tuple(lines[::-1][:8]))):
        for drawn_line in figure.axes[0].containers:
            line = drawn_line.lines[0]
            look = (line.get_color(), line.get_marker(), str(line.get_linestyle()))
            assert seen.setdefault(drawn_line.get_label(), look) == look
    looks = [(look[0], look[1]) for name, look in seen.items() if name in names]
    assert len(set(looks)) == 40
    assert len({marker for _, marker in looks[:13]}) == 13, "in black and white the shapes remain"


@pytest.mark.parametrize("made", [chart, scatter])
def test_figures_are_the_same_bytes_whatever_the_users_settings_and_leave_those_alone(made):
    (plot,) = figures.plots([made()])
    first, picture = svg(plot, DARK), png(plot)
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.hashsalt": None, "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        assert svg(plot, DARK) == first
        assert png(plot) == picture
        assert dict(matplotlib.rcParams) == before


def test_a_figure_is_transparent_on_pages_and_white_as_png():
    (plot,) = figures.plots([chart()])
    light, dark = svg(plot, LIGHT), svg(plot, DARK)
    assert ET.fromstring(light).tag.endswith("svg")
    assert LIGHT.ink in light
    assert LIGHT.ink not in dark
    assert DARK.ink in dark
    assert DARK.ink not in light
    assert "fill: #ffffff" not in light.lower()
    image = Image.open(io.BytesIO(png(plot)))
    assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
    assert image.info["Title"] == "C"
    assert image.width == 1000


def luminance(colour):
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(values <= 0.03928, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_text_can_be_read_and_shades_go_one_way(theme):
    dim, bright = sorted((luminance(theme.ink), luminance(theme.paper)))
    assert (bright + 0.05) / (dim + 0.05) > 7
    shades = [luminance(colour) for colour in theme.shades]
    assert shades in (sorted(shades), sorted(shades, reverse=True))
    assert theme.shades[0] == theme.paper


# pictures of a run's images


def test_a_confusion_matrix_shows_counts_and_shades_shares():
    counts = np.array([[8, 2, 0], [0, 5, 0], [1, 0, 0]])
    axes, *_ = pictures.draw_confusion(counts, ("cat", "dog", "cow"), LIGHT).axes
    assert {(t.get_position(), t.get_text()) for t in axes.texts} == {
        ((0, 0), "8"),
        ((1, 0), "2"),
        ((1, 1), "5"),
        ((0, 2), "1"),
    }
    np.testing.assert_allclose(axes.images[0].get_array(), [[80, 20, 0], [0, 100, 0], [100, 0, 0]])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["cat", "dog", "cow"]
    inks = {t.get_text(): t.get_color() for t in axes.texts}
    assert (inks["8"], inks["2"]) == (LIGHT.paper, LIGHT.ink)


def test_a_matrix_of_many_classes_has_no_names_and_no_numbers():
    axes, *_ = pictures.draw_confusion(np.eye(40, dtype=int), [f"class {i}" for i in range(40)], DARK).axes
    assert list(axes.texts) == []
    assert "class 0" not in [text.get_text() for text in axes.get_xticklabels()]


def test_a_map_has_a_colour_and_a_shape_for_every_class():
    places, labels = np.arange(12.0).reshape(6, 2), np.array([0, 1, 2, 0, 1, 2])
    figure = pictures.draw_map(places, labels, ("a", "b", "c"), LIGHT)
    found = [collection.get_offsets().tolist() for collection in figure.axes[0].collections]
    assert found == [places[labels == label].tolist() for label in range(3)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    many = pictures.draw_map(places, labels, [f"class {i}" for i in range(100)], LIGHT)
    assert many.legends == []


def test_names_are_written_as_they_are_and_not_as_mathematics():
    names = ("_background_", "$5$ note", "a name that is far too long for an axis")
    figure = pictures.draw_map(np.zeros((3, 2)), np.arange(3), names, LIGHT)
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["\u200b_background_", r"\$5\$ note", "a name that is far to…"]
    plot = Plot("c", "C", "", "", lambda theme: pictures.draw_confusion(np.eye(3, dtype=int), names, theme))
    assert svg(plot, LIGHT)


def test_attention_lights_its_patches_and_adds_up_the_other_tokens():
    images, patches = np.full((1, 4, 4, 3), 0.8), np.array([[[0.1, 0.0], [0.0, 0.4]]])
    bars = [("class", np.array([[0.2]])), ("prompts", np.array([[0.1, 0.2]])), ("none", np.zeros((1, 0)))]
    left, middle, right = pictures.draw_attention(images, patches, bars, ["cat"], LIGHT).axes
    lit = middle.images[0].get_array()
    np.testing.assert_allclose(lit[3, 3], 0.1 * 0.4 + 0.9 * np.array([240, 228, 66]) / 255)
    np.testing.assert_allclose(lit[0, 3], 0.4)
    assert left.get_title() == "cat"
    assert middle.get_title() == "patches 50 %"
    assert [bar.get_height() for bar in right.patches] == pytest.approx([20, 10, 20])
    assert [text.get_text() for text in right.get_xticklabels()] == ["class\n20 %", "prompts\n30 %"]


def test_pictures_are_saved_like_charts():
    counts = np.array([[3, 1], [0, 4]])
    plot = Plot("c", "C", "", "", lambda theme: pictures.draw_confusion(counts, ("a", "b"), theme))
    assert svg(plot, LIGHT) == svg(plot, LIGHT) != svg(plot, DARK)
