"""`src/export.py`: a finished run in each form, compared on its own validation images."""

import json
import re

import pytest

from helpers.cli import call, composed, frozen, tiny
from helpers.exported import finished_run
from visprompt.errors import UserError
from visprompt.export.command import export

pytestmark = frozen


def exported(run, output, *arguments):
    with composed("export", f"run={run}", f"output={output}", *arguments) as cfg:
        return export(cfg)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("to=coreml",), "unknown format 'coreml': choose one of hub_folder, onnx, timm, torch"),
        (("push=me/x",), "push=me/x is for to=hub_folder, and this is to=onnx: leave it out"),
        (("to=hub_folder", "quantize=int8"), "quantize and include_preprocessing are for to=onnx"),
        (("to=torch", "quantize=int8"), "quantize=int8 is for to=onnx, and this is to=torch"),
        (("to=hub_folder", "push=me"), "push=me is not the name of a repository"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(tmp_path, arguments, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        exported(finished_run(tmp_path / "run", "linear"), tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_several_runs_are_for_the_card_alone(tmp_path):
    with pytest.raises(UserError, match=r"run= has 2 folders, and to=onnx writes one classifier"):
        exported(f"[{tmp_path}/a,{tmp_path}/b]", tmp_path / "out")
    with pytest.raises(UserError, match=r"run=\[\] names no run"):
        exported("[]", tmp_path / "out")


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    run, output = finished_run(tmp_path / "run", "linear"), tmp_path / "out"
    assert exported(run, output, "to=hub_folder") == output
    with pytest.raises(UserError, match=r"exists: give overwrite=true to replace it"):
        exported(run, output, "to=hub_folder")
    exported(run, output, "to=hub_folder", "overwrite=true")
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds other files, such as thesis.tex: give a new folder"):
        exported(run, output, "to=hub_folder", "overwrite=true")
    assert (output / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file: give the name of a new folder"):
        exported(run, tmp_path / "file", "to=hub_folder")


def test_a_state_without_its_data_is_compared_on_generated_images(tmp_path, capsys):
    """Only the state was copied: there is no result.json that names the data."""
    run = finished_run(tmp_path / "run", "bias")
    (run / "result.json").unlink()
    exported(run, tmp_path / "out", "to=timm")
    printed = capsys.readouterr().out
    assert "compared on generated images only" in printed
    card = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (card["validation"], card["agreement"]["images"]) == (None, 0)


@pytest.mark.slow
def test_a_trained_run_in_every_form(tmp_path):
    """Through the real commands; the validation images are the run's own 200."""
    logs = tmp_path / "logs"
    done = call(
        "train", *tiny(logs, "callbacks=none", "recipe.epochs=1", "recipe.warmup_epochs=0", "method=lora")
    )
    assert done.returncode == 0, done.stderr
    (run,) = (path.parent for path in logs.rglob("result.json"))
    more = {
        "onnx": ("quantize=int8",),
        "graph": ("to=onnx", "include_preprocessing=true"),
        "torch": (),
        "timm": (),
        "hub_folder": (),
    }
    for name, given in more.items():
        to = () if name == "graph" else (f"to={name}",)
        where = (f"run={run}", f"output={tmp_path / name}", f"weights={logs / 'weights.safetensors'}")
        done = call("export", *where, *to, *given, f"paths.log_dir={logs}")
        assert done.returncode == 0, (name, done.stderr)
        if name == "hub_folder":
            assert "loads with the same logits" in done.stdout
            continue
        card = json.loads((tmp_path / name / "export.json").read_text())
        assert card["validation"] == {"split_set": "val200", "images": 200, "trained_on": True}
        assert (card["agreement"]["images"], card["agreement"]["same"]) == (200, 200), name
        assert "same top class on 200 of 200 images of val200, which the run trained on" in done.stdout
    quantised = json.loads((tmp_path / "onnx" / "export.json").read_text())["quantized"]
    assert quantised["accuracy"] is not None
