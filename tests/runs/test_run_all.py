"""The loop over tasks: every run once, a failed one named, a finished one shown, and ranks where there are devices."""

import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from lightning.pytorch.strategies import SingleDeviceStrategy

from helpers.cli import composed, content, frozen, tiny, tiny_job
from helpers.leases import at_work
from visprompt.errors import UserError
from visprompt.models.backbones import build_backbone
from visprompt.models.scores import wilson
from visprompt.runs import rank, ranks, run, run_all, unit
from visprompt.runs.devices import local_devices
from visprompt.runs.engine import local
from visprompt.runs.job import Job, Trainer
from visprompt.runs.result import read_result

pytestmark = frozen
SHORT = (
    "+trainer.limit_train_batches=2",
    "+trainer.limit_test_batches=1",
    "recipe.epochs=2",
    "callbacks=none",
)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(unit.console, "_width", 300)


def train(logs, *arguments, **hydra):
    with composed(
        "train", *tiny(logs, *SHORT, *arguments, *(f"hydra.{k}={v}" for k, v in hydra.items()))
    ) as cfg:
        return run_all.train(cfg)


def figures(text):
    """The tables that were printed: title, and figure by name."""
    found = []
    for line in text.splitlines():
        if re.search(r"split=\w+, seed=\d+", line):
            found.append((line.strip(), {}))
        elif match := re.match(r"│ (\S.*?) +│ (.*?) +│$", line):
            found[-1][1][match[1]] = match[2]
    return found


@pytest.fixture(scope="module")
def demo(logs):
    """Trains a suite once, and what it built and returned."""
    built = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "build_backbone", lambda *given: built.append(given) or build_backbone(*given))
        run.load_backbone.cache_clear()
        return train(logs, "tasks=demo"), built


def test_a_suite_is_trained_in_one_call_with_one_backbone(logs, demo):
    score, built = demo
    results = [read_result(path.parent) for path in sorted(logs.rglob("result.json"))]
    assert [result.task for result in results] == ["digits", "digits_crowded", "digits_loc"]
    assert score == pytest.approx(sum(result.metrics["test/acc"] for result in results) / 3)
    assert len(built) == 1


def test_the_same_call_again_trains_nothing_and_shows_the_scores(logs, demo, monkeypatch, capsys):
    before = content(logs)
    monkeypatch.setattr(run, "_train", lambda *_: pytest.fail("a finished run was trained again"))
    assert train(logs, "tasks=demo") == demo[0]
    text = capsys.readouterr().out
    assert text.count("finished before, not run again: rerun=true runs it anew") == 3
    tables = figures(text)
    assert [title for title, _ in tables] == [
        f"{task}, vpt_deep, split=final, seed=0" for task in ("digits", "digits_crowded", "digits_loc")
    ]
    for (_, table), path in zip(tables, sorted(logs.rglob("result.json")), strict=True):
        result = read_result(path.parent)
        low, high = (f"{100 * end:.1f}" for end in wilson(result.score, int(result.metrics["test/count"])))
        assert table["test/acc"] == f"{100 * result.score:.2f} % (95 % interval {low} to {high})"
        assert table["test/balanced_acc"] == f"{100 * result.metrics['test/balanced_acc']:.2f} %"
        share, head = result.tuned["share"], result.tuned["head_parameters"]
        assert table["tuned parameters"] == f"192 ({100 * share:.2f} % of the backbone) + head {head:,}"
        assert table["tuned state"] == f"{result.tuned['bytes'] / 1000:,.1f} kB"
        assert table["training time"] == f"{result.time['train_s']:.1f} s"
        assert table["peak memory"].endswith(" MiB (process, this run)")
        assert f"\nfolder: {path.parent}\n" in text
    assert content(logs) == before


def test_a_skip_names_the_commit_where_it_differs(logs, demo, monkeypatch, capsys):
    monkeypatch.setattr(unit.environment, "git_commit", lambda: "0123456789ab")
    train(logs, "tasks=digits")
    commit = read_result(next(logs.glob("digits/*/*"))).versions["git_commit"]
    assert (
        f"finished before (by commit {commit}; this is 0123456789ab), not run again"
        in capsys.readouterr().out
    )


def test_a_skip_says_that_it_adds_no_diagnostic(logs, demo, capsys):
    train(logs, "tasks=digits", "diagnostics.best_on_test=true")
    said = "not run again: rerun=true runs it anew and adds what diagnostics.best_on_test=true asks for"
    assert said in capsys.readouterr().out


def test_ranks_that_somebody_else_started_decide_together_what_is_finished(logs, demo, monkeypatch):
    asked = []
    monkeypatch.setattr(unit, "run_job", lambda one: asked.append(one.job.task) or read_result(one.folder))
    train(logs, "tasks=digits")
    assert asked == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    train(logs, "tasks=digits", "trainer=ddp_sim")
    assert asked == ["digits"]


def test_no_sweeper_chooses_by_the_test_accuracy(tmp_path):
    chooses = {"mode": "MULTIRUN", "sweeper._target_": "hydra_plugins.hydra_optuna_sweeper.OptunaSweeper"}
    with pytest.raises(UserError, match=r"no choice may read a test score: give it split=tune$"):
        train(tmp_path, **chooses)
    assert 0 <= train(tmp_path, "split=tune", "+trainer.limit_val_batches=1", **chooses) <= 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [(UserError("no ink: buy some"), "no ink: buy some"), (ValueError("odd"), "ValueError: odd")],
)
def test_a_failed_task_is_named_at_the_end_and_stops_no_other(tmp_path, monkeypatch, error, reason):
    prepare = unit.prepare

    def fails(cfg):
        if cfg.task == "digits_crowded":
            raise error
        return prepare(cfg)

    monkeypatch.setattr(unit, "prepare", fails)
    with pytest.raises(UserError, match=rf"^digits_crowded/vpt_deep: {reason} \(1 of 3 runs failed\)$"):
        train(tmp_path, "tasks=demo")
    assert sorted(path.parts[-4] for path in tmp_path.rglob("result.json")) == ["digits", "digits_loc"]


@pytest.mark.parametrize(("given", "name"), [((), "my birds"), (("data.name=jays",), "jays")])
def test_errors_about_own_images_begin_with_their_own_name(tmp_path, given, name):
    (tmp_path / "my birds").mkdir()
    root = f"data.root='{tmp_path / 'my birds'}'"
    with pytest.raises(UserError, match=rf"^{name}/vpt_deep: .*my birds"):
        train(tmp_path, "data=folder", root, *given)


def test_a_diverged_run_fails_alone_and_scores_lowest_in_a_multirun(tmp_path):
    wild = ("recipe.optimizer=sgd", "recipe.lr=1e30", "recipe.head_lr=null")
    for _ in range(2):  # trained, then stored
        with pytest.raises(UserError, match=r"^digits/vpt_deep: the loss was not finite at step \d: lower"):
            train(tmp_path, *wild)
    assert train(tmp_path, *wild, mode="MULTIRUN") == float("-inf")
    assert read_result(next(tmp_path.glob("digits/*/*"))).status == "diverged"


def test_ctrl_c_goes_through(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(unit, "prepare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "tasks=demo")


def test_missing_weights_without_a_network_are_said_at_once(tmp_path):
    others = {"name": "vit_base_patch16_224.orig_in21k", "weights": None, "kwargs": {}}
    job = tiny_job(tmp_path).vary({f"backbone.{name}": value for name, value in others.items()})
    started = time.monotonic()
    (outcome,) = run_all.run_all([job])
    assert time.monotonic() - started < 10
    assert outcome.result is None
    assert "are not on this machine and the hub cannot be reached: download https://" in outcome.reason
    assert outcome.reason.endswith(
        "set backbone.weights=data/backbones/vit_base_patch16_224.orig_in21k.safetensors"
    )


def test_several_devices_run_as_ranks_of_the_same_run(tmp_path, monkeypatch):
    calls = []

    def run_ranks(command, world):
        assert not list(tmp_path.rglob("resume")), "what lies there is written under the run's lock"
        stored = Job.from_yaml(Path(command[-1]).read_text())
        calls.append((world, stored.task))
        run.run_job(run.prepare(stored.vary({"trainer.devices": 1, "trainer.strategy": "auto"})))

    monkeypatch.setattr(ranks, "run_ranks", run_ranks)
    train(tmp_path, "trainer=ddp_sim", "tasks=[digits,digits_loc]")
    assert calls == [(2, "digits"), (2, "digits_loc")]
    before = content(tmp_path)
    train(tmp_path, "trainer=ddp_sim", "tasks=[digits,digits_loc]")
    train(tmp_path, "trainer=cpu", "tasks=[digits,digits_loc]")
    assert len(calls) == 2, "finished runs start no ranks, whatever the devices"
    assert content(tmp_path) == before
    assert read_result(next(tmp_path.glob("digits/*/*"))) is not None


def test_ranks_that_fail_or_leave_nothing_are_failed_runs(tmp_path, monkeypatch):
    job = tiny_job(tmp_path, "trainer=ddp_sim")
    monkeypatch.setattr(ranks, "run_ranks", lambda *_: None)
    assert run_all.run_all([job])[0].reason.startswith("the ranks left no complete result in ")

    def fails(*_):
        raise ranks.RanksFailed("a rank ended with status -9")

    monkeypatch.setattr(ranks, "run_ranks", fails)
    assert run_all.run_all([job])[0].reason == "a rank ended with status -9"


def test_what_rank_0_cannot_write_is_refused_in_all_ranks_together(tmp_path, monkeypatch):
    sent = []

    def refuse(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr(
        SingleDeviceStrategy, "broadcast", lambda self, value, src=0: sent.append(value) or value
    )
    monkeypatch.setattr(run.attempt_files, "finish", refuse)
    with pytest.raises(UserError, match=r"^the disk is full$"):
        run.run_job(run.prepare(tiny_job(tmp_path, *SHORT)))
    refusals = [each[1] for each in sent if isinstance(each, tuple) and isinstance(each[1], UserError)]
    assert [str(error) for error in refusals] == ["the disk is full"]


def test_a_rank_runs_its_one_job_and_tells_its_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("VISPROMPT_PARENT", "1")
    monkeypatch.setenv("VISPROMPT_REASON", str(tmp_path / "reason"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(ranks, "end_with_parent", lambda: None)
    file = tmp_path / "job.yaml"
    file.write_text(tiny_job(tmp_path, *SHORT).as_yaml())
    rank.main(file)
    assert read_result(next(tmp_path.glob("digits/*/*"))).status == "finished"
    file.write_text(file.read_text().replace("split: final", "split: test"))
    with pytest.raises(SystemExit):
        rank.main(file)
    assert (tmp_path / "reason").read_text().startswith("unknown split 'test': did you mean tune?")


@pytest.mark.parametrize(
    ("trainer", "count"),
    [
        ({"devices": 3, "accelerator": "cpu"}, 3),
        ({"devices": "2", "accelerator": "cpu"}, 2),
        ({"devices": [0, 2, 3], "accelerator": "gpu"}, 3),
        ({"devices": "auto", "accelerator": "cpu"}, 1),
        ({"devices": "auto", "accelerator": "gpu"}, 4),
        ({"devices": -1, "accelerator": "auto"}, 4),
    ],
)
def test_number_of_local_devices(trainer, count, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert local_devices(Trainer(**trainer)) == count


def test_devices_that_are_no_number_are_one_sentence():
    trainer = Trainer(devices="0,1", accelerator="gpu")
    sentence = r"trainer\.devices=0,1 is not a number: give one, auto, or a list such as \[0,1\]$"
    with pytest.raises(UserError, match=sentence):
        local_devices(trainer)


@pytest.mark.parametrize("finishes", [False, True])
def test_a_run_that_another_process_is_at_work_on_is_come_back_to(tmp_path, monkeypatch, capsys, finishes):
    jobs = [tiny_job(tmp_path, *SHORT, f"data=demo/{task}") for task in ("digits", "digits_loc")]
    first = run.prepare(jobs[0])
    trained, original = [], run._train
    monkeypatch.setattr(
        run, "_train", lambda one, *given: trained.append(one.job.task) or original(one, *given)
    )

    def pause(_):
        trained.append("pause")
        if trained.count("pause") == 2:  # it has finished the run, or was killed
            other.release()
            run.run_job(first) if finishes else None

    monkeypatch.setattr(local, "time", SimpleNamespace(sleep=pause))
    with at_work(first.folder) as other:
        outcomes = run_all.run_all(jobs)
    assert trained == ["digits_loc", "pause", "pause", "digits"]
    assert [(o.name, o.reason, o.folder) for o in outcomes] == [
        (f"{job.task}/vpt_deep", "", run.prepare(job).folder) for job in jobs
    ]
    out = capsys.readouterr().out
    assert out.startswith("digits/vpt_deep: process 4711 on thor is working on it: waiting until later\n")
    assert ("finished before" in out) is finishes


def test_a_single_run_that_another_process_is_at_work_on_fails(tmp_path):
    job = tiny_job(tmp_path, *SHORT)
    folder = run.prepare(job).folder
    folder.mkdir(parents=True)
    what = f"another process is working on this run in {folder}: wait for it, or end it"
    with FileLock(folder / "lock"), pytest.raises(UserError, match=f"^digits/vpt_deep: {what}$"):
        train(tmp_path)
