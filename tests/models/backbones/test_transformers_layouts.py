"""Weights under transformers' names give the features that transformers computes, by a forward written down here.

The names and the forward were compared with transformers 4.57.6 and 5.24.0 when they were written.
"""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from helpers.tiny import images, relative_error
from visprompt.errors import UserError
from visprompt.models.backbones.weights.loading import load_file

WIDTH, DEPTH, HEADS, PATCH, TOKENS = 32, 2, 2, 8, 17
SIZE = {"img_size": 32, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
CLIP = "vit_base_patch16_clip_quickgelu_224.openai"
LINEAR, NORM = ("weight", "bias"), ("weight", "bias")


def layer(*names, out=WIDTH, inside=WIDTH):
    return {f"{n}.weight": (out, inside) for n in names} | {f"{n}.bias": (out,) for n in names}


def norm(*names):
    return {f"{n}.{leaf}": (WIDTH,) for n in names for leaf in ("weight", "bias")}


def vit_block(at):
    mlp = layer(f"{at}.intermediate.dense", out=64) | layer(f"{at}.output.dense", inside=64)
    joint = [f"{at}.attention.attention.{part}" for part in ("query", "key", "value")]
    return (
        layer(*joint, f"{at}.attention.output.dense")
        | mlp
        | norm(f"{at}.layernorm_before", f"{at}.layernorm_after")
    )


def vit5_block(at):
    """ViT as version 5 of transformers names it in memory."""
    mlp = layer(f"{at}.mlp.fc1", out=64) | layer(f"{at}.mlp.fc2", inside=64)
    attention = layer(*(f"{at}.attention.{part}_proj" for part in "qkvo"))
    return attention | mlp | norm(f"{at}.layernorm_before", f"{at}.layernorm_after")


def dinov2_block(at):
    joint = [f"{at}.attention.attention.{part}" for part in ("query", "key", "value")]
    mlp = layer(f"{at}.mlp.fc1", out=64) | layer(f"{at}.mlp.fc2", inside=64)
    scales = {f"{at}.layer_scale{i}.lambda1": (WIDTH,) for i in (1, 2)}
    return layer(*joint, f"{at}.attention.output.dense") | mlp | scales | norm(f"{at}.norm1", f"{at}.norm2")


def swiglu_block(at):
    gated = layer(f"{at}.mlp.weights_in", out=128) | layer(f"{at}.mlp.weights_out", inside=64)
    return {name: size for name, size in dinov2_block(at).items() if ".mlp." not in name} | gated


def swiglu5_block(at):
    gated = layer(f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj", out=64) | layer(
        f"{at}.mlp.down_proj", inside=64
    )
    kept = {
        name: size
        for name, size in dinov2_block(at).items()
        if ".attention." not in name and ".mlp." not in name
    }
    return kept | gated | layer(*(f"{at}.attention.{part}_proj" for part in "qkvo"))


def clip_block(at):
    attention = layer(*(f"{at}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")))
    mlp = layer(f"{at}.mlp.fc1", out=64) | layer(f"{at}.mlp.fc2", inside=64)
    return attention | mlp | norm(f"{at}.layer_norm1", f"{at}.layer_norm2")


VIT = {
    "embeddings.cls_token": (1, 1, WIDTH),
    "embeddings.position_embeddings": (1, TOKENS, WIDTH),
    "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, PATCH, PATCH),
    "embeddings.patch_embeddings.projection.bias": (WIDTH,),
    **norm("layernorm"),
}
DINO = VIT | {"embeddings.mask_token": (1, WIDTH)}
IMAGE_TOWER = {
    "embeddings.class_embedding": (WIDTH,),
    "embeddings.position_embedding.weight": (TOKENS, WIDTH),
    "embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
    **norm("pre_layrnorm", "post_layernorm"),
}
CLIP_BESIDE = {
    "text_model.embeddings.token_embedding.weight": (9, WIDTH),
    "text_model.encoder.layers.0.self_attn.q_proj.weight": (WIDTH, WIDTH),
    "visual_projection.weight": (8, WIDTH),
    "text_projection.weight": (8, WIDTH),
    "logit_scale": (),
}
BASE, DINOV2, REGISTERS = (
    "vit_base_patch16_224",
    "vit_base_patch14_dinov2.lvd142m",
    "vit_base_patch14_reg4_dinov2.lvd142m",
)
GATED = "vit_giant_patch14_dinov2.lvd142m"
# what transformers has: prefix, tensors outside the blocks, a block's place and tensors, what stands next to
# the model
LAYOUTS = {
    "ViTModel": (BASE, "", VIT | layer("pooler.dense"), "encoder.layer", vit_block, {}),
    "ViTForImageClassification": (BASE, "vit.", VIT, "encoder.layer", vit_block, layer("classifier", out=5)),
    "ViTForImageClassification, version 5": (
        BASE,
        "vit.",
        VIT,
        "layers",
        vit5_block,
        layer("classifier", out=5),
    ),
    "ViTMAEForPreTraining": (
        BASE,
        "vit.",
        VIT,
        "encoder.layer",
        vit_block,
        layer("decoder.decoder_embed", out=16),
    ),
    "Dinov2Model": (DINOV2, "", DINO, "encoder.layer", dinov2_block, {}),
    "Dinov2ForImageClassification": (
        DINOV2,
        "dinov2.",
        DINO,
        "encoder.layer",
        dinov2_block,
        layer("classifier", out=5),
    ),
    "Dinov2Model, giant": (GATED, "", DINO, "encoder.layer", swiglu_block, {}),
    "Dinov2Model, giant, version 5": (GATED, "", DINO, "encoder.layer", swiglu5_block, {}),
    "Dinov2WithRegistersModel": (
        REGISTERS,
        "",
        DINO | {"embeddings.register_tokens": (1, 4, WIDTH)},
        "encoder.layer",
        dinov2_block,
        {},
    ),
    "CLIPVisionModel": (CLIP, "vision_model.", IMAGE_TOWER, "encoder.layers", clip_block, {}),
    "CLIPVisionModel, version 5": (CLIP, "", IMAGE_TOWER, "encoder.layers", clip_block, {}),
    "CLIPModel": (CLIP, "vision_model.", IMAGE_TOWER, "encoder.layers", clip_block, CLIP_BESIDE),
}


def drawn(shapes, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return {name: (len(s) == 1) + 0.3 * torch.randn(s, generator=noise) for name, s in shapes.items()}


def tensors_of(layout):
    """What lies in the model, and what a file of it holds."""
    _, prefix, whole, at, block, beside = LAYOUTS[layout]
    inside = drawn({**whole, **{k: v for i in range(DEPTH) for k, v in block(f"{at}.{i}").items()}})
    return inside, {prefix + name: tensor for name, tensor in inside.items()} | drawn(beside, seed=1)


def pick(tensors, *names):
    """The first of several names that a layout has, as (weight, bias)."""
    name = next(name for name in names if f"{name}.weight" in tensors)
    return tensors[f"{name}.weight"], tensors.get(f"{name}.bias")


def reference(tensors, x, eps):
    """The last hidden states as transformers computes them, for any of the layouts."""
    clip = "embeddings.class_embedding" in tensors
    weight, bias = pick(tensors, "embeddings.patch_embeddings.projection", "embeddings.patch_embedding")
    patches = F.conv2d(x, weight, bias, stride=PATCH).flatten(2).mT
    token = tensors["embeddings.class_embedding" if clip else "embeddings.cls_token"].reshape(1, 1, WIDTH)
    names = ("embeddings.position_embedding.weight", "embeddings.position_embeddings")
    places = next(tensors[name] for name in names if name in tensors).reshape(1, TOKENS, WIDTH)
    x = torch.cat([token.expand(len(x), -1, -1), patches], 1) + places
    if "embeddings.register_tokens" in tensors:
        x = torch.cat([x[:, :1], tensors["embeddings.register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
    if clip:
        x = F.layer_norm(x, (WIDTH,), *pick(tensors, "pre_layrnorm"), eps)
    start = next(
        name
        for name in tensors
        if name.endswith("0.norm1.weight") or "0.layernorm_before.w" in name or "0.layer_norm1.w" in name
    )
    at = start.split("0.")[0]
    for i in range(DEPTH):
        x = reference_block(
            {n.removeprefix(f"{at}{i}."): t for n, t in tensors.items() if n.startswith(f"{at}{i}.")},
            x,
            clip,
            eps,
        )
    return F.layer_norm(x, (WIDTH,), *pick(tensors, "layernorm", "post_layernorm"), eps)


def reference_block(tensors, x, clip, eps):
    normed = F.layer_norm(x, (WIDTH,), *pick(tensors, "layernorm_before", "norm1", "layer_norm1"), eps)
    parts = [("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")]
    q, k, v = (
        F.linear(normed, *pick(tensors, f"attention.attention.{old}", f"attention.{new}", f"self_attn.{new}"))
        .unflatten(-1, (HEADS, -1))
        .transpose(1, 2)
        for old, new in parts
    )
    weights = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
    out = (weights @ v).transpose(1, 2).flatten(2)
    out = F.linear(out, *pick(tensors, "attention.output.dense", "attention.o_proj", "self_attn.out_proj"))
    x = x + out * tensors.get("layer_scale1.lambda1", 1)
    normed = F.layer_norm(x, (WIDTH,), *pick(tensors, "layernorm_after", "norm2", "layer_norm2"), eps)
    if "mlp.weights_in.weight" in tensors:
        gate, up = F.linear(normed, *pick(tensors, "mlp.weights_in")).chunk(2, -1)
        inner = F.silu(gate) * up
    elif "mlp.gate_proj.weight" in tensors:
        inner = F.silu(F.linear(normed, *pick(tensors, "mlp.gate_proj"))) * F.linear(
            normed, *pick(tensors, "mlp.up_proj")
        )
    else:
        inner = F.linear(normed, *pick(tensors, "intermediate.dense", "mlp.fc1"))
        inner = inner * torch.sigmoid(1.702 * inner) if clip else F.gelu(inner)
    out = F.linear(inner, *pick(tensors, "output.dense", "mlp.fc2", "mlp.weights_out", "mlp.down_proj"))
    return x + out * tensors.get("layer_scale2.lambda1", 1)


def model_of(layout, seed=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ratio = 4.0 if LAYOUTS[layout][0] == GATED else 2.0
        return timm.create_model(LAYOUTS[layout][0], num_classes=0, mlp_ratio=ratio, **SIZE).eval()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_transformers_features(tmp_path, layout, suffix):
    inside, tensors = tensors_of(layout)
    (save_file if suffix == "safetensors" else torch.save)(tensors, tmp_path / f"w.{suffix}")
    model = model_of(layout)
    load_file(model, tmp_path / f"w.{suffix}")
    with torch.no_grad():
        features = model.forward_features(images(2, 32))
    expected = reference(inside, images(2, 32), model.norm.eps)
    assert relative_error(features, expected) < 1e-5
    assert relative_error(model_of(layout).forward_features(images(2, 32)), expected) > 0.1


@pytest.mark.parametrize("layout", ["ViTModel", "Dinov2Model", "CLIPVisionModel"])
def test_a_lightning_checkpoint_of_a_transformers_model_is_loaded(tmp_path, layout):
    inside, tensors = tensors_of(layout)
    torch.save(
        {"state_dict": {f"model.{n}": t for n, t in tensors.items()}, "epoch": 1}, tmp_path / "last.ckpt"
    )
    model = model_of(layout)
    load_file(model, tmp_path / "last.ckpt")
    expected = reference(inside, images(2, 32), model.norm.eps)
    assert relative_error(model.forward_features(images(2, 32)), expected) < 1e-5


def test_what_is_missing_has_timm_s_name(tmp_path):
    _, tensors = tensors_of("ViTForImageClassification")
    tensors = {name: tensor for name, tensor in tensors.items() if "layer.1.output" not in name}
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(
        UserError, match=r"it lacks 2 of 30 weights: blocks\.1\.mlp\.fc2\.weight, blocks\.1\.mlp\.fc2\.b"
    ):
        load_file(model_of("ViTModel"), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("config", "name", "sentence"),
    [
        (
            {"vision_config": {"hidden_act": "quick_gelu"}},
            "vit_base_patch16_clip_224",
            "was trained with the activation quick_gelu (config.json in its folder) and "
            "vit_base_patch16_clip_224 has gelu: set backbone.name=vit_base_patch16_clip_quickgelu_224",
        ),
        (
            {"hidden_act": "gelu"},
            CLIP,
            "was trained with the activation gelu (config.json in its folder) and "
            "vit_base_patch16_clip_quickgelu_224 "
            "has quick_gelu: set backbone.name=vit_base_patch16_clip_224",
        ),
        ({"hidden_act": "quick_gelu"}, CLIP, None),
        ({"hidden_act": ["gelu"]}, CLIP, None),
        ([], CLIP, None),
    ],
)
def test_clip_with_another_activation_is_refused(tmp_path, config, name, sentence):
    _, tensors = tensors_of("CLIPModel")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = timm.create_model(name, num_classes=0, mlp_ratio=2.0, **SIZE).eval()
    if sentence is None:
        load_file(model, tmp_path)
        return
    with pytest.raises(UserError) as error:
        load_file(model, tmp_path)
    assert str(error.value) == f"{tmp_path}/model.safetensors {sentence}"


SIGLIP = "vit_base_patch16_siglip_224.webli"
SIGLIP_TOWER = {
    "embeddings.position_embedding.weight": (TOKENS - 1, WIDTH),
    "embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
    "embeddings.patch_embedding.bias": (WIDTH,),
    "head.probe": (1, 1, WIDTH),
    "head.attention.in_proj_weight": (3 * WIDTH, WIDTH),
    "head.attention.in_proj_bias": (3 * WIDTH,),
    **layer("head.attention.out_proj"),
    **layer("head.mlp.fc1", out=64),
    **layer("head.mlp.fc2", inside=64),
    **norm("post_layernorm", "head.layernorm"),
}


def siglip_reference(tensors, x, eps, gelu):
    """SigLIP's pooled features as transformers computes them."""
    x = F.conv2d(x, *pick(tensors, "embeddings.patch_embedding"), stride=PATCH).flatten(2).mT
    x = x + tensors["embeddings.position_embedding.weight"]
    for i in range(DEPTH):
        at = f"encoder.layers.{i}."
        inside = {n.removeprefix(at): t for n, t in tensors.items() if n.startswith(at)}
        # `reference_block` has the exact GELU, which SigLIP's blocks have an approximation of
        x = reference_block(inside, x, False, eps)
    x = F.layer_norm(x, (WIDTH,), *pick(tensors, "post_layernorm"), eps)
    probe = tensors["head.probe"].expand(len(x), -1, -1).transpose(0, 1)
    attended, _ = F.multi_head_attention_forward(
        *(probe, x.transpose(0, 1), x.transpose(0, 1), WIDTH, HEADS),
        *(tensors["head.attention.in_proj_weight"], tensors["head.attention.in_proj_bias"]),
        *(None, None, False, 0.0, *pick(tensors, "head.attention.out_proj")),
        training=False,
    )
    attended = attended[0]
    inner = F.layer_norm(attended, (WIDTH,), *pick(tensors, "head.layernorm"), eps)
    return attended + F.linear(
        gelu(F.linear(inner, *pick(tensors, "head.mlp.fc1"))), *pick(tensors, "head.mlp.fc2")
    )


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [("vision_model.", {}), ("", {}), ("vision_model.", CLIP_BESIDE | {"logit_bias": (1,)})],
)
def test_siglip_s_image_tower_is_loaded_with_its_attention_pooling(tmp_path, prefix, beside):
    blocks = {k: v for i in range(DEPTH) for k, v in clip_block(f"encoder.layers.{i}").items()}
    inside = drawn(SIGLIP_TOWER | blocks)
    save_file({prefix + n: t for n, t in inside.items()} | drawn(beside, seed=1), tmp_path / "w.safetensors")
    model = timm.create_model(SIGLIP, num_classes=0, mlp_ratio=2.0, act_layer="gelu", **SIZE).eval()
    load_file(model, tmp_path / "w.safetensors")
    with torch.no_grad():
        features = model(images(2, 32))
    expected = siglip_reference(inside, images(2, 32), model.norm.eps, model.attn_pool.mlp.act)
    assert relative_error(features, expected) < 1e-5
