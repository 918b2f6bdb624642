"""Runs of machines that share a store and nothing else, through the code that runs them, on a real S3 server."""

import json
import time
from types import SimpleNamespace

import pytest

from helpers import s3_server
from helpers.cli import content, equal, tensors, tiny_job, tiny_run
from helpers.epochs import trained
from helpers.leases import holder
from visprompt.errors import UserError
from visprompt.models.tuning_module import TuningModule
from visprompt.runs import lease, run, run_all, unit
from visprompt.runs.result import read_result
from visprompt.runs.run_lock import AtWork, is_free

SHORT = ("+trainer.limit_train_batches=1", "+trainer.limit_test_batches=1", "recipe.epochs=3")
E2VPT = (
    *("method=e2vpt", "method.num_tokens=4", "method.num_kv_tokens=2", "recipe.epochs=1"),
    "method.num_segments=4",
    *("recipe.warmup_epochs=0", "method.prune_tokens=[50]", "method.prune_segments=[50]"),
    "split=tune",
)


@pytest.fixture
def machine(tmp_path):
    """Makes the run of a machine; all of them share the weights and an empty store."""
    with s3_server.served():

        def of(name, *options):
            words = [*SHORT, f"paths.results={s3_server.URL}", *options]
            weights = tmp_path / "shared"
            tiny_run(weights)  # writes the weights
            return tiny_run(tmp_path / name, *words, f"backbone.weights={weights / 'weights.safetensors'}")

        yield of


def same(one, other):
    first, second = read_result(one.folder), read_result(other.folder)
    assert first.metrics == second.metrics
    assert equal(tensors(one.folder), tensors(other.folder))


@pytest.mark.slow
def test_another_machine_goes_on_and_a_third_skips(machine, tmp_path):
    whole = machine("whole", "paths.results=null")
    assert trained(whole) == [0, 1, 2]
    assert trained(machine("a"), die_in=2) == [0, 1, 2]
    assert trained(machine("b")) == [2]
    same(machine("b"), whole)
    (outcome,) = run_all.run_all([machine("c").job])
    assert trained(machine("c")) == []
    assert outcome.folder == machine("c").folder
    assert content(machine("c").folder) == content(machine("b").folder)
    assert trained(machine("a")) == []
    same(machine("a"), whole)
    assert not (machine("a").folder / "resume").exists()


@pytest.mark.slow
def test_a_run_that_was_not_stored_is_stored_by_the_next_command(machine, monkeypatch):
    one = machine("a")
    remote = type(one.remote)

    def unreachable(*_):
        raise UserError("the store gives no answer")

    with monkeypatch.context() as patch:
        patch.setattr(remote, "push_finished", unreachable)
        patch.setattr(remote, "push_state", unreachable)
        (outcome,) = run_all.run_all([one.job])
    assert outcome.reason == "the store gives no answer"
    assert read_result(one.folder) is not None
    assert one.remote.objects.read("result.json") is None
    monkeypatch.setattr(TuningModule, "training_step", None)  # is not called
    (outcome,) = run_all.run_all([one.job])
    assert outcome.reason == ""
    assert json.loads(one.remote.objects.read("result.json"))["attempt"] == 0


@pytest.mark.slow
def test_a_run_of_another_machine_is_refused_until_it_gives_no_sign_of_life(machine, monkeypatch):
    one = machine("a")
    record = lease.Record(state="held", who="process 7 on thor", host="thor", life=30.0)
    one.remote.create_lease(1, record.text())
    with pytest.raises(AtWork) as error:
        run.run_job(one)
    assert str(error.value) == (
        f"process 7 on thor is working on this run in {one.remote.url}: wait for it, or end it"
    )
    assert holder(one.folder) is None
    at_work = error.value
    assert not is_free(at_work.folder, at_work.remote)
    now = lease.time.monotonic
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: now() + 31, sleep=time.sleep))
    assert is_free(at_work.folder, at_work.remote)
    assert run.run_job(one).status == "finished"
    assert one.remote.lease_numbers() == [3]


@pytest.mark.slow
def test_a_driver_without_the_run_s_folder_watches_the_lease_in_the_store(machine, tmp_path, monkeypatch):
    """The worker is on another node of a Ray cluster."""
    one = machine("a")
    one.remote.create_lease(1, lease.Record(state="held", who="process 7 on thor", host="thor").text())
    driver = tmp_path / "driver" / one.folder.name
    remote = type(one.remote)(driver, one.remote.objects)
    assert not is_free(driver, remote)
    now = lease.time.monotonic
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: now() + 61))
    assert is_free(driver, remote)
    assert one.remote.lease_numbers() == [1, 2]


@pytest.mark.slow
def test_a_store_that_gives_no_answer_for_a_while_does_not_end_training(machine, monkeypatch, caplog):
    one = machine("a")
    store, epoch = type(one.remote.objects), run.ResumeCheckpoint.on_train_epoch_end

    def no_answer(*_, **__):
        raise UserError("the store gives no answer")

    def end_of_epoch(self, trainer, module):
        with pytest.MonkeyPatch.context() as patch:
            if trainer.current_epoch == 1:
                for name in ("etags", "head", "read", "write", "write_if", "upload", "download"):
                    patch.setattr(store, name, no_answer)
            epoch(self, trainer, module)
            trainer.strategy.checkpoint_io.wait()

    monkeypatch.setattr(run.ResumeCheckpoint, "on_train_epoch_end", end_of_epoch)
    assert run.run_job(one).status == "finished"
    assert "the resume state is not stored, training goes on: the store gives no answer" in caplog.text
    assert json.loads(one.remote.objects.read("result.json"))["attempt"] == 0


@pytest.mark.slow
def test_of_two_that_both_finish_the_first_counts(machine, monkeypatch):
    """One stood still behind its last look at its lease."""
    slow, quick = machine("a"), machine("b")
    check, original = [], unit.run_job

    def overtaken(hold):
        check.append(hold)
        if len(check) == 1:
            monkeypatch.setattr(run.run_lock.Hold, "check", lambda hold: None)
            quick.remote.create_lease(2, lease.Record(state="revoked").text())
            original(quick)

    monkeypatch.setattr(run.run_lock.Hold, "check", overtaken)
    result = run.run_job(slow)
    assert content(slow.folder) == content(quick.folder)
    assert result == read_result(quick.folder)


@pytest.mark.slow
def test_a_chain_of_pruning_continues_on_another_machine(machine, tmp_path, monkeypatch):
    job = machine("a", *E2VPT).job
    whole = run_all.run_all([job])
    assert whole[0].reason == ""
    monkeypatch.setattr(TuningModule, "training_step", None)  # is not called
    again = run_all.run_all([machine("b", *E2VPT).job])
    assert again[0].reason == ""
    assert again[0].result == whole[0].result
    chain = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("masks.json")]
    assert len(chain) == 1
    assert (tmp_path / "b" / chain[0]).read_bytes() == (tmp_path / "a" / chain[0]).read_bytes()


def test_a_bucket_that_is_missing_is_one_sentence_before_anything_runs(machine, tmp_path):
    job = tiny_job(tmp_path, *SHORT, "paths.results=s3://nowhere/team")
    with pytest.raises(
        UserError, match=r"^paths\.results=s3://nowhere/team cannot be used: there is no bucket"
    ):
        run_all.check_all([job])
