"""result.json: what is whole, what may be averaged, and how it is shown."""

import json
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given

from helpers.damage import bounded, damages, outcome, rewrite, spoil
from helpers.tiny import RECORD
from visprompt.errors import UserError
from visprompt.files import DamagedRecord
from visprompt.models.tuned_state import TunedState, load_state, save_state
from visprompt.runs.result import (
    Cell,
    Result,
    cell,
    choose,
    load_result,
    markdown_table,
    open_result,
    open_state,
    read_result,
    write_result,
)

RECIPE = {"lr": 0.1, "weight_decay": 0.0}


def make(**changes):
    values = {
        "status": "finished",
        "task": "digits",
        "method": {"name": "vpt_deep", "num_tokens": 4},
        "recipe": {"lr": 0.1},
        "split": "final",
        "seed": 1,
        "attempt": 0,
        "precision": "32-true",
        "data": {"source": "scikit-learn"},
        "backbone": {"name": "tiny"},
        "metrics": {"train/loss": 0.5, "test/acc": 0.75},
        "per_class": {"0": 0.5, "1": None},
        "tuned": {"bytes": 3},
        "time": {"train_s": 1.0},
        "peak_memory": {"bytes": 1, "of": "process, this run"},
        "machine": {"devices": 1},
        "versions": {"git_commit": None},
    }
    return Result(**values | changes)


def test_where_own_images_were_does_not_keep_runs_apart():
    data = [{"source": "folder", "summary": {"root": f"/machine{seed}"}} for seed in (1, 2)]
    assert cell([make(seed=seed, data=data[seed - 1]) for seed in (1, 2)]) == Cell((0.75, 0.75))
    with pytest.raises(UserError, match="differ in more than the seed"):
        cell([make(seed=1, data=data[0]), make(seed=2, data=data[1] | {"source": "csv"})])


def test_stacked_runs_are_not_averaged_with_single_ones():
    stacked = {"devices": 1, "stacked": 2}
    assert cell([make(seed=1, machine=stacked), make(seed=2, machine=stacked | {"stacked": 1})]).mean == 0.75
    with pytest.raises(
        UserError,
        match=r"^runs that were trained in a stack are not averaged with single ones: run the stacked ones "
        r"\(seed 2\) singly, each with src/train\.py and rerun=true$",
    ):
        cell([make(seed=1), make(seed=2, machine=stacked)])
    # a grid may hold both
    points = [make(split="tune", metrics={"val/acc": score}, recipe=RECIPE) for score in (0.5, 0.7)]
    points[1] = points[1].model_copy(update={"machine": stacked})
    assert choose(points, ["single", "stacked"]) == "stacked"


def test_what_is_written_is_read_back(tmp_path):
    (tmp_path / "tuned.safetensors").write_bytes(b"abc")
    write_result(tmp_path, make(tags=("a", "b")))
    assert read_result(tmp_path) == make(tags=("a", "b"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder, stored: (folder / "tuned.safetensors").unlink(),
        lambda folder, stored: (folder / "tuned.safetensors").write_bytes(b"ab"),
        lambda folder, stored: (folder / "result.json").write_text(json.dumps(stored)[:-9]),
        lambda folder, stored: rewrite(folder / "result.json", schema=2),
        lambda folder, stored: rewrite(folder / "result.json", more=1),
        lambda folder, stored: rewrite(folder / "result.json", status="nearly"),
        lambda folder, stored: rewrite(folder / "result.json", attempt="0"),
        lambda folder, stored: rewrite(folder / "result.json", seed=True),
        lambda folder, stored: (folder / "result.json").write_text(json.dumps(stored | {"seed": 2})),
        lambda folder, stored: (folder / "result.json").write_bytes(b"\xff"),
        lambda folder, stored: (folder / "result.json").write_text("[" * 100_000),
        lambda folder, stored: (folder / "result.json").write_text("[]"),
    ],
)
def test_what_is_not_whole_is_no_result(tmp_path, spoil):
    (tmp_path / "tuned.safetensors").write_bytes(b"abc")
    write_result(tmp_path, make())
    spoil(tmp_path, json.loads((tmp_path / "result.json").read_text()))
    assert read_result(tmp_path) is None


def test_a_record_of_an_older_version_has_no_trainer_files_or_digest(tmp_path):
    (tmp_path / "tuned.safetensors").write_bytes(b"abc")
    write_result(tmp_path, make(trainer={"gradient_clip_val": 1.0}))
    assert read_result(tmp_path) == make(trainer={"gradient_clip_val": 1.0})
    stored = json.loads((tmp_path / "result.json").read_text())
    for name in ("trainer", "files", "digest"):
        del stored[name]
    (tmp_path / "result.json").write_text(json.dumps(stored))
    assert read_result(tmp_path) == make(trainer={})


WHY = {
    "cut": (
        lambda folder: os.truncate(folder / "result.json", 100),
        "result.json is damaged: it is cut off or not JSON",
    ),
    "no object": (
        lambda folder: (folder / "result.json").write_text("[]"),
        "result.json is damaged: it is not a JSON object",
    ),
    "changed": (
        lambda folder: edit(folder / "result.json", b"0.75", b"0.95"),
        "result.json is damaged: it does not match its digest",
    ),
    "not finite": (
        lambda folder: edit(folder / "result.json", b"0.75", b"1e999"),
        "result.json is damaged: it holds a number that is not finite",
    ),
    "NaN": (
        lambda folder: edit(folder / "result.json", b"0.75", b"NaN"),
        "result.json is damaged: it holds a number that is not finite",
    ),
    "newer": (
        lambda folder: rewrite(folder / "result.json", schema=2),
        "result.json is damaged or of another version of visprompt",
    ),
    "kind": (
        lambda folder: rewrite(folder / "result.json", seed=1.5),
        "result.json is damaged: its seed is 1.5",
    ),
    "no state": (
        lambda folder: (folder / "tuned.safetensors").unlink(),
        "tuned.safetensors is missing, but result.json names it",
    ),
    "cut state": (
        lambda folder: os.truncate(folder / "tuned.safetensors", 100),
        "tuned.safetensors is not the state that result.json recorded: its size differs",
    ),
    "other state": (
        lambda folder: save_state(folder / "tuned.safetensors", state(2.0)),
        "tuned.safetensors is not the state that result.json recorded: it is another run's or attempt's",
    ),
    "flipped state": (
        lambda folder: edit(folder / "tuned.safetensors", b"\0\0\x80\x3f", b"\0\0\x80\x3e"),
        "tuned.safetensors is damaged: its checksum differs",
    ),
}


def state(value):
    """A tuned state whose size does not depend on its value."""
    return TunedState(tensors={"head": torch.full((2,), value)}, **RECORD)


def edit(path, old, new):
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def finished(folder):
    """A folder with a state and the result that recorded it."""
    checksum = save_state(folder / "tuned.safetensors", state(1.0))
    result = make(tuned={"bytes": (folder / "tuned.safetensors").stat().st_size, "sha256": checksum})
    write_result(folder, result)
    return result


@pytest.mark.parametrize("case", WHY)
def test_damage_is_named_and_never_a_result(tmp_path, case):
    assert load_result(tmp_path) is None, "there is none yet"
    result = finished(tmp_path)
    assert load_result(tmp_path) == result
    spoil, sentence = WHY[case]
    spoil(tmp_path)
    with pytest.raises(DamagedRecord) as error:
        load_result(tmp_path)
    assert str(error.value) == f"{tmp_path}/{sentence}"
    assert read_result(tmp_path) is None
    if case == "flipped state":  # a report reads the header of the state alone
        assert read_result(tmp_path, hashed=False) == result
        with pytest.raises(
            UserError, match=r"tuned.safetensors is damaged: its checksum differs; copy it again"
        ):
            open_state(tmp_path)
        return
    assert read_result(tmp_path, hashed=False) is None
    for call in (open_result, open_state):
        with pytest.raises(UserError) as error:
            call(tmp_path)
        assert str(error.value) == (
            f"{tmp_path}/{sentence}; copy the run's whole folder again, or run its command again"
        )


def test_a_state_by_itself_needs_no_result(tmp_path):
    finished(tmp_path)
    (tmp_path / "result.json").unlink()
    assert open_state(tmp_path).class_names == RECORD["class_names"]
    with pytest.raises(
        UserError, match=r"holds no finished run: give the folder that was printed below its table$"
    ):
        open_result(tmp_path)


@bounded
@given(damage=damages())
def test_a_flipped_bit_or_a_cut_is_never_another_result(tmp_path, damage):
    result = finished(tmp_path)
    path = tmp_path / "result.json"
    spoil(path, damage, path.read_bytes())
    found, sentence = outcome(load_result, tmp_path)
    assert sentence.startswith(str(path)) or found == result


@bounded
@given(damage=damages())
def test_a_flipped_bit_or_a_cut_is_never_another_tuned_state(tmp_path, damage):
    result = finished(tmp_path)
    path = tmp_path / "tuned.safetensors"
    expected = load_state(path)
    spoil(path, damage, path.read_bytes())
    found, sentence = outcome(load_result, tmp_path)
    assert sentence.startswith(str(path)) or found == result
    found, sentence = outcome(open_state, tmp_path)
    same = found is not None and torch.equal(found.tensors["head"], expected.tensors["head"])
    assert sentence.startswith(str(path)) or (
        same and replace(found, tensors={}) == replace(expected, tensors={})
    )


def test_what_json_has_no_word_for_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_result(tmp_path, make(metrics={"test/acc": 0.5, "val/loss": float("nan")}))
    assert not list(tmp_path.iterdir())


def test_a_diverged_run_is_a_result_without_a_state(tmp_path):
    write_result(tmp_path, make(status="diverged", diverged_step=7, metrics={}))
    found = read_result(tmp_path)
    assert found is not None
    assert (found.diverged_step, found.score) == (7, float("-inf"))


def test_a_run_is_judged_by_the_figure_of_its_split():
    metrics = {"val/acc": 0.25, "test/acc": 0.75}
    assert make(metrics=metrics).score == 0.75
    assert make(metrics=metrics, split="tune").score == 0.25


def point(score, lr, decay, length):
    """A run of a grid whose test score, if it were read, would turn the choice round."""
    recipe, method = {"lr": lr, "weight_decay": decay}, {"name": "vpt_deep", "num_tokens": length}
    return make(split="tune", recipe=recipe, method=method, metrics={"val/acc": score, "test/acc": 1 - score})


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ([(0.5, 1, 0.1, 5), (0.6, 9, 0.0, 50)], 1),  # the best on validation
        ([(0.5, 2, 0.1, 5), (0.5, 1, 0.0, 50)], 1),  # then the smallest learning rate
        ([(0.5, 1, 0.0, 5), (0.5, 1, 0.1, 50)], 1),  # then the largest weight decay
        ([(0.5, 1, 0.1, 50), (0.5, 1, 0.1, 5)], 1),  # then the shortest prompt
        ([(0.5, 1, 0.1, 5), (0.5, 1, 0.1, 5)], 0),  # then the first
    ],
)
def test_ties_on_validation_have_one_answer(found, chosen):
    points = [{"index": i} for i in range(len(found))]
    assert choose([point(*one) for one in found], points) is points[chosen]


def test_a_diverged_or_failed_point_is_never_chosen():
    diverged = make(split="tune", status="diverged", metrics={})
    worst = point(0.0, 1, 0.1, 5)
    assert choose([diverged, None, worst], "abc") == "c"
    assert choose([diverged, None], "ab") is None


def test_a_score_of_a_final_run_cannot_decide():
    with pytest.raises(UserError, match="split=final is among those to choose from"):
        choose([make()], [{}])


def test_a_cell_is_mean_and_sample_deviation():
    found = cell([make(seed=s, metrics={"test/acc": a}) for s, a in ((1, 0.7), (2, 0.8), (3, 0.9))])
    assert (found.mean, found.std) == (pytest.approx(0.8), pytest.approx(0.1))
    assert str(found) == "80.0 ± 10.0"
    assert str(Cell((0.5,))) == "50.0", "one seed has no spread"


@pytest.mark.parametrize(
    "other",
    [
        {"recipe": {"lr": 0.2}},
        {"data": {"source": "folder"}},
        {"precision": "bf16-mixed"},
        {"method": {"name": "vpt_deep", "num_tokens": 5}},
        {"backbone": {"name": "other"}},
        {"task": "digits_loc"},
        {"trainer": {"gradient_clip_val": 1.0}},
        {"status": "diverged", "metrics": {}},
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_never_averaged(other):
    with pytest.raises(UserError, match="cannot be averaged: leave them out"):
        cell([make(), make(seed=2, **other)])


def test_a_seed_counts_once():
    with pytest.raises(
        UserError, match="two runs with the same seed cannot be averaged: leave one of them out"
    ):
        cell([make(), make(metrics={"test/acc": 0.5})])


def test_weights_from_scratch_are_the_seed_s_own_and_loaded_ones_are_not():
    def both(pretrained):
        backbones = ({"name": "tiny", "pretrained": pretrained, "sha256": digest} for digest in "ab")
        return [make(seed=seed, backbone=backbone) for seed, backbone in enumerate(backbones)]

    assert cell(both(False)).scores == (0.75, 0.75)
    with pytest.raises(UserError, match="cannot be averaged: leave them out"):
        cell(both(True))


def test_validation_scores_are_never_tabulated():
    with pytest.raises(UserError, match="have no test score"):
        cell([make(split="tune", metrics={"val/acc": 0.5})])


def test_a_markdown_table():
    assert markdown_table(["a", "b"], [["x", "1"]]) == "| a | b |\n| :-- | --: |\n| x | 1 |\n"
