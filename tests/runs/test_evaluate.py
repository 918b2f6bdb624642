"""A saved state scores what its run scored, labels images as that score says, and fits nothing else."""

import csv
import os
import shutil
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers import miniatures
from helpers.cli import composed, content, frozen, tiny_run
from helpers.names import NASTY
from helpers.wide import case
from visprompt.data.sources import digits
from visprompt.errors import UserError
from visprompt.models.scores import in_percent, wilson
from visprompt.models.tensors import hash_tensors
from visprompt.models.tuned_state import load_state, save_state
from visprompt.reports import report
from visprompt.runs import evaluate as inference
from visprompt.runs import predict as prediction
from visprompt.runs import run
from visprompt.runs.job import Job
from visprompt.text import csv_cell, has_control

pytestmark = frozen
METHODS = {
    "vpt_deep": (),
    "vpt_shallow": ("method=vpt_shallow",),
    "linear": ("method=linear", "recipe.lr=0.4"),
    "full": ("method=full", "recipe.lr=0.02"),
}


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def trained(logs):
    """The folder and result of a finished run with any options."""
    done = {}

    def get(*options):
        if options not in done:
            one = tiny_run(logs, "recipe.epochs=2", *options)
            done[options] = one.folder, run.run_job(one)
        return done[options]

    return get


def evaluate(folder, *arguments):
    with composed("eval", f"run={folder}", "trainer=cpu", "callbacks=none", *arguments) as cfg:
        return inference.evaluate(cfg)


def predict(logs, folder, images, output, *arguments):
    given = (f"state={folder}", f"images={images}", f"output={output}", "device=cpu", *arguments)
    with composed("predict", f"weights={logs / 'weights.safetensors'}", *given) as cfg:
        names = ("state", "images", "output", "batch_size", "device", "weights", "overwrite", "max_pixels")
        prediction.predict(**{name: cfg[name] for name in names})
    with output.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", [case(m, fast=m in ("vpt_deep", "full")) for m in METHODS])
def test_eval_repeats_the_score_exactly_and_leaves_run_and_backbone_alone(logs, trained, method, capsys):
    folder, result = trained(*METHODS[method])
    before = content(folder)
    backbone = tiny_run(logs).backbone
    assert evaluate(folder) == result.metrics["test/acc"]
    percent, interval = f"{100 * result.metrics['test/acc']:.2f} %", in_percent(result.score, result.interval)
    balanced = f"test/balanced_acc {100 * result.metrics['test/balanced_acc']:.2f} %"
    said = " ".join(capsys.readouterr().out.split())
    recorded = (
        f"weights is {logs / 'weights.safetensors'}, as the run recorded it: weights=... names another place"
    )
    assert said.startswith(f"{recorded} the 10 classes, by F1 (%) ")
    assert said.endswith(
        f" all classes: {folder}/classes.csv confusion matrix: {folder}/confusion.csv test/acc {interval} on 797 "
        f"images (the run itself: {percent}), {balanced}, test/ece {100 * result.metrics['test/ece']:.2f} %"
    )
    with (folder / "confusion.csv").open(newline="") as file:
        wrong = [row for row in csv.DictReader(file) if row["true"] != row["predicted"]]
    worst = max(wrong, key=lambda row: int(row["images"]))
    assert f"│ {worst['true']} │ {worst['predicted']} │ {worst['images']} │" in said
    assert content(folder) == before
    assert hash_tensors(backbone.module.model.state_dict()) == backbone.sha256
    assert not backbone.module.training


def test_eval_takes_weights_that_lie_elsewhere(logs, trained, tmp_path, capsys):
    folder, result = trained()
    moved = shutil.copytree(folder, tmp_path / "moved")
    config = OmegaConf.load(moved / "config.yaml")
    config.backbone.weights = "/on/another/machine.safetensors"
    OmegaConf.save(config, moved / "config.yaml")
    with pytest.raises(
        UserError, match=r"no file of backbone weights at /on/another/machine.* give weights=FILE"
    ):
        evaluate(moved)
    for name in ("confusion.csv", "classes.csv"):  # which older runs do not have
        (moved / name).unlink()
    capsys.readouterr()
    assert evaluate(moved, f"weights={logs / 'weights.safetensors'}") == result.score
    said = capsys.readouterr().out
    assert "the 10 classes, by F1 (%)" in said
    assert "classes.csv" not in said


def test_eval_on_own_images_wherever_they_lie_and_refuses_when_they_have_changed(tmp_path, capsys):
    root = miniatures.write_folder(tmp_path / "pets", per_class=5, splits=("train", "test"))
    options = ("data=folder", f"data.root={root}", f"paths.data_dir={tmp_path}/data", "recipe.batch_size=4")
    one = tiny_run(tmp_path / "logs", *options)
    result = run.run_job(one)
    here = f"paths.data_dir={tmp_path}/data"
    assert evaluate(one.folder, here) == result.score
    recorded = f"data.root is {root}, as the run recorded it: data.root=... names another place"
    assert recorded in capsys.readouterr().out.splitlines()
    moved = shutil.move(root, tmp_path / "moved")
    with pytest.raises(UserError, match=rf"^data\.root={root} is not a folder"):
        evaluate(one.folder, here)
    capsys.readouterr()
    assert evaluate(one.folder, here, f"data.root={moved}") == result.score
    assert "data.root is" not in capsys.readouterr().out
    shutil.copy(moved / "test" / "cat" / "0000.png", moved / "test" / "dog" / "more.png")
    with pytest.raises(UserError, match=r"^the data of .* have changed since it was trained"):
        evaluate(one.folder, here, f"data.root={moved}")


def test_eval_refuses_what_has_no_test_score(trained, tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"holds no finished run: give the folder that was printed below its table$"
    ):
        evaluate(tmp_path)
    folder, _ = trained("split=tune")
    with pytest.raises(
        UserError, match=r"is a run of split=tune, which has no test set: give a run of split=final"
    ):
        evaluate(folder)
    folder, result = trained()
    for status, why in (("diverged", "diverged"), ("unscored", r"has no test score \(data\.test=none\)")):
        with monkeypatch.context() as patch:
            ended = result.model_copy(update={"status": status})
            patch.setattr(inference, "open_result", lambda _, ended=ended: ended)
            sentence = f"{why}, so there is nothing to repeat: give a finished run of split=final$"
            with pytest.raises(UserError, match=sentence):
                evaluate(folder)
    half = shutil.copytree(trained()[0], tmp_path / "half")
    (half / "result.json").unlink()
    with pytest.raises(
        UserError, match=r"half holds no finished run: give the folder that was printed below its table"
    ):
        evaluate(half)


def test_another_run_s_state_in_a_run_s_folder_is_refused(logs, trained, tmp_path):
    folder, other = shutil.copytree(trained()[0], tmp_path / "mixed"), trained("seed=1")[0]
    shutil.copy(other / "tuned.safetensors", folder)
    sentence = (
        f"{folder}/tuned.safetensors is not the state that result.json recorded: it is another run's or "
        "attempt's; copy the run's whole folder again, or run its command again"
    )
    images = miniatures.write_folder(tmp_path / "images", ("a", "b"), 1)
    calls = [
        lambda: evaluate(folder),
        lambda: evaluate(f"[{trained()[0]},{folder}]"),
        lambda: predict(logs, folder, images, tmp_path / "out.csv"),
        lambda: predict(logs, folder / "tuned.safetensors", images, tmp_path / "out.csv"),
    ]
    for call in calls:
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value) == sentence
    assert not (tmp_path / "out.csv").exists()
    alone = shutil.copy(other / "tuned.safetensors", tmp_path / "state.safetensors")
    assert len(predict(logs, alone, images, tmp_path / "out.csv")) == 2, "a state by itself is a task's"


def test_another_run_s_config_in_a_run_s_folder_decides_nothing(trained, tmp_path):
    """Its seed and recipe are not read: those of result.json are."""
    folder, result = trained()
    mixed = shutil.copytree(folder, tmp_path / "mixed")
    shutil.copy(trained("seed=1")[0] / "config.yaml", mixed)
    assert evaluate(mixed) == result.score


def test_a_state_whose_numbers_overflow_gives_no_probability(logs, trained, tmp_path):
    folder, _ = trained(*METHODS["linear"])
    state = load_state(folder)
    tensors = {name: torch.full_like(tensor, 3e38) for name, tensor in state.tensors.items()}
    save_state(tmp_path / "state.safetensors", replace(state, tensors=tensors))
    images = miniatures.write_folder(tmp_path / "images", ("a", "b"), 1)
    with pytest.raises(UserError) as error:
        predict(logs, tmp_path / "state.safetensors", images, tmp_path / "out.csv")
    assert str(error.value) == (
        f"{tmp_path}/state.safetensors gives no finite probabilities for a/0000.png: tune it again"
    )
    assert not (tmp_path / "out.csv").exists()


def test_several_states_are_scored_as_one_ensemble(logs, trained, capsys):
    folders, results = zip(*(trained(f"seed={seed}") for seed in (0, 1)), strict=True)
    with composed("eval", f"run=[{','.join(map(str, folders))}]", "trainer=cpu", "callbacks=none") as cfg:
        score = inference.evaluate(cfg)
    said = " ".join(capsys.readouterr().out.split())
    each = ", ".join(f"{100 * result.score:.2f} %" for result in results)
    shown = in_percent(score, wilson(score, 797))
    assert f"test/acc {shown} on 797 images (2 runs averaged; each by itself: {each})" in said
    assert "the 10 classes, by F1 (%)" in said
    assert "confusion.csv" not in said, "there is no such file of an ensemble"

    job = Job(**yaml.safe_load((folders[0] / "config.yaml").read_text()))
    prepared = run.prepare(job)
    states = [load_state(folder) for folder in folders]
    models = [
        prediction.restore(
            state, folder, replace(prepared.backbone, module=deepcopy(prepared.backbone.module))
        )
        for state, folder in zip(states, folders, strict=True)
    ]
    hits = 0
    for batch in prepared.datamodule.test_dataloader():
        images = prepared.datamodule.on_after_batch_transfer(batch, 0).images
        with torch.no_grad():
            logits = sum(model(images) for model in models)
        hits += int((logits.argmax(1) == batch.labels).sum())
    assert score == pytest.approx(hits / 797)


def test_an_ensemble_of_runs_that_differ_in_more_than_the_seed_is_refused(trained):
    folders = [trained()[0], trained("method.num_tokens=3")[0]]
    with (
        composed("eval", f"run=[{','.join(map(str, folders))}]", "trainer=cpu", "callbacks=none") as cfg,
        pytest.raises(UserError, match=r"holds method .*'num_tokens': 3.*, not .*'num_tokens': 4"),
    ):
        inference.evaluate(cfg)


def test_runs_of_other_preprocessing_are_no_ensemble(trained):
    folders = [trained()[0], trained("preprocessing.normalisation=imagenet")[0]]
    with (
        composed("eval", f"run=[{','.join(map(str, folders))}]", "trainer=cpu", "callbacks=none") as cfg,
        pytest.raises(
            UserError, match=r"was tuned with other preprocessing than .*: give runs with the same one"
        ),
    ):
        inference.evaluate(cfg)


def other_weights(logs, folder):
    tensors = load_file(logs / "weights.safetensors")
    tensors["pos_embed"] = tensors["pos_embed"] + 1
    save_file(tensors, folder / "other.safetensors")
    return folder / "other.safetensors"


def test_a_state_of_another_backbone_is_refused(logs, trained, tmp_path):
    folder, result = trained()
    other, hashed = other_weights(logs, tmp_path), result.backbone["sha256"][:12]
    with pytest.raises(
        UserError, match=rf"was tuned on backbone \S+ \(weights {hashed}\), not on \S+ \(weights \w+\)"
    ):
        evaluate(folder, f"weights={other}")
    with pytest.raises(UserError, match=rf"was tuned on backbone \S+ \(weights {hashed}\), not on"):
        predict(
            logs,
            folder,
            miniatures.write_folder(tmp_path / "images"),
            tmp_path / "out.csv",
            f"weights={other}",
        )
    assert not (tmp_path / "out.csv").exists()


def test_a_state_of_other_classes_is_refused(trained, tmp_path):
    copy = shutil.copytree(trained()[0], tmp_path / "run")
    config = OmegaConf.load(copy / "config.yaml")
    config.task = "digits_loc"
    OmegaConf.save(config, copy / "config.yaml")
    with pytest.raises(UserError, match="has 10 classes, not 16: use data of the"):
        evaluate(copy)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """The first test scans as files, in folders of their digits."""
    root = tmp_path_factory.mktemp("scans")
    images, labels, keys = digits.compose("digits", "test")
    for image, label, key in list(zip(images, labels, keys, strict=True))[:150]:
        (root / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(root / str(label) / f"{key}.png")
    return root


def test_predict_says_of_each_scan_what_the_classifier_says(logs, trained, scans, tmp_path):
    folder, _ = trained(*METHODS["full"])
    rows = predict(logs, folder, scans, tmp_path / "new" / "out.csv", "batch_size=64")
    assert list(rows[0]) == ["path", "label", "class", "probability", *map(str, range(10))]
    assert [row["path"] for row in rows] == sorted(
        path.relative_to(scans).as_posix() for path in scans.rglob("*.png")
    )
    state = load_state(folder)
    backbone = prediction.backbone_of(state, str(logs / "weights.safetensors"))
    classifier = prediction.restore(state, folder, backbone)
    images, _, keys = digits.compose("digits", "test")
    with torch.no_grad():
        expected = classifier((torch.from_numpy(images[:150]) / 255 - 0.5) / 0.5).softmax(1)
    for row in rows:
        shares = torch.tensor([float(row[str(digit)]) for digit in range(10)], dtype=torch.float64)
        assert float(shares.sum()) == pytest.approx(1, abs=1e-5)
        place = keys.index(row["path"].split("/")[1].removesuffix(".png"))
        assert shares.tolist() == pytest.approx(expected[place].tolist(), abs=2e-6)
        assert row["class"] == str(int(shares.argmax()))
        assert float(row["probability"]) == float(shares.max())
    assert 0.2 < sum(row["class"] == row["path"].split("/")[0] for row in rows) / len(rows) < 0.9


def test_predict_scores_images_in_folders_with_the_names_of_classes(logs, trained, scans, tmp_path, capsys):
    (folder, _), (other, _) = trained(), trained("seed=1")
    moved = shutil.copytree(scans, tmp_path / "scans")
    (moved / "3").rename(moved / "unsorted")
    (moved / "5").rename(moved / "more")
    (moved / "5").mkdir()
    (moved / "more").rename(moved / "5" / "more")
    rows = predict(logs, folder, moved, tmp_path / "out.csv")
    known = [row for row in rows if row["label"]]
    assert {row["path"].split("/")[0] for row in rows if not row["label"]} == {"unsorted"}
    assert all(row["label"] == row["path"].split("/")[0] for row in known)
    share = sum(row["label"] == row["class"] for row in known) / len(known)
    said = " ".join(capsys.readouterr().out.split())
    shown = in_percent(share, wilson(share, len(known)))
    assert f"digits: acc {shown} on {len(known)} images, labelled by their folders; " in said
    assert f"; {len(rows) - len(known)} others are in no folder with the name of a class" in said
    assert "the 9 worst of 10 classes, by F1 (%)" in said or "the 10 classes, by F1 (%)" in said
    both = predict(logs, f"[{folder},{other}]", moved, tmp_path / "both.csv")
    assert list(both[0]) == ["path", "task", "label", "class", "probability"]
    assert [row["label"] for row in both[::2]] == [row["label"] for row in rows]
    assert [row["class"] for row in both[::2]] == [row["class"] for row in rows]
    assert f"{folder}: acc {shown} on " in " ".join(capsys.readouterr().out.split())


def test_predict_names_what_it_leaves_out(logs, trained, tmp_path, capsys):
    folder, _ = trained()
    images = miniatures.write_folder(tmp_path / "images", ("a", "b"), 3)
    (images / "broken.png").write_bytes((images / "a" / "0000.png").read_bytes()[:100])
    (images / "notes.txt").write_text("no image")
    for name in (".hidden.png", "Thumbs.db", ".cache/0000.png"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_bytes((images / "a" / "0000.png").read_bytes())
    Image.new("L", (4, 4)).save(images / "b" / "dot.png")
    rows = predict(logs, folder / "tuned.safetensors", images, tmp_path / "out.csv", "batch_size=2")
    assert [row["path"] for row in rows] == [
        f"{name}/000{number}.png" for name in "ab" for number in range(3)
    ]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:2] for line in lines[:-2]] == [
        *(["left out", str(images / name)] for name in ("b/dot.png", "broken.png")),
    ]
    assert "less than 16 on the short side" in lines[0]
    assert "cannot be decoded" in lines[1]
    assert lines[-2] == f"6 of 8 files labelled: {tmp_path / 'out.csv'}"
    assert (
        lines[-1]
        == "left out: files of other formats (1), hidden files (1), hidden folders (1), system files (1)"
    )


@pytest.mark.parametrize(
    "spoil", [lambda images: None, lambda images: (images / "a.png").write_bytes(b"broken")]
)
def test_predict_on_a_folder_without_images_is_one_sentence(logs, trained, tmp_path, spoil):
    (tmp_path / "images").mkdir()
    spoil(tmp_path / "images")
    with pytest.raises(
        UserError, match=r"images has no image that can be read: give an image or a folder of images$"
    ):
        predict(logs, trained()[0], tmp_path / "images", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("images=/nowhere",), "images=/nowhere is neither an image nor a folder: correct images="),
        (("state=/nowhere",), "there is no tuned state at /nowhere"),
        (("batch_size=0",), "batch_size=0 is not a number of images: give a whole number of 1 or more"),
        (("output=/tmp",), "^output=/tmp is a folder: give the name of a new CSV file$"),
        (("device=gpu",), "device=gpu is not a device of this machine: choose auto, cpu or cuda"),
        (("weights=/nowhere",), "there is no file of backbone weights at /nowhere"),
    ],
)
def test_predict_says_what_is_wrong(logs, trained, tmp_path, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        predict(logs, trained()[0], tmp_path, tmp_path / "out.csv", *arguments)


def test_predict_takes_a_single_image(logs, trained, scans, tmp_path):
    folder, _ = trained()
    whole = predict(logs, folder, scans, tmp_path / "all.csv")
    (alone,) = predict(logs, folder, scans / whole[3]["path"], tmp_path / "one.csv")
    expected = whole[3] | {"path": whole[3]["path"].split("/")[1]}
    del expected["label"]
    assert alone == expected


def test_predict_replaces_a_csv_only_where_it_is_told_to(logs, trained, tmp_path):
    images = miniatures.write_folder(tmp_path / "images", ("a",), 2)
    output = tmp_path / "out.csv"
    output.write_text("path\nmine\n")
    with pytest.raises(UserError) as caught:
        predict(logs, trained()[0], images, output)
    assert str(caught.value) == (
        f"output={output} exists: give overwrite=true to replace it, or the name of a new CSV file"
    )
    assert output.read_text() == "path\nmine\n"
    assert len(predict(logs, trained()[0], images, output, "overwrite=true")) == 2


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "4"])
def test_predict_refuses_a_batch_size_that_is_not_a_number_of_images(tmp_path, size):
    with pytest.raises(
        UserError, match=rf"^batch_size={size} is not a number of images: give a whole number of 1 or"
    ):
        prediction.predict(
            "x", "y", output=str(tmp_path / "z.csv"), batch_size=size, device="cpu", weights=None
        )


def test_names_that_are_no_utf8_are_trained_on_and_predicted(tmp_path):
    root = miniatures.write_folder(tmp_path / "shades", ("dark", "light"), 6)
    (root / "dark" / "0000.png").rename(root / "dark" / os.fsdecode(b"caf\xe9.png"))
    (root / "light").rename(root / os.fsdecode(b"li\xe9ght"))
    options = ("data=folder", f"data.root={root}", f"paths.data_dir={tmp_path}/data", "recipe.batch_size=4")
    one = tiny_run(tmp_path / "logs", *options)
    run.run_job(one)
    rows = predict(tmp_path / "logs", one.folder, root, tmp_path / "out.csv")
    assert list(rows[0]) == ["path", "label", "class", "probability", "dark", r"li\xe9ght"]
    assert [row["label"] for row in rows] == [row["path"].split("/")[0] for row in rows]
    paths = [row["path"] for row in rows]
    assert r"dark/caf\xe9.png" in paths
    assert r"li\xe9ght/0000.png" in paths
    given = (
        f"paths.log_dir={tmp_path}/logs",
        f"output={tmp_path}/report",
        "formats=[html,markdown,csv,latex]",
    )
    with composed("report", *given) as cfg:
        report.report(cfg)
    assert "shades" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_white_is_what_it_was_in_training(tmp_path):
    root = tmp_path / "scans"
    for name, value in (("dark", 40), ("light", 200)):
        (root / name).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(np.full((40, 40), value + number, np.uint16)).save(root / name / f"{number}.png")
    options = ("data=folder", f"data.root={root}", f"paths.data_dir={tmp_path}/data", "recipe.batch_size=4")
    one = tiny_run(
        tmp_path / "logs", *options, "data.white_level=255", "recipe.epochs=1", "recipe.warmup_epochs=0"
    )
    run.run_job(one)
    state = load_state(one.folder)
    assert state.preprocessing["white_level"] == 255
    rows = {
        row["path"]: float(row["dark"])
        for row in predict(tmp_path / "logs", one.folder, root, tmp_path / "out.csv")
    }
    data = one.datamodule
    batch = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    classifier = prediction.restore(
        state, one.folder, replace(one.backbone, module=deepcopy(one.backbone.module))
    )
    with torch.no_grad():
        shares = classifier(batch.images).softmax(1)[:, 0].tolist()
    keys = [data.store.keys[int(data.test_dataset.rows[row])] for row in batch.rows]
    assert [rows[key] for key in keys] == pytest.approx(shares, abs=2e-6)


@pytest.mark.parametrize("batch", [0, 1])
def test_predict_writes_names_as_they_are_and_no_formula(logs, trained, tmp_path, capsys, batch):
    """A digit has ten classes, so that the names of classes that a state may have come in two batches."""
    folder, _ = trained(*METHODS["linear"])
    allowed = [name for name in NASTY if not has_control(name) and "${" not in name]
    names = tuple(allowed[20 * batch : 20 * batch + 10])
    save_state(tmp_path / "state.safetensors", replace(load_state(folder), class_names=names))
    images = tmp_path / "images [v2] 50%"
    image = Image.new("RGB", (32, 32), "red")
    files = [name for name in NASTY if not {"/", "\0", "\ud800"} & set(name) and len(name) < 200][
        20 * batch : 20 * batch + 20
    ]
    for name in files:
        path = images / "=folder" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "image.png")
        (tmp_path / "image.png").rename(path)
    rows = predict(logs, tmp_path / "state.safetensors", f"'{images}'", tmp_path / "out.csv")
    assert sorted(row["path"] for row in rows) == sorted(csv_cell(f"=folder/{name}.png") for name in files)
    assert list(rows[0]) == ["path", "class", "probability", *map(csv_cell, names)]
    assert {row["class"] for row in rows} <= {csv_cell(name) for name in names}
    assert f"of {len(files)} files labelled: {tmp_path}/out.csv" in capsys.readouterr().out
