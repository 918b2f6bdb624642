"""Backbones by name: what is built, what is loaded into it, and what is said of a wrong word."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny import SIZE, images, relative_error, tiny_model
from visprompt.errors import UserError
from visprompt.models import backbones
from visprompt.models.backbones import DEMO, BackboneSpec, build_backbone
from visprompt.models.methods import build_method
from visprompt.models.tensors import hash_tensors

NAME = "vit_tiny_patch16_224"
HUB = "vit_base_patch16_224.augreg_in21k"
DEMO_FILE = Path(backbones.__file__).parent / "weights" / f"{DEMO}.safetensors"


def build(name=NAME, **options):
    return build_backbone(BackboneSpec(name=name, **({"kwargs": SIZE} | options)))


def state(backbone):
    return backbone.module.model.state_dict()


def linear_features(backbone, x):
    return backbone.module(x, build_method("linear", backbone.module))


def test_the_demo_backbone_is_the_embedded_file():
    backbone = build_backbone(BackboneSpec())
    held = load_file(DEMO_FILE)
    tensors = state(backbone)
    assert {"head." in name for name in held.keys() - tensors.keys()} <= {True}
    assert all(torch.equal(tensor, held[name].float()) for name, tensor in tensors.items())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    module = backbone.module
    assert (module.width, module.num_blocks, module.patch_size, backbone.image_size) == (192, 6, 8, 64)
    assert (backbone.mean, backbone.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert sum(tensor.numel() for tensor in tensors.values()) == 2_719_296
    assert not module.training
    assert backbone.sha256 == hash_tensors(tensors)


@pytest.mark.parametrize("method", ["linear", "vpt_deep"])
def test_a_fresh_norm_stands_behind_the_mean_and_the_trained_one_is_dropped(tmp_path, method):
    """As MAE's and VPT's codes pool.

    The mean over prompts and patches, without the class token, then the norm.
    """
    file = tmp_path / "weights.safetensors"
    model = tiny_model()
    torch.nn.init.uniform_(model.norm.weight)
    save_file(model.state_dict(), file)
    backbone = build(weights=str(file), global_pool="avg", final_norm="fresh")
    options = {} if method == "linear" else {"num_tokens": 3, "dropout": 0.0, "pool": "image_prompt"}
    tuned = build_method(method, backbone.module, **options)
    x, net = images(), backbone.module.model
    tokens = net._pos_embed(net.patch_embed(x))
    with torch.no_grad():
        if method == "linear":
            tokens = net.blocks(tokens)[:, 1:]
        else:
            for prompts, block in zip(tuned.prompts, net.blocks, strict=True):
                rows = prompts.expand(len(x), -1, -1)
                tokens = block(torch.cat([tokens[:, :1], rows, tokens[:, -16:]], dim=1))
            tokens = tokens[:, 1:]
        mean = tokens.mean(dim=1)
        centred = mean - mean.mean(dim=1, keepdim=True)
        expected = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
        found = backbone.module(x, tuned)
    assert relative_error(found, expected) < 1e-5
    trained = build(weights=str(file), global_pool="avg")
    assert "norm.weight" not in state(backbone)
    assert backbone.sha256 != trained.sha256
    assert relative_error(trained.module(x, build_method("linear", trained.module)), expected) > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final_norm": "new"}, r"^unknown backbone\.final_norm 'new': choose one of fresh, trained"),
        (
            {"final_norm": "fresh"},
            r"^backbone\.final_norm=fresh needs a ViT .* give backbone\.global_pool=avg too",
        ),
        (
            {"final_norm": "fresh", "name": "test_resnet", "kwargs": {}},
            r"^backbone\.final_norm=fresh needs a ViT",
        ),
    ],
)
def test_a_fresh_norm_where_it_has_no_place_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        build(pretrained=False, **options)


def test_a_record_says_how_to_build_it_again_and_nothing_of_this_machine(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(tiny_model().state_dict(), file)
    backbone = build(weights=str(file))
    assert backbone.record() == {
        "name": NAME,
        "pretrained": True,
        "image_size": None,
        "global_pool": None,
        "final_norm": "trained",
        "exact": True,
        "kwargs": SIZE,
        "sha256": hash_tensors(tiny_model().state_dict()),
    }


def test_random_weights_follow_the_seed_and_leave_the_generator_alone():
    spec = BackboneSpec(name=NAME, pretrained=False, kwargs=SIZE)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, again, other = (build_backbone(spec, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert first.sha256 == again.sha256 != other.sha256
    assert not torch.equal(state(first)["blocks.0.attn.qkv.weight"], state(other)["blocks.0.attn.qkv.weight"])


def test_the_channel_means_are_the_models_own():
    clip = build("vit_base_patch16_clip_224.openai", pretrained=False)
    assert clip.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert clip.image_size == 32


def test_a_file_of_weights_is_loaded_whole_but_for_its_classifier(tmp_path):
    model = tiny_model(num_classes=7)
    file = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), file)
    backbone = build(weights=str(file))
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    assert state(backbone).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state(backbone).items())
    assert backbone.sha256 == hash_tensors(expected)


def test_a_folder_of_weights_is_the_same_backbone_as_its_file(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(tiny_model().state_dict(), file)
    assert build(weights=str(tmp_path)).record() == build(weights=str(file)).record()


def test_another_input_size_resamples_the_positions_alone():
    backbone, own = build_backbone(BackboneSpec(image_size=96)), build_backbone(BackboneSpec())
    assert backbone.image_size == 96
    changed = {name for name, tensor in state(backbone).items() if not torch.equal(tensor, state(own)[name])}
    assert changed == {"pos_embed"}
    assert state(backbone)["pos_embed"].shape == (1, 1 + 12 * 12, 192)


def test_another_pooling_keeps_the_trained_norm():
    """timm's own `create_model(global_pool="avg")` puts a fresh norm behind the pooling and drops the trained one."""
    backbone, x = build_backbone(BackboneSpec(global_pool="avg")), images(2, 64)
    assert backbone.sha256 == build_backbone(BackboneSpec()).sha256
    model = backbone.module.model
    assert relative_error(linear_features(backbone, x), model.forward_features(x)[:, 1:].mean(1)) < 1e-5


def test_a_convolutional_network_takes_any_size_and_says_it():
    model = backbones._create(BackboneSpec(name="resnet18", image_size=96))
    own = backbones._create(BackboneSpec(name="resnet18"))
    assert model.pretrained_cfg["input_size"] == (3, 96, 96)
    assert own.pretrained_cfg["input_size"] == (3, 224, 224)
    assert timm.get_pretrained_cfg("resnet18").input_size == (3, 224, 224)
    assert model.state_dict().keys() == own.state_dict().keys()


def test_dropout_in_attentions_keeps_no_method_out():
    plain, dropping = (
        build(pretrained=False, kwargs=SIZE | extra) for extra in ({}, {"attn_drop_rate": 0.1})
    )
    assert dropping.module.sites == plain.module.sites >= {"modules", "keys_values", "branches"}
    assert not any(module.training for module in dropping.module.modules())


def test_channel_means_can_be_those_of_other_weights():
    overlay = {"pretrained_cfg_overlay": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    backbone = build(pretrained=False, kwargs=SIZE | overlay)
    assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (backbone.module.mean, backbone.module.std) == (backbone.mean, backbone.std)
    assert backbone.record()["kwargs"] == SIZE | overlay


@pytest.mark.parametrize("name", [NAME, DEMO])
def test_a_file_that_does_not_fit_is_refused(tmp_path, name):
    save_file(tiny_model(depth=6).state_dict(), tmp_path / "deep.safetensors")
    with pytest.raises(
        UserError, match=r"deep\.safetensors does not fit this VisionTransformer: .*blocks\.4"
    ):
        build(name, weights=str(tmp_path / "deep.safetensors"))


@pytest.mark.parametrize("name", [NAME, DEMO])
def test_a_missing_file_is_named(name):
    with pytest.raises(
        UserError, match=r"there is no file of backbone weights at none\.pth: correct backbone"
    ):
        build(name, weights="none.pth")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "vit_bse_patch16_224",
            {},
            "unknown backbone 'vit_bse_patch16_224': did you mean vit_base_patch16_224 or",
        ),
        ("vit64_tiny_imagenet", {}, f"unknown backbone 'vit64_tiny_imagenet': did you mean {DEMO}"),
        (f"{HUB}k", {}, f"unknown backbone '{HUB}k': did you mean {HUB} or"),
        (f"{HUB}k", {"pretrained": False}, f"unknown backbone '{HUB}k': did you mean {HUB} or"),
        ("test_efficientnet", {"pretrained": False, "kwargs": {}}, "backbone class EfficientNet is"),
        ("deit_tiny_distilled_patch16_224", {"pretrained": False}, "class VisionTransformerDistilled is"),
        (
            NAME,
            {"pretrained": False, "global_pool": "mean"},
            "Only avg, avgmax, max, token, map or prr pooling",
        ),
        (
            NAME,
            {"pretrained": False, "global_pool": ""},
            "the backbone has no pooling: set backbone.global_pool",
        ),
        (DEMO, {"global_pool": "map", "kwargs": {}}, "Cannot currently add attention pooling"),
        (DEMO, {"kwargs": {"depth": 4}}, r"does not have 24 of the file's weights: blocks\.4\.attn"),
        (
            NAME,
            {"kwargs": {"dept": 2}},
            r"^unknown option in backbone\.kwargs 'dept': did you mean depth or depths\?$",
        ),
        (
            NAME,
            {"pretrained": False, "kwargs": {"depths": [2]}},
            "one of its settings is unknown or of a wrong kind; check backbone.",
        ),
        (NAME, {"pretrained": False, "kwargs": {"num_heads": 5}}, "dim should be divisible by num_heads"),
        (
            "vit_base_patch16_18x2_224",
            {},
            "timm has no pre-trained weights for backbone vit_base_patch16_18x2_224",
        ),
    ],
)
def test_wrong_words_and_models_are_one_sentence(name, options, message):
    with pytest.raises(UserError, match=message) as error:
        build(name, **options)
    assert len(str(error.value)) < 700


def test_random_weights_and_a_file_of_weights_are_not_both_given(tmp_path):
    sentence = r"^backbone\.pretrained=false asks for random weights, and backbone\.weights=x\.npz for those"
    with pytest.raises(UserError, match=sentence):
        build(pretrained=False, weights="x.npz")
