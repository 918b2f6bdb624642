"""Segmentation runs and states in use: folders of masks, scores of several scales, and the mean of runs."""

import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import visprompt
from helpers.cli import composed, frozen, tiny_run
from helpers.segmented import CLASSES, picture, write_state
from visprompt.data.mask_pictures import overlay
from visprompt.data.transforms import to_input
from visprompt.errors import UserError
from visprompt.models.dense_prediction import MultiScale, mask_of
from visprompt.models.tuned_state import load_state
from visprompt.runs import evaluate, predict, run

pytestmark = frozen
SIZES = {"a.png": (40, 90), "sub/b.png": (70, 64)}


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures of different sizes, one of which is damaged, and a file of another format."""
    folder = tmp_path / "photos"
    for seed, (name, size) in enumerate(SIZES.items()):
        picture(folder / name, *size, seed=seed)
    (folder / "bad.jpg").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("of the beach")
    return folder


def label(state, images, output, *arguments):
    """Calls predict with what `src/predict.py` passes on."""
    given = (f"state={state}", f"images={images}", f"output={output}", "device=cpu", *arguments)
    with composed("predict", *given) as cfg:
        names = ("state", "images", "output", "batch_size", "device", "weights", "overwrite", "max_pixels")
        predict.predict(**{name: cfg[name] for name in (*names, "multi_scale")})


def rows(output):
    with (output / "shares.csv").open(newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def test_a_folder_of_images_becomes_a_folder_of_masks_overlays_and_shares(tmp_path, photos, capsys):
    state, output = write_state(tmp_path / "state.safetensors"), tmp_path / "masks"
    label(state, photos, output)
    said = " ".join(capsys.readouterr().out.split())
    assert f"left out: {photos}/bad.jpg: cannot be decoded" in said
    assert said.endswith(f"2 of 3 files labelled: {output} left out: files of other formats (1)")
    written = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert written == {"shares.csv", *(name + end for name in SIZES for end in (".png", ".overlay.jpg"))}
    classifier, table, how = visprompt.load(state), rows(output), load_state(state).preprocessing
    for name, size in SIZES.items():
        pixels = np.asarray(Image.open(photos / name))
        with torch.inference_mode():
            expected = mask_of(classifier(to_input(pixels, how)[None])[0], size)
        with Image.open(output / f"{name}.png") as mask, Image.open(output / f"{name}.overlay.jpg") as shown:
            assert np.array_equal(np.asarray(mask), expected.labels)
            off = np.asarray(shown, np.int16) - overlay(pixels, expected.labels)
        assert np.abs(off).mean() < 12, "JPEG loses a little"
        shares = [float(table[name][one]) for one in CLASSES]
        assert shares == pytest.approx([np.mean(expected.labels == i) for i in range(3)], abs=1e-6)
        assert float(table[name]["probability"]) == pytest.approx(expected.probability, abs=1e-5)
    label(state, photos, output, "overwrite=true", "multi_scale=true")
    with torch.inference_mode():
        several = mask_of(MultiScale(classifier)(to_input(pixels, how)[None])[0], size)
    assert np.array_equal(np.asarray(Image.open(output / f"{name}.png")), several.labels)
    assert not np.array_equal(several.labels, expected.labels)


def test_masks_inside_the_folder_of_images_are_not_images(tmp_path, photos):
    state = write_state(tmp_path / "state.safetensors")
    for more in ((), ("overwrite=true",)):
        label(state, photos, photos / "masks", *more)
        assert rows(photos / "masks").keys() == SIZES.keys()


def test_without_an_output_it_is_a_folder_for_masks_and_a_file_for_labels(tmp_path, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    label(write_state(tmp_path / "state.safetensors"), photos, "null")
    assert rows(tmp_path / "predictions").keys() == SIZES.keys()
    label(write_state(tmp_path / "flat.safetensors", kind="single_label"), photos, "null")
    assert (tmp_path / "predictions.csv").read_text().startswith("path,class,probability,sky")


def test_what_cannot_be_written_or_combined_is_one_sentence(tmp_path, photos, monkeypatch):
    state = write_state(tmp_path / "state.safetensors")
    flat = write_state(tmp_path / "flat.safetensors", "flat", kind="single_label")

    def refused(sentence, state=state, images=photos, output=tmp_path / "masks", more=()):
        with pytest.raises(UserError, match=sentence):
            label(state, images, output, *more)

    refused("state.safetensors is the state of a segmentation task, .*: give it alone", f"[{flat},{state}]")
    refused("multi_scale=true is for segmentation states, and .*flat", flat, more=("multi_scale=true",))
    refused(
        r"masks.CSV is the name of a table, and the masks .* go to a folder", output=tmp_path / "masks.CSV"
    )
    refused("is a file, and the masks of a segmentation state go to a folder", output=flat)
    refused("holds other files, such as a.png: give the name", output=photos, more=("overwrite=true",))
    assert (photos / "a.png").is_file()
    (tmp_path / "none").mkdir()
    refused("has no image that can be read: give an image or a folder", images=tmp_path / "none")
    assert not (tmp_path / "masks").exists()
    label(state, photos / "a.png", tmp_path / "masks")
    corrected = tmp_path / "masks" / "a.png"  # by hand; the mask is a.png.png
    shutil.copy(tmp_path / "masks" / "a.png.png", corrected)
    refused("holds other files, such as a.png: give the name", more=("overwrite=true",))
    corrected.unlink()
    refused("masks exists: give overwrite=true to replace it, or the name of a new folder")
    monkeypatch.setattr(visprompt.models.classifier.Classifier, "forward", lambda _, x: x * torch.nan)
    refused("the state gives no finite probabilities for .*/a.png", more=("overwrite=true",))
    assert rows(tmp_path / "masks").keys() == {"a.png"}, "what was there stays"


def score(folders, *arguments):
    given = (f"run={folders}", "trainer=cpu", "callbacks=none", "+trainer.limit_test_batches=1", *arguments)
    with composed("eval", *given) as cfg:
        return evaluate.evaluate(cfg)


@pytest.mark.slow
def test_runs_are_scored_on_one_scale_and_on_several_and_as_a_mean(tmp_path, capsys):
    options = ("data=demo/digits_masks", "recipe.epochs=1", "recipe.warmup_epochs=0")
    jobs = [tiny_run(tmp_path, *options, f"seed={seed}") for seed in (0, 1)]
    for job in jobs:
        run.run_job(job)
    first, second = (job.folder for job in jobs)
    capsys.readouterr()
    single = score(first)
    several = score(first, "multi_scale=true")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("test/miou")]
    assert len(said) == 3, "one line without multi_scale, two with it"
    assert said[0] == said[1]
    assert f"{100 * single:.2f} %" in said[0]
    assert f"{100 * several:.2f} %" in said[2]
    assert "(multi-scale with flip)" in said[2]
    classifier = visprompt.load(first, weights=str(tmp_path / "weights.safetensors"))
    batch = next(iter(jobs[0].datamodule.test_dataloader()))
    figures = classifier.kind.figures(11)
    with torch.inference_mode():
        images = jobs[0].datamodule.on_after_batch_transfer(batch, 0).images
        figures.update(MultiScale(classifier).eval()(images), batch.labels, batch.weights)
    assert several == pytest.approx(figures.compute()["miou"], abs=1e-6)
    assert score(f"[{first},{second}]") > 0
    assert "2 runs averaged" in capsys.readouterr().out
    each = score(f"[{first},{second}]", "average=false")
    assert each == pytest.approx((single + score(second)) / 2, abs=1e-6)
    with pytest.raises(UserError, match="multi_scale=true scores one run, or the mean of several"):
        score(f"[{first},{second}]", "average=false", "multi_scale=true")
