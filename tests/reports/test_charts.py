"""Charts of a table's rows hold the numbers of the runs and say which they are."""

from hashlib import sha256

import pytest

from helpers.written_runs import changed, deep, points, result, table, write
from visprompt.reports.charts import Chart, Line, Point, by_parameters, front, in_parts, training
from visprompt.reports.choices import grids
from visprompt.reports.load import frame, history
from visprompt.reports.rows import rows

# by tuned parameters


def one_point(label, x, y):
    return Line(label, (Point(x, y),))


def test_the_front_is_what_no_other_beats():
    lines = [
        one_point(*p) for p in (("a", 0, 50), ("b", 10, 40), ("c", 10, 60), ("d", 20, 60), ("e", 30, 70))
    ]
    assert [line.label for line in front(lines)] == ["a", "c", "e"]


def test_parameters_are_means_of_the_tasks_for_rows_that_have_all_and_tasks_for_the_others():
    def of(method, score, tasks, parameters):
        return [
            result(task, method, score + i / 10, tuned={"parameters": parameters})
            for i, task in enumerate(tasks)
        ]

    tasks = ("digits", "digits_crowded", "digits_loc")
    records = [*of("linear", 0.5, tasks, 0), *of("bias", 0.6, tasks, 300), *of("ssf", 0.7, tasks[:1], 200)]
    mean, alone = by_parameters(rows(table(*records)))
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

    first, second = by_parameters(rows(table(*on(0.5), *on(1.0))))
    assert (
        {line.label for line in first.lines} == {line.label for line in second.lines} == {"bias", "vpt_deep"}
    )
    assert {first.title, second.title} == {
        "Accuracy by tuned parameters, cifar, fraction 0.5",
        "Accuracy by tuned parameters, cifar, fraction 1.0",
    }
    assert first.x_scale == "log"


# training curves


def with_metrics(tmp_path, record, *lines):
    folder = write(tmp_path, record)
    (folder / "metrics.csv").write_text("epoch,train/loss,train/acc,val/acc\n" + "\n".join(lines) + "\n")
    return folder, record


def test_curves_are_means_over_seeds_and_validation_is_that_of_the_chosen_run(tmp_path):
    first = with_metrics(tmp_path, deep(0.5), "0,2.0,0.2,", "1,1.0,0.4,", "2,0.5,0.6,")
    second = with_metrics(tmp_path, deep(0.6, seed=44), "0,4.0,0.4,", "1,nan,0.6,", "2,1.5,0.8,")
    tried = with_metrics(tmp_path, deep(0.3, split="tune"), "0,2.0,0.2,0.25", "1,1.0,0.4,0.3")
    other = with_metrics(tmp_path, deep(0.2, split="tune", recipe={"lr": 9.0}), "0,2,0.2,0.1", "1,1,0.4,0.2")
    found = frame([first, second, tried, other])
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
        loss, accuracy = training(rows(frame([run])), [])
        assert (loss.y_scale, accuracy.y_scale) == (scale, "linear")


def test_a_curve_is_the_mean_of_the_seeds_whose_metrics_are_left_and_says_so(tmp_path):
    first = with_metrics(tmp_path, deep(0.5), "0,2.0,0.2,", "1,1.0,0.4,")
    gone = (write(tmp_path, deep(0.6, seed=44)), deep(0.6, seed=44))
    other = with_metrics(tmp_path, result("cifar", "bias"), "0,3.0,0.2,", "1,1.5,0.4,")
    loss, _ = training(rows(frame([first, gone, other])), [])
    assert {line.label: points(line) for line in loss.lines} == {
        "vpt_deep": [(1, 2.0, None), (2, 1.0, None)],
        "bias": [(1, 3.0, None), (2, 1.5, None)],
    }
    assert loss.caption == (
        "Final runs, mean over seeds. Of some runs no such metrics are left, and these are in no mean; "
        "there are: vpt_deep 1 of 2."
    )


def test_a_folder_without_metrics_has_no_curve(tmp_path):
    run = (write(tmp_path, deep(0.5)), deep(0.5))
    assert training(rows(frame([run])), []) == []
    assert history(*run, "train/loss") == {}


def test_another_run_s_metrics_are_no_curve_of_a_run(tmp_path):
    folder, record = run = with_metrics(tmp_path, deep(0.5), "0,2.0,0.2,", "1,1.0,0.4,")
    assert history(*run, "train/loss") == {1: 2.0, 2: 1.0}, "older records hold no checksum of it"
    metrics = folder / "metrics.csv"
    kept = (folder, changed(record, files={"metrics.csv": sha256(metrics.read_bytes()).hexdigest()}))
    assert history(*kept, "train/loss") == {1: 2.0, 2: 1.0}
    metrics.write_bytes(metrics.read_bytes().replace(b"2.0", b"3.0"))
    assert history(*kept, "train/loss") == {}


def test_many_lines_become_several_charts_with_about_as_many_in_each():
    def parts(number):
        lines = tuple(Line(f"m{i}", (Point(1, i), Point(2, i))) for i in range(number))
        made = in_parts(Chart(name="c", title="C", x_label="x", y_label="y (%)", caption="", lines=lines))
        assert tuple(line for part in made for line in part.lines) == lines
        return made

    counts = {number: [len(part.lines) for part in parts(number)] for number in (8, 9, 17, 25)}
    assert counts == {8: [8], 9: [5, 4], 17: [6, 6, 5], 25: [7, 7, 7, 4]}
    assert [(part.name, part.title) for part in parts(17)][1] == ("c_2", "C (2 of 3)")
