"""A run gets what its command asked for: processes, precision, a login to W&B; or one sentence before it trains."""

import pytest
import wandb
from lightning.pytorch.callbacks import ProgressBar

from helpers.cli import tiny_job
from visprompt.errors import UserError
from visprompt.runs import run_all
from visprompt.runs.trainer import build_trainer
from visprompt.runs.trainer_checks import check_login

ONE_TASK = {"JOB_ID": "1", "NTASKS": "1", "JOB_NAME": "job", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}


def slurm(monkeypatch, **changes):
    for name, value in (ONE_TASK | changes).items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def refused(tmp_path, *words):
    with pytest.raises(UserError) as error:
        build_trainer(tiny_job(tmp_path, *words))
    return str(error.value)


def test_two_devices_of_which_slurm_started_one_are_refused(tmp_path, monkeypatch):
    slurm(monkeypatch)
    assert refused(tmp_path, "trainer=ddp_sim") == (
        "trainer.devices=2 and trainer.num_nodes=1 ask for 2 process(es), and SLURM started 1: start as many as are "
        "asked for (srun --nodes=1 --ntasks-per-node=2), or change trainer.devices"
    )
    assert build_trainer(tiny_job(tmp_path)).world_size == 1


def test_one_device_of_two_processes_that_a_launcher_started_is_refused(tmp_path, monkeypatch):
    for name, value in {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert refused(tmp_path) == (
        "trainer.devices=1 and trainer.num_nodes=1 ask for 1 process(es), and the launcher started 2: start as many as "
        "are asked for (torchrun --nnodes=1 --nproc-per-node=1), or change trainer.devices"
    )


@pytest.mark.filterwarnings("ignore:You passed")
def test_a_precision_that_the_device_cannot_have_is_refused(tmp_path):
    sentence = "precision=16-mixed cannot be had on device cpu: give precision=bf16-mixed"
    assert refused(tmp_path, "precision=16-mixed") == refused(tmp_path, "precision=16") == sentence
    assert build_trainer(tiny_job(tmp_path, "precision=bf16")).precision == "bf16-mixed"
    assert build_trainer(tiny_job(tmp_path, "precision=64")).precision == "64-true"


BAR = "callbacks=default"
MINE = "+callbacks.mine={_target_: lightning.pytorch.callbacks.Timer}"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ((BAR,), ["RichProgressBar"]),
        ((BAR, "trainer.enable_progress_bar=false"), []),
        ((BAR, "callbacks.progress_bar=null"), []),
        ((BAR, MINE, "callbacks.progress_bar=null"), ["Timer"]),
        ((BAR, MINE, "callbacks.mine=null"), ["RichProgressBar"]),
        (("trainer.enable_progress_bar=false",), []),
    ],
)
def test_a_callback_that_is_null_or_a_bar_that_is_switched_off_is_not_there(tmp_path, words, names):
    trainer = build_trainer(tiny_job(tmp_path, "trainer.enable_progress_bar=true", *words))
    kinds = [type(callback) for callback in trainer.callbacks]
    assert [kind.__name__ for kind in kinds if issubclass(kind, ProgressBar) or kind.__name__ == "Timer"] == names


@pytest.fixture
def logins(monkeypatch):
    """W&B online on a machine that may have a key, and how it was asked for one."""
    asked, answer = [], {"key": False}
    monkeypatch.setattr(wandb.setup().settings, "mode", "online")
    monkeypatch.setattr(wandb, "login", lambda **how: asked.append(how) or answer["key"])
    return asked, answer


def test_a_logger_of_wandb_without_a_key_is_one_sentence_before_anything_runs(tmp_path, logins):
    asked, answer = logins
    job = tiny_job(tmp_path, "logger=wandb")
    with pytest.raises(UserError) as error:
        run_all.check_all([job])
    assert str(error.value) == (
        "logger=wandb finds no key of W&B on this machine: run `wandb login` (or set WANDB_API_KEY), or log without a "
        "network by logger.wandb.offline=true"
    )
    assert asked == [{"prompt": False, "verify": False}]
    answer["key"] = True
    check_login(job)


@pytest.mark.parametrize(
    "words",
    [
        ("logger=csv",),
        ("logger=tensorboard",),
        ("logger=wandb", "logger.wandb=null"),
        ("logger=wandb", "logger.wandb.offline=true"),
        ("logger=wandb", "+logger.wandb.mode=disabled"),
    ],
)
def test_a_logger_that_needs_no_key_is_asked_for_none(tmp_path, logins, words):
    check_login(tiny_job(tmp_path, *words))
    assert logins[0] == []


def test_a_key_of_wandb_that_is_none_is_one_sentence(tmp_path, logins, monkeypatch):
    def login(**how):
        raise wandb.errors.AuthenticationError("WANDB_API_KEY invalid: API key must have 40+ characters, has 3.")

    monkeypatch.setattr(wandb, "login", login)
    sentence = r"^W&B's key cannot be used \(WANDB_API_KEY invalid: .*, has 3\.\): run `wandb login` again$"
    with pytest.raises(UserError, match=sentence):
        check_login(tiny_job(tmp_path, "logger=wandb"))
