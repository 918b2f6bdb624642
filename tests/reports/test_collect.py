"""What is found below a folder, which runs share a row, which do not, and what is said of it."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.written_runs import CROPPED, PREPROCESSING, RECIPE, result, write
from visprompt.errors import UserError
from visprompt.reports.collect import LeftOut, diverged, grids, read_runs, rows, survey
from visprompt.reports.runs import Run
from visprompt.reports.settings import scope

CONFIGS = Path(__file__).parents[2] / "configs"


def runs(*records):
    return [Run(Path(f"run{i}"), record) for i, record in enumerate(records)]


def labels(made):
    return [row.label for row in made]


def preprocessing(**changes):
    return {"preprocessing": PREPROCESSING | changes}


# what is found


def test_runs_are_found_at_any_depth_below_several_folders(tmp_path):
    first = write(tmp_path / "a", result(seed=42))
    second = write(tmp_path / "b" / "deep", result(seed=44))
    found = survey([tmp_path / "b", tmp_path / "a"])
    assert [run.folder for run in found.runs] == [second, first]
    assert found.runs[1].result == result(seed=42)
    assert found.left_out == ()
    assert [run.folder for run in read_runs([first])] == [first]  # a run's own folder will do


def test_a_run_is_counted_once_through_links_and_folders_within_folders(tmp_path):
    folder = write(tmp_path / "logs", result())
    (tmp_path / "logs" / "again").symlink_to(folder)
    (tmp_path / "logs" / "cifar" / "loop").symlink_to(tmp_path / "logs")
    found = survey([tmp_path / "logs", tmp_path / "logs" / "cifar", tmp_path])
    assert len(found.runs) == 1
    assert found.left_out == ()


def test_a_copy_is_counted_once_and_said(tmp_path):
    first = write(tmp_path / "a", result())
    copy = write(tmp_path / "b", result())
    found = survey([tmp_path / "a", tmp_path / "b"])
    assert [run.folder for run in found.runs] == [first]
    assert [(one.folder, one.why) for one in found.left_out] == [(copy, f"the same run as {first}, counted there")]


def test_two_runs_that_only_their_scores_tell_apart_are_both_left_out(tmp_path):
    """Something that result.json does not record decided: an arbitrary one of them would be in the mean."""
    one = write(tmp_path, result(score=0.5), "000000000001")
    other = write(tmp_path, result(score=0.6), "000000000002")
    found = survey([tmp_path])
    assert found.runs == ()
    assert [one.folder for one in found.left_out] == [one, other]
    assert found.left_out[0].why == f"recorded exactly as {other}, but its scores differ: keep the one that is meant"


def test_what_is_no_finished_run_is_named_and_never_an_error(tmp_path):
    task = tmp_path / "cifar" / "linear"
    cut = write(tmp_path, result(seed=1))
    (cut / "result.json").write_text((cut / "result.json").read_text()[:-9])
    stateless = write(tmp_path, result(seed=2))
    (stateless / "tuned.safetensors").write_bytes(b"cut")
    half = task / "half"
    (half / "resume").mkdir(parents=True)
    locked = task / "0123456789ab"
    locked.mkdir()
    (locked / "lock").touch()
    found = survey([tmp_path])
    assert found.runs == ()
    said = {one.folder: one.why for one in found.left_out}
    damaged = (
        "damaged, or of another version of visprompt: result.json or the tuned state beside it is not whole; run the "
        "same command again"
    )
    assert said == {cut: damaged, stateless: damaged, half: "not finished", locked: "not finished"}


@pytest.mark.parametrize(
    "change",
    [
        {"method": ["linear"]},
        {"metrics": {}},
        {"time": {}},
        {"data": {"preprocessing": 1}},
        {"tuned": {"share": None}},
        {"tuned": {"parameters": "many"}},
        {"tuned": {"macs": None}},
        {"time": {"train_s": None}},
        {"machine": {"devices": None}},
        {"method": {"name": "e2vpt", "initial": "a"}},  # a link of a chain without kept_tokens
        {"seed": "a"},
        {"seed": True},
        {"split": "other"},
        {"metrics": {"test/acc": float("nan")}},
        {"schema": 2},
    ],
)
def test_a_record_without_what_the_report_reads_is_named(tmp_path, change):
    folder = write(tmp_path, result())
    stored = json.loads((folder / "result.json").read_text())
    for name, value in change.items():
        stored[name] = stored[name] | value if isinstance(value, dict) and value else value
    del stored["digest"]
    (folder / "result.json").write_text(json.dumps(stored))
    found = survey([tmp_path])
    assert (found.runs, [one.folder for one in found.left_out]) == ((), [folder])


def test_a_debug_run_is_no_result(tmp_path):
    folder = write(tmp_path, result(tags=("mine", "debug")))
    found = survey([tmp_path])
    assert (found.runs, found.left_out) == ((), (LeftOut(folder, "a debug run, which is no result"),))


def test_of_several_attempts_at_a_run_the_last_is_counted_wherever_it_lies(tmp_path):
    old = write(tmp_path / "a", result(score=0.5), "0" * 12)
    new = write(tmp_path / "b", result(score=0.6, attempt=1), "0" * 12)
    elsewhere = write(tmp_path / "c", result(score=0.7, attempt=1), "0" * 12)
    found = survey([tmp_path])
    assert [run.folder for run in found.runs] == [new]
    counted = f"the same run as {new}, counted there"
    assert {one.folder: one.why for one in found.left_out} == {
        old: f"{counted} (attempt 1; here is attempt 0), though its scores differ",
        elsewhere: f"{counted}, though its scores differ",
    }


def test_what_belongs_to_chains_and_hydra_is_no_run(tmp_path):
    chain = tmp_path / "cifar" / "e2vpt" / "0123456789ab"
    for folder in (chain, tmp_path / "cifar" / "e2vpt" / "initial", tmp_path / "hydra" / "2026-11-21" / ".hydra"):
        folder.mkdir(parents=True)
    for file in ("lock", "initial.json", "importance.json", "masks.json"):
        (chain / file).touch()
    (tmp_path / "cifar" / "e2vpt" / "initial" / "0123.safetensors").touch()
    (tmp_path / "hydra" / "2026-11-21" / ".hydra" / "config.yaml").touch()
    assert survey([tmp_path]) == survey([])


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, result())
    real = os.scandir

    def scandir(path):
        if str(path).endswith("linear"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = survey([tmp_path])
    assert [(one.folder, one.why) for one in found.left_out] == [
        (tmp_path / "cifar" / "linear", "cannot be read: Permission denied")
    ]


def test_a_folder_that_is_not_there_is_an_error():
    with pytest.raises(UserError, match="there is no folder nowhere to read runs from: name one that holds runs"):
        read_runs([Path("nowhere")])


# what shares a row


def test_seeds_make_a_cell_and_tasks_make_a_row():
    records = [result("cifar", score=s, seed=i) for i, s in enumerate((0.6, 0.5, 0.7))] + [result("dtd", score=0.4)]
    (row,) = rows(runs(*reversed(records)))
    assert (row.label, row.method, row.why) == ("linear", "linear", "")
    assert row.backbone == "vit_base_patch16_224.orig_in21k"
    assert {task: cell.scores for task, cell in row.cells.items()} == {"cifar": (0.6, 0.5, 0.7), "dtd": (0.4,)}
    assert list(row.cells) == ["cifar", "dtd"]  # the catalog's order
    assert row.cells["cifar"].std == pytest.approx(0.1)


def test_what_a_recipe_chose_for_a_task_is_no_difference():
    (row,) = rows(
        runs(
            result("cifar", "vpt_deep", options={"num_tokens": 10, "dropout": 0.1}),
            result("svhn", "vpt_deep", options={"num_tokens": 50, "dropout": 0.0}, recipe={"lr": 5.0, "epochs": 50}),
        )
    )
    assert list(row.cells) == ["cifar", "svhn"]


def test_families_are_preprocessed_each_in_its_way_within_a_row():
    fgvc = {"source": "raw:json", "preprocessing": CROPPED}
    (row,) = rows(runs(result("cifar"), result("cub200", data=fgvc), result("mine", data=fgvc)))
    assert list(row.cells) == ["cifar", "cub200", "mine"]


def test_facts_of_a_task_are_no_difference():
    decoded = {"decode": "grey", "native": 96}
    (row,) = rows(runs(result("cifar"), result("smallnorb_azi", data=preprocessing(**decoded))))
    assert len(row.cells) == 2


def test_masks_of_a_seed_are_no_difference():
    masks = ({"token_mask": [0, 1], "segment_mask": [[1]], "initial": "a"}, {"token_mask": [1, 1], "initial": "b"})
    (row,) = rows(
        runs(*(result("cifar", "e2vpt", options={"prune": True} | own, seed=i) for i, own in enumerate(masks)))
    )
    assert len(row.cells["cifar"].scores) == 2


def test_weights_that_are_drawn_from_the_seed_are_no_difference():
    drawn = [result(seed=i, score=i / 10, backbone={"pretrained": False, "sha256": f"{i}" * 64}) for i in (1, 2)]
    (row,) = rows(runs(*drawn))
    assert (row.cells["cifar"].scores, row.told["backbone.sha256"]) == ((0.1, 0.2), "random")


def test_a_depth_of_all_blocks_is_one_setting_however_it_is_written():
    depths = [result("cifar", "vpt_deep", options={"depth": d}, tuned={"depth": 12}, seed=d or 0) for d in (None, 12)]
    (row,) = rows(runs(*depths))
    assert (len(row.cells["cifar"].scores), row.told["method.depth"]) == (2, "12")


def test_a_row_says_what_of_its_training_differs_from_task_to_task():
    (row,) = rows(runs(result("cifar"), result("dtd", recipe={"epochs": 50, "batch_size": 128, "lr": 5.0})))
    assert row.why == "different from task to task: epochs, batch_size"


def test_rows_come_in_the_order_of_the_methods():
    made = rows(runs(result(method="vpt_deep"), result(method="unheard_of"), result(method="full"), result()))
    assert labels(made) == ["linear", "full", "vpt_deep", "unheard_of"]


# what does not


@pytest.mark.parametrize(
    ("changes", "label", "why"),
    [
        ({"data": {"source": "prepared"}}, "data source (vtab) prepared", "data source (vtab) prepared (others: raw)"),
        ({"data": {"form": "lossy"}}, "data form (vtab) lossy", "data form (vtab) lossy (others: lossless)"),
        ({"data": {"fraction": 0.1}}, "fraction 0.1", "fraction 0.1 (others: 1.0)"),
        ({"data": preprocessing(size=384)}, "data preprocessing size 384", "data preprocessing size 384 (others: 224)"),
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
    made = rows(runs(result(method="vpt_deep", options=options), result(method="vpt_deep", score=0.9, **changes)))
    (row,) = (row for row in made if row.cells["cifar"].scores == (0.9,))
    assert row.why == why
    if "location" not in label:
        assert row.label == f"vpt_deep, {label}"
    else:
        assert labels(made) == ["vpt_deep", "vpt_deep, older record"]


def test_a_label_says_no_more_than_tells_rows_apart_and_why_says_all():
    other = {"backbone": {"name": "swin", "sha256": "b" * 64}, "data": preprocessing(mean=[0.5] * 3)}
    made = rows(runs(result(), result(**other)))
    assert labels(made) == ["linear, backbone swin", "linear, backbone vit_base_patch16_224.orig_in21k"]
    assert made[0].why == (
        "backbone swin (others: vit_base_patch16_224.orig_in21k); "
        "data preprocessing mean [0.5, 0.5, 0.5] (others: [0.485, 0.456, 0.406]); weights bbbbbbbb (others: aaaaaaaa)"
    )


def test_labels_tell_protocols_of_different_methods_apart_too():
    made = rows(runs(result(method="full"), result(precision="bf16-mixed")))
    assert labels(made) == ["linear, precision bf16-mixed", "full, precision 32-true"]
    assert [row.why for row in made] == ["", ""]


def test_an_older_record_that_lacks_a_setting_is_never_averaged_with_a_newer_one():
    older = result(score=0.1)
    data = {key: value for key, value in older.data.items() if key not in ("fraction", "form")}
    made = rows(runs(replace(older, data=data), result(seed=44)))
    assert labels(made) == ["linear", "linear, older record"]
    assert made[1].why == "data form (vtab) not recorded (others: lossless); fraction not recorded (others: 1.0)"


def test_labels_that_come_out_the_same_are_numbered():
    lacking = [{"fraction"}, {"form"}]
    records = [result(seed=i) for i in range(3)]
    for i, names in enumerate(lacking):
        records[i] = replace(records[i], data={k: v for k, v in records[i].data.items() if k not in names})
    assert labels(rows(runs(*records))) == ["linear", "linear, older record (1)", "linear, older record (2)"]


def test_a_family_with_two_preprocessings_leaves_the_other_families_alone():
    cub = result("cub200", data={"preprocessing": CROPPED | {"interpolation": "bilinear", "flip": 0.5}})
    made = rows(runs(result("cifar"), result("dtd", data={"source": "prepared"}), result("cifar", seed=44), cub))
    assert [list(row.cells) for row in made] == [["cifar", "cub200"], ["dtd"]]  # cub200's source is raw as well
    assert made[1].label == "linear, data source (vtab) prepared"


def test_other_images_under_the_same_name_are_another_row():
    made = rows(runs(result("mine"), result("mine", data={"fingerprint": "f" * 64}), result("dtd")))
    assert [list(row.cells) for row in made] == [["dtd"], ["mine"], ["mine"]]
    assert "and nothing chose: they have rows of their own" in made[0].why
    assert "linear, data fingerprint ffffffff" in labels(made)


def deep(task, length, split="final", score=0.5, **changes):
    return result(task, "vpt_deep", score, options={"num_tokens": length}, split=split, **changes)


def test_an_ablation_makes_a_row_of_each_setting():
    made = rows(runs(*(deep(task, length) for task in ("cifar", "dtd") for length in (1, 10, 50))))
    assert labels(made) == ["vpt_deep, num_tokens 1", "vpt_deep, num_tokens 10", "vpt_deep, num_tokens 50"]
    assert [list(row.cells) for row in made] == [["cifar", "dtd"]] * 3
    assert made[0].why == "num_tokens 1 (others: 10, 50)"


def test_a_task_with_one_setting_joins_the_row_that_has_it():
    made = rows(runs(deep("cifar", 1), deep("cifar", 10), deep("dtd", 10)))
    assert {row.label: list(row.cells) for row in made} == {
        "vpt_deep, num_tokens 10": ["cifar", "dtd"],
        "vpt_deep, num_tokens 1": ["cifar"],
    }


def test_what_validation_chose_stands_in_the_row_of_the_other_tasks():
    finals = [deep("cifar", 1), deep("cifar", 10, score=0.6), deep("dtd", 50), deep("svhn", 100)]
    tried = [deep("cifar", 1, "tune", 0.8), deep("cifar", 10, "tune", 0.7)]
    made = rows(runs(*finals, *tried))
    assert {row.label: list(row.cells) for row in made} == {
        "vpt_deep": ["cifar", "dtd", "svhn"],
        "vpt_deep, num_tokens 10": ["cifar"],
    }
    assert made[0].cells["cifar"].scores == (0.5,)  # better on validation, worse on test
    assert made[0].why == (
        "num_tokens of each task (others: 10); "
        "runs of cifar differ in num_tokens: here stand those that validation chose"
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
    made = rows(runs(*finals, *tried))
    assert labels(made) == ["vpt_deep", "vpt_deep, num_tokens 1", "vpt_deep, num_tokens 10"]
    assert [list(row.cells) for row in made] == [["cifar", "dtd"]] * 3
    assert [run.result.method["num_tokens"] for run in made[0].runs] == [1, 10]


def test_a_choice_that_is_the_same_everywhere_needs_no_row_beside_its_setting():
    tried = [deep("cifar", 1, "tune", 0.8), deep("cifar", 10, "tune")]
    made = rows(runs(deep("cifar", 1), deep("cifar", 10), deep("dtd", 1), *tried))
    assert {row.label: list(row.cells) for row in made} == {
        "vpt_deep, num_tokens 1": ["cifar", "dtd"],
        "vpt_deep, num_tokens 10": ["cifar"],
    }


def test_where_nothing_chose_the_other_tasks_stay_together_and_say_what_they_lack():
    made = rows(runs(deep("cifar", 1), deep("cifar", 10), deep("dtd", 50), deep("svhn", 100)))
    assert {row.label: list(row.cells) for row in made} == {
        "vpt_deep": ["dtd", "svhn"],
        "vpt_deep, num_tokens 1": ["cifar"],
        "vpt_deep, num_tokens 10": ["cifar"],
    }
    assert made[0].why == (
        "num_tokens of each task (others: 1, 10); "
        "runs of cifar differ in num_tokens, and nothing chose: they have rows of their own"
    )


def test_a_grid_of_unpruned_runs_settles_the_pruned_ones():
    options = {"prune": True, "prune_tokens": [50], "initial": "a"}
    finals = [result("cifar", "e2vpt", s, options=options, recipe={"lr": lr}) for s, lr in ((0.5, 1.0), (0.6, 5.0))]
    plain = {"prune": False, "prune_tokens": None, "initial": None}
    tried = [
        result("cifar", "e2vpt", s, split="tune", options=plain, recipe={"lr": lr})
        for s, lr in ((0.8, 1.0), (0.7, 5.0))
    ]
    made = rows(runs(*finals, *tried, result("dtd", "e2vpt", options=options, recipe={"lr": 0.1})))
    assert made[0].cells["cifar"].scores == (0.5,)
    assert list(made[0].cells) == ["cifar", "dtd"]


def test_the_grid_of_another_protocol_settles_nothing():
    tried = [deep("cifar", 1, "tune", 0.8, precision="bf16-mixed"), deep("cifar", 10, "tune", precision="bf16-mixed")]
    made = rows(runs(deep("cifar", 1), deep("cifar", 10), deep("dtd", 50), *tried))
    assert [list(row.cells) for row in made] == [["dtd"], ["cifar"], ["cifar"]]


def test_only_final_runs_have_cells():
    assert rows(runs(result(split="tune"))) == []


def test_a_run_that_was_not_scored_is_in_no_row_and_said():
    found = runs(result(score=0.5), result(seed=44, status="unscored", metrics={"train/acc": 1.0}))
    assert [row.cells["cifar"].scores for row in rows(found)] == [(0.5,)]
    assert [(one.folder, one.why) for one in diverged(found)] == [
        (Path("run1"), "trained without test images (data.test=none): it has no test score, and its seed is in no mean")
    ]


def test_a_diverged_seed_is_in_no_mean_and_said():
    found = runs(result(score=0.5), result(seed=44, status="diverged", diverged_step=7))
    assert rows(found)[0].cells["cifar"].scores == (0.5,)
    assert [(one.folder, one.why) for one in diverged(found)] == [
        (Path("run1"), "diverged at step 7: it has no test score, and its seed is in no mean")
    ]


# grids


def test_a_grid_counts_its_points_and_its_choice_is_the_protocols():
    points = [(0.8, 1.0, 0.001), (0.8, 0.5, 0.0), (0.8, 0.5, 0.001), (0.7, 0.1, 0.0)]
    records = [result(split="tune", score=s, recipe={"lr": lr, "weight_decay": decay}) for s, lr, decay in points] + [
        result(split="tune", status="diverged", diverged_step=3, recipe={"lr": 50.0})
    ]
    (grid,) = grids(runs(*records, result()))
    assert (grid.label, grid.task, len(grid.runs), grid.diverged, grid.pruning) == ("linear", "cifar", 5, 1, False)
    assert grid.choice == "lr 0.5, weight_decay 0.001"
    assert grid.chosen.result.score == 0.8


def test_what_the_rule_leaves_tied_goes_to_the_smaller_value():
    points = [result(method="vfpt", score=0.8, split="tune", options={"fourier_share": s}) for s in (0.7, 0.3, 0.5)]
    (grid,) = grids(runs(*points))
    assert grid.choice == "fourier_share 0.3"


def ranks(score, *of, split="tune"):
    return [result(method="vpt_low_rank", score=score, split=split, options={"rank": rank}) for rank in of]


def test_a_tie_goes_to_the_point_that_was_taken_whatever_its_score_on_the_test_set():
    (grid,) = grids(runs(*ranks(0.8, 8, 4), *ranks(0.1, 8, split="final")))
    assert (grid.choice, grid.used) == ("rank 8", ("rank 8",))
    (grid,) = grids(runs(*ranks(0.8, 8, 4), *ranks(0.9, 8, 4, split="final")))
    assert grid.choice == "rank 4"


def test_seeds_of_a_point_are_one_point_that_is_judged_by_its_mean():
    scores = {(1.0, 42): 0.7, (1.0, 44): 0.72, (5.0, 42): 0.9, (5.0, 44): 0.4}
    tried = [result(split="tune", score=s, seed=seed, recipe={"lr": lr}) for (lr, seed), s in scores.items()]
    (grid,) = grids(runs(*tried))
    assert (len(grid.runs), len(grid.points), grid.choice) == (4, 2, "lr 1.0")
    assert grid.score == pytest.approx(0.71)
    lost = result(split="tune", seed=45, recipe={"lr": 1.0}, status="diverged", diverged_step=3)
    (grid,) = grids(runs(*tried, lost))
    assert (grid.diverged, grid.choice, grid.score) == (1, "lr 5.0", pytest.approx(0.65))


def test_final_runs_that_took_something_else_are_said_to():
    tried = [deep("cifar", length, "tune", score) for length, score in ((1, 0.8), (10, 0.7))]
    (alone,) = grids(runs(*tried, deep("cifar", 1, precision="bf16-mixed")))
    (as_chosen,) = grids(runs(*tried, deep("cifar", 1), deep("cifar", 1, seed=44)))
    (other,) = grids(runs(*tried, deep("cifar", 10), deep("cifar", 50)))
    assert (alone.choice, alone.used) == ("num_tokens 1", ())
    assert (as_chosen.choice, as_chosen.used) == ("num_tokens 1", ("num_tokens 1",))
    assert (other.choice, other.used) == ("num_tokens 1", ("num_tokens 10", "num_tokens 50"))


def test_a_grid_in_which_all_diverged_chose_nothing():
    (grid,) = grids(runs(result(split="tune", status="diverged")))
    assert (grid.chosen, grid.choice) == (None, "")


def test_a_chains_prune_grid_is_one_of_its_own_for_each_seed():
    def link(seed, kept, score, mask):
        options = {"prune": True, "initial": "a", "token_mask": mask}
        tuned = {"kept_tokens": kept, "parameters": 100 * kept}
        return result("cifar", "e2vpt", score, split="tune", seed=seed, options=options, tuned=tuned)

    plain = result("cifar", "e2vpt", 0.6, split="tune", options={"prune": False, "initial": None})
    links = [link(42, 4, 0.7, None), link(42, 2, 0.7, [0, 1]), link(44, 1, 0.5, [1, 0])]
    final = replace(link(42, 2, 0.7, [0, 1]), split="final", metrics={"test/acc": 0.6})
    made = grids(runs(*links, plain, final))
    assert [(grid.label, len(grid.runs), grid.pruning) for grid in made] == [
        ("e2vpt, pruning none", 1, False),
        ("e2vpt, pruning of seed 42", 2, True),
        ("e2vpt, pruning of seed 44", 1, True),
    ]
    assert [grid.choice for grid in made] == ["", "2 tokens, 200 parameters", "1 tokens, 100 parameters"]
    assert [grid.used for grid in made] == [("",), ("2 tokens, 200 parameters",), ()]


def test_chains_with_other_settings_have_prune_grids_of_their_own():
    def link(split, lr, length, kept, score):
        options = {"prune": True, "initial": "a", "num_tokens": length, "token_mask": [kept]}
        tuned = {"kept_tokens": kept, "parameters": 100 * kept}
        return result("cifar", "e2vpt", score, split=split, options=options, tuned=tuned, recipe={"lr": lr})

    tried = [link("tune", lr, n, kept, s) for lr, n, kept, s in ((1, 10, 9, 0.7), (1, 10, 2, 0.8), (5, 50, 40, 0.9))]
    made = grids(runs(*tried, link("final", 1, 10, 2, 0.5)))
    assert [(grid.label, len(grid.runs), grid.choice, grid.used) for grid in made] == [
        ("e2vpt, num_tokens 10", 2, "2 tokens, 200 parameters", ("2 tokens, 200 parameters",)),
        ("e2vpt, num_tokens 50", 1, "40 tokens, 4,000 parameters", ()),
    ]


def test_all_prunings_of_a_seed_are_points_and_its_final_run_is_one(tmp_path):
    for i, mask in enumerate(([0, 1], [1, 0])):
        options = {"prune": True, "initial": "a", "token_mask": mask}
        tuned = {"kept_tokens": 1}
        write(tmp_path, result("cifar", "e2vpt", split="tune", options=options, tuned=tuned), f"00000000000{i}")
    assert len(survey([tmp_path]).runs) == 2


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


def test_what_a_run_records_is_json(tmp_path):
    """The records of these tests are read back as they were written, as those of runs are."""
    folder = write(tmp_path, result())
    assert json.loads((folder / "result.json").read_text())["task"] == "cifar"
    assert read_runs([tmp_path])[0].settings["data.preprocessing.mean"] == "[0.485, 0.456, 0.406]"
