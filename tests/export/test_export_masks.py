"""Segmentation states in other forms: windows in, logits of their pixels out; what has no such form is refused."""

import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
import yaml

import visprompt
from helpers.segmented import CLASSES, segmenter, state_of
from helpers.written_runs import result
from visprompt.data.transforms import to_input
from visprompt.errors import UserError
from visprompt.export import hub_folder
from visprompt.export.command import summary
from visprompt.export.write import Request, write
from visprompt.models.windows import slide

IMAGES = {"split_set": "val", "images": 4, "trained_on": False}


def drawn():
    """Pictures of two sizes and their masks, which have the sizes of the pictures."""
    draw = np.random.default_rng(0)
    for i in range(4):
        size = (40 + 50 * (i // 2), 70)
        yield draw.integers(0, 256, (*size, 3), dtype=np.uint8), draw.integers(0, 3, size)


@pytest.mark.slow
def test_an_onnx_file_takes_windows_and_leaves_sliding_to_the_caller(tmp_path):
    classifier = segmenter("linear")
    state = state_of(classifier)
    card = write(tmp_path, classifier, state, Request(to="onnx"), drawn, IMAGES)
    assert card["kind"] == "segmentation"
    assert card["windows"] == {"size": 64, "stride": 42, "by": "the caller"}
    assert card["agreement"]["error"] < 1e-5
    assert (card["agreement"]["images"], card["agreement"]["same"]) == (4, 4)
    assert card["agreement"]["accuracy"] == pytest.approx(card["agreement"]["of_classifier"])
    assert "same classes on 4 of 4 images of val; pixel accuracy" in summary(card)[1]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    picture, _ = next(drawn())
    x = to_input(picture, state.preprocessing)[None]

    def network(windows):
        return torch.from_numpy(session.run(["logits"], {"images": windows.numpy()})[0])

    with torch.no_grad():
        assert network(x[..., :64]).shape == (1, 3, 64, 64)
        assert torch.allclose(slide(network, x, 64, 64), classifier(x), atol=1e-3)


@pytest.mark.slow
def test_int8_changes_the_accuracy_of_pixels_a_little(tmp_path):
    classifier = segmenter("vpt_deep", "setr_pup", num_tokens=2)
    request = Request(to="onnx", quantize="int8")
    card = write(tmp_path, classifier, state_of(classifier, "setr_pup"), request, drawn, IMAGES)
    assert card["agreement"]["error"] < 1e-4
    assert card["agreement"]["same"] == 4
    assert abs(card["quantized"]["change_of_accuracy"]) < 0.05
    assert card["quantized"]["bytes"] < card["quantized"]["bytes_before"]
    assert "; pixel accuracy " in summary(card)[2]


@pytest.mark.slow
def test_a_graph_can_prepare_pictures_that_are_squashed_to_one_window(tmp_path):
    classifier = segmenter("vpt_deep", num_tokens=2)
    state = state_of(classifier, resize="squash", short_side=None)
    card = write(tmp_path, classifier, state, Request(to="torch", include_preprocessing=True), drawn, IMAGES)
    assert card["agreement"]["error"] < 1e-4
    assert card["agreement"]["same"] == 4
    assert "windows" not in card


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"to": "timm"},
            "a segmentation task cannot be merged, because a timm model has no head for each pixel",
        ),
        (
            {"to": "onnx", "include_preprocessing": True},
            "include_preprocessing=true is not for a run whose images are covered by sliding windows: leave it out",
        ),
    ],
)
def test_what_has_no_such_form_is_one_sentence(tmp_path, given, sentence):
    classifier = segmenter("lora")
    with pytest.raises(UserError, match=sentence):
        write(tmp_path, classifier, state_of(classifier), Request(**given))
    assert not list(tmp_path.iterdir())


def test_a_folder_for_the_hub_says_that_it_segments_and_loads(tmp_path):
    classifier = segmenter("vpt_deep", num_tokens=2)
    state = replace(state_of(classifier), task="digits_masks")
    score = {"kind": "segmentation", "metrics": {"test/miou": 0.5}, "backbone": dict(state.backbone)}
    scored = result("digits_masks", "vpt_deep", 0.5, options=dict(state.method), **score)
    hub_folder.write(tmp_path, state, [scored], repository="me/beach")
    hub_folder.check(tmp_path, classifier)
    loaded = visprompt.load(tmp_path)
    assert (loaded.kind.name, loaded.class_names) == ("segmentation", CLASSES)
    text = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["pipeline_tag"] == "image-segmentation"
    (entry,) = front["model-index"][0]["results"]
    assert entry["task"] == {"type": "image-segmentation"}
    assert entry["metrics"][0]["type"] == "mean_iou"
    assert "50.0 % test mean IoU (seed 42)" in text
    assert "returns logits [B, 3, 64, 64] of images [B, 3, 64, 64]" in text
    assert json.loads((tmp_path / "config.json").read_text())["preprocessing"]["resize"] == "windows"
