"""Convpass: the bypass convolves the grid of patches, and every other token alone."""

import pytest
import torch
from torch.nn import functional as F

from helpers.tiny import NUM_CLASSES, SIZE, VIT_B_SIZE, geometry, images, measured, tiny_model, worst_error
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.contract import Place
from visprompt.models.methods.convpass import Convpass

VIT_B = geometry(**VIT_B_SIZE)
MODELS = {
    "class token": {},
    "average": {"global_pool": "avg", "class_token": False},
    "registers, map": {"reg_tokens": 4, "global_pool": "map", "qk_norm": True, "init_values": 0.5},
    "oblong": {"img_size": (32, 48)},
}


def build(random=True, model=None, **options):
    backbone = ViT(tiny_model() if model is None else model)
    torch.manual_seed(1)
    method = Convpass(backbone, **options)
    if random:
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.normal_(0, 0.2)
    return Classifier(backbone, method, NUM_CLASSES)


def naive_bypass(method, i, j, z, prefix, grid):
    """The convolution written out: every patch's neighbours one by one."""
    hidden = F.gelu(z @ method.down[i, j] + method.down_bias[i, j])
    rows, columns = grid
    out = []
    for token in range(z.shape[1]):
        total = method.conv_bias[i, j].expand(len(z), -1)
        if token < prefix:
            total = total + hidden[:, token] @ method.conv[i, j, :, :, 1, 1].T
        else:
            y, x = divmod(token - prefix, columns)
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= y + dy < rows and 0 <= x + dx < columns:
                        neighbour = hidden[:, prefix + (y + dy) * columns + x + dx]
                        total = total + neighbour @ method.conv[i, j, :, :, dy + 1, dx + 1].T
        out.append(total)
    return method.scale * (F.gelu(torch.stack(out, 1)) @ method.up[i, j] + method.up_bias[i, j])


def naive_logits(classifier, x):
    model, method, backbone = classifier.backbone.model, classifier.method, classifier.backbone
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    where = (backbone.num_prefix, backbone.grids[0])
    for i, block in enumerate(model.blocks):
        z = block.norm1(x)
        x = x + block.ls1(block.attn(z)) + naive_bypass(method, i, 0, z, *where)
        z = block.norm2(x)
        x = x + block.ls2(block.mlp(z)) + naive_bypass(method, i, 1, z, *where)
    return classifier.head(model.forward_head(model.norm(x), pre_logits=True))


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_logits_and_gradients_are_those_of_the_equations(options):
    classifier = build(model=tiny_model(**options), bottleneck=3, scale=0.7).eval()
    x = images(3) if "img_size" not in options else torch.randn(3, 3, *options["img_size"])
    fast, naive = (measured(classifier, f(x)) for f in (classifier, lambda x: naive_logits(classifier, x)))
    assert worst_error(fast, naive) < 1e-5


@pytest.mark.parametrize("init", ["identity", "xavier"])
def test_the_start_is_the_backbone(init):
    model, x = tiny_model(), images(3)
    plain = model(x)
    classifier = build(random=False, model=model, init=init)
    assert torch.allclose(classifier.features(x), plain, rtol=1e-5, atol=1e-5)


def test_initial_values():
    torch.manual_seed(0)
    identity, xavier = Convpass(VIT_B), Convpass(VIT_B, init="xavier")
    z = torch.randn(2, 8, 14, 14)
    assert torch.allclose(F.conv2d(z, identity.conv[3, 1], padding=1), z)
    assert xavier.conv.abs().max().item() == pytest.approx((6 / 144) ** 0.5, rel=0.01)
    assert identity.down.abs().max().item() == pytest.approx((6 / 776) ** 0.5, rel=0.01)
    assert not any(p.any() for p in (identity.up, identity.up_bias, identity.down_bias, identity.conv_bias))


def test_the_count_is_the_papers():
    """Two bypasses of 2 * 768 * 8 + 8 + 768 and 9 * 8 * 8 + 8 in each of 12 blocks: 0.33 M, as published."""
    count = sum(p.numel() for p in Convpass(VIT_B).parameters())
    assert count == 24 * (2 * 768 * 8 + 8 + 768 + 9 * 8 * 8 + 8)
    assert round(count / 1e6, 2) == 0.33


def test_saved_keys_and_tuned_names():
    classifier = build(bottleneck=3)
    assert {name: list(tensor.shape) for name, tensor in classifier.tuned_state().items()} == {
        "down": [4, 2, 32, 3],
        "down_bias": [4, 2, 3],
        "conv": [4, 2, 3, 3, 3, 3],
        "conv_bias": [4, 2, 3],
        "up": [4, 2, 3, 32],
        "up_bias": [4, 2, 32],
        "head.weight": [5, 32],
        "head.bias": [5],
    }
    F.cross_entropy(classifier(images(3)), torch.arange(3)).backward()
    assert {n for n, p in classifier.named_parameters() if p.grad is not None} == classifier.tuned_names


def test_a_patch_reaches_its_neighbours_and_the_class_token_nobody():
    method = build(bottleneck=3).method.eval()
    z = torch.zeros(1, 17, 32)
    base = method.branch(Place.ATTENTION, 2, z, z)

    def reached(token):
        changed = z.clone()
        changed[0, token] = 1.0
        return (
            (method.branch(Place.ATTENTION, 2, changed, changed) != base)
            .any(-1)[0]
            .nonzero()
            .flatten()
            .tolist()
        )

    assert reached(0) == [0]
    assert reached(1 + 5) == [1 + n for n in (0, 1, 2, 4, 5, 6, 8, 9, 10)]  # row 1, column 1 of 4 x 4
    assert reached(1 + 3) == [1 + n for n in (2, 3, 6, 7)]  # the corner


@pytest.mark.parametrize(
    ("options", "last"),
    [({}, 1), ({"reg_tokens": 2}, 1), ({"global_pool": "avg"}, 17)],
    ids=["class token", "registers", "average"],
)
def test_the_last_block_computes_the_patches_only_where_the_pooling_reads_them(options, last):
    classifier, seen = build(model=tiny_model(**options), bottleneck=3), []
    original = classifier.method._convolve
    classifier.method._convolve = lambda x, *rest: seen.append(x.shape[1]) or original(x, *rest)
    classifier(images())
    assert seen == [17 + options.get("reg_tokens", 0)] * 6 + [last] * 2


def test_dropout_only_in_training():
    method = build(bottleneck=3, dropout=0.5).method
    z = torch.randn(2, 17, 32)
    plain = [method.eval().branch(Place.MLP, 0, z, z) for _ in range(2)]
    assert torch.equal(*plain)
    assert not torch.equal(method.train().branch(Place.MLP, 0, z, z), plain[0])


def test_another_grid_is_named():
    classifier = build(model=tiny_model(**SIZE | {"dynamic_img_size": True}))
    message = r"needs images of the backbone's own size 32 x 32 and got 48 x 48: resize them, or set backbone.image_size"
    with pytest.raises(UserError, match=message):
        classifier(images(1, size=48))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck": 0}, "method.bottleneck=0 is too small: give at least 1"),
        ({"scale": -1.0}, "method.scale=-1.0 is not a positive finite number: give a number above 0"),
        ({"dropout": 1.5}, "method.dropout=1.5 is not a probability"),
        ({"init": "xaver"}, "unknown method.init 'xaver': did you mean xavier"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        Convpass(VIT_B, **options)
