"""Resume state: everything Lightning keeps comes back equal, no byte of it is a pickle, and damage is one sentence."""

import errno
import json
import pickle
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from hypothesis import given
from safetensors import safe_open
from safetensors.torch import save_file

from helpers.damage import bounded, damages, outcome, spoil
from visprompt.errors import UserError
from visprompt.runs.checkpoint import Owner, ResumeCheckpoint, SafetensorsIO
from visprompt.runs.resume_state import Snapshot

OWNER = Owner(run="a" * 64, seed=0, attempt=0)

TREE = {
    "epoch": 3,
    "nothing": None,
    "flag": True,
    "rate": 0.1,
    "spoilt": float("inf"),
    "by number": {0: {"exp_avg": torch.arange(6.0).reshape(2, 3)}, 1: {"step": torch.tensor(7.0)}},
    "betas": (0.9, 0.999),
    "list": [1, [2, (3,)], {"deep": torch.tensor([True, False])}],
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "empty dict": {},
    "a key: with 'quotes'": "a text\nof two lines",
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def load(path):
    return SafetensorsIO().load_checkpoint(path)


def test_a_tree_comes_back_with_its_types_order_and_bits(tmp_path):
    path = tmp_path / "new" / "state.safetensors"
    SafetensorsIO().save_checkpoint(TREE, path)
    assert same(TREE, SafetensorsIO().load_checkpoint(path, weights_only=True))
    assert [file.name for file in path.parent.iterdir()] == ["state.safetensors"]


def test_a_tree_without_a_tensor_and_tensors_that_share_memory(tmp_path):
    SafetensorsIO().save_checkpoint({"epoch": 1}, tmp_path / "plain")
    assert SafetensorsIO().load_checkpoint(tmp_path / "plain") == {"epoch": 1}
    whole = torch.arange(6.0)
    tree = {"a": whole, "b": whole[2:4], "c": whole.reshape(2, 3).t()}
    SafetensorsIO().save_checkpoint(tree, tmp_path / "shared")
    assert same(tree, load(tmp_path / "shared"))


def test_what_is_neither_tensor_nor_plain_data_is_refused_and_the_old_file_stands(tmp_path):
    SafetensorsIO().save_checkpoint({"epoch": 1}, tmp_path / "state")
    with pytest.raises(
        TypeError, match="resume state holds a PosixPath, which is neither a tensor nor plain data"
    ):
        SafetensorsIO().save_checkpoint({"epoch": 2, "where": [Path("/")]}, tmp_path / "state")
    assert load(tmp_path / "state") == {"epoch": 1}


def test_the_file_is_safetensors_and_no_pickle(tmp_path):
    path = tmp_path / "state"
    SafetensorsIO().save_checkpoint(TREE, path)
    with safe_open(path, framework="pt") as file:
        assert len(list(file.keys())) == 5
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(path.read_bytes())
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def cut(data):
    return data[: len(data) // 2]


def emptied(data):
    return b""


def flipped_tensor(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def flipped_text(data):
    at = data.index(b"epoch")
    return data[:at] + b"apoch" + data[at + 5 :]


@pytest.mark.parametrize("damage", [cut, emptied, flipped_tensor, flipped_text])
def test_damage_is_one_sentence_that_says_what_to_do(tmp_path, damage):
    path = tmp_path / "state.safetensors"
    SafetensorsIO().save_checkpoint(TREE, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"state\.safetensors is .*: delete it to start over$") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_another_safetensors_file_is_no_resume_state(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other", metadata={"format": "pt"})
    with pytest.raises(UserError, match="other is not a readable resume state"):
        load(tmp_path / "other")


def test_removing_is_idempotent(tmp_path):
    SafetensorsIO().save_checkpoint({}, tmp_path / "state")
    for _ in range(2):
        SafetensorsIO().remove_checkpoint(tmp_path / "state")
    assert not (tmp_path / "state").exists()


class Line(L.LightningModule):
    """Fits a line; dies in the middle of an epoch where it is told to."""

    def __init__(self, dies_in=None):
        super().__init__()
        self.line, self.dies_in = torch.nn.Linear(2, 1), dies_in

    def training_step(self, batch, index):
        if (self.current_epoch, index) == self.dies_in:
            raise ZeroDivisionError
        loss = (self.line(batch) - batch.sum(1, keepdim=True)).square().mean()
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.eye(2).repeat(4, 1), batch_size=2)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2)}


def fit(folder, every=1, dies_in=None, epochs=5, beside=False):
    torch.manual_seed(0)
    resume, module = ResumeCheckpoint(folder, every), Line(dies_in)
    path = resume.find(OWNER)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        callbacks=[resume],
        plugins=[SafetensorsIO(beside)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=path, weights_only=True)
    return resume, module


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("every", [1, 2])
def test_a_fit_that_died_goes_on_to_the_same_bits_and_the_same_curve(tmp_path, every):
    whole, expected = fit(tmp_path / "whole", every)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "dies", every, dies_in=(3, 2))
    assert load(whole.path)["epoch"] == 4
    assert load(tmp_path / "dies" / "state.safetensors")["epoch"] == {1: 2, 2: 1}[every]
    resumed, module = fit(tmp_path / "dies", every)
    assert same(dict(expected.state_dict()), dict(module.state_dict()))
    assert same(whole.rows, resumed.rows)
    assert whole.csv.read_text() == resumed.csv.read_text()
    lines = whole.csv.read_text().splitlines()
    assert lines[0] == "epoch,step,train/loss"
    assert [line.split(",")[:2] for line in lines[1:]] == [[str(e), str(4 * e + 4)] for e in range(5)]
    assert 0 < resumed.seconds < 60


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_the_last_epoch_is_kept_whatever_the_interval(tmp_path):
    resume, _ = fit(tmp_path, every=100, epochs=3)
    assert load(resume.path)["epoch"] == 2
    assert json.loads(json.dumps(resume.rows[2]))["step"] == 12


def due(monkeypatch, resume, seconds, took, tuned=0):
    """Whether the state is due so many seconds after training began, if a state takes so long."""
    parameter = torch.zeros(tuned // 4)
    strategy = SimpleNamespace(
        checkpoint_io=SimpleNamespace(seconds=took), broadcast=lambda decision: decision
    )
    optimizer = SimpleNamespace(param_groups=[{"params": [parameter]}])
    trainer = SimpleNamespace(strategy=strategy, optimizers=[optimizer])
    monkeypatch.setattr("visprompt.runs.checkpoint.time.monotonic", lambda: 100.0 + seconds)
    resume._written = 100.0
    return resume._is_due(trainer, 6)


def test_a_state_is_written_when_that_takes_a_twentieth_of_the_time_or_after_ten_minutes(
    tmp_path, monkeypatch
):
    resume = ResumeCheckpoint(tmp_path)
    assert [due(monkeypatch, resume, seconds, took=4.0) for seconds in (79, 81)] == [False, True]
    assert [due(monkeypatch, resume, seconds, took=90.0) for seconds in (599, 601)] == [False, True]
    # of the first state only the size is known: 3 x 200 MB at 200 MB/s, and 10 ms
    first = [due(monkeypatch, resume, seconds, None, tuned=200_000_000) for seconds in (60.1, 60.3)]
    assert first == [False, True]
    assert due(monkeypatch, ResumeCheckpoint(tmp_path, 7), 0, took=90.0)
    assert not due(monkeypatch, ResumeCheckpoint(tmp_path, 6), 1000, took=0.0)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_rank_0_decides_for_all(tmp_path, monkeypatch):
    """It alone knows what a write takes, and a state is written with all of them."""
    asked = []

    def decide(strategy, value, src=0):
        if not isinstance(value, bool):
            return value
        asked.append((value, src))
        return True

    monkeypatch.setattr("lightning.pytorch.strategies.SingleDeviceStrategy.broadcast", decide)
    monkeypatch.setattr("visprompt.runs.checkpoint._FIRST", 10.0)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, None, dies_in=(2, 0))
    assert asked[:2] == [(False, 0)] * 2
    assert load(tmp_path / "state.safetensors")["epoch"] == 1


def test_a_state_is_written_beside_training_and_is_of_the_moment_when_it_was_asked_for(tmp_path, monkeypatch):
    path, written, go = tmp_path / "state", Snapshot.write, threading.Event()
    monkeypatch.setattr(Snapshot, "write", lambda copy, path: go.wait(20) and written(copy, path))
    weights, plugin = torch.zeros(3), SafetensorsIO(beside=True)
    plugin.save_checkpoint({"weights": weights}, path)
    weights += 1  # training goes on
    assert not path.exists()
    go.set()
    plugin.save_checkpoint({"weights": weights}, path)  # after the first
    assert load(path)["weights"].tolist() in ([0, 0, 0], [1, 1, 1])
    plugin.wait()
    assert load(path)["weights"].tolist() == [1, 1, 1]
    assert 0 < plugin.seconds < 20


def test_an_error_of_the_thread_is_raised_once_and_the_old_state_stands(tmp_path, monkeypatch):
    plugin = SafetensorsIO(beside=True)
    plugin.save_checkpoint({"epoch": 1}, tmp_path / "state")
    plugin.wait()
    monkeypatch.setattr("visprompt.files.os.fsync", full)
    plugin.save_checkpoint({"epoch": 2}, tmp_path / "state")
    with pytest.raises(UserError, match=r"cannot write .*state: .*No space left"):
        plugin.save_checkpoint({"epoch": 3}, tmp_path / "state")
    plugin.wait()
    assert load(tmp_path / "state") == {"epoch": 1}


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_a_fit_that_ends_has_its_state_and_says_why_it_has_none(tmp_path, monkeypatch, caplog):
    written = Snapshot.write
    monkeypatch.setattr(Snapshot, "write", lambda copy, path: (time.sleep(0.3), written(copy, path)))
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "dies", 1, dies_in=(1, 0), beside=True)
    assert load(tmp_path / "dies" / "state.safetensors")["epoch"] == 0
    resume, _ = fit(tmp_path / "whole", None, epochs=2, beside=True)
    assert load(resume.path)["epoch"] == 1
    monkeypatch.setattr("visprompt.runs.resume_state.save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        fit(tmp_path / "full", None, epochs=1, beside=True)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "both", 1, dies_in=(1, 0), beside=True)
    assert "No space left on device" in caplog.text


def stored(folder, owner=OWNER, weight=0.0):
    """A resume state as Lightning lays it out."""
    resume = ResumeCheckpoint(folder)
    resume.owner = owner
    tree = {
        "state_dict": {"w": torch.tensor([1.0, weight])},
        "callbacks": {resume.state_key: resume.state_dict()},
    }
    SafetensorsIO().save_checkpoint(tree, resume.path)
    return resume.path


def test_a_resume_state_is_found_by_its_owner_alone(tmp_path):
    resume = ResumeCheckpoint(tmp_path)
    assert resume.find(OWNER) is None
    assert resume.state_dict()["owner"] == {"run": "a" * 64, "seed": 0, "attempt": 0}
    path = stored(tmp_path)
    assert resume.find(OWNER) == path


@pytest.mark.parametrize(
    ("owner", "weight", "sentence"),
    [
        (
            Owner(run="b" * 64, seed=7, attempt=0),
            0.0,
            "is the resume state of another run (its seed is 7, this run's is 0)",
        ),
        (
            Owner(run="a" * 64, seed=0, attempt=2),
            0.0,
            "is the resume state of attempt 2 of this run, and this is attempt 0",
        ),
        (None, 0.0, "was written by an older version, which did not record the run it belongs to"),
        (OWNER, float("nan"), "holds numbers that are not finite, in w"),
    ],
)
def test_what_is_not_this_attempt_s_resume_state_is_refused(tmp_path, owner, weight, sentence):
    path = stored(tmp_path, owner, weight)
    with pytest.raises(UserError) as error:
        ResumeCheckpoint(tmp_path).find(OWNER)
    assert str(error.value) == f"{path} {sentence}: delete it to start over"


def test_a_resume_state_of_another_layout_is_of_an_older_version(tmp_path):
    path = tmp_path / "state.safetensors"
    SafetensorsIO().save_checkpoint({"callbacks": {}, "state_dict": {}}, path)
    with pytest.raises(
        UserError,
        match=r"was written by an older version, which did not record the run it belongs to: delete",
    ):
        ResumeCheckpoint(tmp_path).find(OWNER)


@bounded
@given(damage=damages())
def test_a_flipped_bit_or_a_cut_is_never_another_resume_state(tmp_path, damage):
    """Bits of the whole file, the header of safetensors included."""
    path = stored(tmp_path)
    expected, whole = load(path), path.read_bytes()
    spoil(path, damage, whole)
    found, sentence = outcome(ResumeCheckpoint(tmp_path).find, OWNER)
    assert re.fullmatch(rf"{re.escape(str(path))} .*: delete it to start over", sentence) or same(
        load(found), expected
    )
