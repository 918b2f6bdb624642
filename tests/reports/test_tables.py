"""Aggregates, costs, tests and the paper's figures beside them, as tables."""

from statistics import fmean

import pytest

from helpers.written_runs import CROPPED, VIT_B, VIT_B_SIZE, changed, result, write
from helpers.written_runs import table as runs_table
from visprompt.data.catalog import SUITES, TASKS
from visprompt.models.scores import wilson
from visprompt.reports import tables
from visprompt.reports.choices import grids
from visprompt.reports.load import survey
from visprompt.reports.published import FLAT, GROUPED, contents, published, published_of
from visprompt.reports.rows import full_of, rows, same_protocol
from visprompt.reports.summary import backbone_sizes, cost, means, wins
from visprompt.reports.writers import csv_text

VTAB, FGVC = SUITES["vtab_all"], SUITES["fgvc"]
FGVC_DATA = {"source": "raw:json", "preprocessing": CROPPED}


def made(*records):
    return rows(runs_table(*records))


def over(tasks, method="linear", scores=None, **changes):
    """One run of a method on each task; FGVC with its own preprocessing."""
    for i, task in enumerate(tasks):
        score = scores[task] if scores else 0.5 + i / 100
        yield result(task, method, score, **changes | ({"data": FGVC_DATA} if task in FGVC else {}))


def entries(table, name):
    """A row of a table by the names of its columns, as it is read."""
    (row,) = (row for row in table.rows if row[0] == name)
    return dict(zip(table.header[1:], map(str, row[1:]), strict=True))


# aggregates


def test_the_two_means_over_vtab_are_not_the_same():
    scores = {
        task: {"natural": 0.9, "specialized": 0.8, "structured": 0.4}[TASKS[task].group] for task in VTAB
    }
    (row,) = made(*over(VTAB, scores=scores))
    found = means(row)
    assert found["vtab_natural"].value == pytest.approx(0.9)
    assert found[FLAT].value == pytest.approx((7 * 0.9 + 4 * 0.8 + 8 * 0.4) / 19)
    assert found[GROUPED].value == pytest.approx((0.9 + 0.8 + 0.4) / 3)
    table = tables.aggregates([row])
    assert table.header[1:] == ("vtab_natural", "vtab_specialized", "vtab_structured", FLAT, GROUPED)
    assert entries(table, "linear")[FLAT] == "66.84"
    assert entries(table, "linear")[GROUPED] == "70.00"


def test_a_mean_over_an_incomplete_group_is_missing_and_says_how_much_is_there():
    (row,) = made(*over(VTAB[:5]))
    found = means(row)
    assert (found["vtab_natural"].value, found["vtab_natural"].missing) == (None, "missing (5 of 7)")
    assert (found[FLAT].value, found[GROUPED].value) == (None, None)
    shown = entries(tables.aggregates([row]), "linear")
    assert (shown["vtab_natural"], shown[GROUPED]) == ("missing (5 of 7)", "missing (5 of 19)")


def test_published_figures_and_differences_stand_below_a_row():
    paper = published("linear", "vit_b16_in21k")
    scores = {task: paper.tasks[task] / 100 + 0.01 for task in (*VTAB, *FGVC)}
    (row,) = made(*over([*VTAB, *FGVC], scores=scores))
    assert published_of(row) is paper
    table = tables.accuracy([row], "vtab_specialized")
    source = "linear: Jia et al., Visual Prompt Tuning, ECCV 2022"
    assert entries(table, "linear") == {
        "patch_camelyon": "79.5",
        "eurosat": "88.5",
        "resisc45": "69.6",
        "diabetic_retinopathy": "75.0",
        "mean": "78.15",
    }
    assert entries(table, source)["mean"] == "77.16"
    assert entries(table, "linear: difference")["eurosat"] == "+1.0"
    sums = tables.aggregates([row])
    assert entries(sums, source)["fgvc"] == "79.32"
    assert entries(sums, source)[FLAT] == f"{paper.all_means[FLAT]:.2f}"
    assert entries(sums, "linear: difference") == {
        "vtab_natural": "+1.00",
        "vtab_specialized": "+0.99",
        "vtab_structured": "+1.01",
        FLAT: "+1.00",
        GROUPED: "+1.00",
        "fgvc": "+1.00",
    }


def ade20k(method="vpt_deep", score=0.4, **changes):
    """A segmentation run as the paper made it."""
    spec = {"name": "vit_large_patch16_224.orig_in21k", "image_size": 512}
    recipe = {"head": "setr_pup"} | changes.pop("recipe", {})
    options = {"num_tokens": 10} | changes.pop("options", {})
    return result(
        "ade20k",
        method,
        score,
        kind="segmentation",
        metrics={"test/miou": score},
        options=options,
        recipe=recipe,
        backbone=spec | changes.pop("backbone", {}),
        data={"kind": "segmentation"},
        **changes,
    )


def test_a_segmentation_task_has_a_table_of_mean_iou_beside_the_paper_s_and_is_in_no_mean():
    (row,) = made(ade20k())
    table = tables.accuracy([row], "segmentation")
    task = "ade20k (mean IoU)"
    assert (table.title, table.header) == ("Test mean IoU (%), segmentation", ("method", task))
    assert entries(table, "vpt_deep") == {task: "40.0"}
    assert entries(table, "vpt_deep: Jia et al., Visual Prompt Tuning, ECCV 2022") == {task: "42.11"}
    assert entries(table, "vpt_deep: difference") == {task: "-2.1"}
    assert table.notes[1].endswith("vpt_deep: read from two independent transcriptions of the paper's table.")
    rows = made(
        ade20k(),
        result("digits", "vpt_deep"),
        result("digits_masks", kind="segmentation", metrics={"test/miou": 0.5}),
    )
    assert tables.task_groups(rows) == {
        "demo": SUITES["demo"],
        "segmentation": (task, "digits_masks (mean IoU)"),
    }
    assert tables.aggregates([row]).rows == ()
    assert tables.aggregates(rows).header == ("method", "demo")


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": {"head": "linear"}},
        {"options": {"num_tokens": 50}},
        {"backbone": {"image_size": 480}},
        {"backbone": {"image_size": None}},
        {"options": {"depth": 12}},
        {"backbone": {"name": VIT_B}},
    ],
)
def test_another_head_length_or_image_size_has_none_of_the_paper_s_segmentation_figures(changes):
    (row,) = made(ade20k(**changes))
    assert published_of(row) is None


def test_missing_cells_stay_missing_beside_published_ones():
    table = tables.accuracy(made(*over(["cifar"], scores={"cifar": 0.7})), "vtab_natural")
    assert entries(table, "linear")["svhn"] == "missing"
    assert entries(table, "linear: Jia et al., Visual Prompt Tuning, ECCV 2022")["svhn"] == "36.6"
    assert entries(table, "linear: difference")["svhn"] == ""


def test_a_caution_goes_with_the_figures():
    table = tables.accuracy(made(*over(["cifar"], "adapter")), "vtab_natural")
    assert table.notes[1].startswith(
        "Jia et al., Visual Prompt Tuning, ECCV 2022, adapter: its accuracies by task do"
    )
    named = tables.aggregates(made(*over(VTAB, "vpt_deep")), paper="one_protocol")
    (study,) = {published("vpt_deep", "vit_b16_in21k", paper="one_protocol").source}
    assert study.endswith("Parameter-Efficient Fine-Tuning (PEFT) in Visual Recognition, CVPR 2025")
    assert entries(named, f"vpt_deep: {study}")[GROUPED] == "73.4"
    assert not any("worked out" in note for note in named.notes), "that paper prints it"


def test_means_that_a_paper_does_not_print_are_said_to_be_worked_out():
    assert tables.aggregates(made(*over(VTAB))).notes == (
        "Jia et al., Visual Prompt Tuning, ECCV 2022: vtab, mean of 19 tasks; vtab, mean of 3 groups: not "
        "printed there but worked out from its other figures.",
    )
    assert tables.aggregates(made(*over(FGVC))).notes == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"fraction": 0.1}},
        {"backbone": {"pretrained": False}},
        {"backbone": {"kwargs": {"depth": 3}}},
        {"options": {"pool": "prompt"}},
        {"trainer": {"limit_train_batches": 0.1}},
        {"backbone": {"image_size": 384}},
        {"backbone": {"global_pool": "avg"}},
        {"options": {"pool": "image_prompt"}},
        {"backbone": {"name": "vit_base_patch16_224.augreg_in21k"}},
        {"options": {"location": "add"}},
        {"options": {"depth": 3}},
    ],
)
def test_what_is_the_same_in_name_only_has_no_published_figures(changes):
    (plain,) = made(result("cifar", "vpt_deep"))
    (row,) = made(result("cifar", "vpt_deep", **changes))
    assert published_of(plain) is not None
    assert published_of(row) is None


@pytest.mark.parametrize(
    ("name", "options", "pooled", "found"),
    [
        (VIT_B, {"pool": "cls"}, None, "vpt_deep"),
        (VIT_B, {"pool": None}, "token", "vpt_deep"),
        ("vit_base_patch16_224.mae", {"pool": "image_prompt"}, "avg", "vpt_deep"),
        ("vit_base_patch16_224.mae", {"pool": None}, "avg", None),
        ("vit_base_patch16_224.mae", {"pool": "image_prompt"}, None, None),
    ],
)
def test_the_papers_pooling_has_its_figures_however_it_is_written(name, options, pooled, found):
    (row,) = made(
        result("cifar", "vpt_deep", options=options, backbone={"name": name, "global_pool": pooled})
    )
    paper = published_of(row)
    assert (paper and paper.name) == found


def test_a_depth_of_all_blocks_has_the_papers_figures_however_it_is_written():
    tuned = {"depth": 12}
    depths = [result("cifar", "vpt_deep", options={"depth": depth}, tuned=tuned) for depth in (None, 12)]
    assert [published_of(row).name for record in depths for row in made(record)] == ["vpt_deep"] * 2
    (row,) = made(depths[0], result("cifar", "vpt_deep", options={"depth": 12}, tuned=tuned, seed=1))
    assert len(row.cells["cifar"].scores) == 2


def test_accuracies_are_means_and_deviations_over_seeds_and_say_how_many():
    records = [result("cifar", score=s, seed=i) for i, s in enumerate((0.6, 0.7, 0.8))] + [
        result("dtd", score=0.5)
    ]
    table = tables.accuracy(
        made(*records, result("svhn", score=0.4), result("svhn", score=0.5, seed=1)), "vtab_natural"
    )
    assert entries(table, "linear")["cifar"] == "70.0 ± 10.0"
    assert entries(table, "linear")["dtd"] == "50.0"
    assert table.notes[0] == (
        "Mean ± sample standard deviation (n - 1) over 3 seeds; linear on dtd: 1; linear on svhn: 2."
    )


def test_a_single_seed_has_the_interval_of_its_test_images():
    counted = {"score": 0.8, "metrics": {"test/count": 1000}}
    found = tables.accuracy(made(result("cifar", **counted)), "vtab_natural")
    assert entries(found, "linear")["cifar"] == "80.0 (77.4 to 82.4)"
    assert found.rows[0][1].ends == pytest.approx([100 * end for end in wilson(0.8, 1000)])
    assert found.notes[0] == (
        "Mean over 1 seed; of a single seed the 95 % interval over the test images, by Wilson."
    )
    several = tables.accuracy(made(*(result("cifar", seed=s, **counted) for s in (1, 2))), "vtab_natural")
    assert entries(several, "linear")["cifar"] == "80.0 ± 0.0"


def test_groups_are_those_that_have_tasks_and_own_images_stand_alone():
    found = made(result("cifar"), result("digits"), result("my birds"))
    assert list(tables.task_groups(found)) == ["vtab_natural", "demo", "own images"]
    assert list(tables.suites(found)) == ["vtab_all", "demo", "own images"]
    assert tables.accuracy(found, "own images").header == ("method", "my birds")
    assert tables.aggregates(made(result("my birds"))).rows == ()


# wins


def test_wins_are_tasks_above_full_and_a_tie_is_none():
    tasks = SUITES["vtab_specialized"]
    full = dict.fromkeys(tasks, 0.5)
    better = dict(zip(tasks, (0.6, 0.5, 0.4, 0.51), strict=True))
    mine, base = made(*over(tasks, scores=better), *over(tasks, "full", scores=full))
    assert wins(mine, base)["vtab_specialized"].value == 2
    shown = entries(tables.wins_over_full([mine, base]), "linear")
    assert (shown["vtab_specialized"], shown[FLAT], shown["compared with"]) == (
        "2 of 4",
        "missing (4 of 19)",
        "full",
    )


def test_a_win_is_more_than_the_rounding_of_a_mean():
    tasks = SUITES["vtab_specialized"]
    mine, base = (dict.fromkeys(tasks, mean) for mean in (0.1 + 0.2, 0.3))  # 0.1 + 0.2 > 0.3 in float64
    mine, base = made(*over(tasks, scores=mine), *over(tasks, "full", base))
    assert wins(mine, base)["vtab_specialized"].value == 0


def test_wins_are_missing_where_full_is_or_stands_under_another_protocol():
    mine, base = made(*over(["patch_camelyon"]), *over(["patch_camelyon"], "full", precision="bf16-mixed"))
    assert full_of(mine, [mine, base]) is None
    shown = entries(tables.wins_over_full([mine, base]), "linear, precision 32-true")
    assert shown == {
        "vtab_specialized": "no full row of the same protocol",
        FLAT: "no full row of the same protocol",
        "compared with": "none",
    }


def test_a_protocol_is_compared_where_both_rows_have_tasks():
    alone, both = made(result("cifar"), result("cifar", "full"), result("cub200", "full", data=FGVC_DATA))
    assert same_protocol(alone, both)
    other = {"data": {"fingerprint": "f" * 64}}
    mine, base = made(result("mine", **other), result("mine", "full"))
    assert not same_protocol(mine, base)
    torn = made(result("mine", **other), result("mine"), result("dtd"), result("dtd", "full"))
    assert full_of(torn[0], torn) is torn[-1]


# cost


def counts(tuned, hidden=0):
    """Counts of a task on a ViT-B/16: `tuned` parameters and a head of its classes."""

    def of(task):
        head = 769 * TASKS[task].num_classes + hidden
        parameters = tuned(task) if callable(tuned) else tuned
        return {"parameters": parameters, "head_parameters": head, "share": parameters / VIT_B_SIZE}

    return of


def lengths(method, fgvc=None):
    known = contents()["settings"]["lengths"][method] | ({"fgvc": fgvc} if fgvc else {})
    order = contents()["order"]
    return {task: n for group in known for task, n in zip(order[group], known[group], strict=True)}


BLOCK = 12 * 768**2 + 13 * 768
DEEP, SHALLOW = lengths("vpt_deep"), lengths("vpt_shallow", [100] * 5)  # 100: not published, the recipe's own


@pytest.mark.parametrize(
    ("method", "of", "total", "options"),
    [
        ("full", counts(VIT_B_SIZE), 24.02, {}),
        ("linear", counts(0), 1.02, {}),
        ("partial", counts(BLOCK + 2 * 768), 3.00, {"num_blocks": 1}),
        ("mlp", counts(0, hidden=2 * (768 * 769 + 2 * 768)), 1.35, {"num_layers": 3}),
        ("bias", counts(12 * 11 * 768 + 2 * 768), 1.05, {}),
        ("vpt_deep", counts(lambda task: 12 * 768 * DEEP[task]), 1.18, {}),
        ("vpt_shallow", counts(lambda task: 768 * SHALLOW[task]), 1.04, {}),
    ],
)
def test_the_total_over_24_tasks_is_the_papers(method, of, total, options):
    records = [
        result(task, method, options=options, tuned=of(task), **({"data": FGVC_DATA} if task in FGVC else {}))
        for task in (*VTAB, *FGVC)
    ]
    (row,) = made(*records)
    sizes = backbone_sizes(made(result("cifar", "vpt_deep")))  # linear probing alone does not tell it
    assert sizes == {"a" * 64: VIT_B_SIZE}
    assert round(cost(row, sizes).total, 2) == total == published_of(row).params
    line = entries(tables.costs([*made(result("dtd", "lora")), row]), method)
    assert (line["all tasks (backbones)"], line["published, 24 tasks"]) == (f"{total:.2f}", f"{total:.2f}")


def test_a_cost_is_of_a_task_over_its_seeds():
    first = {"parameters": 1000, "head_parameters": 10, "share": 0.1, "bytes": 4000, "macs": 2_000_000}
    second = {"parameters": 3000, "head_parameters": 30, "share": 0.3, "bytes": 12_000, "macs": 4_000_000}
    slow = {"time": {"train_s": 300.0}, "peak_memory": {"bytes": 2**31}}
    pruned = first | {"parameters": 500, "share": 0.05}
    (row,) = made(
        result("cifar", tuned=first),
        result("cifar", tuned=pruned, seed=1),
        result("dtd", tuned=second, **slow),
    )
    found = cost(row, backbone_sizes([row]))
    assert (found.tasks, found.tuned, found.least, found.most) == (2, (750 + 3000) / 2, 750, 3000)
    assert (found.head, found.bytes, found.macs) == (20, 8000, 3_000_000)
    assert found.share == pytest.approx((0.075 + 0.3) / 2)
    assert found.total == pytest.approx(1 + (750 + 3000 + 40) / 10_000)
    assert (found.seconds, found.devices) == ((100 + 300) / 2, ("NVIDIA H200",))
    assert (found.memory, found.memory_of) == (2**31, ("GPU allocations",))
    line = entries(tables.costs([row]), "linear")
    assert line["tuned parameters"] == "1,875 (750 to 3,000)"
    assert (line["peak memory (MiB)"], line["measured"]) == ("2,048", "GPU allocations")
    assert (line["training (s)"], line["operations (M)"], line["MB per task"]) == ("200.0", "3", "0.01")


def test_what_was_not_recorded_or_measured_alike_is_missing():
    record = result(
        tuned={"parameters": 0, "share": 0.0}, machine={"device": "cpu", "devices": 2, "threads": 1}
    )
    older = {key: value for key, value in record.tuned.items() if key != "macs"}
    other = result(seed=1, peak_memory={"of": "process, this run"}, tuned={"parameters": 0, "share": 0.0})
    line = entries(tables.costs(made(changed(record, tuned=older), other)), "linear")
    assert line["operations (M)"] == "not recorded"
    assert line["all tasks (backbones)"] == "backbone's size not known"
    assert line["peak memory (MiB)"] == "measured in several ways"
    assert line["trained on"] == "2 x cpu (1 thread), NVIDIA H200"
    assert line["training (s)"] == "on several devices"


# tests, ranks, intervals


def test_paired_tests_say_where_a_level_is_out_of_reach():
    tasks = SUITES["vtab_specialized"]
    base = dict.fromkeys(tasks, 0.5)
    better = dict(zip(tasks, (0.54, 0.51, 0.52, 0.53), strict=True))
    mine, full = made(*over(tasks, scores=better), *over(tasks, "full", scores=base))
    table = tables.paired_tests([mine, full], full)
    assert entries(table, "linear") == {
        "over": "vtab_all",
        "tasks": "4",
        "difference (points)": "+2.50",
        "95 % interval": "+1.50 to +3.50",
        "better, equal, worse": "4, 0, 0",
        "Wilcoxon p": "0.125",
        "one-sided p": "0.0625",
        "smallest p": "0.125",
        "paired t p": "0.0305",
    }
    assert table.notes[0] == (
        "With 4 tasks that differ the two-sided signed-rank test cannot go below 0.125: 0.05 and 0.01 are "
        "out of reach."
    )
    assert table.notes[1:] == (
        "Difference: mean score over the common tasks minus that of full. 95 % interval: percentile "
        "bootstrap over the tasks, 10,000 resamples; none below four tasks, of which it would be the range.",
        "Wilcoxon p: the exact signed-rank test, two-sided; equal tasks are left out, differences of one "
        "size share "
        "their mean rank. One-sided p: of the same test, the alternative being that the method is better. "
        "Smallest p: the two-sided test's with so many unequal tasks. Paired t p: two-sided.",
        "No test: fewer than two unequal tasks or, for t, differences that are all the same. The p-values "
        "are not corrected for the number of comparisons.",
    )


def test_a_single_common_task_has_no_test_and_says_so():
    mine, full = made(result("cifar", score=0.6), *over(["cifar", "dtd"], "full"))
    table = tables.paired_tests([mine, full], full)
    assert entries(table, "linear")["Wilcoxon p"] == "no test"
    assert entries(table, "linear")["paired t p"] == "no test"
    assert entries(table, "linear")["95 % interval"] == "none"
    assert table.notes[-1].startswith("No test: fewer than two unequal tasks")


def test_ranks_are_taken_among_complete_rows():
    demo = SUITES["demo"]
    records = [
        *over(demo, "linear", dict(zip(demo, (0.9, 0.8, 0.7), strict=True))),
        *over(demo, "full", dict(zip(demo, (0.8, 0.8, 0.9), strict=True))),
        *over(demo[:1], "bias", dict.fromkeys(demo, 0.99)),
    ]
    table = tables.ranks(made(*records))
    assert [entries(table, name)["demo"] for name in ("linear", "full", "bias")] == [
        "1.50",
        "1.50",
        "not ranked",
    ]
    assert table.notes == ("1 is the best; ties share their mean rank.", "demo: 2 rows over 3 of 3 tasks.")
    partly = tables.ranks(made(*records[3:]))  # only one is complete: over what both have in common
    assert [entries(partly, name)["demo"] for name in ("full", "bias")] == ["2.00", "1.00"]
    assert partly.notes[-1] == "demo: 2 rows over 1 of 3 tasks."


def test_seed_intervals_are_of_three_seeds_or_more():
    table = tables.seed_intervals(
        made(
            *(result(score=s, seed=i) for i, s in enumerate((0.5, 0.6, 0.7))),
            result("dtd"),
            result("dtd", seed=1),
        )
    )
    assert [tuple(map(str, row)) for row in table.rows] == [("linear", "cifar", "3", "60.0", "50.0 to 70.0")]


# what was left out, and why


def test_rows_of_their_own_and_choices_and_what_was_left_out(tmp_path):
    write(tmp_path, result(score=0.5))
    write(tmp_path, result(score=0.6, precision="bf16-mixed"))
    write(tmp_path, result(seed=1, status="diverged", diverged_step=3))
    for i, (score, lr) in enumerate(((0.4, 1.0), (0.45, 5.0))):
        write(tmp_path, result(score=score, split="tune", recipe={"lr": lr}), f"00000000000{i}")
    found = survey([tmp_path])
    own = tables.own_rows(rows(found.runs))
    assert own.rows == (
        ("linear, precision 32-true", "cifar", "precision 32-true (others: bf16-mixed)"),
        ("linear, precision bf16-mixed", "cifar", "precision bf16-mixed (others: 32-true)"),
    )
    (choice,) = tables.choices(grids(found.runs)).rows
    assert tuple(map(str, choice)) == ("linear", "cifar", "settings", "2", "0", "45.0", "lr 5.0", "lr 1.0")
    (out,) = tables.left_out(found).rows
    assert out[1] == "diverged at step 3: it has no test score, and its seed is in no mean"
    assert tables.left_out(survey([])).rows == ()


def test_the_mean_of_a_group_is_not_rounded_before_it_is_taken():
    (row,) = made(
        *over(SUITES["demo"], scores=dict(zip(SUITES["demo"], (0.1234, 0.2345, 0.3456), strict=True)))
    )
    expected = fmean((0.1234, 0.2345, 0.3456))
    assert csv_text(tables.aggregates([row])).splitlines()[1] == f"linear,{100 * expected:.10g}"
