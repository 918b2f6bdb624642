"""Runs on own images: augmented, scored on val after each epoch, and ended early."""

import csv
from types import SimpleNamespace

import pytest

from helpers.cli import call, equal, frozen, tensors, tiny, tiny_job, tiny_run
from helpers.miniatures import write_folder
from visprompt.errors import UserError
from visprompt.models.tuned_state import load_state
from visprompt.models.tuning_module import TuningModule
from visprompt.runs import run, run_all, unit
from visprompt.runs.recorded import job_of
from visprompt.runs.result import read_result

pytestmark = frozen
RESIZED = "{_target_: torchvision.transforms.v2.RandomErasing, p: 1.0}"


@pytest.fixture
def pets(tmp_path):
    return write_folder(tmp_path / "pets", per_class=10)


def words(folder, root, *more):
    return (
        *("data=folder", f"data.root={root}", f"paths.data_dir={folder / 'data'}", "recipe.batch_size=4"),
        *("recipe.epochs=2", *more),
    )


def own_run(logs, root, *more):
    return tiny_run(logs, *words(root.parent, root, *more))


def curve(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("augment", ["randaugment", RESIZED])
def test_an_augmented_and_mixed_run_that_died_goes_on_to_the_same_bits(tmp_path, pets, augment, monkeypatch):
    given = (f"data.augment={augment}", "recipe.cutmix=1", "recipe.mixup=1", "recipe.sampling=balanced")
    one, half = (own_run(tmp_path / name, pets, *given) for name in ("one", "half"))
    result, original = run.run_job(one), TuningModule.training_step

    def step(module, batch, index):
        if (module.current_epoch, index) == (1, 2):
            raise ZeroDivisionError
        return original(module, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(TuningModule, "training_step", step)
        with pytest.raises(ZeroDivisionError):
            run.run_job(half)
    resumed = run.run_job(own_run(tmp_path / "half", pets, *given, "data.num_workers=1"))
    assert equal(tensors(one.folder), tensors(half.folder))
    assert resumed.metrics == result.metrics
    assert curve(one.folder) == curve(half.folder)


def test_an_augmentation_is_part_of_the_run_and_its_default_is_not(tmp_path, pets):
    plain, none, light, mine, other = (
        own_run(tmp_path, pets, *(f"data.augment={value}" for value in given))
        for given in ((), ("none",), ("light",), (RESIZED,), (RESIZED.replace("1.0", "0.5"),))
    )
    assert plain.folder == none.folder
    assert len({one.folder for one in (plain, light, mine, other)}) == 4
    assert "augment" not in plain.identity["data"]
    assert light.identity["data"]["augment"] == "light"
    result = run.run_job(mine)
    assert result.data["augment"] == {"_target_": "torchvision.transforms.v2.RandomErasing", "p": 1.0}
    assert read_result(mine.folder) == result
    again = job_of(
        mine.folder, load_state(mine.folder), result, data_dir=str(tmp_path / "data"), weights=None
    )
    assert again.data.augment == "none", "a run's folder names no code, and scoring augments nothing"


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ("ligth", "unknown data.augment 'ligth': did you mean light"),
        (
            "{_target_: torch.optim.SGD}",
            "data.augment._target_=torch.optim.SGD is not a class that belongs there",
        ),
        ("1", "data.augment=1 does not fit: give text or a mapping with _target_"),
        (
            "{_target_: torchvision.transforms.v2.RandomErasing, q: 1}",
            r"unknown key 'data.augment.q': did you mean .*data\.augment\.p",
        ),
        (
            "{_target_: torchvision.transforms.v2.RandomErasing, p: 7}",
            r"^data.augment cannot be built: .*interval \[0.0, 1.0\]; correct data\.augment\.<key>=",
        ),
    ],
)
def test_an_augmentation_that_there_is_not_is_refused(tmp_path, pets, augment, message):
    with pytest.raises(UserError, match=message):
        own_run(tmp_path, pets, f"data.augment={augment}")


def test_a_final_run_scores_val_after_each_epoch_where_it_does_not_train_on_it(tmp_path, pets, monkeypatch):
    one = own_run(tmp_path / "1", pets)
    result = run.run_job(one)
    rows = curve(one.folder)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert all(0 <= float(row["val/acc"]) <= 1 and float(row["val/loss"]) > 0 for row in rows)
    assert (result.metrics["val/count"], result.metrics["test/count"]) == (2, 2)
    assert result.score == result.metrics["test/acc"]
    both = own_run(tmp_path / "2", pets, "data.final=train+val")
    assert not any(name.startswith("val/") for name in run.run_job(both).metrics)
    without = own_run(tmp_path / "3", pets)
    monkeypatch.setattr(type(without.datamodule), "validates", False)
    alone = run.run_job(without)
    assert equal(tensors(without.folder), tensors(one.folder)), "scoring val changes nothing"
    assert {
        name: value for name, value in result.metrics.items() if not name.startswith("val/")
    } == alone.metrics


def test_early_stopping_without_val_images_is_refused(tmp_path):
    root = write_folder(tmp_path / "shades", ("dark", "light"), 4, splits=("train", "test"))
    job = own_run(tmp_path, root, "callbacks=[none,early_stopping]").job
    (outcome,) = run_all.run_all([job])
    assert outcome.reason == (
        "callbacks.early_stopping watches val/acc, but shades has no val images: add them, or leave the callback "
        "out"
    )


@pytest.mark.slow
def test_early_stopping_ends_a_final_run_and_the_test_score_is_that_of_its_last_epoch(tmp_path, pets):
    stops = ("callbacks=[none,early_stopping]", "callbacks.early_stopping.patience=1", "recipe.lr=0.0")
    done = call("train", *tiny(tmp_path / "logs", *words(tmp_path, pets, *stops, "recipe.epochs=9")))
    assert done.returncode == 0, done.stderr
    (folder,) = (path.parent for path in (tmp_path / "logs").rglob("result.json"))
    assert len(curve(folder)) == 2, "the first, and one that is no better"
    assert read_result(folder).metrics["test/count"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("method=da_vpt", "recipe.mixup=0.2"), "would not follow recipe.mixup=0.2: leave that out"),
        (
            ("data=vtab/clevr_count", "data.augment=light"),
            "data.augment does not suit clevr_count, whose labels",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_before_data_are_read(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        refused(tmp_path, *words)


def refused(folder, *words):
    job = tiny_job(folder, *words)
    run_all.check_all([job])
    run.build_data(job, SimpleNamespace(image_size=224, mean=(0.5,) * 3, std=(0.5,) * 3))


def test_how_often_val_is_scored_is_a_part_of_a_run_that_stops_early(tmp_path):
    stops, every = "callbacks=[default,early_stopping]", "trainer.check_val_every_n_epoch=2"

    def folder(*given):
        return run.prepare(tiny_job(tmp_path, "split=tune", *given)).folder

    assert folder() == folder(every)
    assert folder(stops) != folder(stops, every)


def test_a_run_that_was_ended_early_and_then_killed_trains_no_further(tmp_path, pets, monkeypatch):
    stops = ("callbacks=[early_stopping]", "callbacks.early_stopping.patience=1", "recipe.epochs=6")
    given = (*stops, "+callbacks.early_stopping.min_delta=1.0")  # no epoch is better by as much
    one, killed = (own_run(tmp_path / name, pets, *given) for name in ("one", "killed"))
    result = run.run_job(one)
    assert len(curve(one.folder)) == 2
    with monkeypatch.context() as patch:
        patch.setattr(TuningModule, "on_test_epoch_end", lambda module: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.run_job(killed)
    again = run.run_job(own_run(tmp_path / "killed", pets, *given))
    assert equal(tensors(one.folder), tensors(killed.folder))
    assert curve(killed.folder) == curve(one.folder)
    assert again.metrics == result.metrics


def test_early_stopping_by_a_figure_that_is_not_logged_names_those_that_are(tmp_path, pets):
    for figure in ("val/map", "train/accuracy"):
        given = ("callbacks=[early_stopping]", f"callbacks.early_stopping.monitor={figure}")
        sentence = (
            rf"^unknown callbacks\.early_stopping\.monitor '{figure}': .*train/acc, train/loss, val/acc"
        )
        with pytest.raises(UserError, match=sentence):
            unit._run_one(own_run(tmp_path, pets, *given).job)
