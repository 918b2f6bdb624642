"""The re-driven ViT equals timm's own forward.

Its exact path equals carrying the tokens and the paper's equations.
"""

import pytest
import timm
import torch
from timm.layers import Attention, DropPath, LayerNorm, LayerNormFp32, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from helpers.tiny import (
    NUM_IMAGE,
    images,
    measured,
    naive_logits,
    relative_error,
    tiny_classifier,
    tiny_model,
    worst_error,
)
from helpers.wide import star
from visprompt.errors import UserError
from visprompt.models.backbones.block import is_proven
from visprompt.models.backbones.vit import ViT
from visprompt.models.methods import Method

FLOAT32, FLOAT64 = 1e-5, 1e-12
# bfloat16 rounds to 2^-9 relative. The two ways multiply matrices of other shapes, so each of a block's some
# ten roundings may fall apart and none can be blamed: eight units of 2^-8 (measured: under 0.005 in logits,
# 0.012 in gradients; bfloat16 itself is up to 0.06 away from float32 here).
BFLOAT16 = 2**-5

PROVEN = {
    "token": {},
    "avg": {"global_pool": "avg"},
    "avg, norm before": {"global_pool": "avg", "fc_norm": False},
    "token, norm after": {"fc_norm": True},
    "avgmax": {"global_pool": "avgmax"},
    "max": {"global_pool": "max"},
    "map": {"global_pool": "map"},
    "map of all": {"global_pool": "map", "pool_include_prefix": True},
    "prr": {"global_pool": "prr"},
    "avg of all": {"global_pool": "avg", "reg_tokens": 2, "pool_include_prefix": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 4},
    "registers, avg": {"reg_tokens": 4, "global_pool": "avg", "no_embed_class": True},
    "no class embedding": {"no_embed_class": True},
    "no positions": {"pos_embed": "none"},
    "no norm": {"final_norm": False},
    "query-key norm, layer scale": {"qk_norm": True, "init_values": 0.5},
    "pre-norm": {"pre_norm": True, "norm_layer": nn.LayerNorm, "act_layer": "quick_gelu"},
    "scale norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "gated mlp": {"mlp_layer": SwiGLU},
    "packed gated mlp": {"mlp_layer": SwiGLUPacked, "norm_layer": RmsNorm, "qk_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
}


class ScaledBlock(Block):
    def forward(self, x, attn_mask=None, is_causal=False):
        return 1.5 * super().forward(x, attn_mask, is_causal)


class BackwardAttention(Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return -super().forward(x, attn_mask, is_causal)


CARRIED = {
    "parallel attention and mlp": {"block_fn": ParallelScalingBlock},
    "parallel, differential": {"block_fn": DiffParallelScalingBlock},
    "norm behind": {"block_fn": ResPostBlock},
    "two attentions": {"block_fn": ParallelThingsBlock},
    "a subclass of Block": {"block_fn": ScaledBlock},
    "a subclass of Attention": {"attn_layer": BackwardAttention},
    "differential attention": {"attn_layer": "diff"},
    "another norm": {"norm_layer": LayerNormFp32},
}

# (depth, from, carry over): every distinct way in which prompts can flow through four blocks
FLOWS = [
    (4, "first", False),
    *((depth, "first", carry) for depth in (1, 2, 3) for carry in (False, True)),
    *((depth, "last", False) for depth in (1, 2, 3)),
]


def gated(model):
    """timm's VisionTransformer has no option for the gate of its Attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for block in model.blocks:
            block.attn.gate = nn.Linear(32, 32)
    return model


@pytest.mark.parametrize("options", PROVEN.values(), ids=PROVEN)
def test_without_prompts_features_are_timms_own(options):
    model, x = tiny_model(**options), images(3)
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    for exact in (True, False):
        classifier = tiny_classifier("linear", exact, model)
        assert classifier.features(x).shape == (3, 32)
        assert relative_error(classifier.features(x), expected) < FLOAT32
    assert ViT(model).carried_blocks() == []
    assert ViT(model, exact=False).carried_blocks() == [0, 1, 2, 3]


@pytest.mark.parametrize("options", CARRIED.values(), ids=CARRIED)
def test_without_prompts_other_blocks_are_timms_own_too(options):
    model, x = tiny_model(**options), images(3)
    classifier = tiny_classifier("linear", model=model)
    assert (
        relative_error(classifier.features(x), model.forward_head(model.forward_features(x), True)) < FLOAT32
    )


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_clip_224", "deit3_small_patch16_224", "vit_medium_patch16_reg4_gap_256"]
)
def test_named_models_equal_timms_own(name):
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model, x = timm.create_model(name, num_classes=0, **size).eval(), images(2)
    for classifier in (tiny_classifier("linear", model=model), tiny_classifier("full", model=model).eval()):
        assert relative_error(classifier.features(x), model(x)) < FLOAT32
    assert classifier.backbone.carried_blocks() == []


@pytest.mark.parametrize(
    "prefix", [{}, {"reg_tokens": 2, "no_embed_class": True}], ids=["class token", "registers"]
)
@pytest.mark.parametrize("size", [24, 48])
def test_a_dynamic_model_takes_images_of_another_size(size, prefix):
    model, x = tiny_model(dynamic_img_size=True, **prefix), images(2, size)
    linear, deep = (
        tiny_classifier("linear", model=model),
        tiny_classifier("vpt_deep", model=model, dropout=0.0),
    )
    assert relative_error(linear.features(x), model.forward_head(model.forward_features(x), True)) < FLOAT32
    assert worst_error(measured(deep, deep(x)), measured(deep, naive_logits(deep, x))) < FLOAT32


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (
            {},
            (64, 64),
            "this backbone takes images of size 32 x 32 only and got 64 x 64: resize them, or set back",
        ),
        (
            {"img_size": (32, 48)},
            (48, 32),
            "of size 32 x 48 only and got 48 x 32: resize them, or set backbone.image",
        ),
        (
            {"dynamic_img_size": True},
            (32, 36),
            "images of 32 x 36 do not fit, because their sides are not multiples of the patch size 8: crop "
            "or",
        ),
    ],
)
@pytest.mark.parametrize("method", ["linear", "vpt_deep"])
def test_images_of_a_size_that_it_does_not_take_are_refused(method, model, shape, message):
    classifier = tiny_classifier(method, model=tiny_model(**model))
    with pytest.raises(UserError, match=message):
        classifier(torch.zeros(1, 3, *shape))


@pytest.mark.parametrize("patch_drop_rate", [0.0, 0.5])
@pytest.mark.parametrize("options", [{}, {"drop_path": 0.5}], ids=["default", "half the branches"])
def test_full_tuning_gives_timms_own_features_and_gradients_in_training(options, patch_drop_rate):
    """Stochastic depth is drawn per image, whatever tokens are read.

    One seed skips the same branches everywhere.
    """
    model, x = tiny_model(patch_drop_rate=patch_drop_rate), images(6)
    results = []
    for exact in (True, False, None):
        classifier = tiny_classifier("full", bool(exact), model, **options)
        assert [type(block.drop_path1) for block in model.blocks] == [
            nn.Identity,
            DropPath,
            DropPath,
            DropPath,
        ]
        torch.manual_seed(4)
        features = model(x) if exact is None else classifier.features(x)
        results.append(measured(classifier, classifier.head(features)))
    assert len(results[0]) == 2 + len(list(model.parameters())) + 1
    assert worst_error(results[0], results[2]) < FLOAT32
    assert worst_error(results[1], results[2]) < FLOAT32


def test_full_tuning_with_attention_dropout_carries_the_tokens_in_training():
    classifier = tiny_classifier("full", model=tiny_model(attn_drop_rate=0.5))
    assert classifier.backbone.carried_blocks() == [0, 1, 2, 3]
    assert classifier.eval().backbone.carried_blocks() == []


def three_ways(model, method="vpt_deep", dtype=torch.float32, **options):
    """Exact, carried, and the paper's equations: logits and gradients of each."""
    x = images().to(dtype)
    ways = (tiny_classifier(method, way, model, dropout=0.0, **options) for way in (True, False))
    exact, carried = (classifier.to(dtype) for classifier in ways)
    return measured(exact, exact(x)), measured(carried, carried(x)), measured(exact, naive_logits(exact, x))


def assert_equal_ways(*arguments, **options):
    exact, carried, naive = three_ways(*arguments, **options)
    assert exact.keys() == {"logits", "method.prompts", "head.weight", "head.bias"}
    assert exact["method.prompts"].abs().amax(-1).min() > 0, "a prompt that gets no gradient proves nothing"
    assert worst_error(exact, carried) < FLOAT32
    assert worst_error(exact, naive, ["logits"]) < FLOAT32
    # gradients of a saturated softmax lose digits in float32, how many depends on the processor
    double, _, naive = three_ways(*arguments, dtype=torch.float64, **options)
    assert worst_error(double, naive) < FLOAT64


@pytest.mark.parametrize(("options", "flow"), star(PROVEN, FLOWS))
def test_the_exact_path_equals_carrying_the_tokens_at_every_depth(options, flow):
    model, (depth, depth_from, carry_over) = tiny_model(**options), flow
    assert_equal_ways(model, num_tokens=3, depth=depth, depth_from=depth_from, carry_over=carry_over)


@pytest.mark.parametrize("num_tokens", [1, 20])
@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow"])
@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_the_exact_path_equals_carrying_the_tokens_at_every_length(pool, method, num_tokens):
    assert_equal_ways(tiny_model(global_pool=pool), method, num_tokens=num_tokens)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_exact_path_knows_the_gate_of_an_attention(pool):
    model = gated(tiny_model(global_pool=pool))
    assert_equal_ways(model, num_tokens=3)
    assert ViT(model).carried_blocks() == []


class GivenMasks(nn.Module):
    """In the place of prompt dropout: the given masks, block after block."""

    p = 0.5

    def __init__(self, masks):
        super().__init__()
        self.masks, self.calls = masks, 0

    def forward(self, prompts):
        mask = self.masks[self.calls % len(self.masks)]
        self.calls += 1
        assert prompts.shape == mask.shape
        return prompts * mask


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("carry_over", [False, True])
@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_the_ways_are_equal_under_the_same_prompt_dropout(pool, carry_over, depth):
    model, x = tiny_model(global_pool=pool), images(3)
    masks = 2.0 * (torch.rand(depth, 3, 5, 32, generator=torch.Generator().manual_seed(5)) < 0.5)
    results = []
    for exact in (True, False, None):
        classifier = tiny_classifier(
            "vpt_deep", bool(exact), model, num_tokens=5, depth=depth, carry_over=carry_over
        )
        classifier.method.dropout = GivenMasks(masks)
        logits = naive_logits(classifier, x, masks) if exact is None else classifier(x)
        results.append(measured(classifier, logits))
        assert classifier.method.dropout.calls == (0 if exact is None else depth)
    assert worst_error(results[0], results[1]) < FLOAT32
    assert worst_error(results[0], results[2]) < FLOAT32


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("options", [PROVEN["token"], PROVEN["avg"], PROVEN["query-key norm, layer scale"]])
@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow"])
def test_the_ways_are_equal_under_bfloat16_autocast(method, options, dropout):
    model, x = tiny_model(**options), images(4)
    results = []
    for exact in (True, False):
        classifier = tiny_classifier(method, exact, model, num_tokens=5, dropout=0.0)
        if dropout:
            shape = (len(classifier.method.prompts), 4, 5, 32)
            masks = 2.0 * (torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.5)
            classifier.method.dropout = GivenMasks(masks)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = classifier(x)
        assert logits.dtype == torch.bfloat16
        results.append(measured(classifier, logits))
    assert worst_error(*results) < BFLOAT16


@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow"])
@pytest.mark.parametrize("options", CARRIED.values(), ids=CARRIED)
def test_other_blocks_carry_the_tokens(options, method):
    model = tiny_model(**options)
    exact, carried, naive = three_ways(model, method, num_tokens=3)
    assert ViT(model).carried_blocks() == [0, 1, 2, 3]
    assert all(torch.equal(exact[name], carried[name]) for name in carried)
    assert worst_error(exact, naive) < FLOAT32


def test_each_block_is_looked_at_by_itself():
    model = tiny_model()
    model.blocks[2].__class__ = ScaledBlock
    model.blocks[3].norm2.__class__ = type("Other", (LayerNorm,), {})
    assert ViT(model).carried_blocks() == [2, 3]
    assert [is_proven(block) for block in model.blocks] == [True, True, False, False]
    assert_equal_ways(model, num_tokens=3)


def flops(classifier, batch):
    with FlopCounterMode(display=False) as counter:
        classifier(images(batch))
    return counter.get_total_flops()


def expected_flops(batch, p, own_blocks, queries_last, dim=32, hidden=128, n=NUM_IMAGE):
    """Multiply-adds, times two, of patch embedding, blocks and head.

    P shared prompts before `own_blocks` blocks.
    """
    total = batch * (16 * 3 * 64 * dim + dim * 5)
    for i in range(4):
        q = queries_last if i == 3 else n
        # keys and values; the rest
        total += batch * (n * 2 * dim * dim + q * (2 * dim * dim + 2 * dim * hidden))
        total += batch * 2 * q * (n + (p if i < own_blocks else 0)) * dim  # attention
    return 2 * (total + own_blocks * p * 2 * dim * dim)  # prompts' keys and values: once, whatever the batch


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_what_nobody_reads_is_not_computed(batch):
    deep = tiny_classifier("vpt_deep", num_tokens=6, dropout=0.0)
    assert flops(deep, batch) == expected_flops(batch, 6, 4, queries_last=1)
    half = tiny_classifier("vpt_deep", num_tokens=6, depth=2, dropout=0.0)
    assert flops(half, batch) == expected_flops(batch, 6, 2, queries_last=1)
    average = tiny_classifier("vpt_deep", model=tiny_model(global_pool="avg"), num_tokens=6, dropout=0.0)
    assert flops(average, batch) == expected_flops(batch, 6, 4, queries_last=16)
    assert flops(tiny_classifier("linear"), batch) == expected_flops(batch, 0, 0, queries_last=1)


@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow", "linear"])
def test_the_exact_path_computes_less_than_carrying_the_tokens(method):
    assert flops(tiny_classifier(method, exact=True), 2) < flops(tiny_classifier(method, exact=False), 2)


def test_under_dropout_every_image_has_prompts_of_its_own():
    shared, own = (tiny_classifier("vpt_deep", num_tokens=6, dropout=rate) for rate in (0.0, 0.5))
    once = 2 * 4 * 6 * 2 * 32 * 32
    assert flops(own, 5) == flops(shared, 5) + 4 * once
    assert flops(own.eval(), 5) == flops(shared, 5)


class PoolsOtherwise(VisionTransformer):
    def pool(self, x, pool_type=None):
        return x.amax(1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "backbone class Linear is not a plain timm VisionTransformer: choose one"),
        (
            PoolsOtherwise(depth=1, embed_dim=32, num_heads=2),
            "backbone class PoolsOtherwise is not a plain timm Vis",
        ),
        (
            tiny_model(global_pool="", class_token=False),
            "the backbone has no pooling: set backbone.global_pool to tok",
        ),
        (
            tiny_model(img_size=63),
            "^backbone.image_size=63 is not a multiple of the patch size 8: give a multiple$",
        ),
        (
            tiny_model(img_size=(32, 36)),
            "^backbone.image_size=36 is not a multiple of the patch size 8: give a mult",
        ),
    ],
)
def test_a_model_that_it_cannot_drive_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        ViT(model)


def test_a_side_is_taken_whose_last_pixels_are_padded_or_were_left_out_in_the_pre_training():
    """As timm's vit_so400m_patch14_siglip_384 reads 378 of its 384 pixels."""
    padded = ViT(tiny_model(img_size=30, dynamic_img_size=True, dynamic_img_pad=True))
    assert padded.embed(images(size=30), Method(padded)).shape == (2, NUM_IMAGE, 32)
    model = tiny_model(img_size=36)
    model.pretrained_cfg = {"input_size": (3, 36, 36)}
    assert ViT(model).image_size == 36
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    with pytest.raises(UserError, match=r"^backbone\.image_size=36 is not a multiple"):
        ViT(model)


def test_timms_distilled_model_with_its_two_class_tokens_is_refused():
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1)
    with pytest.raises(UserError, match="backbone class VisionTransformerDistilled is not a plain"):
        ViT(model)
