"""Side-tuning: the mixture, the side network, its weights."""

import math

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import visprompt
from helpers.cli import frozen, tiny_run
from helpers.tiny import NUM_CLASSES, SIZE, images, measured, tiny_model, worst_error
from visprompt.errors import UserError
from visprompt.models import tuning_module
from visprompt.models.backbones import BackboneSpec, build_backbone
from visprompt.models.backbones.family import Family
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.methods.sidetune import SideTune, alexnet_features
from visprompt.models.tuned_state import TunedState
from visprompt.runs import attempt_files, run
from visprompt.runs.predict import restore

CONVOLUTIONS = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
SHAPES = {f"side.{i}.weight": (out, into, k, k) for i, (out, into, k) in CONVOLUTIONS.items()}
SHAPES |= {f"side.{i}.bias": (out,) for i, (out, _, _) in CONVOLUTIONS.items()}
SHAPES |= {"alpha": (), "projection.weight": (32, 9216), "head.weight": (5, 32), "head.bias": (5,)}


def sidetuned(size=64, **options):
    backbone = ViT(tiny_model(img_size=size))
    torch.manual_seed(1)
    classifier = Classifier(backbone, SideTune(backbone, **options), NUM_CLASSES)
    with torch.no_grad():  # large enough that the mixture needs both, and unequal shares
        for tuning_module in classifier.method.side:
            if isinstance(tuning_module, nn.Conv2d):
                nn.init.kaiming_normal_(tuning_module.weight)
        classifier.method.alpha.fill_(0.7)
    return classifier


@pytest.fixture(scope="module")
def torchvisions():
    """torchvision's whole AlexNet with random weights."""
    torch.manual_seed(3)
    return torchvision.models.alexnet(weights=None)


def naive_side(method, x):
    """The released code's side branch, convolution by convolution."""
    p = dict(method.named_parameters())
    x = F.relu(F.conv2d(x, p["side.0.weight"], p["side.0.bias"], stride=4, padding=2))
    x = F.relu(F.conv2d(F.max_pool2d(x, 3, 2), p["side.3.weight"], p["side.3.bias"], padding=2))
    x = F.relu(F.conv2d(F.max_pool2d(x, 3, 2), p["side.6.weight"], p["side.6.bias"], padding=1))
    for i in (8, 10):
        x = F.relu(F.conv2d(x, p[f"side.{i}.weight"], p[f"side.{i}.bias"], padding=1))
    x = F.max_pool2d(x, 3, 2)
    index = [torch.arange(6) * side // 6 for side in x.shape[2:]]  # a map of one or two rows is repeated
    assert x.shape[2] in (1, 2)
    x = x[:, :, index[0]][..., index[1]]
    return x.reshape(len(x), -1) @ p["projection.weight"].T


@pytest.mark.parametrize("size", [64, 96])
def test_equals_a_naive_implementation(size):
    classifier = sidetuned(size)
    x = images(3, size)
    model, method = classifier.backbone.model, classifier.method
    a = 1 / (1 + torch.exp(-method.alpha))
    frozen = model.forward_head(model.forward_features(x), pre_logits=True)
    naive = classifier.head(a * frozen + (1 - a) * naive_side(method, x))
    expected = measured(classifier, naive)
    assert set(expected) == {"logits"} | set(classifier.tuned_names)
    assert worst_error(measured(classifier, classifier(x)), expected) < 1e-5


def test_names_and_shapes_of_what_is_saved_and_tuned():
    classifier = sidetuned()
    assert {n: tuple(t.shape) for n, t in classifier.tuned_state().items()} == SHAPES
    assert {n.removeprefix("method.") for n in classifier.tuned_names} == set(SHAPES)
    F.cross_entropy(classifier(images(2, 64)), torch.tensor([0, 1])).backward()
    with_gradient = {n for n, p in classifier.named_parameters() if p.grad is not None}
    assert with_gradient == set(classifier.tuned_names)
    assert all(p.grad.abs().max() > 0 for _, p in classifier.tuned_parameters())


def test_both_branches_have_the_same_share_at_the_start():
    method = SideTune(ViT(tiny_model(img_size=64)))
    assert method.alpha.item() == 0.0
    pooled, x = torch.randn(2, 32), images(2, 64)
    assert torch.allclose(method.features(pooled, x), (pooled + naive_side(method, x)) / 2, atol=1e-6)


def test_the_share_has_two_limits():
    classifier = sidetuned()
    pooled, x = torch.randn(2, 32), images(2, 64)
    with torch.no_grad():
        classifier.method.alpha.fill_(math.inf)
        assert torch.equal(classifier.method.features(pooled, x), pooled)
        classifier.method.alpha.fill_(-math.inf)
        assert torch.allclose(
            classifier.method.features(pooled, x), naive_side(classifier.method, x), rtol=1e-4
        )


def test_the_backbones_features_are_kept_beside_the_pixels_and_give_the_same():
    """Of oblong images, too; the backbone runs once, the side network in every epoch."""
    backbone = ViT(tiny_model(img_size=(64, 80)))
    classifier, ran = Classifier(backbone, SideTune(backbone), NUM_CLASSES), []
    backbone.model.patch_embed.register_forward_hook(lambda *_: ran.append(1))
    x = torch.randn(3, 3, 64, 80, generator=torch.Generator().manual_seed(4))
    kept = classifier.frozen(x)
    assert kept.shape == (3, 32 + 3 * 64 * 80)
    assert torch.equal(kept[:, 32:], x.flatten(1))
    expected = measured(classifier, classifier(x))
    assert len(ran) == 2
    found = measured(classifier, classifier(kept))
    assert len(ran) == 2
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.slow
@frozen
@pytest.mark.filterwarnings("ignore:The number of training batches .* smaller than the logging")
def test_a_run_that_stores_the_features_ends_in_the_same_values(tmp_path, monkeypatch):
    def go(folder):
        short = ("recipe.epochs=3", "recipe.warmup_epochs=0", "recipe.batch_size=16", "data.fraction=0.1")
        return run.run_job(tiny_run(tmp_path / folder, "method=sidetune", "split=tune", *short))

    ran, original = [], Family.forward
    monkeypatch.setattr(attempt_files, "_macs", {})  # an earlier test of this process may have counted
    monkeypatch.setattr(Family, "forward", lambda self, *given: ran.append(1) or original(self, *given))
    once, runs = go("stored"), len(ran)
    monkeypatch.setattr(tuning_module, "keep", lambda *given: None)
    again = go("every epoch")
    assert again.tuned["sha256"] == once.tuned["sha256"]
    assert again.metrics == once.metrics
    batches = 5 + 13  # of training and validation; the operations are counted in one more, for both runs
    # and those of validation once more, for the temperature
    assert (runs, len(ran) - runs) == (batches + 1, 3 * batches + 13)


def test_the_side_network_is_torchvisions(torchvisions, tmp_path):
    """Loaded from a file of its weights, at the paper's size, the 9216 numbers before its classifier are the same."""
    torch.save(torchvisions.state_dict(), tmp_path / "alexnet.pth")
    method = SideTune(ViT(tiny_model()), weights=str(tmp_path / "alexnet.pth"))
    x = images(1, 224)
    with torch.no_grad():
        expected = torchvisions.avgpool(torchvisions.features(x)).flatten(1)
        assert torch.equal(method.side(x).flatten(1), expected)
        assert torch.allclose(
            method.features(torch.zeros(1, 32), x), 0.5 * method.projection(expected), atol=1e-6
        )


def test_random_weights_are_drawn_as_torchvision_draws_them(torchvisions):
    torch.manual_seed(3)
    drawn = alexnet_features().state_dict()
    assert drawn.keys() == torchvisions.features.state_dict().keys()
    assert all(
        torch.equal(drawn[name], tensor) for name, tensor in torchvisions.features.state_dict().items()
    )


@pytest.mark.parametrize("size", [(32, 32), (32, 80)])
def test_a_small_image_is_enlarged_to_what_the_side_network_needs(size):
    method = sidetuned().method
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(4))
    enlarged = F.interpolate(x, (63, max(63, size[1])), mode="bilinear")
    pooled = torch.zeros(2, 32)
    assert torch.equal(method.features(pooled, x), method.features(pooled, enlarged))
    with pytest.raises(RuntimeError, match="Output size is too small"):
        method.side(torch.zeros(1, 3, 62, 62))


def test_a_missing_file_is_named(tmp_path):
    message = (
        r"there is no file of AlexNet weights at .*none\.pth: correct method\.weights=\.\.\., or give random"
    )
    with pytest.raises(UserError, match=message):
        SideTune(ViT(tiny_model()), weights=str(tmp_path / "none.pth"))


def test_the_record_of_a_file_is_none_to_draw_values_from():
    message = r"^there is no file of AlexNet weights at sha256:0{64}: correct method\.weights=\.\.\., or give random$"
    with pytest.raises(UserError, match=message):
        visprompt.build(tiny_model(), "sidetune", 5, weights=f"sha256:{'0' * 64}")


def test_a_state_whose_file_is_gone_brings_the_values_itself(torchvisions, tmp_path):
    file = tmp_path / "alexnet.pth"
    torch.save(torchvisions.state_dict(), file)
    spec = BackboneSpec(name="vit_tiny_patch16_224", pretrained=False, kwargs=SIZE)
    classifier = visprompt.build(build_backbone(spec).module, "sidetune", 5, weights=str(file)).eval()
    file.unlink()
    state = TunedState(
        tensors=classifier.tuned_state(), method={"name": "sidetune", "weights": f"sha256:{'0' * 64}"}, task="digits",
        class_names=tuple("abcde"), preprocessing={}, backbone=build_backbone(spec).record(), versions={},
    )  # fmt: skip
    restored = restore(state, tmp_path, build_backbone(spec))
    assert torch.equal(restored(images(2)), classifier(images(2)))


class Anything:
    """What a pickle could hold."""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"features.0.weight": torch.zeros(3)}, "RuntimeError"),
        ({"conv1.weight": torch.zeros(3)}, "RuntimeError"),
        ([1, 2], "AttributeError"),
        (Anything(), "UnpicklingError"),
    ],
)
def test_a_file_of_something_else_is_named_and_nothing_in_it_is_run(tmp_path, content, reason):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(
        UserError, match=rf"other\.pth does not hold the weights of torchvision's AlexNet \({reason}\)"
    ):
        SideTune(ViT(tiny_model()), weights=str(tmp_path / "other.pth"))
