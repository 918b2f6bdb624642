"""Which runs share a row, which do not, and what is said of it."""

import re
from pathlib import Path

import pytest

from helpers.written_runs import CROPPED, PREPROCESSING, RECIPE, changed, result, table
from visprompt.reports.rows import rows, without_score
from visprompt.reports.settings import scope

CONFIGS = Path(__file__).parents[2] / "configs"


def labels(made):
    return [row.label for row in made]


def preprocessing(**changes):
    return {"preprocessing": PREPROCESSING | changes}


# what shares a row


def test_seeds_make_a_cell_and_tasks_make_a_row():
    records = [result("cifar", score=s, seed=i) for i, s in enumerate((0.6, 0.5, 0.7))] + [
        result("dtd", score=0.4)
    ]
    (row,) = rows(table(*reversed(records)))
    assert (row.label, row.method, row.why) == ("linear", "linear", "")
    assert row.backbone == "vit_base_patch16_224.orig_in21k"
    assert {task: cell.scores for task, cell in row.cells.items()} == {
        "cifar": (0.6, 0.5, 0.7),
        "dtd": (0.4,),
    }
    assert list(row.cells) == ["cifar", "dtd"]  # the catalog's order
    assert row.cells["cifar"].std == pytest.approx(0.1)


def test_what_a_recipe_chose_for_a_task_is_no_difference():
    (row,) = rows(
        table(
            result("cifar", "vpt_deep", options={"num_tokens": 10, "dropout": 0.1}),
            result(
                "svhn",
                "vpt_deep",
                options={"num_tokens": 50, "dropout": 0.0},
                recipe={"lr": 5.0, "epochs": 50},
            ),
        )
    )
    assert list(row.cells) == ["cifar", "svhn"]


def test_families_are_preprocessed_each_in_its_way_within_a_row():
    fgvc = {"source": "raw:json", "preprocessing": CROPPED}
    (row,) = rows(table(result("cifar"), result("cub200", data=fgvc), result("mine", data=fgvc)))
    assert list(row.cells) == ["cifar", "cub200", "mine"]


def test_facts_of_a_task_are_no_difference():
    decoded = {"decode": "grey", "native": 96}
    (row,) = rows(table(result("cifar"), result("smallnorb_azi", data=preprocessing(**decoded))))
    assert len(row.cells) == 2


def test_masks_of_a_seed_are_no_difference():
    masks = (
        {"token_mask": [0, 1], "segment_mask": [[1]], "initial": "a"},
        {"token_mask": [1, 1], "initial": "b"},
    )
    (row,) = rows(
        table(
            *(result("cifar", "e2vpt", options={"prune": True} | own, seed=i) for i, own in enumerate(masks))
        )
    )
    assert len(row.cells["cifar"].scores) == 2


def test_weights_that_are_drawn_from_the_seed_are_no_difference():
    drawn = [
        result(seed=i, score=i / 10, backbone={"pretrained": False, "sha256": f"{i}" * 64}) for i in (1, 2)
    ]
    (row,) = rows(table(*drawn))
    assert (row.cells["cifar"].scores, row.told["backbone.sha256"]) == ((0.1, 0.2), "random")


def test_a_depth_of_all_blocks_is_one_setting_however_it_is_written():
    depths = [
        result("cifar", "vpt_deep", options={"depth": d}, tuned={"depth": 12}, seed=d or 0)
        for d in (None, 12)
    ]
    (row,) = rows(table(*depths))
    assert (len(row.cells["cifar"].scores), row.told["method.depth"]) == (2, "12")


def test_a_row_says_what_of_its_training_differs_from_task_to_task():
    (row,) = rows(table(result("cifar"), result("dtd", recipe={"epochs": 50, "batch_size": 128, "lr": 5.0})))
    assert row.why == "different from task to task: epochs, batch_size"


def test_rows_come_in_the_order_of_the_methods():
    made = rows(
        table(result(method="vpt_deep"), result(method="unheard_of"), result(method="full"), result())
    )
    assert labels(made) == ["linear", "full", "vpt_deep", "unheard_of"]


# what does not


@pytest.mark.parametrize(
    ("changes", "label", "why"),
    [
        (
            {"data": {"source": "prepared"}},
            "data source (vtab) prepared",
            "data source (vtab) prepared (others: raw)",
        ),
        ({"data": {"form": "lossy"}}, "data form (vtab) lossy", "data form (vtab) lossy (others: lossless)"),
        ({"data": {"fraction": 0.1}}, "fraction 0.1", "fraction 0.1 (others: 1.0)"),
        (
            {"data": preprocessing(size=384)},
            "data preprocessing size 384",
            "data preprocessing size 384 (others: 224)",
        ),
        (
            {"data": preprocessing(resampling="pillow")},
            "data preprocessing resampling (vtab) pillow",
            "data preprocessing resampling (vtab) pillow (others: tf1)",
        ),
        ({"precision": "bf16-mixed"}, "precision bf16-mixed", "precision bf16-mixed (others: 32-true)"),
        (
            {"trainer": {"limit_train_batches": 0.1}},
            "trainer limit_train_batches=0.1",
            "trainer limit_train_batches=0.1 (others: neutral)",
        ),
        ({"backbone": {"sha256": "b" * 64}}, "weights bbbbbbbb", "weights bbbbbbbb (others: aaaaaaaa)"),
        ({"options": {"depth": None}}, "depth all", "depth all (others: 3)"),
        ({"options": {"depth": 3, "location": "add"}}, "location add", "location add (others: not recorded)"),
    ],
)
def test_a_protocol_of_its_own_is_a_row_of_its_own_that_says_so(changes, label, why):
    options = {"depth": 3} if "options" in changes else {}
    made = rows(
        table(result(method="vpt_deep", options=options), result(method="vpt_deep", score=0.9, **changes))
    )
    (row,) = (row for row in made if row.cells["cifar"].scores == (0.9,))
    assert row.why == why
    if "location" not in label:
        assert row.label == f"vpt_deep, {label}"
    else:
        assert labels(made) == ["vpt_deep", "vpt_deep, older record"]


def test_a_label_says_no_more_than_tells_rows_apart_and_why_says_all():
    other = {"backbone": {"name": "swin", "sha256": "b" * 64}, "data": preprocessing(mean=[0.5] * 3)}
    made = rows(table(result(), result(**other)))
    assert labels(made) == ["linear, backbone swin", "linear, backbone vit_base_patch16_224.orig_in21k"]
    assert made[0].why == (
        "backbone swin (others: vit_base_patch16_224.orig_in21k); "
        "data preprocessing mean [0.5, 0.5, 0.5] (others: [0.485, 0.456, 0.406]); weights bbbbbbbb (others: "
        "aaaaaaaa)"
    )


def test_labels_tell_protocols_of_different_methods_apart_too():
    made = rows(table(result(method="full"), result(precision="bf16-mixed")))
    assert labels(made) == ["linear, precision bf16-mixed", "full, precision 32-true"]
    assert [row.why for row in made] == ["", ""]


def test_an_older_record_that_lacks_a_setting_is_never_averaged_with_a_newer_one():
    older = result(score=0.1)
    data = {key: value for key, value in older.data.items() if key not in ("fraction", "form")}
    made = rows(table(changed(older, data=data), result(seed=44)))
    assert labels(made) == ["linear", "linear, older record"]
    assert (
        made[1].why == "data form (vtab) not recorded (others: lossless); fraction not recorded (others: 1.0)"
    )


def test_labels_that_come_out_the_same_are_numbered():
    lacking = [{"fraction"}, {"form"}]
    records = [result(seed=i) for i in range(3)]
    for i, names in enumerate(lacking):
        records[i] = changed(records[i], data={k: v for k, v in records[i].data.items() if k not in names})
    assert labels(rows(table(*records))) == ["linear", "linear, older record (1)", "linear, older record (2)"]


def test_a_family_with_two_preprocessings_leaves_the_other_families_alone():
    cub = result("cub200", data={"preprocessing": CROPPED | {"interpolation": "bilinear", "flip": 0.5}})
    made = rows(
        table(result("cifar"), result("dtd", data={"source": "prepared"}), result("cifar", seed=44), cub)
    )
    # cub200's source is raw as well
    assert [list(row.cells) for row in made] == [
        ["cifar", "cub200"],
        ["dtd"],
    ]
    assert made[1].label == "linear, data source (vtab) prepared"


def test_other_images_under_the_same_name_are_another_row():
    made = rows(table(result("mine"), result("mine", data={"fingerprint": "f" * 64}), result("dtd")))
    assert [list(row.cells) for row in made] == [["dtd"], ["mine"], ["mine"]]
    assert "and no recorded grid chose one: they are in separate rows" in made[0].why
    assert "linear, data fingerprint ffffffff" in labels(made)


def test_stacked_runs_are_never_averaged_with_single_ones_but_tasks_may_differ():
    stacked = {"machine": {"stacked": 3}}
    others = [result("dtd", seed=seed) for seed in (1, 2)]
    made = rows(table(result("cifar", seed=1, **stacked), result("cifar", seed=2, **stacked), *others))
    assert [list(row.cells) for row in made] == [["cifar", "dtd"]]
    made = rows(table(result("cifar", seed=1, **stacked), result("cifar", seed=2), *others))
    assert [sum(row.runs["task"] == "cifar") for row in made if "cifar" in row.cells] == [1, 1]
    assert any("stacked yes" in row.label for row in made)


def deep(task, length, split="final", score=0.5, **changes):
    return result(task, "vpt_deep", score, options={"num_tokens": length}, split=split, **changes)


def test_an_ablation_makes_a_row_of_each_setting():
    made = rows(table(*(deep(task, length) for task in ("cifar", "dtd") for length in (1, 10, 50))))
    assert labels(made) == ["vpt_deep, num_tokens 1", "vpt_deep, num_tokens 10", "vpt_deep, num_tokens 50"]
    assert [list(row.cells) for row in made] == [["cifar", "dtd"]] * 3
    assert made[0].why == "num_tokens 1 (others: 10, 50)"


def test_a_task_with_one_setting_joins_the_row_that_has_it():
    made = rows(table(deep("cifar", 1), deep("cifar", 10), deep("dtd", 10)))
    assert {row.label: list(row.cells) for row in made} == {
        "vpt_deep, num_tokens 10": ["cifar", "dtd"],
        "vpt_deep, num_tokens 1": ["cifar"],
    }


def test_what_validation_chose_stands_in_the_row_of_the_other_tasks():
    finals = [deep("cifar", 1), deep("cifar", 10, score=0.6), deep("dtd", 50), deep("svhn", 100)]
    tried = [deep("cifar", 1, "tune", 0.8), deep("cifar", 10, "tune", 0.7)]
    made = rows(table(*finals, *tried))
    assert {row.label: list(row.cells) for row in made} == {
        "vpt_deep": ["cifar", "dtd", "svhn"],
        "vpt_deep, num_tokens 10": ["cifar"],
    }
    assert made[0].cells["cifar"].scores == (0.5,)  # better on validation, worse on test
    assert made[0].why == (
        "num_tokens of each task (others: 10); "
        "runs of cifar differ in num_tokens: this row has those that validation chose"
    )
    assert made[1].why == "num_tokens 10 (others: of each task)"


def test_a_whole_ablation_keeps_its_rows_beside_that_of_the_choices():
    finals = [deep(task, length) for task in ("cifar", "dtd") for length in (1, 10)]
    tried = [
        deep("cifar", 1, "tune", 0.8),
        deep("cifar", 10, "tune"),
        deep("dtd", 1, "tune"),
        deep("dtd", 10, "tune", 0.8),
    ]
    made = rows(table(*finals, *tried))
    assert labels(made) == ["vpt_deep", "vpt_deep, num_tokens 1", "vpt_deep, num_tokens 10"]
    assert [list(row.cells) for row in made] == [["cifar", "dtd"]] * 3
    assert [record.method["num_tokens"] for record in made[0].runs.result] == [1, 10]


def test_a_choice_that_is_the_same_everywhere_needs_no_row_beside_its_setting():
    tried = [deep("cifar", 1, "tune", 0.8), deep("cifar", 10, "tune")]
    made = rows(table(deep("cifar", 1), deep("cifar", 10), deep("dtd", 1), *tried))
    assert {row.label: list(row.cells) for row in made} == {
        "vpt_deep, num_tokens 1": ["cifar", "dtd"],
        "vpt_deep, num_tokens 10": ["cifar"],
    }


def test_where_nothing_chose_the_other_tasks_stay_together_and_say_what_they_lack():
    made = rows(table(deep("cifar", 1), deep("cifar", 10), deep("dtd", 50), deep("svhn", 100)))
    assert {row.label: list(row.cells) for row in made} == {
        "vpt_deep": ["dtd", "svhn"],
        "vpt_deep, num_tokens 1": ["cifar"],
        "vpt_deep, num_tokens 10": ["cifar"],
    }
    assert made[0].why == (
        "num_tokens of each task (others: 1, 10); "
        "runs of cifar differ in num_tokens, and no recorded grid chose one: they are in separate rows"
    )


def test_a_grid_of_unpruned_runs_settles_the_pruned_ones():
    options = {"prune": True, "prune_tokens": [50], "initial": "a"}
    finals = [
        result("cifar", "e2vpt", s, options=options, recipe={"lr": lr}) for s, lr in ((0.5, 1.0), (0.6, 5.0))
    ]
    plain = {"prune": False, "prune_tokens": None, "initial": None}
    tried = [
        result("cifar", "e2vpt", s, split="tune", options=plain, recipe={"lr": lr})
        for s, lr in ((0.8, 1.0), (0.7, 5.0))
    ]
    made = rows(table(*finals, *tried, result("dtd", "e2vpt", options=options, recipe={"lr": 0.1})))
    assert made[0].cells["cifar"].scores == (0.5,)
    assert list(made[0].cells) == ["cifar", "dtd"]


def test_the_grid_of_another_protocol_settles_nothing():
    tried = [
        deep("cifar", 1, "tune", 0.8, precision="bf16-mixed"),
        deep("cifar", 10, "tune", precision="bf16-mixed"),
    ]
    made = rows(table(deep("cifar", 1), deep("cifar", 10), deep("dtd", 50), *tried))
    assert [list(row.cells) for row in made] == [["dtd"], ["cifar"], ["cifar"]]


def test_only_final_runs_have_cells():
    assert rows(table(result(split="tune"))) == []


def test_a_run_that_was_not_scored_is_in_no_row_and_said():
    found = table(result(score=0.5), result(seed=44, status="unscored", metrics={"train/acc": 1.0}))
    assert [row.cells["cifar"].scores for row in rows(found)] == [(0.5,)]
    assert [(one.folder, one.why) for one in without_score(found)] == [
        (
            Path("run1"),
            "trained without test images (data.test=none): it has no test score, and its seed is in no mean",
        )
    ]


def test_a_diverged_seed_is_in_no_mean_and_said():
    found = table(result(score=0.5), result(seed=44, status="diverged", diverged_step=7))
    assert rows(found)[0].cells["cifar"].scores == (0.5,)
    assert [(one.folder, one.why) for one in without_score(found)] == [
        (Path("run1"), "diverged at step 7: it has no test score, and its seed is in no mean")
    ]


# the settings that a row lets differ from task to task


def test_every_option_that_a_recipes_row_chooses_may_differ_from_task_to_task():
    found = 0
    for file in sorted((CONFIGS / "method").glob("*.yaml")):
        for option in re.findall(r"^(\w+): \$\{row:", file.read_text(), re.M):
            assert scope(f"method.{option}", file.stem) == "chosen", (file.stem, option)
            found += 1
    assert found > 20
    assert scope("method.init", "vpt_deep") == "row"
    assert scope("method.depth", "vpt_deep") == "row"
    assert {scope(f"recipe.{key}", "linear") for key in RECIPE} == {"chosen"}
