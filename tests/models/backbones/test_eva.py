"""The re-driven Eva equals timm's own forward.

With prompts it equals timm's blocks with prompts behind the prefix.
"""

import copy

import pytest
import timm
import torch
from timm.models.eva import Eva
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import visprompt
from helpers.pairs import working
from helpers.tiny import NUM_CLASSES, images, mean_loss, measured, relative_error, worst_error
from helpers.wide import REPRESENTATIVES, case, plain_class, star
from visprompt.errors import UserError
from visprompt.models.backbones.eva import EVA
from visprompt.models.backbones.families import family
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.merge import merge
from visprompt.models.methods import METHODS, Place, build_method

FLOAT32 = 1e-5
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
MIXED, POST_NORM = "vit_small_patch16_rope_mixed_ape_224", "eva02_enormous_patch14_clip_224"
# one of each kind that timm has, with its own flags; what is given here only makes it fit the size above
MEMBERS = {
    "eva_giant_patch14_224": {},  # absolute positions alone, biases beside the joint projection
    "eva02_tiny_patch14_224": {},  # both kinds of positions, GluMlp
    "eva02_base_patch14_224": {},  # three projections, SwiGLU with its norm
    "eva02_large_patch14_clip_224": {},  # norm in the attention, class token
    "vit_base_patch16_dinov3": {},  # registers, rotary positions of any size, no biases
    "vit_small_plus_patch16_dinov3_qkvb": {},
    "vit_medium_patch16_rope_reg1_gap_256": {},  # no class token
    "vit_pe_core_tiny_patch16_384": {"attn_pool_num_heads": 2},  # AttentionRope, attention pooling
    "vit_pe_spatial_base_patch16_512": {},
    MIXED: {},  # tuned angles of each block and head
    "vit_base_patch16_sapiens2": {"num_kv_heads": (2, 1, 2)},  # fewer heads of keys, one layer scale, RmsNorm
    "vit_base_patch16_rope_224": {
        "rope_type": "mrope",
        "rope_grid_indexing": "ij",
        "rope_mrope_section": (2, 3, 3),
    },
}
RESIZED = ["vit_base_patch16_dinov3", "vit_base_patch16_sapiens2", "eva02_tiny_patch14_224", MIXED]
MADE = MEMBERS | {POST_NORM: {"use_rot_pos_emb": True}}  # it has none, but a model with such blocks could
OTHERS = {
    "token": {"global_pool": "token"},
    "max": {"global_pool": "max", "num_reg_tokens": 2},
    "avgmax, normed twice": {"global_pool": "avgmax", "use_fc_norm": True, "use_post_transformer_norm": True},
    "query-key norm": {"qk_norm": True, "num_reg_tokens": 2, "no_embed_class": True},
    "gate": {},
    "rope attention": {"attn_type": "rope", "qk_norm": True, "scale_attn_inner": True, "qkv_bias": False},
}


def tiny_eva(name="vit_base_patch16_dinov3", **options):
    """A tiny model with large random weights.

    Under timm's own small ones, attention is flat and hides mistakes.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        if name in OTHERS:
            model = Eva(num_classes=0, use_rot_pos_emb=True, **SIZE, **OTHERS[name], **options)
        else:
            model = timm.create_model(name, num_classes=0, **SIZE | MADE[name] | options)
        if name == "gate":  # Eva has no option for the gate of its attention
            for block in model.blocks:
                block.attn.gate = nn.Linear(32, 32)
        for of, parameter in model.named_parameters():
            start = parameter if parameter.ndim == 1 or "freqs" in of else 0
            parameter.copy_(start + 0.2 * torch.randn_like(parameter))
    return model.eval()


def classifier_on(model, method="vpt_deep", exact=True, **options):
    """A classifier on a copy of the model, with prompts large enough to be seen, and branches that left zero."""
    backbone = family(copy.deepcopy(model), exact)
    torch.manual_seed(1)
    classifier = Classifier(backbone, build_method(method, backbone, **options), NUM_CLASSES)
    with torch.no_grad():
        for name, parameter in classifier.method.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise) if name == "prompts" else parameter.add_(0.2 * noise)
    return classifier


def naive_logits(classifier, model, x):
    """Logits by way of timm's own blocks.

    Prompts behind the prefix, where a raised number keeps them unrotated.
    """
    method, place, count = classifier.method, model.num_prefix_tokens, 0
    end = method.first_block + len(method.prompts)
    x, rotations = model._pos_embed(model.patch_embed(x))
    x = model.norm_pre(x)
    for i, block in enumerate(model.blocks):
        own = method.first_block <= i < end
        if own or (i == end and not method.carry_over):
            x, count = torch.cat([x[:, :place], x[:, place + count :]], dim=1), 0
        if own:
            prompts = method.prompts[i - method.first_block].expand(len(x), -1, -1)
            x, count = torch.cat([x[:, :place], prompts, x[:, place:]], dim=1), prompts.shape[1]
        block.attn.num_prefix_tokens = place + count
        x = block(x, rope=rotations[i] if model.rope_mixed else rotations)
        block.attn.num_prefix_tokens = place
    x = torch.cat([x[:, :place], x[:, place + count :]], dim=1)
    return classifier.head(model.forward_head(model.norm(x), pre_logits=True))


@pytest.mark.parametrize("name", [*MEMBERS, *OTHERS, POST_NORM])
def test_without_prompts_features_are_timms_own(name):
    model, x = tiny_eva(name), images(3)
    expected = model(x)
    for exact in (True, False):
        classifier = classifier_on(model, "linear", exact)
        assert relative_error(classifier.features(x), expected) < FLOAT32
        carried = [] if exact and name != POST_NORM else [0, 1, 2]
        assert classifier.backbone.carried_blocks() == carried


@pytest.mark.parametrize(
    ("name", "flow"),
    star(
        [*MEMBERS, *OTHERS, POST_NORM],
        [
            (3, "first", False),
            (1, "first", True),
            (2, "first", True),
            (2, "first", False),
            (1, "last", False),
        ],
    ),
)
def test_prompts_are_as_in_timms_blocks(name, flow):
    model, x = tiny_eva(name), images()
    options = dict(zip(("depth", "depth_from", "carry_over"), flow, strict=True), num_tokens=3, dropout=0.0)
    exact, carried = (classifier_on(model, exact=way, **options) for way in (True, False))
    result = measured(exact, exact(x))
    assert result["method.prompts"].abs().amax(-1).min() > 0, "a prompt that gets no gradient proves nothing"
    assert worst_error(result, measured(exact, naive_logits(exact, model, x))) < FLOAT32
    assert worst_error(result, measured(carried, carried(x))) < FLOAT32


@pytest.mark.parametrize("name", [*MEMBERS, *OTHERS, POST_NORM])
def test_rotations_are_seen_by_the_tests_above(name):
    rotating, still = (classifier_on(tiny_eva(name), dropout=0.0) for _ in range(2))
    still.backbone.model.rope = None
    assert (relative_error(still(images()), rotating(images())) > 200 * FLOAT32) == (
        name != "eva_giant_patch14_224"
    )


@pytest.mark.parametrize(
    ("name", "method", "size"),
    star(RESIZED, ["vpt_deep", "vpt_shallow"], [(48, 24), (24, 24), (48, 48), (16, 64)]),
)
def test_a_dynamic_model_takes_images_of_another_size(name, method, size):
    model = tiny_eva(name, dynamic_img_size=True)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    linear, prompted = classifier_on(model, "linear"), classifier_on(model, method, dropout=0.0)
    assert relative_error(linear.features(x), model(x)) < FLOAT32
    assert (
        worst_error(measured(prompted, prompted(x)), measured(prompted, naive_logits(prompted, model, x)))
        < FLOAT32
    )


@pytest.mark.parametrize(
    ("name", "size"), [*((name, 32) for name in [*MEMBERS, POST_NORM]), *((name, 48) for name in RESIZED)]
)
def test_tokens_of_the_frozen_part_keep_their_positions(name, size):
    model = tiny_eva(name, **{"dynamic_img_size": True} if size == 48 else {})
    classifier = classifier_on(model, depth=1, depth_from="last").eval()
    x, prefix = images(2, size), model.num_prefix_tokens
    tokens = classifier.frozen(x)
    assert tokens.shape == (2, prefix + (size // 8) ** 2, 32)
    assert relative_error(classifier(tokens), classifier(x)) < FLOAT32
    states = classifier.backbone.states(x)
    assert [state.shape for state in states] == [tokens.shape] * 4
    assert relative_error(states[2], tokens) < FLOAT32
    assert classifier.backbone._current_rotations is None


def test_oblong_images_leave_no_tokens_without_a_grid():
    classifier = classifier_on(tiny_eva(), depth=1, depth_from="last", dropout=0.0)
    message = (
        "images of 2 x 8 patches are not supported here, because the rotary positions are inferred from the "
    )
    with pytest.raises(UserError, match=message):
        classifier.frozen(torch.zeros(1, 3, 16, 64))
    with pytest.raises(UserError, match="must be square, and these have 18 positions"):
        classifier.frozen(torch.zeros(1, 3, 48, 24))
    flat = classifier_on(
        tiny_eva("eva_giant_patch14_224", dynamic_img_size=True), depth=1, depth_from="last"
    ).eval()
    x = torch.randn(2, 3, 16, 64)
    assert relative_error(flat(flat.frozen(x)), flat(x)) < FLOAT32


@pytest.mark.parametrize("name", ["vit_base_patch16_sapiens2", MIXED, POST_NORM])
@pytest.mark.parametrize("options", [{}, {"patch_drop_rate": 0.5}], ids=["default", "half the patches"])
def test_full_tuning_gives_timms_own_features_and_gradients_in_training(name, options):
    """One seed draws the same: stochastic depth, dropped patches, and the shifts and scales of rotary positions."""
    drawn_positions = {"rope_shift_coords": 0.3, "rope_jitter_coords": 1.3}
    model, x = tiny_eva(name, **drawn_positions, **options), images(6)
    results = []
    for exact in (True, False):
        classifier = classifier_on(model, "full", exact, drop_path=0.5)
        torch.manual_seed(4)
        results.append(measured(classifier, classifier(x)))
    torch.manual_seed(4)
    results.append(measured(classifier, classifier.head(classifier.backbone.model(x))))
    classifier.eval()
    assert relative_error(results[2]["logits"], classifier(x)) > 0.05
    assert worst_error(results[0], results[2]) < FLOAT32
    assert worst_error(results[1], results[2]) < FLOAT32


def test_images_that_it_does_not_take_are_refused():
    classifier = classifier_on(tiny_eva("eva02_tiny_patch14_224"), "linear")
    with pytest.raises(
        UserError, match="this backbone takes images of size 32 x 32 only and got 64 x 64: resize"
    ):
        classifier(images(size=64))
    with pytest.raises(
        UserError, match=r"images must be \[B, 3, height, width\], and these have the shape \(1, 1, 32"
    ):
        classifier(torch.zeros(1, 1, 32, 32))


# The battery: members in which methods meet another projection, norm, MLP or attention.
# such as those that read the projections of timm's plain attention
PLAIN_ONLY = set(METHODS) - working("DINOv3")
BATTERY = {
    "vit_base_patch16_dinov3": {*PLAIN_ONLY},
    "eva02_tiny_patch14_224": {*PLAIN_ONLY, "fact"},
    "eva02_base_patch14_224": {*PLAIN_ONLY, "fact", "lora"},
    "vit_pe_core_tiny_patch16_384": {*PLAIN_ONLY},
    MIXED: {*PLAIN_ONLY},
    "vit_base_patch16_sapiens2": {*PLAIN_ONLY, "fact", "lora", "layernorm"},
}
SENTENCES = {
    "cvpt": "reads its prompts through timm's plain attention, and these blocks, of class EvaBlock",
    "da_vpt": "method da_vpt cannot work on this backbone: it reads queries of timm's plain attention, and these",
    "sa2vp": "method sa2vp cannot work on this backbone: image and prompts read each other through timm's plain",
    "tcpa": "method tcpa cannot work on this backbone: it masks the weights of timm's plain attention, and these",
    "fact": "method fact cannot work on this backbone: (its EvaBlock has no linear layer|mlp.fc1 maps 32 to 170)",
    "lora": "method lora cannot work on this backbone: its EvaBlock has no linear layer attn.qkv; choose",
    "layernorm": "this backbone has no layer or batch norms to tune",
}
WORKING = [(m, n) for n, refused in BATTERY.items() for m in METHODS if m not in refused and m != "sidetune"]
WORKING.append(("sidetune", "vit_base_patch16_dinov3"))  # 40 M operations an image: once is enough
RMS_NORM = ("ssf", "vit_base_patch16_sapiens2")  # which cannot shift
MERGING = [(m, n) for m, n in WORKING if plain_class(m).can_merge and (m, n) != RMS_NORM]
QUICK = ("vit_base_patch16_dinov3", MIXED)


def quick(method, name):
    """Whether a pair is fast: every method on the first, on the other one a method of each set of sites."""
    return method != "sidetune" and (name == QUICK[0] or (name == QUICK[1] and method in REPRESENTATIVES))


each_working_pair = pytest.mark.parametrize(
    ("method", "name"), [case(m, n, id=f"{m}, {n}", fast=quick(m, n)) for m, n in WORKING]
)


@each_working_pair
def test_every_method_tunes_what_it_names_and_is_restored(method, name):
    model, x = tiny_eva(name), images(3)
    classifier = classifier_on(model, method)
    mean_loss(classifier, classifier(x), torch.arange(3)).backward()
    graded = {n for n, p in classifier.named_parameters() if p.grad is not None}
    assert graded == set(classifier.tuned_names)
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for _, p in classifier.tuned_parameters())
    classifier.eval()
    other = visprompt.build(model, method, NUM_CLASSES).eval()
    assert not torch.equal(other(x), classifier(x))
    other.load_tuned_state(classifier.tuned_state())
    assert torch.equal(other(x), classifier(x))
    assert classifier.summary().macs > 0


# timm's RmsNorm of tokens in 16 bits, in PyTorch's words
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@each_working_pair
def test_every_method_is_near_itself_in_bfloat16_and_without_the_exact_path(method, name):
    # by default a gate's gradient is in float32's noise
    options = {"gate_init": 0.0} if method == "vpt_gated" else {}
    exact, carried = (classifier_on(tiny_eva(name), method, way, **options).eval() for way in (True, False))
    x = images(3)
    expected = exact(x)
    assert worst_error(measured(exact, expected), measured(carried, carried(x))) < FLOAT32
    with torch.autocast("cpu", torch.bfloat16):
        assert max(relative_error(classifier(x), expected) for classifier in (exact, carried)) < 0.2


@pytest.mark.parametrize(
    ("method", "name"), [case(m, n, id=f"{m}, {n}", fast=n == QUICK[0] or m == "full") for m, n in MERGING]
)
def test_what_merges_is_a_plain_eva(method, name):
    classifier = classifier_on(tiny_eva(name), method).eval()
    merged = merge(classifier)
    assert type(merged) is Eva
    assert relative_error(merged(images(3)), classifier(images(3))) < FLOAT32
    again = classifier_on(merged, dropout=0.0)  # with biases both in and beside the joint projection
    expected = naive_logits(again, merged, images(3))
    merged.reset_classifier(0)
    assert relative_error(again(images(3)), expected) < FLOAT32


@pytest.mark.parametrize(
    ("name", "method"), [(n, m) for n, refused in BATTERY.items() for m in sorted(refused)]
)
def test_a_pair_that_cannot_work_says_so(name, method):
    with pytest.raises(
        UserError, match=SENTENCES.get(method, f"method {method} cannot work on this backbone: ")
    ):
        visprompt.build(tiny_eva(name), method, NUM_CLASSES)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_with_their_norms_behind_take_what_needs_no_way_into_them(method):
    model = tiny_eva(POST_NORM)
    if plain_class(method).sites <= {"tokens", "weights", "pixels", "stream"}:
        classifier = classifier_on(model, method)
        mean_loss(classifier, classifier(images(3)), torch.arange(3)).backward()
        assert {n for n, p in classifier.named_parameters() if p.grad is not None} == set(
            classifier.tuned_names
        )
    else:
        with pytest.raises(
            UserError, match=f"method {method} cannot work on this backbone: it needs the site "
        ):
            visprompt.build(model, method, NUM_CLASSES)


def test_key_value_prompts_join_unrotated(monkeypatch):
    for name in BATTERY:
        model, x = tiny_eva(name), images()
        classifier = classifier_on(model, "e2vpt", num_tokens=0, share_kv=False)
        result, calls, plain = (
            measured(classifier, classifier(x)),
            iter(range(3)),
            F.scaled_dot_product_attention,
        )

        def joined(q, k, v, calls=calls, plain=plain, method=classifier.method, **options):
            if (block := next(calls, None)) is None:  # behind the blocks: an attention pooling
                return plain(q, k, v, **options)
            rows = [part.expand(len(q), -1, -1, -1) for part in method.keys_values(block)]
            return plain(q, torch.cat([k, rows[0]], 2), torch.cat([v, rows[1]], 2), **options)

        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", joined)
            logits = classifier.head(model(x))
        assert worst_error(result, measured(classifier, logits)) < FLOAT32


@pytest.mark.parametrize("name", BATTERY)
def test_a_branch_stands_at_its_place(name):
    model, x = tiny_eva(name), images()
    classifier = classifier_on(model, "adapter")
    branch = classifier.method.branch
    for i, block in enumerate(model.blocks):
        block.mlp.register_forward_hook(lambda _, __, out, i=i: out + branch(Place.OUTPUT, i, out, None))
    expected = measured(classifier, classifier.head(model(x)))
    assert worst_error(measured(classifier, classifier(x)), expected) < FLOAT32


@pytest.mark.parametrize("pool", ["cls", "image", "prompt", "image_prompt"])
@pytest.mark.parametrize(
    "name", ["eva02_tiny_patch14_224", "vit_base_patch16_dinov3", "vit_pe_core_tiny_patch16_384"]
)
def test_a_method_may_pool_otherwise(name, pool):
    exact, carried = (classifier_on(tiny_eva(name), "vpt_shallow", way, pool=pool) for way in (True, False))
    assert worst_error(measured(exact, exact(images())), measured(carried, carried(images()))) < FLOAT32


def test_what_nobody_reads_is_not_computed():
    def flops(batch, **options):
        model = tiny_eva(global_pool="token", **options)
        classifier = classifier_on(model, num_tokens=6, dropout=0.0)
        with FlopCounterMode(display=False) as counter:
            classifier(images(batch))
        return counter.get_total_flops()

    n, d, hidden = 5 + 16, 32, 128
    for options in ({}, {"qkv_fused": False}):
        for batch in (1, 3):
            blocks = sum(
                n * 2 * d * d + q * (2 * d * d + 2 * d * hidden) + 2 * q * (n + 6) * d for q in (n, n, 1)
            )
            of_images = batch * (16 * 3 * 64 * d + d * NUM_CLASSES + blocks)
            # prompts: once, whatever the batch
            assert flops(batch, **options) == 2 * (of_images + 3 * 6 * 2 * d * d)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_base_patch16_dinov3", "eva02_tiny_patch14_224", POST_NORM])
def test_a_compiled_classifier_gives_the_same_logits(name):
    classifier = classifier_on(tiny_eva(name), dropout=0.0)
    torch.compiler.reset()
    compiled = torch.compile(classifier, backend="aot_eager", fullgraph=True)
    for x in (images(), images(3)):
        torch._dynamo.maybe_mark_dynamic(x, 0)  # as `models.compiled` does
        assert relative_error(compiled(x), classifier(x)) < FLOAT32
    assert classifier.backbone._current_rotations is None


@pytest.mark.parametrize(
    ("own", "model", "message"),
    [
        (EVA, type("Other", (Eva,), {})(**SIZE), "backbone class Other is not a plain timm Eva: choose one"),
        (EVA, nn.Linear(2, 2), "backbone class Linear is not a plain timm Eva: choose one"),
        (
            EVA,
            Eva(global_pool="", **SIZE),
            "the backbone has no pooling: set backbone.global_pool to token, avg",
        ),
        (ViT, Eva(**SIZE), "backbone class Eva is not a plain timm VisionTransformer: choose one"),
    ],
)
def test_a_model_that_it_cannot_drive_is_refused(own, model, message):
    with pytest.raises(UserError, match=message):
        own(model)
