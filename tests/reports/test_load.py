"""What is found below a folder: each finished run once, and why any other folder takes no part."""

import json
import os
from pathlib import Path

import pytest

from helpers.written_runs import result, write
from visprompt.errors import UserError
from visprompt.reports.load import LeftOut, read_runs, survey


def test_runs_are_found_at_any_depth_below_several_folders(tmp_path):
    first = write(tmp_path / "a", result(seed=42))
    second = write(tmp_path / "b" / "deep", result(seed=44))
    found = survey([tmp_path / "b", tmp_path / "a"])
    assert list(found.runs.folder) == [second, first]
    assert found.runs.result[1] == result(seed=42)
    assert found.left_out == ()
    assert list(read_runs([first]).folder) == [first]  # a run's own folder will do


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
    assert list(found.runs.folder) == [first]
    assert [(one.folder, one.why) for one in found.left_out] == [
        (copy, f"the same run as {first}, counted there")
    ]


def test_two_runs_that_only_their_scores_tell_apart_are_both_left_out(tmp_path):
    """Something that result.json does not record decided: an arbitrary one of them would be in the mean."""
    one = write(tmp_path, result(score=0.5), "000000000001")
    other = write(tmp_path, result(score=0.6), "000000000002")
    found = survey([tmp_path])
    assert found.runs.empty
    assert [one.folder for one in found.left_out] == [one, other]
    assert (
        found.left_out[0].why
        == f"recorded exactly as {other}, but its scores differ: keep the one that is meant"
    )


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
    assert found.runs.empty
    said = {one.folder: one.why for one in found.left_out}
    damaged = (
        "damaged, or of another version of visprompt: result.json or the tuned state is incomplete; "
        "run the same command again"
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
    assert (len(found.runs), [one.folder for one in found.left_out]) == (0, [folder])


def test_a_debug_run_is_no_result(tmp_path):
    folder = write(tmp_path, result(tags=("mine", "debug")))
    found = survey([tmp_path])
    assert (len(found.runs), found.left_out) == (0, (LeftOut(folder, "a debug run, which is no result"),))


def test_of_several_attempts_at_a_run_the_last_is_counted_wherever_it_lies(tmp_path):
    old = write(tmp_path / "a", result(score=0.5), "0" * 12)
    new = write(tmp_path / "b", result(score=0.6, attempt=1), "0" * 12)
    elsewhere = write(tmp_path / "c", result(score=0.7, attempt=1), "0" * 12)
    found = survey([tmp_path])
    assert list(found.runs.folder) == [new]
    counted = f"the same run as {new}, counted there"
    assert {one.folder: one.why for one in found.left_out} == {
        old: f"{counted} (attempt 1; here is attempt 0), though its scores differ",
        elsewhere: f"{counted}, though its scores differ",
    }


def test_what_belongs_to_chains_and_hydra_is_no_run(tmp_path):
    chain = tmp_path / "cifar" / "e2vpt" / "0123456789ab"
    for folder in (
        chain,
        tmp_path / "cifar" / "e2vpt" / "initial",
        tmp_path / "hydra" / "2026-11-21" / ".hydra",
    ):
        folder.mkdir(parents=True)
    for file in ("lock", "initial.json", "importance.json", "masks.json"):
        (chain / file).touch()
    (tmp_path / "cifar" / "e2vpt" / "initial" / "0123.safetensors").touch()
    (tmp_path / "hydra" / "2026-11-21" / ".hydra" / "config.yaml").touch()
    found = survey([tmp_path])
    assert (len(found.runs), found.left_out) == (0, ())


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
    with pytest.raises(
        UserError, match="there is no folder nowhere to read runs from: name one that holds runs"
    ):
        read_runs([Path("nowhere")])


def test_all_prunings_of_a_seed_are_points_and_its_final_run_is_one(tmp_path):
    for i, mask in enumerate(([0, 1], [1, 0])):
        options = {"prune": True, "initial": "a", "token_mask": mask}
        tuned = {"kept_tokens": 1}
        write(
            tmp_path, result("cifar", "e2vpt", split="tune", options=options, tuned=tuned), f"00000000000{i}"
        )
    assert len(survey([tmp_path]).runs) == 2


def test_what_a_run_records_is_json(tmp_path):
    """The records of these tests are read back as they were written, as those of runs are."""
    folder = write(tmp_path, result())
    assert json.loads((folder / "result.json").read_text())["task"] == "cifar"
    assert read_runs([tmp_path])["data.preprocessing.mean"][0] == "[0.485, 0.456, 0.406]"
