"""One run: what it leaves, what decides its folder, and that it is skipped, resumed or run anew with equal bits."""

import csv
import json
import math
import re
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
import yaml
from safetensors import safe_open

from helpers import miniatures
from helpers.cli import content, frozen, tiny_job, tiny_run
from visprompt.errors import UserError
from visprompt.models.scores import wilson
from visprompt.models.tuned_state import load_state
from visprompt.models.tuning_module import TuningModule
from visprompt.runs import run, unit
from visprompt.runs.job import Job
from visprompt.runs.result import cell, read_result

pytestmark = frozen


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def whole(logs):
    """The uninterrupted run and its result for any options."""
    done = {}

    def get(*options):
        if options not in done:
            one = tiny_run(logs, *options)
            done[options] = one, run.run_job(one)
        return done[options]

    return get


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_final_run_leaves_exactly_these_files_and_no_pickle(whole):
    one, _ = whole()
    assert set(content(one.folder)) == {
        *("config.yaml", "metrics.csv", "result.json", "tuned.safetensors", "confusion.csv", "classes.csv")
    }
    for file in one.folder.rglob("*"):
        data = file.read_bytes()
        assert not re.match(rb"\x80[\x02-\x05]|PK\x03\x04", data), (
            f"{file} begins like a pickle or an archive of them"
        )
    with safe_open(one.folder / "tuned.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["head.bias", "head.weight", "prompts"]


def test_the_curve_has_a_row_for_every_epoch_and_no_validation_in_final(whole):
    one, result = whole()
    found = rows(one.folder)
    assert [(row["epoch"], row["step"]) for row in found] == [("0", "16"), ("1", "32"), ("2", "48")]
    assert list(found[0]) == ["epoch", "step", "lr", "train/acc", "train/loss"]
    assert float(found[-1]["train/acc"]) == result.metrics["train/acc"]
    assert float(found[-1]["train/loss"]) < float(found[0]["train/loss"])
    peak = 0.4 * 64 / 256  # at the end of the warm-up, after which a cosine falls to zero
    assert float(found[0]["lr"]) == pytest.approx(peak)
    last = peak * 0.5 * (1 + math.cos(math.pi * 31 / 32))  # the 32nd of 32 steps behind the warm-up
    assert float(found[2]["lr"]) == pytest.approx(last)


def test_what_the_result_says(whole):
    one, result = whole()
    assert read_result(one.folder) == result
    stored = json.loads((one.folder / "result.json").read_text())
    assert (stored["status"], stored["task"], stored["split"], stored["seed"]) == (
        "finished",
        "digits",
        "final",
        0,
    )
    assert (stored["attempt"], stored["precision"], stored["diverged_step"]) == (0, "32-true", None)
    assert set(stored["metrics"]) == {
        "train/acc",
        "train/loss",
        "test/acc",
        "test/balanced_acc",
        "test/count",
        "test/ece",
    }
    assert stored["metrics"]["test/count"] == 797
    assert 0.2 < stored["metrics"]["test/acc"] < 0.6
    assert stored["metrics"]["test/acc"] * 797 == pytest.approx(
        round(stored["metrics"]["test/acc"] * 797), abs=1e-9
    )
    assert list(stored["per_class"]) == [str(digit) for digit in range(10)]
    present = list(stored["per_class"].values())
    assert sum(present) / 10 == pytest.approx(stored["metrics"]["test/balanced_acc"], abs=1e-6)
    backbone = sum(p.numel() for p in one.backbone.module.parameters())
    tuned = stored["tuned"]
    assert (tuned["parameters"], tuned["head_parameters"]) == (2 * 4 * 24, 10 * 25)
    assert (tuned["share"], tuned["depth"], tuned["num_tokens"]) == (2 * 4 * 24 / backbone, 2, 4)
    assert tuned["bytes"] == (one.folder / "tuned.safetensors").stat().st_size
    assert stored["method"]["name"] == "vpt_deep"
    assert stored["recipe"]["epochs"] == 3
    assert stored["data"]["source"] == "scikit-learn"
    assert stored["data"]["fingerprint"] == one.datamodule.fingerprint
    assert stored["data"]["sizes"] == {"train800": 800, "val200": 200, "test": 797}
    assert stored["data"]["preprocessing"]["size"] == 64
    assert stored["backbone"]["sha256"] == one.backbone.sha256
    assert "weights" not in stored["backbone"]
    assert stored["backbone"]["carried_blocks"] == []
    assert stored["backbone"]["pooling"] == "token"
    assert set(stored["versions"]) == {
        *("python", "torch", "torchvision", "timm", "lightning", "safetensors", "visprompt", "git_commit")
    }
    assert stored["machine"] == {"device": "cpu", "devices": 1, "accumulation": 1, "threads": 1}
    assert 0 < stored["time"]["train_s"] < stored["time"]["last_process_s"]
    assert stored["peak_memory"]["bytes"] > 10e6


@pytest.mark.parametrize("options", [(), ("split=tune", "seed=3")])
def test_the_tables_of_classes_are_of_the_scored_images(whole, options):
    one, result = whole(*options)
    with (one.folder / "confusion.csv").open(newline="") as file:
        pairs = {(row["true"], row["predicted"]): int(row["images"]) for row in csv.DictReader(file)}
    size = 200 if options else 797
    assert sum(pairs.values()) == size
    assert sum(count for (true, taken), count in pairs.items() if true == taken) / size == result.score
    with (one.folder / "classes.csv").open(newline="") as file:
        classes = {row.pop("class"): row for row in csv.DictReader(file)}
    assert list(classes) == list(result.per_class)
    for name, row in classes.items():
        count = sum(count for (true, _), count in pairs.items() if true == name)
        taken = sum(count for (_, predicted), count in pairs.items() if predicted == name)
        hits = pairs.get((name, name), 0)
        assert int(row["images"]) == count
        assert float(row["recall"]) == pytest.approx(result.per_class[name], abs=1e-6)
        assert float(row["precision"] or 0) == pytest.approx(hits / max(taken, 1), abs=1e-6)
        assert float(row["f1"]) == pytest.approx(2 * hits / (count + taken), abs=1e-6)
    names = ("metrics.csv", "confusion.csv", "classes.csv")
    assert result.files == {name: sha256((one.folder / name).read_bytes()).hexdigest() for name in names}
    assert result.interval == wilson(result.score, size)


def test_the_config_is_whole_and_resolved(whole):
    one, _ = whole()
    stored = yaml.safe_load((one.folder / "config.yaml").read_text())
    assert stored["task"] == "digits"
    assert "rows" not in stored["recipe"]
    assert Job(**stored) == one.job
    assert run.prepare(Job(**stored)).folder == one.folder


SAME = [
    ("logger=tensorboard",),
    ("callbacks=default",),
    ("tags=[a,b]",),
    ("data.num_workers=2", "data.pin_memory=true"),
    ("trainer=ddp_sim",),
    ("trainer.devices=2", "trainer.strategy=ddp"),
    ("trainer.accumulate_grad_batches=2",),
    ("resume_every_n_epochs=2",),
    ("rerun=true",),
    ("compile=true",),
    ("recipe.grid={recipe.lr:[1]}",),
    ("paths.data_dir=/somewhere/else",),
    ("callbacks=none",),
    ("method.dropout=0", "data.fraction=1", "precision=32"),
]
OTHER = [
    ("data=demo/digits_crowded",),
    ("method.num_tokens=5",),
    ("method.dropout=0.1",),
    ("method=linear",),
    ("recipe.lr=0.3",),
    ("recipe.batch_size=32",),
    ("split=tune",),
    ("seed=1",),
    ("precision=bf16-mixed",),
    ("backbone.weights=null", "backbone.pretrained=false"),
    ("backbone.image_size=32", "backbone.weights=null", "backbone.pretrained=false"),
    ("backbone.exact=false",),
    ("+trainer.limit_train_batches=0.5",),
    ("+trainer.gradient_clip_val=1.0",),
    (
        "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: train/loss, patience: 1}",
    ),
    (
        "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: train/loss, patience: 2}",
    ),
]


@pytest.mark.parametrize("options", SAME, ids=" ".join)
def test_what_leaves_the_numbers_alone_leaves_the_folder_alone(logs, whole, options):
    assert tiny_run(logs, *options).folder == whole()[0].folder


def test_a_whole_number_is_the_rate_that_it_means(logs):
    words = ("recipe.lr={}", "recipe.head_lr={}", "recipe.weight_decay={}", "method.dropout={}")
    names = [tiny_run(logs, *(word.format(value) for word in words)).folder.name for value in ("0", "0.0")]
    assert names[0] == names[1]


def test_a_run_that_scored_nothing_is_no_result(tmp_path):
    for split in ("tune", "final"):
        one = tiny_run(
            tmp_path, f"split={split}", "+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1"
        )
        limits = {"limit_val_batches": 0, "limit_test_batches": 0}  # as no command line may say
        one = replace(
            one, job=one.job.model_copy(update={"trainer": one.job.trainer.model_copy(update=limits)})
        )
        with pytest.raises(UserError, match=r"^nothing was scored: trainer\.limit_val_batches and"):
            run.run_job(one)
        assert not (one.folder / "result.json").exists()


def test_another_results_folder_has_the_same_hash(tmp_path, whole):
    other = tiny_run(tmp_path)
    assert other.folder.parent == tmp_path / "digits" / "vpt_deep"
    assert other.folder.name == whole()[0].folder.name


def test_what_decides_the_numbers_decides_the_folder(logs, whole):
    folders = [whole()[0].folder, *(tiny_run(logs, *options).folder for options in OTHER)]
    assert len(set(folders)) == 1 + len(OTHER)
    assert not any(folder.exists() for folder in folders[1:]), "prepare() alone writes nothing"


def test_the_best_on_test_is_a_diagnostic_that_changes_nothing_else(tmp_path, whole):
    one = tiny_run(tmp_path, "diagnostics.best_on_test=true")
    plain, expected = whole()
    assert one.folder.name == plain.folder.name
    result = run.run_job(one)
    curve = [float(row["leak/test_acc"]) for row in rows(one.folder)]
    assert len(curve) == 3
    assert result.metrics["leak/best_on_test"] == pytest.approx(max(curve))
    assert result.metrics["leak/test_acc"] == pytest.approx(result.metrics["test/acc"], abs=1e-6)
    assert {k: v for k, v in result.metrics.items() if "leak" not in k} == expected.metrics
    assert result.score == expected.score
    assert not any("leak" in name for name in expected.metrics)
    saved = [(folder / "tuned.safetensors").read_bytes() for folder in (one.folder, plain.folder)]
    assert saved[0] == saved[1]
    tuned = run.run_job(tiny_run(tmp_path, "diagnostics.best_on_test=true", "split=tune"))
    assert not any("leak" in name or "test" in name for name in tuned.metrics)


def test_tune_scores_val200_and_never_test(whole, monkeypatch):
    monkeypatch.setattr(TuningModule, "test_step", None)  # is not called
    one, result = whole("split=tune", "seed=3")
    assert {name for name in result.metrics if not name.startswith("train/")} == {
        *("val/acc", "val/balanced_acc", "val/count", "val/ece", "val/loss")
    }
    assert result.metrics["val/count"] == 200
    assert result.score == result.metrics["val/acc"]
    found = rows(one.folder)
    assert [row["step"] for row in found] == ["13", "26", "39"]
    assert float(found[-1]["val/acc"]) == pytest.approx(result.metrics["val/acc"], abs=1e-6)
    assert len({row["val/loss"] for row in found}) == 3


def test_tune_is_scored_after_the_last_epoch_however_often_it_looks(tmp_path, logs, whole):
    one, result = whole("split=tune", "seed=3")
    seldom = tiny_run(tmp_path, "split=tune", "seed=3", "trainer.check_val_every_n_epoch=2")
    assert seldom.folder.name == one.folder.name
    assert run.run_job(seldom).metrics == pytest.approx(result.metrics, rel=1e-6)
    every, found = rows(one.folder), rows(seldom.folder)
    assert found[1] == every[1]
    for place in (0, 2):
        assert {k: v for k, v in found[place].items() if v} == {
            k: v for k, v in every[place].items() if not k.startswith("val/")
        }


def test_a_diverged_run_says_its_step_and_is_not_run_again(tmp_path, monkeypatch):
    one = tiny_run(tmp_path, "recipe.optimizer=sgd", "recipe.lr=1e30", "recipe.head_lr=null")
    result = run.run_job(one)
    assert (result.status, result.score) == ("diverged", float("-inf"))
    assert result.diverged_step in (1, 2, 3)
    assert read_result(one.folder) == result
    assert json.loads((one.folder / "result.json").read_text())["diverged_step"] == result.diverged_step
    assert set(content(one.folder)) <= {"config.yaml", "metrics.csv", "result.json"}
    assert not (one.folder / "resume").exists()
    monkeypatch.setattr(run, "_train", None)
    assert run.run_job(one) == result


def test_a_last_step_that_spoils_the_state_is_a_divergence_too(tmp_path):
    options = ("recipe.optimizer=sgd", "recipe.lr=5e37", "recipe.head_lr=null", "recipe.batch_size=1000")
    one = tiny_run(
        tmp_path, *options, "recipe.epochs=1", "recipe.warmup_epochs=0", "recipe.weight_decay=1e38"
    )
    result = run.run_job(one)
    assert (result.status, result.diverged_step) == ("diverged", 1)


@pytest.mark.parametrize("split", ["tune", "final"])
def test_a_last_step_that_spoils_what_is_scored_is_a_divergence_too(tmp_path, split):
    options = ("recipe.optimizer=sgd", "recipe.lr=1e25", "recipe.head_lr=null", "recipe.batch_size=1000")
    one = tiny_run(tmp_path, *options, "recipe.epochs=1", "recipe.warmup_epochs=0", f"split={split}")
    result = run.run_job(one)
    assert (result.status, result.diverged_step) == ("diverged", 1)
    assert read_result(one.folder) == result
    json.loads((one.folder / "result.json").read_text(), parse_constant=lambda word: pytest.fail(word))


def test_what_the_trainer_does_to_the_numbers_is_recorded(tmp_path, whole):
    assert whole()[1].trainer == {}
    options = ("+trainer.gradient_clip_val=0.5", "+trainer.limit_train_batches=1", "recipe.epochs=1")
    one = tiny_run(tmp_path, *options, "recipe.warmup_epochs=0")
    result = run.run_job(one)
    assert result.trainer == {"gradient_clip_val": 0.5, "limit_train_batches": 1}
    assert read_result(one.folder) == result


def test_peak_memory_is_that_of_where_the_run_was(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 + device.index)
    assert run.environment.peak_memory(torch.device("cuda", 1)) == {"bytes": 8, "of": "GPU allocations"}
    found = run.environment.peak_memory(torch.device("cpu"))
    assert found["of"] == "process, this run"
    assert found["bytes"] > 10e6


def test_own_images_with_given_splits(tmp_path, capsys):
    root = miniatures.write_folder(
        tmp_path / "pets", ("cat", "dog", "eel"), 6, splits=("train", "val", "test")
    )
    for number in range(3):
        (root / "test" / "eel" / f"000{number}.png").unlink()
    options = ("data=folder", f"data.root={root}", f"paths.data_dir={tmp_path}/data", "recipe.batch_size=8")
    one = tiny_run(tmp_path / "logs", *options)
    result = run.run_job(one)
    assert one.folder.parent == tmp_path / "logs" / "pets" / "vpt_deep"
    assert result.data["sizes"] == result.data["summary"]["images"] == {"train": 18, "val": 18, "test": 15}
    assert result.data["summary"]["smallest"] == 6
    assert capsys.readouterr().out.splitlines()[0] == (
        f"data: pets in {root}: 3 classes (cat, dog, eel); images: train 18, val 18, test 15; smallest "
        "class: cat with 6 training images"
    )
    hits = hand_counted(one)
    assert result.metrics["test/count"] == 15
    assert result.metrics["test/acc"] == sum(h for h, _ in hits) / 15
    shares = [h / n for h, n in hits]
    assert result.per_class == pytest.approx(dict(zip(("cat", "dog", "eel"), shares, strict=True)))
    assert result.metrics["test/balanced_acc"] == pytest.approx(sum(shares) / 3)
    tuned = run.run_job(tiny_run(tmp_path / "logs", *options, "split=tune"))
    assert tuned.metrics["val/count"] == 18
    assert "test/acc" not in tuned.metrics


def test_without_test_images_a_run_is_refused_or_marked_as_not_scored(tmp_path, capsys):
    root = miniatures.write_folder(tmp_path / "pets", ("cat", "dog"), 6, splits=("train", "val"))
    options = ("data=folder", f"data.root={root}", f"paths.data_dir={tmp_path}/data", "recipe.batch_size=4")
    with pytest.raises(
        UserError, match=r"^pets has no test images: .* split=tune, .* or give data.test=none"
    ):
        tiny_run(tmp_path / "logs", *options)
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "logs" / "pets").exists()
    one = tiny_run(tmp_path / "logs", *options, "data.test=none", "diagnostics.best_on_test=true")
    result = run.run_job(one)
    assert result.status == "unscored"
    assert math.isnan(result.score)
    assert not [name for name in result.metrics if name.startswith(("test/", "leak/"))]
    assert result.metrics["val/count"] == 12, "a curve, and no score"
    assert result.per_class == {}
    assert load_state(one.folder).task == "pets"
    assert read_result(one.folder) == result
    capsys.readouterr()
    unit.show(result, one)
    assert "not scored: there are no test images" in capsys.readouterr().out
    assert run.run_job(one) == result, "it is finished"
    with pytest.raises(UserError, match="have no test score cannot be averaged"):
        cell([result])


def hand_counted(one):
    """Hits and images of each class, one image at a time and with another library's resizing left out."""
    from visprompt.data.sources.images import decode
    from visprompt.data.transforms import to_input
    from visprompt.models.tuned_state import load_state
    from visprompt.runs.evaluate import restore

    state = load_state(one.folder)
    classifier = restore(state, one.folder, one.backbone)
    found = []
    for label, name in enumerate(state.class_names):
        files = sorted((one.datamodule.root / "test" / name).iterdir())
        with torch.no_grad():
            said = [
                int(classifier(to_input(decode(file), state.preprocessing)[None]).argmax()) for file in files
            ]
        found.append((said.count(label), len(files)))
    return found


def test_words_that_only_a_run_can_judge(tmp_path):
    for options, sentence in {
        ("split=test",): "unknown split 'test': did you mean tune",
        ("+recipe.lrr=1",): "unknown key of recipe 'lrr': did you mean lr",
        ("recipe.lr=fast",): "recipe.lr=fast does not fit: give a finite number, 0 or above",
        ("recipe.epochs=2.5",): "recipe.epochs=2.5 does not fit: give a whole number, 1 or more",
        ("+trainer.max_epoch=3",): "unknown key 'trainer.max_epoch': did you mean trainer.max_epochs",
        ("+data.foo=3",): "unknown key 'data.foo': did you mean data.fraction",
        ("data=folder", "data.root=/nowhere"): "data.root=/nowhere is not a folder",
        ("data=folder", "data.root=/", "data.final=all"): "unknown data.final 'all'",
        (
            "recipe.batch_size=30",
            "trainer.accumulate_grad_batches=4",
        ): "recipe.batch_size=30 cannot be dealt to 1 dev",
        ("+method.tokens=3",): "unknown option of method vpt_deep 'tokens': did you mean num_tokens",
    }.items():
        with pytest.raises(UserError, match=sentence):
            run.run_job(run.prepare(tiny_job(tmp_path, *options)))
