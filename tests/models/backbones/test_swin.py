"""The re-driven Swin equals timm's own forward.

Its exact path equals prompts carried through every window by hand.
"""

import math

import pytest
import timm
import torch
from timm.layers import LayerNormFp32, RmsNorm
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import visprompt
from helpers.pairs import works
from helpers.tiny import NUM_CLASSES, images, measured, relative_error, worst_error
from helpers.wide import REPRESENTATIVES, case, star
from visprompt.errors import UserError
from visprompt.models.backbones.families import family
from visprompt.models.backbones.swin import Swin
from visprompt.models.classifier import Classifier
from visprompt.models.merge import merge
from visprompt.models.methods import METHODS, build_method
from visprompt.models.methods.inits import initialise

FLOAT32 = 1e-5
SIZE = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
}

# what each gives: map and window of the stages
MODELS = {
    "even": {},  # 8 by 4 with shift; 4 by 4, one window
    "filled up": {"img_size": 40},  # 10 by 4 and 5 by 4, both with shift
    "odd": {"img_size": 36, "window_size": 3},  # 9 by 3; 5 by 3
    "one window": {"window_size": 9},  # larger than the map: 8 by 8; 4 by 4, neither with shift
    "partitioned": {"window_size": 5, "always_partition": True},  # 8 by 5; 4 by 5, with shift
    "oblong": {"img_size": (24, 40), "window_size": ((4, 2), (3, 2))},
    "three stages": {"depths": (1, 2, 1), "num_heads": (1, 2, 4), "window_size": 2},
    "other heads": {"head_dim": 6, "qkv_bias": False, "norm_layer": RmsNorm},
    "another norm": {"norm_layer": LayerNormFp32},  # not known to be proven: carried
    "max": {"global_pool": "max"},
    "both": {"global_pool": "catavgmax"},
}
# (depth, from, carry over): every distinct way in which prompts can flow through four blocks
FLOWS = [
    (4, "first", False),
    *((depth, "first", carry) for depth in (1, 2, 3) for carry in (False, True)),
    *((depth, "last", False) for depth in (1, 2, 3)),
]


def tiny_swin(seed=0, **options):
    """A timm Swin with large random weights, see `tiny.tiny_model`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SwinTransformer(**{"num_classes": 0} | SIZE | options).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                start = parameter if parameter.ndim == 1 else 0
                parameter.copy_(start + 0.3 * torch.randn_like(parameter))
    return model


def dynamic(model, **options):
    """timm's own model of the same weights, whose option lets images of any size in."""
    other = SwinTransformer(**{"num_classes": 0} | SIZE | options, dynamic_img_size=True).eval()
    other.load_state_dict(model.state_dict())
    return other


def classifier_on(model, method="vpt_deep", exact=True, **options):
    """As `tiny.tiny_classifier`, on a Swin."""
    backbone = Swin(model, exact=exact)
    torch.manual_seed(1)
    classifier = Classifier(backbone, build_method(method, backbone, **options), NUM_CLASSES)
    with torch.no_grad():
        for name, parameter in classifier.method.named_parameters():
            if "prompts" in name:
                parameter.normal_()
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return classifier


def pictures(model, batch=2):
    height, width = model.patch_embed.img_size
    return images(batch, max(height, width))[..., :height, :width]


# --- the equations, by hand: windows one after another, prompts carried in each as tokens


def naive_bias(attn):
    """The table's entry for the distance of two positions, row by row, then column by column."""
    rows, columns = attn.window_size
    places = [(y, x) for y in range(rows) for x in range(columns)]
    # (y, x) asks, (v, u) is asked
    index = [
        [(y - v + rows - 1) * (2 * columns - 1) + (x - u + columns - 1) for v, u in places] for y, x in places
    ]
    return attn.relative_position_bias_table[torch.tensor(index)].permute(2, 0, 1)


def naive_regions(block, height, width):
    """Which of nine parts, that lay apart before the shift, each position of the shifted map belongs to."""
    kinds = []
    for length, window, shift in zip((height, width), block.window_size, block.shift_size, strict=True):
        kinds.append(torch.tensor([(p >= length - window) + (p >= length - shift) for p in range(length)]))
    return kinds[0][:, None] * 3 + kinds[1]


def naive_attention(attn, tokens, bias, masked, rows):
    """Attention of tokens [B, n, width]; bias and mask are those of the last ones, the window's."""
    batch, count, _ = tokens.shape
    q, k, v = attn.qkv(tokens).view(batch, count, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-2, -1) * attn.scale
    added = F.pad(bias + masked, (count - bias.shape[-1], 0, count - bias.shape[-1], 0))
    logits = logits + added
    if rows:
        logits = torch.cat([logits, q @ rows[0].transpose(-2, -1) * attn.scale], dim=-1)
        v = torch.cat([v, rows[1].expand(batch, -1, -1, -1)], dim=2)
    out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return attn.proj(out)


def naive_block(block, maps, prompts, rows=None):
    """A block on maps [B, H, W, width] and the prompts [B, p, width] that stand in each of its windows."""
    (_, height, width, _), (wh, ww), count = maps.shape, block.window_size, prompts.shape[1]
    x = torch.roll(block.norm1(maps), [-s for s in block.shift_size], (1, 2))
    full = (math.ceil(height / wh) * wh, math.ceil(width / ww) * ww)
    x = torch.cat([x, x.new_zeros(len(x), full[0] - height, width, x.shape[-1])], dim=1)
    x = torch.cat([x, x.new_zeros(len(x), full[0], full[1] - width, x.shape[-1])], dim=2)
    regions, bias, normed = naive_regions(block, *full), naive_bias(block.attn), block.norm1(prompts)
    out, of_prompts = torch.zeros_like(x), []
    for top in range(0, full[0], wh):
        for left in range(0, full[1], ww):
            window = x[:, top : top + wh, left : left + ww].reshape(len(x), wh * ww, -1)
            parts = regions[top : top + wh, left : left + ww].flatten()
            masked = -100.0 * (parts[:, None] != parts)
            seen = naive_attention(block.attn, torch.cat([normed, window], dim=1), bias, masked, rows)
            of_prompts.append(seen[:, :count])
            out[:, top : top + wh, left : left + ww] = seen[:, count:].view(len(x), wh, ww, -1)
    out = torch.roll(out[:, :height, :width], block.shift_size, (1, 2))
    maps, prompts = maps + out, prompts + sum(of_prompts) / len(of_prompts)
    return maps + block.mlp(block.norm2(maps)), prompts + block.mlp(block.norm2(prompts))


def naive_merging(merging, maps, prompts):
    maps = F.pad(maps, (0, 0, 0, maps.shape[2] % 2, 0, maps.shape[1] % 2))
    four = [maps[:, y::2, x::2] for x in (0, 1) for y in (0, 1)]
    return tuple(merging.reduction(merging.norm(torch.cat(x, dim=-1))) for x in (four, [prompts] * 4))


def naive_features(model, x, entering, rows=None, added=None, pool=None):
    """Features of images x by the equations.

    `entering` has for every block its prompts [p, width], "keep" or "drop"; `rows` its keys and values;
    `added` what its image tokens are shifted by, [n, width].
    """
    maps, index = model.patch_embed.norm(model.patch_embed.proj(x).permute(0, 2, 3, 1)), 0
    prompts = maps.new_zeros(len(maps), 0, maps.shape[-1])
    for stage in model.layers:
        if not isinstance(stage.downsample, nn.Identity):
            maps, prompts = naive_merging(stage.downsample, maps, prompts)
        for block in stage.blocks:
            if isinstance(entering[index], torch.Tensor):
                prompts = entering[index].expand(len(maps), -1, -1)
            elif entering[index] == "drop":
                prompts = prompts[:, :0]
            if added is not None:
                maps = maps + added[index].view(1, *maps.shape[1:])
            maps, prompts = naive_block(block, maps, prompts, rows and rows[index])
            index += 1
    image = maps.flatten(1, 2)
    tokens = {"image": image, "prompt": prompts}.get(pool, torch.cat([prompts, image], dim=1))
    tokens = model.norm(tokens)
    of_each = {
        "avg": [tokens.mean(1)],
        "max": [tokens.amax(1)],
        "catavgmax": [tokens.mean(1), tokens.amax(1)],
    }
    return torch.cat(of_each[model.head.global_pool.pool_type], dim=-1)


def entering_of(method):
    """What `naive_features` asks of a VPT."""
    own = method.prompted_blocks
    entering = ["keep"] * method.num_blocks
    for i, block in enumerate(own):
        entering[block] = method.prompts[i]
    if own.stop < len(entering) and not method.carry_over:
        entering[own.stop] = "drop"
    return entering


def naive_logits(classifier, x, **options):
    method = classifier.method
    features = naive_features(classifier.backbone.model, x, entering_of(method), pool=method.pool, **options)
    return classifier.head(features)


def assert_equal_ways(model, method="vpt_deep", x=None, **options):
    """Exact, carried, and by hand: logits and gradients of each."""
    x = pictures(model) if x is None else x
    exact, carried = (classifier_on(model, method, way, dropout=0.0, **options) for way in (True, False))
    ways = [measured(exact, exact(x)), measured(carried, carried(x)), measured(exact, naive_logits(exact, x))]
    tuned = [name for name in ways[0] if "prompts" in name]
    assert tuned
    for name in tuned:
        assert ways[0][name].abs().amax(-1).min() > 0, "a prompt that gets no gradient proves nothing"
    assert worst_error(ways[0], ways[1]) < FLOAT32
    assert worst_error(ways[0], ways[2]) < FLOAT32


# --- without prompts


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_without_prompts_features_are_timms_own(options):
    model = tiny_swin(**options)
    x = pictures(model, 3)
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    for exact in (True, False):
        classifier = classifier_on(model, "linear", exact)
        assert classifier.features(x).shape == (3, classifier.backbone.width) == expected.shape
        assert relative_error(classifier.features(x), expected) < FLOAT32
    by_hand = naive_features(model, x, ["keep"] * classifier.backbone.num_blocks)
    assert relative_error(by_hand, expected) < FLOAT32


@pytest.mark.parametrize("window", [3, 4, 5, 9])
@pytest.mark.parametrize("side", [4, 12, 20, 28, 40, 44])
def test_images_of_another_size_are_windowed_as_timms_dynamic_model_does(side, window):
    model, x = tiny_swin(window_size=window), images(2, side)
    expected = dynamic(model, window_size=window)(x)
    assert relative_error(classifier_on(model, "linear").features(x), expected) < FLOAT32


def test_what_is_left_of_a_side_is_dropped():
    model, x = tiny_swin(), images(2, 35)
    classifier = classifier_on(model, "linear")
    assert torch.equal(classifier.features(x), classifier.features(x[..., :32, :32]))


def test_images_of_other_channels_are_refused():
    with pytest.raises(
        UserError, match=r"images must be \[B, 3, height, width\], and these have the shape \(2, 1, 32"
    ):
        classifier_on(tiny_swin(), "linear")(torch.zeros(2, 1, 32, 32))


@pytest.mark.parametrize("shape", [(16, 64), (32, 36)])
def test_images_whose_tokens_do_not_tell_their_map_are_refused(shape):
    message = rf"images of {shape[0] // 4} x {shape[1] // 4} patches do not fit, because this backbone takes 8 x 8 or"
    with pytest.raises(UserError, match=message):
        classifier_on(tiny_swin(), "linear")(torch.zeros(1, 3, *shape))
    oblong = Swin(tiny_swin(**MODELS["oblong"]))
    assert not oblong.any_size
    with pytest.raises(UserError, match="this backbone takes 6 x 10: crop or resize them, or set"):
        oblong(torch.zeros(1, 3, 32, 32), build_method("linear", oblong))


@pytest.mark.parametrize("options", [{}, {"drop_path": 0.5}], ids=["default", "half the branches"])
@pytest.mark.parametrize("which", ["even", "filled up"])
def test_full_tuning_gives_timms_own_features_and_gradients_in_training(which, options):
    model = tiny_swin(**MODELS[which])
    x = pictures(model, 6)
    results = []
    for exact in (True, False, None):
        classifier = classifier_on(model, "full", bool(exact), **options)
        assert all(module.training for module in model.modules())
        torch.manual_seed(4)
        features = model(x) if exact is None else classifier.features(x)
        results.append(measured(classifier, classifier.head(features)))
    assert len(results[0]) == 2 + len(list(model.parameters())) + 1
    assert worst_error(results[0], results[2]) < FLOAT32
    assert worst_error(results[1], results[2]) < FLOAT32


def test_dropout_of_the_attention_is_drawn_in_training_alone():
    model, x = tiny_swin(attn_drop_rate=0.5), images()
    classifier = classifier_on(model, "full", drop_path=0.0)
    assert classifier.backbone.carried_blocks() == [0, 1, 2, 3]
    assert not torch.equal(classifier(x), classifier(x))
    assert classifier.eval().backbone.carried_blocks() == []
    assert relative_error(classifier.features(x), model(x)) < FLOAT32


# --- with prompts


@pytest.mark.parametrize(("options", "flow"), star(MODELS, FLOWS))
def test_the_exact_path_equals_carrying_prompts_through_every_window(options, flow):
    model, (depth, depth_from, carry_over) = tiny_swin(**options), flow
    assert_equal_ways(model, num_tokens=3, depth=depth, depth_from=depth_from, carry_over=carry_over)


@pytest.mark.parametrize("pool", ["image", "prompt", "image_prompt", None])
@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow"])
@pytest.mark.parametrize("which", ["even", "filled up"])
def test_every_pooling_reads_what_it_says(which, method, pool):
    assert_equal_ways(tiny_swin(**MODELS[which]), method, num_tokens=3, pool=pool)


def test_there_is_no_class_token_to_pool():
    with pytest.raises(
        UserError, match=r"method\.pool=cls needs a class token, which this backbone does not have"
    ):
        classifier_on(tiny_swin(), pool="cls")


@pytest.mark.parametrize("side", [12, 20, 44])
@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow"])
@pytest.mark.parametrize("window", [3, 4])
def test_prompts_in_images_of_another_size(window, method, side):
    assert_equal_ways(tiny_swin(window_size=window), method, images(2, side), num_tokens=2)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow", "e2vpt"])
@pytest.mark.parametrize("which", ["even", "filled up"])
def test_two_images_give_what_each_gives_alone(which, method, exact):
    model = tiny_swin(**MODELS[which])
    classifier, x = classifier_on(model, method, exact).eval(), pictures(model)
    assert relative_error(torch.cat([classifier(x[:1]), classifier(x[1:])]), classifier(x)) < FLOAT32


def test_prompt_dropout_is_drawn_for_every_image():
    classifier, x = classifier_on(tiny_swin(), num_tokens=4, dropout=0.5), images(1).expand(3, -1, -1, -1)
    assert classifier(x).unique(dim=0).shape[0] == 3
    torch.manual_seed(3)
    exact = measured(classifier, classifier(x))
    classifier.backbone.exact = False
    torch.manual_seed(3)
    assert worst_error(exact, measured(classifier, classifier(x))) < FLOAT32


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize("which", ["even", "filled up", "one window"])
def test_rows_of_keys_and_values_stand_in_every_window(which, tokens, share):
    model = tiny_swin(**MODELS[which])
    x, options = (
        pictures(model),
        {"num_tokens": tokens, "num_kv_tokens": 3, "share_kv": share, "kv_blocks": [0, 1, 3]},
    )
    results = []
    for exact in (True, False):
        classifier = classifier_on(model, "e2vpt", exact, dropout=0.0, **options)
        results.append(measured(classifier, classifier(x)))
    method = classifier.method
    entering = [method.prompts[i] for i in range(4)] if tokens else ["keep"] * 4
    features = naive_features(model, x, entering, rows=[method.keys_values(i) for i in range(4)])
    results.append(measured(classifier, classifier.head(features)))
    assert [tuple(rows[0].shape) for i in (0, 1, 3) if (rows := method.keys_values(i))] == [
        (2, 3, 4),
        (2, 3, 4),
        (4, 3, 4),
    ]
    assert worst_error(results[0], results[1]) < FLOAT32
    assert worst_error(results[0], results[2]) < FLOAT32


def test_heads_that_do_not_share_the_width_take_no_rows():
    backbone = Swin(tiny_swin(**MODELS["other heads"]))
    with pytest.raises(
        UserError, match="method e2vpt cannot work on this backbone: it needs the site keys_values"
    ):
        build_method("e2vpt", backbone)


@pytest.mark.parametrize("location", ["add", "add_one"])
def test_added_prompts_shift_the_image_tokens_of_every_block(location):
    model = tiny_swin(**MODELS["filled up"])
    x, classifier = pictures(model), classifier_on(model, location=location, dropout=0.0)
    sides = [10, 10, 5, 5]
    own = [p.expand(side * side, -1) for p, side in zip(classifier.method.prompts, sides, strict=True)]
    assert [len(p) for p in classifier.method.prompts] == (
        [s * s for s in sides] if location == "add" else [1] * 4
    )
    features = naive_features(model, x, ["keep"] * 4, added=own)
    assert (
        worst_error(measured(classifier, classifier(x)), measured(classifier, classifier.head(features)))
        < FLOAT32
    )


PIXELS = {"depth": 1, "dropout": 0.0}


def test_patches_of_pixels_enter_as_tokens():
    model, x = tiny_swin(), images()
    classifier = classifier_on(model, location="prepend_pixel", num_tokens=3, carry_over=True, **PIXELS)
    patches = classifier.method.prompts
    tokens = model.patch_embed.norm(model.patch_embed.proj(patches).flatten(1))
    by_hand = classifier.head(naive_features(model, x, [tokens, "keep", "keep", "keep"]))
    assert worst_error(measured(classifier, classifier(x)), measured(classifier, by_hand)) < FLOAT32


@pytest.mark.parametrize(
    ("pixels", "resize", "side"), [(3, True, 32), (2, False, 36), (3, False, 36), (5, False, 40)]
)
def test_a_frame_of_pixels_may_make_the_image_larger(pixels, resize, side):
    """What the patch does not divide of the new side is dropped.

    The mask of shifted windows is that of the new map.
    """
    model, x = tiny_swin(), images()
    classifier = classifier_on(model, location="pad", num_tokens=pixels, pad_resize=resize, **PIXELS)
    framed = classifier.method.pixels(x)
    assert framed.shape == (2, 3, side, side)
    by_hand = classifier.head(dynamic(model)(framed))
    assert worst_error(measured(classifier, classifier(x)), measured(classifier, by_hand)) < FLOAT32


def test_further_channels_enter_before_the_embeddings_norm():
    model, x = tiny_swin(), images()
    plain = tiny_swin()
    classifier = classifier_on(model, location="concat_channel", num_tokens=2, **PIXELS)
    conv, method = plain.patch_embed.proj, classifier.method
    weight = torch.cat([conv.weight, method.channel_embed], dim=1)
    more = torch.cat([x, method.prompts.expand(2, -1, -1, -1)], dim=1)
    maps = plain.patch_embed.norm(F.conv2d(more, weight, conv.bias, stride=4).permute(0, 2, 3, 1))
    by_hand = classifier.head(plain.forward_head(plain.norm(plain.layers(maps)), pre_logits=True))
    assert worst_error(measured(classifier, classifier(x)), measured(classifier, by_hand)) < FLOAT32


def test_a_projection_leads_to_the_width_of_its_stage():
    model, x = tiny_swin(), images()
    classifier = classifier_on(model, depth=2, project=3, dropout=0.0)
    assert classifier.method.project.weight.shape == (8, 3)
    own = classifier.method.project(classifier.method.prompts)
    by_hand = classifier.head(naive_features(model, x, [*own, "drop", "keep"]))
    assert worst_error(measured(classifier, classifier(x)), measured(classifier, by_hand)) < FLOAT32
    with pytest.raises(UserError, match=r"method\.project=3 needs layers of one shape, and those"):
        classifier_on(model, project=3)


@pytest.mark.parametrize("init", ["patch_sample", "patch_pool", "patch_kmeans"])
def test_prompts_may_start_as_patches_of_their_stage(init):
    classifier = classifier_on(tiny_swin(), num_tokens=3, init=init)
    initialise(classifier.method, classifier.backbone, images(4))
    states = classifier.backbone.states(images(4))
    assert [tuple(s.shape[1:]) for s in states] == [(64, 8), (64, 8), (16, 16), (16, 16), (16, 16)]
    if init == "patch_sample":
        for prompts, state in zip(classifier.method.prompts, states, strict=False):
            rows = state.flatten(0, 1)
            assert all((row == rows).all(-1).any() for row in prompts)


# --- what is computed


def flops(classifier, batch):
    with FlopCounterMode(display=False) as counter:
        classifier(images(batch))
    return counter.get_total_flops()


def block_macs(batch, width, windows, p, own_outputs, asked_of=1):
    """Multiply-adds of a block with 16 tokens in each of its windows and p prompts; no biases, no norms."""
    n = 16 * windows
    total = batch * n * 12 * width**2  # of the image tokens: four matrices and the MLP
    total += batch * windows * 2 * 16 * (16 + p) * width
    if own_outputs:  # queries, keys, values, projection and MLP once for every image; a query in every window
        return total + batch * p * 12 * width**2 + batch * windows * 2 * p * (16 + p) * width
    return total + asked_of * p * 2 * width**2  # keys and values


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_what_nobody_reads_is_not_computed(batch):
    p, widths, windows = 6, (8, 8, 16, 16), (4, 4, 1, 1)
    rest = batch * (64 * 48 * 8 + 16 * 32 * 16 + 16 * NUM_CLASSES)  # embedding, merging, head

    def expected(of_prompts):
        parts = zip(widths, windows, of_prompts, strict=True)
        return 2 * (rest + sum(block_macs(batch, width, w, *own) for width, w, own in parts))

    deep = classifier_on(tiny_swin(), num_tokens=p, dropout=0.0)
    assert flops(deep, batch) == expected([(p, False), (p, False), (p, False), (p, True)])
    image = classifier_on(tiny_swin(), num_tokens=p, dropout=0.0, pool="image")
    assert flops(image, batch) == expected([(p, False)] * 4)
    half = classifier_on(tiny_swin(), num_tokens=p, depth=2, dropout=0.0)
    assert flops(half, batch) == expected([(p, False), (p, False), (0, False), (0, False)])
    shallow = classifier_on(tiny_swin(), "vpt_shallow", num_tokens=p)
    assert flops(shallow, batch) == expected([(p, True)] * 4) + 2 * batch * p * 32 * 16
    assert flops(classifier_on(tiny_swin(), "linear"), batch) == expected([(0, False)] * 4)


def test_where_prompts_alone_are_pooled_the_last_blocks_image_tokens_only_answer():
    prompt, both = (
        classifier_on(tiny_swin(), num_tokens=6, dropout=0.0, pool=p) for p in ("prompt", "image_prompt")
    )
    left_out = 16 * 10 * 16**2 + 2 * 16 * (16 + 6) * 16  # one window of 16 tokens of width 16
    assert flops(both, 3) - flops(prompt, 3) == 2 * 3 * left_out


# --- methods

FITTING = [name for name in METHODS if works(name, "Swin")]


def test_what_needs_one_sequence_of_one_width_says_so():
    backbone = Swin(tiny_swin())
    for name, factory in METHODS.items():
        if "stream" in getattr(factory, "func", factory).sites:
            sentence = f"method {name} cannot work on this backbone: it needs the site stream"
            with pytest.raises(UserError, match=sentence):
                build_method(name, backbone)


@pytest.mark.parametrize(
    ("name", "side"),
    [case(n, s, fast=s == 32 or n in REPRESENTATIVES, id=f"{n}, {s}") for n in FITTING for s in (32, 44)],
)
def test_every_method_trains_and_is_restored(name, side):
    model = tiny_swin()
    classifier, x = classifier_on(model, name), images(2, side)
    if classifier.method.fixed_size and side != 32:
        return
    gradients = measured(classifier, classifier(x))
    assert gradients.keys() - {"logits"} == classifier.tuned_names
    unseen = {n for n, p in gradients.items() if not p.abs().max() > 0}
    assert not unseen
    state = classifier.tuned_state()
    other = classifier_on(tiny_swin(), name).eval()
    with torch.no_grad():
        for _, parameter in other.tuned_parameters():
            parameter.add_(torch.randn_like(parameter))
    assert not torch.equal(other(x), classifier.eval()(x))
    other.load_tuned_state(state)
    assert torch.equal(other(x), classifier(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(classifier(x), other(x)) < 0.2
    if classifier.has_frozen_part:
        assert relative_error(classifier(classifier.frozen(x)), other(x)) < FLOAT32


@pytest.mark.parametrize("name", ["vpt_deep", "vpt_shallow", "e2vpt"])
@pytest.mark.parametrize("which", ["even", "filled up"])
def test_the_ways_are_near_float32_and_each_other_under_bfloat16_autocast(which, name):
    model, results = tiny_swin(**MODELS[which]), []
    x = pictures(model, 4)
    for exact, precision in ((True, torch.bfloat16), (False, torch.bfloat16), (True, torch.float32)):
        classifier = classifier_on(model, name, exact, dropout=0.0)
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            logits = classifier(x)
        assert logits.dtype == precision
        results.append(measured(classifier, logits))
    # measured: 0.06 from float32, in gradients of heads of four numbers; 0.035 between the ways
    assert worst_error(results[0], results[2]) < 2**-3
    assert worst_error(results[1], results[2]) < 2**-3
    assert worst_error(results[0], results[1]) < 2**-4


def test_a_backbone_in_16_bits_takes_a_method_in_32():
    for name in FITTING:
        classifier = visprompt.build(tiny_swin().bfloat16(), name, 5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(classifier(images().bfloat16())).all()


@pytest.mark.parametrize("name", ["vpt_deep", "e2vpt"])
@pytest.mark.parametrize("first", [1, 2, 3])
def test_the_frozen_part_may_be_computed_once(name, first):
    options = (
        {"depth": 4 - first, "depth_from": "last"}
        if name == "vpt_deep"
        else {"num_tokens": 0, "kv_blocks": [first]}
    )
    model, x = tiny_swin(**MODELS["filled up"]), images(2, 40)
    classifier = classifier_on(model, name, **options).eval()
    assert classifier.method.first_block == first
    for side in (40, 28):
        x = images(2, side)
        frozen = classifier.frozen(x)
        rows = [side // 4, side // 4, math.ceil(side / 8), math.ceil(side / 8)][first]
        assert frozen.shape == (2, rows * rows, [8, 8, 16, 16][first])
        assert relative_error(classifier(frozen), classifier(x)) < FLOAT32


@pytest.mark.parametrize(("num_blocks", "between"), [(1, []), (2, []), (3, ["layers.1.downsample"])])
def test_partial_tunes_the_merging_between_tuned_blocks(num_blocks, between):
    classifier = classifier_on(tiny_swin(), "partial", num_blocks=num_blocks)
    blocks = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"][
        4 - num_blocks :
    ]
    starts = tuple(f"backbone.model.{name}." for name in [*blocks, *between, "norm"])
    own = {name for name in classifier.tuned_names if not name.startswith("head.")}
    assert own == {name for name, _ in classifier.named_parameters() if name.startswith(starts)}


@pytest.mark.parametrize(
    ("which", "name"),
    star(
        ["even", "filled up", "odd", "three stages"],
        ["full", "linear", "partial", "bias", "layernorm", "lora", "ssf"],
    ),
)
def test_merged_is_a_plain_swin_with_equal_logits(which, name):
    model = tiny_swin(**MODELS[which])
    classifier = classifier_on(model, name).eval()
    with torch.no_grad():
        for _, parameter in classifier.tuned_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    merged = merge(classifier)
    assert type(merged) is SwinTransformer
    assert {type(module) for module in merged.modules()} <= {
        type(m) for m in tiny_swin(num_classes=2).modules()
    }
    x = pictures(model, 3)
    assert relative_error(merged(x), classifier(x)) < FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("vpt_deep", 44), ("vpt_shallow", 44), ("e2vpt", 32)])
def test_a_compiled_classifier_gives_the_same_logits(name, side):
    classifier, x = classifier_on(tiny_swin(), name).eval(), images(2, side)
    torch.compiler.reset()
    compiled = torch.compile(classifier, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), classifier(x)) < FLOAT32


# --- named models


def named(name, **options):
    with torch.device("meta"):
        return Swin(timm.create_model(name, num_classes=0, **options))


def test_the_papers_counts():
    """Facts of Swin-B: 12,032 numbers a prompt of each block; 5 pixels on each side of 224."""
    base = named("swin_base_patch4_window7_224")
    assert base.widths == (128,) * 2 + (256,) * 2 + (512,) * 18 + (1024,) * 2
    assert base.heads == (4,) * 2 + (8,) * 2 + (16,) * 18 + (32,) * 2
    assert [base.grids[i][0] for i in (0, 2, 4, 22)] == [56, 28, 14, 7]
    assert (base.width, base.patch_size, base.image_size, base.num_blocks) == (1024, 4, 224, 24)
    merges = {i: name for i, name in enumerate(base.between_names) if name}
    assert merges == {2: "layers.1.downsample", 4: "layers.2.downsample", 22: "layers.3.downsample"}
    for p in (1, 10):
        deep = build_method("vpt_deep", base, num_tokens=p)
        assert sum(parameter.numel() for parameter in deep.parameters()) == 12_032 * p
    pad = build_method("vpt_deep", base, location="pad", num_tokens=5, pad_resize=False, **PIXELS)
    assert sum(parameter.numel() for parameter in pad.parameters()) == 13_740
    assert sum(p.numel() for p in build_method("vpt_shallow", base, num_tokens=10).parameters()) == 1_280


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "swin_s3_tiny_224", "swin_large_patch4_window12_384"]
)
def test_named_models_are_driven(name):
    backbone = named(name)
    assert backbone.carried_blocks() == []
    assert backbone.sites == {"tokens", "weights", "modules", "pixels", "branches", "keys_values"}
    assert backbone.any_size
    assert not backbone.has_class_token


class OtherBlock(SwinTransformerBlock):
    pass


class OtherAttention(WindowAttention):
    pass


class OtherSwin(SwinTransformer):
    pass


def with_part(cls):
    model = tiny_swin()
    block = model.layers[1].blocks[1]
    (block.attn if issubclass(cls, WindowAttention) else block).__class__ = cls
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "backbone class Linear is not a plain timm SwinTransformer: choose one"),
        (OtherSwin(**SIZE), "backbone class OtherSwin is not a plain timm SwinTransformer: choose one"),
        (
            with_part(OtherBlock),
            "this SwinTransformer has a OtherBlock, which is not supported: choose a plain one of",
        ),
        (with_part(OtherAttention), "this SwinTransformer has a OtherAttention, which is not supported"),
        (
            tiny_swin(global_pool=""),
            "the backbone has no pooling: set backbone.global_pool to avg, avgmax or max",
        ),
    ],
)
def test_a_model_that_it_cannot_drive_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        Swin(model)


def test_each_block_is_looked_at_by_itself():
    model = tiny_swin()
    model.layers[0].blocks[1].norm2.__class__ = type("Other", (nn.LayerNorm,), {})
    assert Swin(model).carried_blocks() == [1]
    assert Swin(model, exact=False).carried_blocks() == [0, 1, 2, 3]
    assert_equal_ways(model, num_tokens=3)


def test_it_is_the_family_of_timms_class():
    assert type(family(tiny_swin())) is Swin
