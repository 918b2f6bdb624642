"""Runs of a grid that are trained together: equal to single ones, each with its own folder, whole or not at all."""

import csv
import json
import logging
import signal
import subprocess
import time
from contextlib import ExitStack

import pytest
from filelock import FileLock

from helpers.cli import command, composed, content, equal, frozen, tensors, tiny, tiny_job
from helpers.leases import holder
from helpers.miniatures import write_folder
from visprompt.errors import UserError
from visprompt.models.stacked import StackedTraining
from visprompt.models.tuned_state import load_state
from visprompt.runs import run, run_all, stack, stack_training
from visprompt.runs.engine import local
from visprompt.runs.result import cell, is_stacked, read_result
from visprompt.runs.run_lock import is_free
from visprompt.runs.signals import sentence

pytestmark = frozen
GRID = [{"recipe.lr": lr, "recipe.weight_decay": decay} for lr in (0.1, 0.5) for decay in (0.0, 0.01)]
SHORT = ("recipe.epochs=2", "data.fraction=0.3")


def jobs(logs, method="linear", points=GRID, *words):
    job = tiny_job(logs, f"method={method}", "split=tune", *SHORT, *words)
    return [job.vary(point) for point in points]


def finals(logs, seeds, method="linear", *words):
    return jobs(logs, method, [{"split": "final", "seed": seed} for seed in seeds], *words)


def curve(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def same(ours, theirs):
    """Compare two outcomes of a job, of which the first was stacked, and all their files."""
    one, other = ours.result, theirs.result
    assert is_stacked(one)
    assert not is_stacked(other)
    measured = {"time", "peak_memory", "machine", "versions"}
    assert one.model_dump(exclude=measured) == other.model_dump(exclude=measured)
    machine = dict(one.machine)
    assert machine.pop("stacked") > 0
    assert machine == other.machine
    assert one.time.keys() == other.time.keys()
    assert ours.folder.name == theirs.folder.name  # the same identity
    mine, its = content(ours.folder), content(theirs.folder)
    assert mine.keys() == its.keys()
    differ = {name for name in mine if mine[name] != its[name]}
    assert differ <= {"result.json", "config.yaml"}, (
        "learning curve, tables and tuned state are equal to the byte"
    )
    assert run.Job.from_yaml((ours.folder / "config.yaml").read_text()).recipe.record() == one.recipe


@pytest.mark.parametrize("method", ["linear", "mlp"])
def test_stacked_runs_leave_the_files_of_single_ones(tmp_path, method, capsys):
    together = run_all.run_all(jobs(tmp_path / "a", method, GRID[::3]), stacks=True)
    assert capsys.readouterr().out.count(f"digits/{method}: 2 points are trained together") == 1
    assert {outcome.result.machine["stacked"] for outcome in together} == {2}
    for ours, theirs in zip(together, run_all.run_all(jobs(tmp_path / "b", method, GRID[::3])), strict=True):
        same(ours, theirs)


def test_final_runs_of_several_seeds_have_their_own_order_and_initial_values(tmp_path):
    words = ("recipe.head_init=vpt", "recipe.class_weights=balanced", "+trainer.gradient_clip_val=100.0")
    together = run_all.run_all(finals(tmp_path / "a", [1, 2], "mlp", *words), stacks=True)
    for ours, theirs in zip(
        together, run_all.run_all(finals(tmp_path / "b", [1, 2], "mlp", *words)), strict=True
    ):
        one, other = ours.result, theirs.result
        assert one.metrics.keys() == other.metrics.keys()
        assert one.metrics["test/count"] == 797
        assert abs(one.score - other.score) <= 1 / 797
        assert float(curve(ours.folder)[0]["train/loss"]) == pytest.approx(
            float(curve(theirs.folder)[0]["train/loss"]), rel=1e-5
        )
    assert len({json.dumps(outcome.result.metrics) for outcome in together}) == 2


def test_tuned_blocks_are_stacked_where_a_run_does_not_fill_the_device(tmp_path, monkeypatch):
    """On a CPU they are not; here it counts as a GPU."""
    points = [{"recipe.lr": lr} for lr in (0.02, 0.1)]
    single = run_all.run_all(jobs(tmp_path / "b", "partial", points), stacks=True)
    assert not any(is_stacked(outcome.result) for outcome in single)
    monkeypatch.setattr(stack, "has_own_memory", lambda device: True)
    together = run_all.run_all(jobs(tmp_path / "a", "partial", points), stacks=True)
    for ours, theirs in zip(together, single, strict=True):
        assert is_stacked(ours.result)
        assert ours.result.metrics.keys() == theirs.result.metrics.keys()
        assert abs(ours.result.score - theirs.result.score) <= 1 / 200
        assert tensors(ours.folder).keys() == tensors(theirs.folder).keys()


def test_own_images_of_several_classes_have_their_curve_and_temperature(tmp_path):
    """Validation images that a final run leaves out give a curve and a temperature, test images the score."""
    root = write_folder(tmp_path / "pets", ("cat", "dog"), 9, splits=("train", "val", "test"))
    paths = sorted(path.relative_to(root) for path in root.rglob("*.png"))
    with (root / "labels.csv").open("w", newline="") as file:
        labels = ("cat", "dog", "cat;dog", "")
        rows = [(path, labels[place % 4], path.parts[0]) for place, path in enumerate(paths)]
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    words = ("data=folder", f"data.root={root}", "data.csv=labels.csv", "data.kind=multi_label")
    words += ("data.crop=false", "data.flip=0.0", f"paths.data_dir={tmp_path}/data", "recipe.batch_size=8")

    def pair(logs, *more):
        job = tiny_job(logs, "method=linear", "recipe.epochs=2", *words, *more)
        return [job.vary({"recipe.lr": lr}) for lr in (0.1, 0.5)]

    together = run_all.run_all(pair(tmp_path / "a"), stacks=True)
    for ours, theirs in zip(together, run_all.run_all(pair(tmp_path / "b")), strict=True):
        # products of fewer than 400 multiplications are summed in another order
        assert ours.result.metrics == pytest.approx(theirs.result.metrics, rel=1e-5)
        states = [load_state(outcome.folder) for outcome in (ours, theirs)]
        assert states[0].temperature == pytest.approx(states[1].temperature, rel=1e-3)
        assert states[0].temperature is not None
        assert content(ours.folder).keys() == content(theirs.folder).keys()
        for one, other in zip(curve(ours.folder), curve(theirs.folder), strict=True):
            figures = [{name: float(value) for name, value in row.items()} for row in (one, other)]
            assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    assert together[0].result.score_name == "test/map"
    assert "val/map" in curve(together[0].folder)[1]
    cropped = run_all.run_all(pair(tmp_path / "c", "data.crop=true"), stacks=True)
    assert not any(is_stacked(outcome.result) for outcome in cropped)


def test_a_point_that_diverges_is_recorded_as_a_single_run_records_it(tmp_path):
    points = [{"recipe.lr": lr} for lr in (0.5, 1e38)]
    words = ("recipe.optimizer=sgd",)
    together = run_all.run_all(jobs(tmp_path / "a", "linear", points, *words), stacks=True)
    single = run_all.run_all(jobs(tmp_path / "b", "linear", points, *words))
    for ours, theirs in zip(together, single, strict=True):
        same(ours, theirs)
    assert together[1].result.status == "diverged"
    assert together[1].reason == single[1].reason
    assert not (together[1].folder / "tuned.safetensors").exists()
    assert not (together[1].folder / "metrics.csv").exists()


def test_in_bf16_the_scores_are_those_of_single_runs(tmp_path):
    words = ("precision=bf16-mixed",)
    together = run_all.run_all(jobs(tmp_path / "a", "mlp", GRID[:2], *words), stacks=True)
    for ours, theirs in zip(
        together, run_all.run_all(jobs(tmp_path / "b", "mlp", GRID[:2], *words)), strict=True
    ):
        assert is_stacked(ours.result)
        assert abs(ours.result.score - theirs.result.score) <= 1 / 200


@pytest.fixture
def ran(monkeypatch):
    """How many points each stack had."""
    counts, original = [], stack_training.Stack._train

    def train(self, points, *given):
        counts.append(len(points))
        return original(self, points, *given)

    monkeypatch.setattr(stack_training.Stack, "_train", train)
    return counts


def test_what_is_finished_is_not_trained_again(tmp_path, ran):
    run_all.run_all(jobs(tmp_path, points=GRID[:1]), stacks=True)
    assert ran == []  # a single job is no stack
    before = content(tmp_path)
    outcomes = run_all.run_all([*jobs(tmp_path), *jobs(tmp_path, points=GRID[1:2])], stacks=True)
    assert ran == [3]  # the same job twice is one run
    assert [is_stacked(outcome.result) for outcome in outcomes] == [False, True, True, True, True]
    after = content(tmp_path)
    assert before.items() <= after.items()
    assert run_all.run_all(jobs(tmp_path), stacks=True)[1].result == outcomes[1].result
    assert ran == [3]
    assert content(tmp_path) == after


def test_rerun_trains_all_again(tmp_path, ran):
    run_all.run_all(jobs(tmp_path, points=GRID[:2]), stacks=True)
    again = run_all.run_all(
        [job.vary({"rerun": True}) for job in jobs(tmp_path, points=GRID[:2])], stacks=True
    )
    assert ran == [2, 2]
    assert [outcome.result.attempt for outcome in again] == [1, 1]


@pytest.mark.parametrize("first", ["single", "stacked"])
def test_all_seeds_of_a_final_run_are_stacked_or_none(tmp_path, ran, first):
    if first == "single":
        run_all.run_all(finals(tmp_path, [1]))
    else:
        run_all.run_all(finals(tmp_path, [1, 2]), stacks=True)
    outcomes = run_all.run_all(finals(tmp_path, [1, 2, 3]), stacks=True)
    assert {is_stacked(outcome.result) for outcome in outcomes} == {first == "stacked"}
    assert ran == ([] if first == "single" else [2, 1])
    assert outcomes[2].result.machine.get("stacked") == (None if first == "single" else 1)


def test_a_seed_that_cannot_be_stacked_is_refused_beside_stacked_ones(tmp_path, ran):
    run_all.run_all(finals(tmp_path, [1, 2]), stacks=True)
    watched = "trainer.check_val_every_n_epoch=2"
    third = finals(tmp_path, [3], "linear", watched)
    assert run_all.run_all(third, stacks=True)[0].reason == (
        "other seeds of digits/linear were trained together, and this command has settings with which that is "
        "not possible (docs/runs.md lists them: loggers other than csv, for example): leave them out, or run "
        "each seed singly with src/train.py and rerun=true"
    )
    finished = run_all.run_all(finals(tmp_path, [1, 2], "linear", watched), stacks=True)
    assert all(is_stacked(outcome.result) for outcome in finished), "they are shown"
    assert ran == [2]
    other = finals(
        tmp_path, [3], "linear", "trainer.check_val_every_n_epoch=2", "recipe.lr=0.3"
    )  # its seeds are not stacked
    assert not run_all.run_all(other, stacks=True)[0].reason


def test_a_run_that_was_begun_singly_goes_on_singly(tmp_path, ran, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run.attempt_files, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_all.run_all(jobs(tmp_path, points=GRID[:1]))
    outcomes = run_all.run_all(jobs(tmp_path), stacks=True)
    assert ran == [3]
    assert [is_stacked(outcome.result) for outcome in outcomes] == [False, True, True, True]


def interrupt(*given):
    raise KeyboardInterrupt


def test_a_killed_stack_leaves_whole_results_or_none_and_is_completed(tmp_path, ran, monkeypatch):
    finish, done = stack_training.attempt_files.finish, []

    def killed(hold, *given):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(hold.folder)
        return finish(hold, *given)

    with monkeypatch.context() as patch:
        patch.setattr(stack_training.attempt_files, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            run_all.run_all(finals(tmp_path, [1, 2, 3, 4]), stacks=True)
    folders = [path.parent for path in tmp_path.rglob("lock")]
    assert len(folders) == 4
    assert all(is_free(folder) for folder in folders)
    assert sorted(folder for folder in folders if read_result(folder)) == sorted(done)
    outcomes = run_all.run_all(finals(tmp_path, [1, 2, 3, 4]), stacks=True)
    assert ran == [4, 2]
    assert all(is_stacked(outcome.result) for outcome in outcomes)
    single = run_all.run_all(finals(tmp_path / "single", [4]))
    assert equal(tensors(outcomes[3].folder), tensors(single[0].folder))


def test_a_stack_that_is_interrupted_while_it_trains_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(StackedTraining, "epoch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_all.run_all(jobs(tmp_path), stacks=True)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"lease-1", "lock", "weights.safetensors"}


def test_a_point_of_a_grid_that_is_taken_is_left_out_and_waited_for(tmp_path, ran, monkeypatch):
    taken = run.prepare(jobs(tmp_path)[1]).folder
    taken.mkdir(parents=True)
    lock = FileLock(taken / "lock")
    lock.acquire()
    monkeypatch.setattr(local, "is_free", lambda folder, remote: lock.release() or is_free(folder))
    outcomes = run_all.run_all(jobs(tmp_path), stacks=True)
    assert ran == [3]
    assert [is_stacked(outcome.result) for outcome in outcomes] == [True, False, True, True]


def test_final_runs_wait_together_for_one_that_is_taken(tmp_path, ran, monkeypatch, capsys):
    """It may be trained singly, and then the others have to be too."""
    taken = run.prepare(finals(tmp_path, [2])[0]).folder
    taken.mkdir(parents=True)
    lock = FileLock(taken / "lock")
    lock.acquire()

    def other_ends(folder, remote):
        lock.release()
        run_all.run_all(finals(tmp_path, [2]))
        return is_free(folder)

    monkeypatch.setattr(local, "is_free", other_ends)
    outcomes = run_all.run_all(finals(tmp_path, [1, 2, 3]), stacks=True)
    assert capsys.readouterr().out.count("digits/linear: another process is working on it") == 1
    assert ran == []
    assert not any(is_stacked(outcome.result) for outcome in outcomes)


def test_final_runs_fail_together_where_nobody_waits(tmp_path, ran):
    taken = run.prepare(finals(tmp_path, [2])[0]).folder
    taken.mkdir(parents=True)
    with FileLock(taken / "lock"):
        outcomes = run_all.run_all(finals(tmp_path, [1, 2]), wait=False, stacks=True)
    assert ran == []
    assert [outcome.result for outcome in outcomes] == [None, None]
    assert {outcome.reason for outcome in outcomes} == {
        f"another process is working on this run in {taken}: wait for it, or end it"
    }


def test_a_stack_that_fails_is_run_one_after_the_other(tmp_path, monkeypatch, caplog):
    def fails(*given):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:98] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(StackedTraining, "epoch", fails)
    with caplog.at_level(logging.WARNING):
        outcomes = run_all.run_all(jobs(tmp_path, points=GRID[:2]), stacks=True)
    assert [is_stacked(outcome.result) for outcome in outcomes] == [False, False]
    assert (
        "digits/linear: no stack of its points, they run one after the other (RuntimeError: " in caplog.text
    )


def test_final_runs_of_a_stack_that_failed_when_some_were_finished_are_not_run_singly(tmp_path, monkeypatch):
    real, finished = stack_training.attempt_files.finish, []

    def fails(hold, *given):
        if finished:
            raise OSError("no space left")
        finished.append(hold)
        return real(hold, *given)

    monkeypatch.setattr(stack_training.attempt_files, "finish", fails)
    outcomes = run_all.run_all(finals(tmp_path, [1, 2, 3]), stacks=True)
    assert {outcome.reason for outcome in outcomes} == {
        "seeds of digits/linear were trained in a stack, which now fails for the others (OSError: no space "
        "left): run the same command again, or each seed singly with src/train.py and rerun=true"
    }
    monkeypatch.undo()
    again = run_all.run_all(finals(tmp_path, [1, 2, 3]), stacks=True)
    assert all(is_stacked(outcome.result) for outcome in again)


@pytest.mark.parametrize("why", ["no room in memory, or another device", "RuntimeError: a bug"])
def test_a_seed_is_not_run_singly_beside_stacked_ones(tmp_path, monkeypatch, why):
    def fails(self):
        if "room" in why:
            return {}
        raise RuntimeError("a bug")

    run_all.run_all(finals(tmp_path, [1, 2]), stacks=True)
    with monkeypatch.context() as patch:
        patch.setattr(stack_training.Stack, "train", fails)
        for seeds in ([1, 2, 3], [3]):
            outcome = run_all.run_all(finals(tmp_path, seeds), stacks=True)[-1]
            assert outcome.reason == (
                f"seeds of digits/linear were trained in a stack, which now fails for the others ({why}): run "
                "the same command again, or each seed singly with src/train.py and rerun=true"
            )
    assert is_stacked(run_all.run_all(finals(tmp_path, [3]), stacks=False)[0].result)


def test_stacked_seeds_can_be_made_again_singly(tmp_path):
    run_all.run_all(finals(tmp_path, [1, 2]), stacks=True)
    again = [job.vary({"rerun": True}) for job in finals(tmp_path, [1, 2])]
    outcomes = run_all.run_all(again, stacks=False)
    assert [is_stacked(outcome.result) for outcome in outcomes] == [False, False]
    assert len(cell(outcome.result for outcome in outcomes).scores) == 2


def test_points_whose_validation_images_have_no_room_are_run_singly(tmp_path, monkeypatch):
    real, kept = stack_training.keep, []
    monkeypatch.setattr(
        stack_training, "keep", lambda *given: kept.append(1) or (real(*given) if len(kept) == 1 else None)
    )
    outcomes = run_all.run_all(jobs(tmp_path, points=GRID[:2]), stacks=True)
    assert len(kept) == 2
    assert [outcome.result.status for outcome in outcomes] == ["finished", "finished"]
    assert not any(is_stacked(outcome.result) for outcome in outcomes)


def test_an_error_of_the_file_system_before_a_final_run_is_its_outcome(tmp_path, monkeypatch):
    def fails(job):
        raise PermissionError("not yours")

    monkeypatch.setattr(stack, "prepare", fails)
    (outcome,) = run_all.run_all(finals(tmp_path, [1]), stacks=True)
    assert (outcome.result, outcome.reason) == (None, "PermissionError: not yours")


def test_a_stack_takes_a_part_of_the_free_memory(tmp_path, ran, monkeypatch):
    free = stack_training.step_bytes

    def bytes_of(*given):
        step = free(*given)
        monkeypatch.setattr(stack_training, "free_on", lambda device: 4 * 2 * step)
        return step

    monkeypatch.setattr(stack_training, "step_bytes", bytes_of)
    together = run_all.run_all(jobs(tmp_path / "a", points=[*GRID, {"recipe.lr": 1.0}]), stacks=True)
    assert ran == [2, 2, 1]
    assert [outcome.result.machine["stacked"] for outcome in together] == [2, 2, 2, 2, 1]
    monkeypatch.setattr(stack_training, "step_bytes", lambda *given: 2**62)
    outcomes = run_all.run_all(jobs(tmp_path / "b", points=GRID[:2]), stacks=True)
    assert not any(is_stacked(outcome.result) for outcome in outcomes)


def test_what_may_not_be_stacked_is_a_group_of_its_own(tmp_path):
    def groups(*words, points=({"recipe.lr": 0.1}, {"recipe.lr": 0.2}), method="linear"):
        return stack.groups(jobs(tmp_path, method, points, *words))

    assert groups() == [[0, 1]]
    assert groups(points=[{"recipe.lr": 0.1}, {"recipe.epochs": 3}, {"recipe.weight_decay": 0.5}]) == [
        [0, 2],
        [1],
    ]
    assert groups(points=[{"seed": 1}, {"split": "final"}, {"seed": 2}]) == [[0, 2], [1]]
    decays = [{"recipe.weight_decay": decay} for decay in (0.0, 0.1, 0.2)]  # without decay, it is SGD
    assert groups("recipe.optimizer=vpt_adamw", points=decays) == [[0], [1, 2]]
    apart = [[0], [1]]
    assert groups(method="vpt_deep") == apart
    for word in (
        "recipe.mixup=0.2",
        "compile=true",
        "recipe.fused=true",
        "logger=tensorboard",
        "+data.augment=trivial",
        "precision=64-true",
        "diagnostics.best_on_test=true",
        "trainer.devices=2",
        "trainer.accumulate_grad_batches=2",
        "trainer.check_val_every_n_epoch=2",
        "+trainer.limit_train_batches=2",
        "+trainer.profiler=simple",
        "callbacks=[none,early_stopping]",
    ):
        assert groups(word) == apart, word


def tuned(logs, *words):
    given = tiny(
        logs, "callbacks=none", f"table={logs}/table.md", "seeds=[1,2]", "methods=[linear]", *SHORT, *words
    )
    with composed("tune", *given) as cfg:
        from visprompt.tuning import protocol

        return protocol.tune(cfg)


@pytest.mark.slow
def test_the_protocol_stacks_its_grid_and_its_seeds_unless_it_is_told_not_to(tmp_path, ran):
    score = tuned(tmp_path / "a")
    assert ran == [5, 2]
    assert tuned(tmp_path / "b", "engine.stack=off") == score
    assert ran == [5, 2]
    assert (tmp_path / "a" / "table.md").read_text() == (tmp_path / "b" / "table.md").read_text()
    # a seed more is trained as those before it
    tuned(tmp_path / "a", "engine.stack=off", "seeds=[1,2,3]")
    tuned(tmp_path / "a", "seeds=[4]")
    tuned(tmp_path / "b", "seeds=[3]")
    assert ran == [5, 2, 1, 1]
    assert tuned(tmp_path / "a", "seeds=[1,2,3]") == tuned(
        tmp_path / "b", "seeds=[1,2,3]", "engine.stack=off"
    )
    with pytest.raises(UserError, match=r"^engine\.stack=on does not fit: give auto or off$"):
        tuned(tmp_path / "a", "engine.stack=on")


def test_locks_are_released_if_the_stack_is_not_trained(tmp_path):
    with ExitStack() as locks:
        made = stack._open(stack._prepared(jobs(tmp_path)), locks)
        assert not any(is_free(point.run.folder) for point in made.points)
    assert all(is_free(point.run.folder) for point in made.points)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_signal_ends_a_stack_with_one_sentence_and_frees_its_folders(tmp_path):
    words = tiny(tmp_path, "callbacks=none", "methods=[linear]", "recipe.epochs=1000000", "data.fraction=0.3")
    words = [word for word in words if word != "seed=0"]  # that of a grid is fixed
    process = subprocess.Popen(command("tune", *words), stderr=subprocess.PIPE, text=True)
    while len(held := list(tmp_path.rglob("lease-1"))) < 5 and process.poll() is None:
        time.sleep(0.05)
    assert len(held) == 5
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error.splitlines()[-1]) == (143, sentence(signal.SIGTERM))
    assert all(is_free(path.parent) for path in held)
    assert not any(holder(path.parent) for path in held)
    assert not list(tmp_path.rglob("result.json"))
