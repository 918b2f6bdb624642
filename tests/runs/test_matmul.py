"""Products of float32 matrices: the setting, where it acts, what it leaves behind, and the sentence about it."""

import logging

import pytest
import torch
from lightning.fabric.accelerators.cuda import _check_cuda_matmul_precision
from lightning_utilities.core import rank_zero

from helpers.cli import tiny_job, tiny_run
from helpers.goldens import identity
from helpers.written_runs import result
from visprompt.errors import UserError
from visprompt.runs import matmul, recorded
from visprompt.runs.trainer import build_trainer

DEFAULT = ("data=demo/digits",)
HIGH = (*DEFAULT, "matmul_precision=high")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that has TensorFloat32, as far as questions about it go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    matmul._hint.cache_clear()
    yield torch.device("cuda")
    matmul._hint.cache_clear()


@pytest.fixture(autouse=True)
def unchanged():
    before = state()
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before[1:]
    assert state() == before


def state():
    """The setting, and those of products on GPUs and by oneDNN that it decides."""
    try:
        name = torch.get_float32_matmul_precision()
    except RuntimeError:
        name = "mixed"
    return name, torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


def test_it_is_part_of_a_runs_identity_where_it_acts(gpu, monkeypatch):
    assert identity(HIGH) != identity(DEFAULT)
    assert identity(HIGH) != identity((*DEFAULT, "matmul_precision=medium"))
    assert identity((*HIGH, "trainer=cpu")) == identity(DEFAULT) == identity((*DEFAULT, "trainer=cpu"))
    monkeypatch.undo()
    assert identity(HIGH) != identity(DEFAULT), "a machine without a GPU may plan the runs of one that has it"


def test_it_is_recorded_among_the_trainers_settings_and_scoring_takes_it_from_there(gpu, tmp_path):
    words = ("trainer.accelerator=auto", "matmul_precision=high", "+trainer.gradient_clip_val=1")
    run = tiny_run(tmp_path, *words)
    recipe = run.job.recipe.record()
    assert run.identity["trainer"] == {"gradient_clip_val": 1, "matmul_precision": "high"}
    assert (
        recorded._scoring(tmp_path, result(recipe=recipe, trainer=run.identity["trainer"]))[
            "matmul_precision"
        ]
        == "high"
    )
    assert recorded._scoring(tmp_path, result(recipe=recipe))["matmul_precision"] == "highest"
    with pytest.raises(UserError, match="is refused: matmul_precision"):
        recorded._scoring(tmp_path, result(recipe=recipe, trainer={"matmul_precision": "evil"}))


def test_a_value_that_it_does_not_have_is_one_sentence(tmp_path):
    with pytest.raises(UserError) as error:
        tiny_job(tmp_path, "matmul_precision=tf32")
    assert str(error.value) == "matmul_precision=tf32 does not fit: give one of highest, high, medium"


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_process_is_left_as_it_was(precision, gpu, tmp_path):
    job = tiny_job(tmp_path, "trainer.accelerator=auto", f"matmul_precision={precision}")
    before = state()
    assert before[1:] == ("none", "none"), "what PyTorch starts with"
    with matmul.matmul_precision(job):
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_tf32 is (precision != "highest")
    assert state() == before
    with pytest.raises(ZeroDivisionError), matmul.matmul_precision(job):
        raise ZeroDivisionError
    assert state() == before


@pytest.mark.parametrize("setting", ["high", "tf32"])
def test_what_a_user_has_set_comes_back_and_does_not_change_a_run(setting, gpu, tmp_path):
    if setting == "high":
        torch.set_float32_matmul_precision("high")
    else:
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # after it the function above cannot be read
    before = state()
    with matmul.matmul_precision(tiny_job(tmp_path, "trainer.accelerator=auto")):
        assert state() == ("highest", "ieee", "ieee")
    assert state() == before


def test_products_on_a_cpu_are_exact_whatever_the_setting(tmp_path):
    with matmul.matmul_precision(tiny_job(tmp_path, "matmul_precision=medium")):
        assert state() == ("highest", "ieee", "ieee")


def test_the_faster_settings_are_named_once(gpu, tmp_path, capsys):
    def said(*words, device=gpu):
        matmul.hint(tiny_job(tmp_path, *words), device)
        return capsys.readouterr().out

    assert said("matmul_precision=high") == said("precision=bf16-mixed") == ""
    assert said(device=torch.device("cpu")) == ""
    assert said() == (
        "float32 matrices are multiplied in full precision: on Pretended GPU matmul_precision=high or "
        "precision=bf16-mixed is faster, and makes another run\n"
    )
    assert said() == ""


def test_lightnings_own_hint_is_silent(gpu, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(rank_zero.log, "handle", lambda record: said.append(record.getMessage()))
    check = _check_cuda_matmul_precision.__wrapped__  # it is called once in a process
    for name in ("lightning.fabric", "lightning.pytorch"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.INFO)
    rank_zero.log.manager._clear_cache()
    check(gpu)
    assert len(said) == 1
    assert "torch.set_float32_matmul_precision" in said[0]
    build_trainer(tiny_job(tmp_path))
    check(gpu)
    assert len(said) == 1
