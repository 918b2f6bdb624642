"""The public call: what `save` wrote is what `load` builds, by name or on the user's own model."""

import pytest
import timm
import torch

import visprompt
from helpers.tiny import images, relative_error
from visprompt.errors import UserError
from visprompt.models.backbones import DEMO
from visprompt.runs.predict import predict

NAMES = ("a", "b", "c")
SMALL = "vit_tiny_patch16_224"


def plain(seed=0):
    torch.manual_seed(seed)
    return timm.create_model(
        SMALL, img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=7
    ).eval()


@pytest.mark.parametrize(
    ("method", "options"), [("vpt_deep", {"num_tokens": 3}), ("lora", {"rank": 2}), ("linear", {})]
)
def test_a_state_of_the_embedded_backbone_is_built_from_its_file_alone(tmp_path, method, options):
    first = visprompt.build(DEMO, method, 3, **options).eval()
    with torch.no_grad():
        for _, parameter in first.tuned_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path / "task.safetensors"
    visprompt.save(first, path, class_names=NAMES)
    second = visprompt.load(path)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(second(x), first(x))
    assert (second.class_names, second.training) == (NAMES, False)
    visprompt.save(second, tmp_path / "again.safetensors", class_names=NAMES)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_state_goes_onto_the_model_that_it_was_tuned_on_and_no_other(tmp_path):
    classifier = visprompt.build(plain(), "vpt_deep", 3, num_tokens=3).eval()
    path = tmp_path / "task.safetensors"
    visprompt.save(classifier, path, class_names=NAMES)
    other_head = plain()
    other_head.reset_classifier(2)
    for model in (plain(), other_head):
        loaded = visprompt.load(path, model)
        assert relative_error(loaded(images(2)), classifier(images(2))) == 0
        assert not any("prompts" in name for name, _ in model.named_parameters()), (
            "the user's model stays as it is"
        )
    with pytest.raises(
        UserError, match=r"was tuned on backbone vit_tiny_patch16_224.* not on vit_tiny_patch16_224"
    ):
        visprompt.load(path, plain(seed=1))


def test_what_is_saved_predicts_as_a_run_s_state_does(tmp_path):
    from PIL import Image

    path, output = tmp_path / "task.safetensors", tmp_path / "out.csv"
    classifier = visprompt.build(DEMO, "vpt_deep", 3)
    visprompt.save(classifier, path, class_names=NAMES, temperature=0.5)
    Image.new("RGB", (80, 60), (200, 10, 10)).save(tmp_path / "a.png")
    predict(str(path), str(tmp_path / "a.png"), output=str(output), device="cpu", batch_size=1, weights=None)
    assert output.read_text().splitlines()[0].startswith("path,class,probability")
    assert (visprompt.load(path).temperature, classifier.temperature) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("a", "b"), "^class_names has 2 names, and the classifier 3 classes: give one"),
        (("a\0", "b", "c"), "class_names"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, names, sentence):
    with pytest.raises(UserError, match=sentence):
        visprompt.save(visprompt.build(DEMO, "linear", 3), tmp_path / "x.safetensors", class_names=names)
    assert not list(tmp_path.iterdir())
