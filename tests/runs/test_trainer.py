"""Trainer and loggers of a job: what W&B and TensorBoard get, and one run of theirs for each of ours."""

import pytest

from helpers.cli import frozen, tiny_job, tiny_run
from visprompt.errors import UserError
from visprompt.models.tuning_module import TuningModule
from visprompt.runs import run
from visprompt.runs.trainer import build_trainer

pytestmark = [
    frozen,
    pytest.mark.filterwarnings("ignore:The number of training batches .* smaller than the logging"),
]
SHORT = (
    "+trainer.limit_train_batches=2",
    "+trainer.limit_test_batches=1",
    "recipe.epochs=2",
    "method.num_tokens=4",
)


def logged(folder, *options):
    one = tiny_run(folder, *SHORT, "logger=wandb", "logger.wandb.offline=true", "tags=[first,look]", *options)
    return one, run.run_job(one)


def test_wandb_gets_the_runs_identity_and_searchable_fields(tmp_path, begun):
    one, result = logged(tmp_path)
    (started,) = begun
    assert (started["id"], started["resume"]) == (one.folder.name, "allow")
    assert (started["project"], started["group"], started["job_type"]) == ("visprompt", "vpt_deep", "final")
    assert list(started["tags"]) == ["first", "look", "debug"]
    assert started["name"] == f"digits/vpt_deep/{one.folder.name}"
    assert started["exit_code"] == 0
    assert started["logged"]["test/acc"] == result.metrics["test/acc"]
    config = started["config"]
    assert (config["task"], config["seed"], config["split"]) == ("digits", 0, "final")
    assert (config["method.name"], config["method.num_tokens"], config["method.depth"]) == (
        "vpt_deep",
        4,
        None,
    )
    assert (config["num_tokens"], config["depth"]) == (4, 2), "what accuracy is plotted against, as numbers"
    assert (config["tuned.parameters"], config["tuned.share"]) == (192, result.tuned["share"])
    assert not any(isinstance(value, dict) for name, value in config.items() if name != "_wandb")
    assert list(one.folder.glob(f"wandb/offline-run-*-{one.folder.name}/*.wandb"))
    _, stored = logged(tmp_path)
    assert stored == result
    assert [each["id"] for each in begun] == [one.folder.name] * 2, "a skip shows its score in the same run"
    assert begun[1]["logged"] == result.metrics
    logged(tmp_path, "rerun=true")
    assert begun[2]["id"] == f"{one.folder.name}-r1"


def test_an_agents_run_id_stands(tmp_path, begun, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "agent-7")
    logged(tmp_path)
    assert begun[0].get("id") is None
    assert begun[0]["resume"] == "allow"


def test_a_run_that_failed_ends_its_wandb_run_and_the_next_gets_its_own(tmp_path, begun, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(TuningModule, "on_test_epoch_end", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logged(tmp_path, "seed=1")
    assert begun[0]["exit_code"] == 1
    two, _ = logged(tmp_path, "seed=2")
    assert [each["id"] for each in begun][1] == two.folder.name
    assert begun[1]["exit_code"] == 0


def test_tensorboard_writes_its_events_into_the_runs_folder(tmp_path):
    one = tiny_run(tmp_path, *SHORT, "logger=tensorboard")
    run.run_job(one)
    data = b"".join(
        events.read_bytes() for events in (one.folder / "tensorboard").glob("events.out.tfevents.*")
    )
    assert b"train/loss" in data
    assert b"test/acc" in data


def test_a_trainer_that_this_machine_cannot_give_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for options, sentence in [
        (
            ("trainer=gpu",),
            r"^trainer cannot be built: .*gpu.*; without a GPU take trainer=cpu, or trainer=ddp_sim",
        ),
        (
            ("trainer=ddp",),
            r"^trainer cannot be built: .*gpu.*; without a GPU take trainer=cpu, or trainer=ddp_sim",
        ),
        (("trainer.strategy=dpp",), r"^trainer cannot be built: .*dpp.*; correct trainer\.<key>=\.\.\.$"),
    ]:
        with pytest.raises(UserError, match=sentence):
            build_trainer(tiny_job(tmp_path, *options))


def test_final_holds_no_images_out_and_lightning_adds_nothing_of_its_own(tmp_path):
    final = tiny_run(tmp_path)
    trainer = build_trainer(final.job)
    final.datamodule.trainer = trainer
    final.datamodule.setup("fit")
    assert trainer.limit_val_batches == 0
    assert trainer.num_sanity_val_steps == 0
    assert trainer.loggers == []
    assert trainer.max_epochs == 3
    tune = build_trainer(tiny_job(tmp_path, "split=tune"))
    assert tune.limit_val_batches == 1.0
