"""Weights in the layouts they are published in are loaded whole, bit for bit, or not at all."""

import argparse
import re
import sys

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch.nn import functional as F

from helpers.tiny import images, relative_error
from visprompt.errors import UserError
from visprompt.models.backbones import BackboneSpec, build_backbone
from visprompt.models.backbones.weights import loading
from visprompt.models.backbones.weights.loading import load_file
from visprompt.models.tensors import hash_tensors

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY = {
    "vit_tiny_patch16_224": VIT,
    "vit_base_patch16_224": VIT,
    "vit_base_patch16_224.mae": VIT,
    "vit_base_patch16_224.dino": VIT,
    "vit_base_patch16_clip_quickgelu_224.openai": VIT,
    "vit_base_patch16_siglip_224.webli": VIT,
    "vit_base_patch14_dinov2.lvd142m": VIT,
    "vit_base_patch14_reg4_dinov2.lvd142m": VIT,
    "deit3_small_patch16_224.fb_in1k": VIT,
    "vit_base_patch16_dinov3.lvd1689m": VIT,
    "eva02_base_patch14_224.mim_in22k": VIT,
    "swin_base_patch4_window7_224.ms_in22k": {
        **{"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8},
        **{"depths": (1, 2, 1, 1), "num_heads": (1, 1, 2, 2)},
    },
    "convnext_base.fb_in22k": {"depths": (1, 2, 1, 1), "dims": (4, 8, 8, 16)},
    "resnet18.tv_in1k": {},
}


def model_of(name, seed=0, **options):
    """A tiny model whose every number is drawn, statistics of batches among them."""
    model = timm.create_model(name, num_classes=0, **TINY[name] | options).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith(("running_var", "num_batches_tracked")):
                tensor.copy_(torch.randint(1, 5, tensor.shape, generator=noise))
            else:
                tensor.copy_((tensor.ndim == 1) + 0.3 * torch.randn(tensor.shape, generator=noise))
    return model


def features(model):
    return model.forward_head(model.forward_features(images(2, 32)), pre_logits=True)


def assert_same(model, source):
    tensors, expected = model.state_dict(), source.state_dict()
    assert tensors.keys() == expected.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, expected[name])] == []
    assert torch.equal(features(model), features(source))


def drawn(*names, seed=9):
    noise = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 2, generator=noise) for name in names}


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def moco_v3(tensors):
    """A checkpoint of the pre-training: the encoder with its projector, its slower copy, the predictor."""
    projector = drawn("head.0.weight", "head.1.weight", "head.1.running_mean", "head.6.weight")
    slower = {name: tensor + 1 for name, tensor in tensors.items()}
    beside = prefixed("module.momentum_encoder.", slower | projector) | drawn("module.predictor.0.weight")
    state = prefixed("module.base_encoder.", dict(tensors) | projector) | beside
    return {
        "epoch": 300,
        "arch": "vit_base",
        "state_dict": state,
        "optimizer": {"state": {}},
        "scaler": {"scale": 1.0},
    }


def moco_v3_linear(tensors):
    state = prefixed("module.", dict(tensors) | drawn("head.weight", "head.bias"))
    return {"epoch": 90, "arch": "vit_base", "state_dict": state, "best_acc1": torch.tensor(76.7)}


def moco_v3_resnet(tensors):
    state = prefixed("module.base_encoder.", dict(tensors) | drawn("fc.0.weight", "fc.1.running_mean"))
    return {
        "state_dict": state | prefixed("module.momentum_encoder.", {n: t + 1 for n, t in tensors.items()})
    }


def mae(tensors):
    decoder = drawn(
        "mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.norm1.weight"
    )
    return {"model": dict(tensors) | decoder, "args": argparse.Namespace(mask_ratio=0.75), "epoch": 799}


def dino_full(tensors):
    student = prefixed("module.backbone.", {name: tensor + 1 for name, tensor in tensors.items()})
    teacher = prefixed("backbone.", tensors) | drawn("head.mlp.0.weight", "head.last_layer.weight_g")
    return {"student": student, "teacher": teacher, "epoch": 400}


def dinov2(tensors):
    return dict(tensors) | {"mask_token": torch.zeros(1, 32)}


def dinov2_with_registers(tensors):
    """Registers under another name; a position of the class token, which timm adds to the token."""
    tensors = dict(tensors)
    place = torch.full((1, 1, 32), 0.25)
    tensors["register_tokens"] = tensors.pop("reg_token")
    tensors["pos_embed"] = torch.cat([place, tensors["pos_embed"]], 1)
    tensors["cls_token"] = tensors["cls_token"] - place
    return tensors | {"mask_token": torch.zeros(1, 32)}


def renamed(tensors, *pairs):
    def new(name):
        for pattern, text in pairs:
            name = re.sub(pattern, text, name)
        return name

    return {new(name): tensor for name, tensor in tensors.items()}


def deit3(tensors):
    return {"model": renamed(tensors, (r"ls(\d)\.gamma", r"gamma_\1")) | drawn("head.weight", "head.bias")}


def dinov3(tensors):
    tensors = renamed(tensors, (r"^reg_token", "storage_tokens"), (r"\.gamma_(\d)", r".ls\1.gamma"))
    heads = ("blocks.0.attn.qkv.bias", "blocks.0.attn.qkv.bias_mask", "blocks.1.attn.qkv.bias")
    return tensors | drawn("mask_token", "rope_embed.periods", "local_cls_norm.weight", *heads)


def eva02(tensors):
    pairs = [
        (r"^fc_norm", "norm"),
        ("mlp.norm", "mlp.ffn_ln"),
        ("fc1_g", "w1"),
        ("fc1_x", "w2"),
        ("fc2", "w3"),
    ]
    pairs += [(r"q_proj\.bias", "q_bias"), (r"v_proj\.bias", "v_bias")]
    return {
        "module": renamed(tensors, *pairs)
        | drawn("mask_token", "lm_head.weight", "blocks.0.attn.rope.freqs_cos")
    }


def swin(tensors):
    """Each merging of patches stands at the end of the stage before.

    Tables of indices and masks are in the file.
    """
    tables = drawn("layers.0.blocks.0.attn.relative_position_index", "layers.1.blocks.1.attn_mask")
    pairs = [(rf"layers\.{i}\.downsample", f"layers.{i - 1}.downsample") for i in (1, 2, 3)]
    return {"model": renamed(tensors, *pairs) | tables | drawn("head.weight", "head.bias")}


def convnext(tensors):
    pairs = [(r"^stem\.", "downsample_layers.0."), (r"stages\.(\d)\.downsample\.", r"downsample_layers.\1.")]
    pairs += [
        (r"\.blocks\.", "."),
        ("conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"^head\.norm\.", "norm."),
    ]
    return {"model": renamed(tensors, *pairs) | drawn("head.weight", "head.bias")}


def openai_clip(tensors):
    swaps = [
        (r"^patch_embed\.proj\.weight", "conv1.weight"),
        (r"^norm_pre\.", "ln_pre."),
        (r"^norm\.", "ln_post."),
    ]
    swaps += [(r"^blocks\.", "transformer.resblocks."), (r"\.norm(\d)\.", r".ln_\1."), (r"qkv\.", "in_proj_")]
    swaps += [
        (r"attn\.proj\.", "attn.out_proj."),
        (r"mlp\.fc1\.", "mlp.c_fc."),
        (r"mlp\.fc2\.", "mlp.c_proj."),
    ]
    tensors = renamed(tensors, *swaps)
    tensors["class_embedding"] = tensors.pop("cls_token")[0, 0]
    tensors["positional_embedding"] = tensors.pop("pos_embed")[0]
    text = drawn("token_embedding.weight", "transformer.resblocks.0.ln_1.weight", "logit_scale")
    return prefixed("visual.", tensors | {"proj": torch.ones(32, 4)}) | text


def siglip(tensors):
    """The file on the hub: OpenCLIP's, in which timm's model is the trunk of the image tower."""
    text = drawn("text.token_embedding.weight", "text.transformer.resblocks.0.ln_1.weight", "logit_bias")
    return prefixed("visual.trunk.", tensors) | text


def uncounted(tensors):
    """From before batch norm counted its batches, as torchvision's first files are."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    return kept | drawn("fc.weight", "fc.bias")


LAYOUTS = {
    "moco_v3": ("vit_base_patch16_224", moco_v3),
    "moco_v3_linear": ("vit_base_patch16_224", moco_v3_linear),
    "moco_v3_resnet": ("resnet18.tv_in1k", moco_v3_resnet),
    "mae": ("vit_base_patch16_224.mae", mae),
    "dino": ("vit_base_patch16_224.dino", dict),
    "dino_full": ("vit_base_patch16_224.dino", dino_full),
    "dinov2": ("vit_base_patch14_dinov2.lvd142m", dinov2),
    "dinov2_registers": ("vit_base_patch14_reg4_dinov2.lvd142m", dinov2_with_registers),
    "deit3": ("deit3_small_patch16_224.fb_in1k", deit3),
    "dinov3": ("vit_base_patch16_dinov3.lvd1689m", dinov3),
    "eva02": ("eva02_base_patch14_224.mim_in22k", eva02),
    "clip": ("vit_base_patch16_clip_quickgelu_224.openai", openai_clip),
    "siglip": ("vit_base_patch16_siglip_224.webli", siglip),
    "swin": ("swin_base_patch4_window7_224.ms_in22k", swin),
    "convnext": ("convnext_base.fb_in22k", convnext),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_layout_gives_every_weight_and_the_same_features(tmp_path, capsys, layout):
    name, write = LAYOUTS[layout]
    source, model = model_of(name), model_of(name, seed=1)
    assert not torch.allclose(features(source), features(model))
    torch.save(write(source.state_dict()), tmp_path / "weights.pth")
    if layout == "dinov2_registers":  # minus and plus 0.25 round
        with torch.no_grad():
            source.cls_token.copy_((source.cls_token - 0.25) + 0.25)
    load_file(model, tmp_path / "weights.pth")
    assert_same(model, source)
    backbone = build_backbone(
        BackboneSpec(name=name, weights=str(tmp_path / "weights.pth"), kwargs=TINY[name])
    )
    assert backbone.sha256 == hash_tensors(source.state_dict())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("write", [dict, uncounted])
def test_resnet_of_torchvision_computes_the_same_in_timm(tmp_path, write):
    torch.manual_seed(0)
    source = torchvision.models.resnet18(num_classes=7).eval()
    with torch.no_grad():
        for tensor in source.state_dict().values():
            if tensor.ndim < 2:  # of batch norm
                tensor.add_(torch.rand(tensor.shape).to(tensor.dtype))
    torch.save(write(source.state_dict()), tmp_path / "weights.pth")
    model = model_of("resnet18.tv_in1k", seed=1)
    load_file(model, tmp_path / "weights.pth")
    expected = {name: t for name, t in source.state_dict().items() if not name.startswith("fc.")}
    counted = {
        name: t for name, t in expected.items() if write is dict or not name.endswith("num_batches_tracked")
    }
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in counted.items())
    source.fc = torch.nn.Identity()
    assert relative_error(model(images()), source(images())) < 1e-5


FORMATS = [(name, "safetensors") for name in TINY]
FORMATS += [("vit_tiny_patch16_224", suffix) for suffix in ("pth", "bin", "pth.tar")]


@pytest.mark.parametrize(("name", "suffix"), FORMATS)
def test_what_timm_saved_is_loaded_in_every_format(tmp_path, name, suffix):
    source, model = model_of(name), model_of(name, seed=1)
    file = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(source.state_dict(), file)
    else:
        torch.save({"state_dict_ema": prefixed("module.", source.state_dict()), "state_dict": {}}, file)
    load_file(model, file)
    assert_same(model, source)


def test_a_model_s_own_classifier_is_loaded_too(tmp_path):
    source, model = (timm.create_model("vit_tiny_patch16_224", num_classes=3, **VIT) for _ in range(2))
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    load_file(model, tmp_path / "weights.safetensors")
    assert torch.equal(model(images()), source(images()))
    save_file(model_of("vit_tiny_patch16_224").state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"it lacks 2 of 32 weights: head\.weight, head\.bias"):
        load_file(model, tmp_path / "weights.safetensors")


def filter_of(name, monkeypatch):
    """The filter that timm itself hands its loader for an architecture."""
    module = sys.modules[timm.model_entrypoint(name).__module__]
    given = {}
    with monkeypatch.context() as patch:
        patch.setattr(
            module, "build_model_with_cfg", lambda *_, **kwargs: given.update(kwargs) or torch.nn.Module()
        )
        timm.create_model(name)
    return given.get("pretrained_filter_fn")


NAMES = [
    *TINY,
    "flexivit_small",
    "vit_base_patch16_radio_v3",
    "vit_large_patch16_radio_v3",
    "vitamin_small_224",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_filter_is_the_one_that_timm_would_take(monkeypatch, name):
    expected = filter_of(name.partition(".")[0], monkeypatch)
    model = torch.nn.Module()
    model.pretrained_cfg = timm.get_pretrained_cfg(name).to_dict()
    found = loading._filter(model)
    if expected is None:
        assert found({"a": 1}, model) == {"a": 1}
        return
    func, keywords = getattr(expected, "func", expected), getattr(expected, "keywords", {})
    assert getattr(found, "func", found) is func
    ours = dict(getattr(found, "keywords", {}))
    if "adapt_layer_scale" not in keywords:
        ours.pop("adapt_layer_scale", None)
    assert ours == keywords


THIN = {"embed_dim": 8, "depth": 1, "num_heads": 1}
STAGES = {"embed_dim": 4, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
SIZES = {  # the position table, and the side of its grid in the file
    "vit_base_patch16_224": ("pos_embed", 14, THIN),
    "vit_base_patch14_reg4_dinov2.lvd142m": ("pos_embed", 37, THIN),
    "eva02_base_patch14_224.mim_in22k": ("pos_embed", 16, THIN),
    "vit_base_patch16_dinov3.lvd1689m": (None, 0, THIN),
    "swin_base_patch4_window7_224.ms_in22k": (None, 0, STAGES),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("side", [384, 448])
def test_another_size_resamples_the_positions_alone(tmp_path, name, side):
    table, old, options = SIZES[name]
    source, model = (
        timm.create_model(name, num_classes=0, **options | given) for given in ({}, {"img_size": side})
    )
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    load_file(model, tmp_path / "weights.safetensors")
    expected = source.state_dict()
    if table:
        prefix, grid = expected[table].split([expected[table].shape[1] - old**2, old**2], 1)
        grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, model.patch_embed.grid_size, mode="bicubic", antialias=True)
        expected[table] = torch.cat([prefix, grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)
    assert [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, expected[key])] == []
    assert torch.isfinite(model(torch.zeros(1, 3, side, side))).all()
