"""Charts hold the numbers of the runs and say which they are.

Figures are the same bytes every time, for every page.
"""

import csv
import io
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from PIL import Image

from visprompt.reports import closeups, figures, score_figures
from visprompt.reports.charts import Chart, Line, Point, in_parts
from visprompt.reports.figures import DARK, LIGHT, Plot, png, svg
from visprompt.reports.writers import csv_text

# what is drawn


def one_point(label, x, y):
    return Line(label, (Point(x, y),))


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
    assert (axes.get_xscale(), [text.get_text() for text in axes.get_xticklabels()]) == (
        "log",
        ["1", "10", "50"],
    )
    assert [text.get_text() for legend in figure.legends for text in legend.get_texts()] == ["vpt_deep"]


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [(0.2, 2.3, ["0.2", "0.5", "1", "2"]), (0.001, 2.0, ["0.001", "0.01", "0.1", "1"])],
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
        line.get_xdata()[0]: line.get_markerfacecolor() != "none"
        for line in axes.lines
        if len(line.get_xdata()) == 1
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
    with matplotlib.rc_context(
        {"font.size": 30, "lines.linewidth": 9, "svg.hashsalt": None, "axes.grid": False}
    ):
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
    axes, *_ = score_figures.draw_confusion(counts, ("cat", "dog", "cow"), LIGHT).axes
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


def test_a_map_has_a_colour_and_a_shape_for_every_class():
    places, labels = np.arange(12.0).reshape(6, 2), np.array([0, 1, 2, 0, 1, 2])
    figure = closeups.draw_map(places, labels, ("a", "b", "c"), LIGHT)
    found = [collection.get_offsets().tolist() for collection in figure.axes[0].collections]
    assert found == [places[labels == label].tolist() for label in range(3)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    many = closeups.draw_map(places, labels, [f"class {i}" for i in range(100)], LIGHT)
    assert many.legends == []


def test_names_are_written_as_they_are_and_not_as_mathematics():
    names = ("_background_", "$5$ note", "a name that is far too long for an axis")
    figure = closeups.draw_map(np.zeros((3, 2)), np.arange(3), names, LIGHT)
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["\u200b_background_", r"\$5\$ note", "a name that is far to…"]
    plot = Plot(
        "c", "C", "", "", lambda theme: score_figures.draw_confusion(np.eye(3, dtype=int), names, theme)
    )
    assert svg(plot, LIGHT)


def test_attention_lights_its_patches_and_adds_up_the_other_tokens():
    images, patches = np.full((1, 4, 4, 3), 0.8), np.array([[[0.1, 0.0], [0.0, 0.4]]])
    bars = [("class", np.array([[0.2]])), ("prompts", np.array([[0.1, 0.2]])), ("none", np.zeros((1, 0)))]
    left, middle, right = closeups.draw_attention(images, patches, bars, ["cat"], LIGHT).axes
    lit = middle.images[0].get_array()
    np.testing.assert_allclose(lit[3, 3], 0.1 * 0.4 + 0.9 * np.array([240, 228, 66]) / 255)
    np.testing.assert_allclose(lit[0, 3], 0.4)
    assert left.get_title() == "cat"
    assert middle.get_title() == "patches 50 %"
    assert [bar.get_height() for bar in right.patches] == pytest.approx([20, 10, 20])
    assert [text.get_text() for text in right.get_xticklabels()] == ["class\n20 %", "prompts\n30 %"]


def test_pictures_are_saved_like_charts():
    counts = np.array([[3, 1], [0, 4]])
    plot = Plot("c", "C", "", "", lambda theme: score_figures.draw_confusion(counts, ("a", "b"), theme))
    assert svg(plot, LIGHT) == svg(plot, LIGHT) != svg(plot, DARK)
