"""A run gets what its command asked for: processes, precision, a login to W&B.

Or one sentence before it trains.
"""

import pytest
import wandb
from lightning.pytorch.callbacks import ProgressBar

from helpers.cli import frozen, tiny_job, tiny_run
from visprompt.errors import UserError
from visprompt.models.tuning_module import TuningModule
from visprompt.runs import run_all
from visprompt.runs.run import run_job
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
        "trainer.devices=2 and trainer.num_nodes=1 ask for 2 process(es), and SLURM started 1: start 2 "
        "(srun --nodes=1 --ntasks-per-node=2), or change trainer.devices"
    )
    assert build_trainer(tiny_job(tmp_path)).world_size == 1


@pytest.mark.parametrize(
    "rank", ["0", "1"]
)  # of a trainer with one device Lightning finds no device of rank 1
def test_one_device_of_two_processes_that_a_launcher_started_is_refused(tmp_path, monkeypatch, rank):
    for name, value in {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert refused(tmp_path) == (
        "trainer.devices=1 and trainer.num_nodes=1 ask for 1 process(es), and the launcher started 2: start "
        "1 (torchrun --nnodes=1 --nproc-per-node=1), or change trainer.devices"
    )


@pytest.mark.filterwarnings("ignore:You passed")
def test_a_precision_that_the_device_cannot_have_is_refused(tmp_path):
    sentence = "precision=16-mixed is not available on device cpu: give precision=bf16-mixed"
    assert refused(tmp_path, "precision=16-mixed") == refused(tmp_path, "precision=16") == sentence
    assert build_trainer(tiny_job(tmp_path, "precision=bf16")).precision == "bf16-mixed"
    assert build_trainer(tiny_job(tmp_path, "precision=64")).precision == "64-true"


BAR = "callbacks=default"
MINE = "+callbacks.mine={_target_: lightning.pytorch.callbacks.Timer}"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ((BAR,), ["RunProgressBar"]),
        ((BAR, "trainer.enable_progress_bar=false"), []),
        ((BAR, "callbacks.progress_bar=null"), []),
        ((BAR, MINE, "callbacks.progress_bar=null"), ["Timer"]),
        ((BAR, MINE, "callbacks.mine=null"), ["RunProgressBar"]),
        (("trainer.enable_progress_bar=false",), []),
    ],
)
def test_a_callback_that_is_null_or_a_bar_that_is_switched_off_is_not_there(tmp_path, words, names):
    trainer = build_trainer(tiny_job(tmp_path, "trainer.enable_progress_bar=true", *words))
    kinds = [type(callback) for callback in trainer.callbacks]
    assert [
        kind.__name__ for kind in kinds if issubclass(kind, ProgressBar) or kind.__name__ == "Timer"
    ] == names


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
        "logger=wandb finds no W&B API key on this machine: run `wandb login` (or set WANDB_API_KEY), or "
        "log without a network by giving logger.wandb.offline=true"
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
        raise wandb.errors.AuthenticationError(
            "WANDB_API_KEY invalid: API key must have 40+ characters, has 3."
        )

    monkeypatch.setattr(wandb, "login", login)
    sentence = r"^W&B's key cannot be used \(WANDB_API_KEY invalid: .*, has 3\.\): run `wandb login` again$"
    with pytest.raises(UserError, match=sentence):
        check_login(tiny_job(tmp_path, "logger=wandb"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("callbacks=[none,early_stopping]",),
            "callbacks.early_stopping watches val/acc, but this run trains on the validation images: give "
            "split=tune",
        ),
        (
            ("data=folder", "data.root=x", "data.final=train+val", "callbacks=[none,early_stopping]"),
            "callbacks.early_stopping watches val/acc, but this run trains on the validation images: give "
            "data.final=train",
        ),
        *(
            (
                (
                    "callbacks=[none,early_stopping]",
                    "split=tune",
                    f"callbacks.early_stopping.monitor={figure}",
                ),
                f"callbacks.early_stopping watches {figure}, but test images must not choose when a run ends: "
                "watch a figure of val/ or train/",
            )
            for figure in ("leak/test_acc", "test/acc")
        ),
        (
            ("callbacks=[none,lr_monitor]",),
            "callbacks.lr_monitor needs a logger: give logger=tensorboard or ",
        ),
    ],
)
def test_a_callback_that_does_not_fit_the_run_is_refused(tmp_path, words, sentence):
    with pytest.raises(UserError) as error:
        run_all.check_all([tiny_job(tmp_path, *words)])
    assert f": {sentence}" in f": {error.value}"


def test_callbacks_of_lightnings_are_a_choice_and_those_that_only_show_leave_the_run_what_it_is(tmp_path):
    names = ("model_summary", "lr_monitor")
    plain, shown, stopped = (
        tiny_run(tmp_path, "split=tune", "logger=tensorboard", *words)
        for words in ((), (f"callbacks=[none,{','.join(names)}]",), ("callbacks=[none,early_stopping]",))
    )
    kinds = {type(callback).__name__ for callback in build_trainer(shown.job).callbacks}
    assert {"RichModelSummary", "LearningRateMonitor"} <= kinds
    assert shown.folder == plain.folder
    assert stopped.folder != plain.folder


@frozen
def test_early_stopping_ends_a_run_before_its_last_epoch(tmp_path):
    words = ("split=tune", "callbacks=[none,early_stopping]", "callbacks.early_stopping.patience=1")
    one = tiny_run(tmp_path, *words, "recipe.epochs=9", "recipe.lr=0.0", "recipe.warmup_epochs=0")
    assert run_job(one).status == "finished"
    assert len((one.folder / "metrics.csv").read_text().splitlines()) == 1 + 2, (
        "the first, and one that is no better"
    )


class Mine(TuningModule):
    """A user's own."""


@frozen
def test_a_lightning_module_of_ones_own_stands_in_the_config_and_is_part_of_the_run(tmp_path):
    target = f"lightning_module._target_={Mine.__module__}.Mine"
    plain, mine = tiny_run(tmp_path), tiny_run(tmp_path, target)
    assert plain.job.lightning_module._target_ == "visprompt.models.tuning_module.TuningModule"
    assert mine.folder != plain.folder
    with pytest.raises(
        UserError, match=r"^lightning_module\._target_=torch\.nn\.Linear is not a class that belongs"
    ):
        run_job(tiny_run(tmp_path, "lightning_module._target_=torch.nn.Linear"))


def test_a_fused_optimiser_that_would_have_to_clip_under_autocast_is_refused(tmp_path):
    words = ("recipe.fused=true", "+trainer.gradient_clip_val=1")
    assert build_trainer(tiny_job(tmp_path, *words)).gradient_clip_val == 1
    with pytest.raises(UserError) as error:
        build_trainer(tiny_job(tmp_path, *words, "precision=bf16-mixed"))
    assert str(error.value) == (
        "recipe.fused=true cannot clip gradients under precision=bf16-mixed: leave out recipe.fused or "
        "trainer.gradient_clip_val"
    )
