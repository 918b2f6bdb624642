"""Where prompts enter, each location against what its formula reads; what they count.

Pairs that cannot be.
"""

import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.nn import functional as F
from torchvision.transforms.functional import resize

from helpers.tiny import (
    VIT_B_SIZE,
    geometry,
    images,
    measured,
    naive_features,
    tiny_classifier,
    tiny_model,
    worst_error,
)
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.methods.locations import pad
from visprompt.models.methods.vpt import VPT

SITES = frozenset({"tokens", "pixels", "modules"})
VIT_B = geometry(**VIT_B_SIZE)
MODELS = {
    "class token": {},
    "average": {"global_pool": "avg", "class_token": False},
    "registers": {"reg_tokens": 4, "qk_norm": True, "init_values": 0.5},
    "pre-norm": {"pre_norm": True},
}
every_model = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
SHALLOW = {"depth": 1, "dropout": 0.0, "carry_over": True}


def classifier(model_options=None, exact=True, **options):
    model = tiny_model(**(model_options or {}))
    return tiny_classifier("vpt_deep", exact, model, **({"num_tokens": 3, "dropout": 0.0} | options)).eval()


def close(one, features, x, bound=1e-5):
    """Logits and gradients of a classifier and of what its formula reads."""
    return worst_error(measured(one, one(x)), measured(one, one.head(features))) < bound


def through(model, tokens):
    """The model's own features of embedded patches, which may be of any number of channels before."""
    x = model.norm_pre(model._pos_embed(tokens))
    for block in model.blocks:
        x = block(x)
    return model.forward_head(model.norm(x), pre_logits=True)


@every_model
@pytest.mark.parametrize("location", ["add", "add_one"])
@pytest.mark.parametrize("where", [{}, {"depth": 2}, {"depth": 2, "depth_from": "last"}, {"depth": 1}])
def test_added_vectors_are_one_for_each_patch_or_one_for_all(options, location, where):
    one, x = classifier(options, location=location, **where), images()
    model, prompts = one.backbone.model, one.method.prompts
    assert prompts.shape == (where.get("depth", 4), 16 if location == "add" else 1, 32)
    blocks = one.method.prompted_blocks
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for i, block in enumerate(model.blocks):
        if i in blocks:
            rows = list(tokens.unbind(1))
            for j in range(16):
                rows[model.num_prefix_tokens + j] = (
                    rows[model.num_prefix_tokens + j] + prompts[i - blocks[0]][j if location == "add" else 0]
                )
            tokens = torch.stack(rows, 1)
        tokens = block(tokens)
    assert close(one, model.forward_head(model.norm(tokens), pre_logits=True), x)
    if one.has_frozen_part:
        assert torch.allclose(one(one.frozen(x)), one(x), atol=1e-5)


@every_model
@pytest.mark.parametrize("carry_over", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_patches_of_pixels_become_tokens_by_the_frozen_convolution(options, carry_over, exact):
    one, x = classifier(options, exact, location="prepend_pixel", depth=1, carry_over=carry_over), images()
    assert one.method.prompts.shape == (3, 3, 8, 8)
    proj = one.backbone.model.patch_embed.proj
    tokens = one.method.prompts.flatten(1) @ proj.weight.flatten(1).T  # one patch is one product
    tokens = tokens if proj.bias is None else tokens + proj.bias
    assert close(one, naive_features(one.backbone.model, x, tokens[None], 0, carry_over), x)


def framed(image, prompts):
    """A frame, strip by strip: above, then what one, two and three quarter turns bring left, below and right."""
    p, side = prompts.shape[2], prompts.shape[2] + prompts.shape[3]
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    strips = (prompts - mean) / std
    canvas = torch.zeros(len(image), 3, side, side)
    canvas[:, :, p : side - p, p : side - p] = image
    canvas[:, :, :p, : side - p] = strips[0]
    canvas[:, :, p:, :p] = strips[1].flip(2).transpose(1, 2)
    canvas[:, :, side - p :, p:] = strips[2].flip(1, 2)
    canvas[:, :, : side - p, side - p :] = strips[3].flip(1).transpose(1, 2)
    return canvas


@every_model
def test_padding_shrinks_the_image_so_that_its_side_stays(options):
    one, x = classifier(options, location="pad", depth=1), images()
    model = one.backbone.model
    assert one.method.prompts.shape == (4, 3, 3, 29)
    canvas = framed(resize(x, [26, 26], antialias=True), one.method.prompts)
    assert close(one, model.forward_head(model.forward_features(canvas), pre_logits=True), x)


@pytest.mark.parametrize(
    ("pixels", "options", "side"),
    [(3, {}, 32), (4, {"dynamic_img_size": True}, 40), (5, {"dynamic_img_size": True}, 40)],
)
def test_or_the_side_grows_and_the_remainder_is_dropped(pixels, options, side):
    one, x = classifier(options, location="pad", depth=1, num_tokens=pixels, pad_resize=False), images()
    model = one.backbone.model
    assert one.method.prompts.shape == (4, 3, pixels, 32 + pixels)
    canvas = framed(x, one.method.prompts)[..., :side, :side]
    assert one.method.pixels(x).shape == (2, 3, side, side)
    assert close(one, model.forward_head(model.forward_features(canvas), pre_logits=True), x)


def test_the_strips_cover_the_frame_once_and_nothing_of_the_image():
    prompts = torch.rand(4, 3, 4, 36)
    out = pad(torch.full((1, 3, 32, 32), torch.nan), prompts, resize=False, patch_size=8)[0]
    assert out[:, 4:36, 4:36].isnan().all()
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    there = (out * std + mean)[~out.isnan()]
    assert there.numel() == prompts.numel()
    assert torch.allclose(there.sort().values, prompts.flatten().sort().values, atol=1e-6)


def test_a_padded_pixel_starts_as_one_of_an_image():
    one = VPT(ViT(tiny_model()), num_tokens=3, location="pad", **SHALLOW)
    assert 0 <= one.prompts.min() < 0.01
    assert 0.99 < one.prompts.max() <= 1


@every_model
def test_further_channels_are_part_of_what_the_patch_embedding_normalises(options):
    one, x = classifier(options, location="concat_channel", depth=1), images()
    model, method = one.backbone.model, one.method
    base = model.patch_embed.proj.base
    weight = torch.cat([base.weight, method.channel_embed], 1)
    more = torch.cat([x, method.prompts.expand(2, -1, -1, -1)], 1)
    patches = F.conv2d(more, weight, base.bias, stride=8).flatten(2).transpose(1, 2)
    assert close(one, through(model, model.patch_embed.norm(patches)), x)
    assert one.tuned_names == {"method.prompts", "method.channel_embed", "head.weight", "head.bias"}


COUNTS = [  # by the paper's shapes on ViT-B/16
    ({"location": "add"}, 12 * 196 * 768),
    ({"location": "add", "depth": 1}, 196 * 768),
    ({"location": "add_one"}, 12 * 768),
    ({"location": "prepend_pixel", "num_tokens": 5, "depth": 1}, 3 * 16 * 16 * 5),
    ({"location": "pad", "num_tokens": 10, "depth": 1}, 3 * (20 * 224 + 204 * 20)),
    ({"location": "pad", "num_tokens": 10, "depth": 1, "pad_resize": False}, 3 * (20 * 244 + 224 * 20)),
    ({"location": "concat_channel", "num_tokens": 2, "depth": 1}, 2 * 224 * 224 + 768 * 2 * 16 * 16),
]


@pytest.mark.parametrize(("options", "count"), COUNTS)
def test_counts_are_the_papers(options, count):
    assert sum(p.numel() for p in VPT(VIT_B, dropout=0.0, **options).parameters()) == count


@pytest.mark.parametrize("location", ["add", "add_one", "prepend_pixel", "pad", "concat_channel"])
def test_what_is_saved_and_gets_gradients_is_called_prompts(location):
    one = classifier(location=location, depth=1)
    extra = {"channel_embed"} if location == "concat_channel" else set()
    assert set(one.tuned_state()) == {"prompts", "head.weight", "head.bias"} | extra
    one(images()).square().sum().backward()
    assert {n for n, p in one.named_parameters() if p.grad is not None} == one.tuned_names
    other = classifier(location=location, depth=1)
    with torch.no_grad():
        other.method.prompts.zero_()
    assert not torch.equal(other(images()), one(images()))
    other.load_tuned_state(one.tuned_state())
    assert torch.equal(other(images()), one(images()))


@pytest.mark.parametrize("location", ["add", "add_one"])
def test_dropout_of_added_vectors_is_drawn_for_every_image(location):
    method = VPT(ViT(tiny_model()), location=location, dropout=0.5).train()
    added = method.shift(1, torch.zeros(2, 17, 32))
    assert (added[:, 0] == 0).all(), "the class token stays"
    assert not torch.equal(added[0], added[1])
    assert torch.equal(*method.eval().shift(1, torch.zeros(2, 17, 32)))


PAIRS = [
    (
        {"location": "below"},
        "unknown method.location 'below': choose one of add, add_one, concat_channel, pad, prepend",
    ),
    (
        {"location": "pad"},
        "method.location=pad enters before the first block alone: give method.depth=1 and depth_from",
    ),
    (
        {"location": "pad", **SHALLOW, "depth_from": "last"},
        "before the first block alone: give method.depth=1",
    ),
    (
        {"location": "pad", "depth": 1},
        "method.dropout=0.1 is for prompts that are vectors, and those of method.location=pad are pixels: "
        "give method.dropout=0",
    ),
    (
        {"location": "pad", **SHALLOW, "shared": "all"},
        "method.shared=all is for prompts that are vectors.*shared=none",
    ),
    (
        {"location": "prepend_pixel", **SHALLOW, "project": 3},
        "method.project=3 is for .* give method.project=null",
    ),
    (
        {"location": "pad", **SHALLOW, "num_tokens": 16},
        "method.num_tokens=16 pixels on each side leave nothing of an image of 32: give less than 16, or "
        "method",
    ),
    (
        {"location": "pad", **SHALLOW, "num_tokens": 4, "pad_resize": False},
        "method.pad_resize=false with method.num_tokens=4 makes images of 32 pixels 40 wide, which this "
        "backbone does "
        r"not take: set \+backbone.kwargs.dynamic_img_size=true, or give method.pad_resize=true",
    ),
    (
        {"location": "add", "init": "cls"},
        "method.init=cls gives tokens, which method.location=add does not take",
    ),
    (
        {"location": "add", "depth": 2, "carry_over": True},
        "method.carry_over=true has no effect here, since method.location=add has no prompt outputs: give "
        "method.carry",
    ),
    (
        {"location": "add_one", "carry_over": True},
        "since method.location=add_one has no prompt outputs: give method",
    ),
    (
        {"location": "add", "pool": "prompt"},
        "method.pool=prompt reads prompts after the last block, which they do",
    ),
]


@pytest.mark.parametrize(("options", "message"), PAIRS)
def test_pairs_that_cannot_be_are_one_sentence(options, message):
    backbone = ViT(tiny_model())
    with pytest.raises(UserError, match=message):
        Classifier(backbone, VPT(backbone, **options), 5)


def test_a_backbone_without_the_site_or_with_oblong_images_is_named():
    sites = geometry(**VIT_B_SIZE, sites=frozenset({"tokens"}))
    with pytest.raises(
        UserError, match=r"method.location=pad cannot work on this backbone: it needs the site pixels"
    ):
        VPT(sites, location="pad", **SHALLOW)
    with pytest.raises(UserError, match="it needs the site pixels, and the backbone offers tokens"):
        VPT(sites, location="concat_channel", **SHALLOW)
    with pytest.raises(UserError, match=r"method.location=pad needs square images"):
        VPT(geometry(**VIT_B_SIZE, grids=((14, 7),) * 12), location="pad", **SHALLOW)
