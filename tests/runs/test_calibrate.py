"""The temperature of a run: which images it is fitted on, and that nothing else changes by it."""

import csv

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from PIL import Image

from helpers import miniatures
from helpers.cli import content, equal, frozen, tensors, tiny_run
from visprompt.data.datamodule import TaskDataModule
from visprompt.data.sources import digits
from visprompt.models.bank import Bank
from visprompt.models.kind import SINGLE_LABEL
from visprompt.models.tuned_state import load_state
from visprompt.models.tuning_module import TuningModule
from visprompt.reports import inspection
from visprompt.runs import attempt_files, calibrate, run
from visprompt.runs.predict import predict
from visprompt.serving.batching import answers
from visprompt.serving.pictures import Input

pytestmark = frozen


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    one = tiny_run(tmp_path_factory.mktemp("logs"), "split=tune")
    return one, run.run_job(one)


def logits_of(one, split_set="val200"):
    """The logits of a run's classifier, computed by hand."""
    opened = inspection.open_run(one.folder)
    pixels, labels, _ = digits.compose("digits", split_set)
    with torch.no_grad():
        logits = opened.classifier((torch.from_numpy(pixels) / 255 - 0.5) / 0.5)
    return logits, torch.from_numpy(np.asarray(labels))


def test_a_tune_run_fits_it_on_its_validation_images(tuned):
    one, _ = tuned
    expected = SINGLE_LABEL.fit_temperature(*logits_of(one))
    assert load_state(one.folder).temperature == pytest.approx(expected, rel=1e-4)
    assert abs(expected - 1) > 0.01, "else it would change nothing"


def test_it_changes_no_number_of_the_run(tuned, tmp_path, monkeypatch):
    one, result = tuned
    monkeypatch.setattr(calibrate, "has_unseen_images", lambda data: False)
    other = tiny_run(tmp_path, "split=tune")
    without = run.run_job(other)
    assert other.folder.name == one.folder.name
    assert without.metrics == result.metrics
    assert equal(tensors(other.folder), tensors(one.folder))
    assert load_state(other.folder).temperature is None
    files = ("classes.csv", "confusion.csv", "metrics.csv")
    assert {name: content(other.folder)[name] for name in files} == {
        name: content(one.folder)[name] for name in files
    }


def test_a_run_that_died_after_its_last_epoch_has_the_same(tuned, tmp_path, monkeypatch):
    one, _ = tuned
    half = tiny_run(tmp_path, "split=tune")
    with monkeypatch.context() as patch:
        patch.setattr(attempt_files, "save_state", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.run_job(half)
    run.run_job(tiny_run(tmp_path, "split=tune"))
    states = [(folder / "tuned.safetensors").read_bytes() for folder in (half.folder, one.folder)]
    assert states[0] == states[1]


def test_it_is_fitted_on_the_runs_device_to_which_the_classifier_is_moved_again(tmp_path, monkeypatch):
    """Lightning moves it to the CPU first; there, the weights that autocast for CUDA reads do not fit."""
    events, teardown, forward = [], SingleDeviceStrategy.teardown, TuningModule.forward
    monkeypatch.setattr(SingleDeviceStrategy, "teardown", lambda s: events.append("teardown") or teardown(s))
    monkeypatch.setattr(TuningModule, "forward", lambda m, x: events.append("forward") or forward(m, x))
    monkeypatch.setattr(TuningModule, "to", lambda m, device: events.append(device) or m)
    run.run_job(tiny_run(tmp_path, "split=tune", "recipe.epochs=1", "recipe.warmup_epochs=0"))
    after = events[events.index("teardown") + 1 :]
    assert after[0] == torch.device("cpu")
    assert "forward" in after


def test_a_final_run_that_trains_on_them_has_none(tmp_path):
    one = tiny_run(tmp_path, "recipe.epochs=1", "recipe.warmup_epochs=0")
    run.run_job(one)
    assert load_state(one.folder).temperature is None


@pytest.mark.parametrize(("final", "has"), [("train", True), ("train+val", False)])
def test_a_final_run_on_own_images_reads_val_only_if_it_is_not_trained_on(tmp_path, final, has, monkeypatch):
    root = miniatures.write_folder(tmp_path / "pets", ("cat", "dog"), 12, splits=("train", "val", "test"))
    options = ("data=folder", f"data.root={root}", f"paths.data_dir={tmp_path}/data", "recipe.batch_size=8")
    one = tiny_run(
        tmp_path / "logs", *options, f"data.final={final}", "recipe.epochs=1", "recipe.warmup_epochs=0"
    )
    monkeypatch.setattr(calibrate, "MOST", 15)
    sizes, original = [], TaskDataModule.feature_dataloader

    def note(data, dataset):
        sizes.append(len(dataset))
        return original(data, dataset)

    monkeypatch.setattr(TaskDataModule, "feature_dataloader", note)
    run.run_job(one)
    assert sizes == ([15] if has else [])
    assert has or load_state(one.folder).temperature is None


def test_probabilities_of_predict_and_of_the_service_are_calibrated(tuned, tmp_path):
    one, _ = tuned
    state = load_state(one.folder)
    logits, _ = logits_of(one, "val200")
    pixels, _, _ = digits.compose("digits", "val200")
    for number in range(3):
        Image.fromarray(pixels[number].transpose(1, 2, 0)).save(tmp_path / f"{number}.png")
    expected = (logits[:3] / state.temperature).softmax(1)
    weights = str(one.job.backbone.weights)
    predict(
        str(one.folder),
        str(tmp_path),
        output=str(tmp_path / "o.csv"),
        batch_size=2,
        device="cpu",
        weights=weights,
    )
    with (tmp_path / "o.csv").open(newline="") as file:
        found = [[float(row[str(digit)]) for digit in range(10)] for row in csv.DictReader(file)]
    assert torch.tensor(found).numpy() == pytest.approx(expected.numpy(), abs=2e-6)
    opened = inspection.open_run(one.folder)
    assert opened.classifier.temperature == state.temperature
    bank = Bank(opened.backbone)
    task = bank.add("digits", one.folder)
    inputs = list((torch.from_numpy(pixels[:3]) / 255 - 0.5) / 0.5)
    served = torch.stack(answers(bank, [Input(x, (64, 64)) for x in inputs], [task] * 3))
    assert served.numpy() == pytest.approx(expected.numpy(), abs=2e-6)
    assert torch.stack(bank(inputs, "digits")).numpy() == pytest.approx(logits[:3].numpy(), abs=1e-4)
