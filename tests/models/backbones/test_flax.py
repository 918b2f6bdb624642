"""Google's `.npz` files are read whole, each array as PyTorch lays it out."""

import numpy as np
import pytest
import torch

from helpers.tiny import SIZE, images, tiny_model
from visprompt.errors import UserError
from visprompt.models.backbones.weights.flax import read_npz
from visprompt.models.backbones.weights.loading import load_file

HEADS, HEAD_WIDTH, WIDTH = 2, 16, 32
RELEASE = {
    "attention": "MultiHeadDotProductAttention_1",
    "norms": ("LayerNorm_0", "LayerNorm_2"),
    "mlp": "MlpBlock_3",
}
BIG_VISION = {
    "attention": "MultiHeadDotProductAttention_0",
    "norms": ("LayerNorm_0", "LayerNorm_1"),
    "mlp": "MlpBlock_0",
}


def dense(layer):
    return {"kernel": layer.weight.T, "bias": layer.bias}


def norm(layer):
    return {"scale": layer.weight, "bias": layer.bias}


def projection(weight, bias):
    return {"kernel": weight.T.reshape(WIDTH, HEADS, HEAD_WIDTH), "bias": bias.reshape(HEADS, HEAD_WIDTH)}


def out(layer):
    return {"kernel": layer.weight.T.reshape(HEADS, HEAD_WIDTH, WIDTH), "bias": layer.bias}


def block_parts(block, names):
    parts = {names["norms"][0]: norm(block.norm1), names["norms"][1]: norm(block.norm2)}
    weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
    for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
        parts[f"{names['attention']}/{name}"] = projection(weight, bias)
    parts[f"{names['attention']}/out"] = out(block.attn.proj)
    for r, layer in enumerate((block.mlp.fc1, block.mlp.fc2)):
        parts[f"{names['mlp']}/Dense_{r}"] = dense(layer)
    return parts


def flat(parts):
    return {
        f"{part}/{leaf}".lstrip("/"): t.detach().numpy()
        for part, ts in parts.items()
        for leaf, t in ts.items()
    }


def start_parts(model):
    patches = {
        "kernel": model.patch_embed.proj.weight.permute(2, 3, 1, 0),
        "bias": model.patch_embed.proj.bias,
    }
    return {"embedding": patches, "Transformer/encoder_norm": norm(model.norm)}


def release_arrays(model):
    """The layout of Dosovitskiy et al.'s files, with the classifier and the layer before it that they come with."""
    parts = start_parts(model) | {
        "": {"cls": model.cls_token},
        "Transformer/posembed_input": {"pos_embedding": model.pos_embed},
        "pre_logits": {"kernel": torch.ones(WIDTH, WIDTH), "bias": torch.ones(WIDTH)},
        "head": {"kernel": torch.ones(WIDTH, 7), "bias": torch.ones(7)},
    }
    for i, block in enumerate(model.blocks):
        parts |= {f"Transformer/encoderblock_{i}/{k}": v for k, v in block_parts(block, RELEASE).items()}
    return flat(parts)


def siglip_arrays(model):
    """big_vision's layout: the blocks stacked, positions elsewhere, pooled by attention, a text tower beside it."""
    pool = model.attn_pool
    pooling = {
        "MAPHead_0": {"probe": pool.latent},
        "MAPHead_0/LayerNorm_0": norm(pool.norm),
        "MAPHead_0/MultiHeadDotProductAttention_0/query": projection(pool.q.weight, pool.q.bias),
        "MAPHead_0/MultiHeadDotProductAttention_0/out": out(pool.proj),
        "MAPHead_0/MlpBlock_0/Dense_0": dense(pool.mlp.fc1),
        "MAPHead_0/MlpBlock_0/Dense_1": dense(pool.mlp.fc2),
    }
    for name, weight, bias in zip(
        ("key", "value"), pool.kv.weight.chunk(2), pool.kv.bias.chunk(2), strict=True
    ):
        pooling[f"MAPHead_0/MultiHeadDotProductAttention_0/{name}"] = projection(weight, bias)
    arrays = flat(start_parts(model) | {"": {"pos_embedding": model.pos_embed}} | pooling)
    blocks = [flat(block_parts(block, BIG_VISION)) for block in model.blocks]
    arrays |= {
        f"Transformer/encoderblock/{name}": np.stack([block[name] for block in blocks]) for name in blocks[0]
    }
    return {f"params/img/{name}": a for name, a in arrays.items()} | {
        "params/txt/head/bias": np.zeros(3),
        "params/t": 1.0,
    }


def saved(path, arrays):
    np.savez(path, **arrays)
    return path


def same(model, other):
    tensors, expected = model.state_dict(), other.state_dict()
    assert tensors.keys() == expected.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, expected[name])] == []


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
def test_every_weight_of_the_release_is_read_bit_for_bit(tmp_path, prefix):
    source, model, by_timm = tiny_model(), tiny_model(seed=1), tiny_model(seed=2)
    file = saved(tmp_path / "w.npz", {prefix + name: array for name, array in release_arrays(source).items()})
    load_file(model, file)
    same(model, source)
    assert torch.equal(model(images()), source(images()))
    if prefix != "params/":  # for timm a sign of big_vision
        by_timm.load_pretrained(str(file))
        same(by_timm, source)


def test_big_vision_s_stacked_blocks_and_pooling_are_read_bit_for_bit(tmp_path):
    options = {"class_token": False, "global_pool": "map"}
    source, model, by_timm = (tiny_model(seed=seed, **options) for seed in (0, 1, 2))
    file = saved(tmp_path / "w.npz", siglip_arrays(source))
    load_file(model, file)
    by_timm.load_pretrained(str(file))
    same(model, source)
    same(by_timm, source)
    assert torch.equal(model(images()), source(images()))


def test_a_model_without_the_pooling_leaves_it_out(tmp_path):
    source = tiny_model(class_token=False, global_pool="map")
    model = tiny_model(seed=1, class_token=False, global_pool="avg", fc_norm=False)
    load_file(model, saved(tmp_path / "w.npz", siglip_arrays(source)))
    expected = {
        name: tensor for name, tensor in source.state_dict().items() if not name.startswith("attn_pool.")
    }
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def without(name):
    return lambda arrays: {n: a for n, a in arrays.items() if n != name}


BLOCK = "Transformer/encoderblock_3"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (dict, {"depth": 3}, r"the model does not have 12 of the file's weights: blocks\.3\."),
        (dict, {"depth": 5}, r"it lacks 12 of 66 weights: blocks\.4\.norm1\.weight, blocks\.4\."),
        (dict, {"reg_tokens": 2}, r"it lacks 1 of 55 weights: reg_token"),
        (dict, {"init_values": 0.1}, r"it lacks 8 of 62 weights: blocks\.0\.ls1\.gamma"),
        (
            dict,
            {"class_token": False, "global_pool": "avg", "fc_norm": False},
            "does not have 1 .*: cls_token",
        ),
        (
            dict,
            {"embed_dim": 64},
            r"shapes: patch_embed.proj.weight \[32 x 3 x 8 x 8\], which is \[64 x 3 x 8 x 8\] here",
        ),
        (without("cls"), {}, "it lacks 1 of 54 weights: cls_token; check backbone"),
        (
            without(f"{BLOCK}/MlpBlock_3/Dense_1/bias"),
            {},
            r"it lacks 1 of 54 weights: blocks\.3\.mlp\.fc2\.bias;",
        ),
        (
            without(f"{BLOCK}/MultiHeadDotProductAttention_1/key/bias"),
            {},
            r"lacks 1 of 54 weights: blocks\.3\.attn\.qkv\.bias; the model does not have 2 .*: "
            r"blocks\.3\.attn\.query",
        ),
        (
            lambda arrays: arrays | {"conv_root/kernel": np.ones(3)},
            {},
            r"does not have 1 .*: conv_root\.kernel",
        ),
        (
            lambda arrays: arrays | {"cls": np.full((1, 1, 32), np.nan, "f")},
            {},
            "not finite: cls_token",
        ),
        (without("embedding/kernel"), {}, "but no embedding/kernel of a ViT"),
        (lambda arrays: arrays | {"cls": np.array([{}], dtype=object)}, {}, "Object arrays cannot be loaded"),
    ],
)
def test_what_timm_s_reader_would_leave_random_is_refused(tmp_path, change, options, message):
    file = saved(tmp_path / "w.npz", change(release_arrays(tiny_model())))
    model = tiny_model(seed=1, **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as error:
        load_file(model, file)
    assert str(error.value).startswith(str(file))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    file = saved(tmp_path / "w.npz", release_arrays(tiny_model()))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"w\.npz cannot be read as backbone weights .*: it may be truncated"):
        load_file(tiny_model(), file)


def test_half_precision_is_read_as_it_is(tmp_path):
    arrays = {name: array.astype(np.float16) for name, array in release_arrays(tiny_model()).items()}
    file = saved(tmp_path / "w.npz", arrays)
    assert {tensor.dtype for tensor in read_npz(file).values()} == {torch.float16}
    model = tiny_model(seed=1)
    load_file(model, file)
    assert torch.equal(model.pos_embed, tiny_model().pos_embed.half().float())
    assert SIZE["embed_dim"] == WIDTH
