"""VPT: where prompts enter, what becomes of their outputs, how they are drawn and dropped out."""

from itertools import pairwise

import pytest
import torch

from helpers.tiny import (
    NUM_IMAGE,
    SIZE,
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
from visprompt.models.methods import Flow, build_method

TINY = geometry()
VIT_B = geometry(**VIT_B_SIZE)

# E: prompts enter, k: what is there flows on, d: dropped
FLOWS = [
    ("vpt_deep", {}, "EEEE"),
    ("vpt_shallow", {}, "Ekkk"),
    ("vpt_deep", {"depth": 1}, "Edkk"),
    ("vpt_deep", {"depth": 3}, "EEEd"),
    ("vpt_deep", {"depth": 2, "carry_over": True}, "EEkk"),
    ("vpt_deep", {"depth": 1, "carry_over": True}, "Ekkk"),
    ("vpt_deep", {"depth": 1, "depth_from": "last"}, "kkkE"),
    ("vpt_deep", {"depth": 3, "depth_from": "last"}, "kEEE"),
    ("vpt_deep", {"depth": 4, "depth_from": "last", "carry_over": True}, "EEEE"),
]
LETTERS = {"E": Flow.ENTER, "k": Flow.KEEP, "d": Flow.DROP}


def seen(classifier, x):
    """Input and output of every block."""
    passed = []
    for block in classifier.backbone.model.blocks:
        block.register_forward_hook(lambda _, args, out: passed.append((args[0].detach(), out.detach())))
    classifier(x)
    return passed


@pytest.mark.parametrize(("name", "options", "expected"), FLOWS)
def test_prompts_enter_and_leave_where_the_paper_says(name, options, expected):
    method = build_method(name, TINY, num_tokens=3, **options)
    assert "".join({v: k for k, v in LETTERS.items()}[flow] for flow in method.token_flow()) == expected
    assert method.prompts.shape == (expected.count("E"), 3, 32)
    for i, letter in enumerate(expected):
        if letter == "E":
            first = expected.index("E")
            assert torch.equal(
                method.eval().tokens(i, torch.zeros(7, 5, 32)), method.prompts[i - first].unsqueeze(0)
            )


@pytest.mark.parametrize(("name", "options", "expected"), FLOWS)
def test_the_sequence_never_grows_beyond_one_set_of_prompts(name, options, expected):
    classifier = tiny_classifier(name, exact=False, num_tokens=3, **options)
    there, lengths = 0, []
    for letter in expected:
        there = {"E": 3, "d": 0, "k": there}[letter]
        lengths.append(NUM_IMAGE + there)
    assert [entering.shape[1] for entering, _ in seen(classifier, images())] == lengths


def test_deep_prompts_replace_the_outputs_of_those_before():
    classifier = tiny_classifier("vpt_deep", exact=False, num_tokens=3, dropout=0.0)
    passed = seen(classifier, images())
    for i, (entering, _) in enumerate(passed):
        assert torch.equal(entering[:, NUM_IMAGE:], classifier.method.prompts[i].detach().expand(2, -1, -1))
        if i:
            assert torch.equal(entering[:, :NUM_IMAGE], passed[i - 1][1][:, :NUM_IMAGE])


@pytest.mark.parametrize("exact", [True, False])
def test_shallow_prompts_enter_once_and_their_outputs_flow_on(exact):
    classifier = tiny_classifier("vpt_shallow", exact=exact, num_tokens=3)
    passed = seen(classifier, images())
    # the exact path reads one token of the last block, without calling it
    assert len(passed) == (3 if exact else 4)
    assert torch.equal(passed[0][0][:, NUM_IMAGE:], classifier.method.prompts[0].detach().expand(2, -1, -1))
    for (_, before), (entering, _) in pairwise(passed):
        assert torch.equal(entering, before)


def test_prompts_change_the_features_and_an_image_keeps_its_own():
    """A batch of two equals two singles."""
    classifier, linear = tiny_classifier("vpt_deep", num_tokens=3).eval(), tiny_classifier("linear").eval()
    x = images(2)
    both = classifier.features(x)
    assert not torch.allclose(both, linear.features(x), atol=0.1)
    assert torch.allclose(
        both, torch.cat([classifier.features(x[:1]), classifier.features(x[1:])]), atol=1e-5
    )


def test_prompts_are_drawn_from_the_papers_range_and_the_seed():
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(build_method("vpt_deep", VIT_B, num_tokens=50).prompts.detach())
    bound = 0.0625  # sqrt(6 / (3 * 16^2 + 768))
    assert draws[0].shape == (12, 50, 768)
    assert bound * 0.999 < draws[0].abs().max() <= bound
    assert draws[0].std() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    small = build_method("vpt_deep", TINY, num_tokens=500).prompts
    assert small.abs().max().item() == pytest.approx((6 / (3 * 64 + 32)) ** 0.5, rel=1e-3)


@pytest.mark.parametrize(("name", "rate"), [("vpt_deep", 0.1), ("vpt_shallow", 0.0)])
def test_the_papers_dropout_is_the_default(name, rate):
    assert build_method(name, TINY).dropout.p == rate


def test_dropout_is_drawn_for_every_image_and_only_in_training():
    method = build_method("vpt_deep", TINY, num_tokens=50, dropout=0.5)
    prompts = method.prompts[1].detach()
    tokens = method.train().tokens(1, torch.zeros(3, 5, 32)).detach()
    assert tokens.shape == (3, 50, 32)
    kept = tokens != 0
    assert torch.equal(tokens[kept], (2 * prompts).expand(3, -1, -1)[kept])
    assert [image.float().mean().item() for image in kept] == [pytest.approx(0.5, abs=0.06)] * 3
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(method.eval().tokens(1, torch.zeros(3, 5, 32)), prompts.unsqueeze(0))


def test_without_dropout_training_draws_nothing():
    method = build_method("vpt_deep", TINY, dropout=0.0).train()
    before = torch.get_rng_state()
    assert method.tokens(0, torch.zeros(3, 5, 32)).shape == (1, 10, 32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "method.num_tokens=0 is too small: give at least 1, or use method=linear"),
        ({"depth": 0}, "method.depth=0 does not fit: give 1 to 4, the backbone's blocks"),
        ({"depth": 5}, "method.depth=5 does not fit: give 1 to 4, the backbone's blocks"),
        ({"depth_from": "frist"}, "unknown method.depth_from 'frist': did you mean first"),
        ({"dropout": 1.0}, "method.dropout=1.0 is not a probability: give a number from 0 to below 1"),
        ({"dropout": float("nan")}, "method.dropout=nan is out of range: give a number up to 65536"),
        ({"shared": "both"}, "unknown method.shared 'both': choose one of all, inter, intra, none"),
        ({"project": 0}, "method.project=0 is too small: give at least 1, or null for no projection"),
        ({"pool": "images"}, "unknown method.pool 'images': did you mean image"),
        ({"init": "kmeans"}, "unknown method.init 'kmeans': did you mean patch_kmeans"),
        (
            {"depth": 2, "pool": "prompt"},
            "method.pool=prompt reads prompts after the last block, which they do not reach",
        ),
        (
            {"depth": 2, "depth_from": "last", "carry_over": True},
            "method.carry_over=true has no effect here, since method.depth_from=last leaves no block after "
            "the prompted ones: give method.carry_over=false",
        ),
        (
            {"project": 3, "frozen": True},
            "method.project is tuned and method.frozen=true tunes the head alone",
        ),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        build_method("vpt_deep", TINY, **options)


def test_prompts_are_shaped_by_the_backbone_they_are_for():
    classifier = tiny_classifier(
        "vpt_deep", model=tiny_model(**SIZE | {"embed_dim": 64, "depth": 2}), num_tokens=7
    )
    assert classifier.method.prompts.shape == (2, 7, 64)
    assert classifier(images()).shape == (2, 5)


def same(classifier, features, x):
    """Whether logits and gradients are those of a head on features computed in another way."""
    return (
        worst_error(measured(classifier, classifier(x)), measured(classifier, classifier.head(features)))
        < 1e-5
    )


@pytest.mark.parametrize("options", [{"depth": 3}, {"depth": 2}, {"depth": 1, "num_tokens": 20}])
@pytest.mark.parametrize("exact", [True, False])
def test_a_depth_of_the_last_blocks_keeps_every_image_token(options, exact):
    """The released code cuts off as many image tokens as there are prompts."""
    x = images()
    classifier = tiny_classifier("vpt_deep", exact, dropout=0.0, depth_from="last", **options)
    first, model = 4 - options["depth"], classifier.backbone.model
    plain = model._pos_embed(model.patch_embed(x))
    for block in model.blocks[:first]:
        plain = block(plain)
    assert torch.equal(classifier.frozen(x), plain)
    assert plain.shape[1] == NUM_IMAGE
    assert same(classifier, naive_features(model, x, classifier.method.prompts, first, False), x)
    entered = seen(tiny_classifier("vpt_deep", False, dropout=0.0, depth_from="last", **options), x)[first][0]
    assert torch.equal(entered[:, :NUM_IMAGE], plain)


@pytest.mark.parametrize("depth_from", ["first", "last"])
@pytest.mark.parametrize(
    ("shared", "shape"), [("none", (3, 5)), ("intra", (3, 1)), ("inter", (1, 5)), ("all", (1, 1))]
)
def test_shared_prompts_are_one_vector_or_one_set(shared, shape, depth_from):
    x, options = images(), {"num_tokens": 5, "depth": 3, "depth_from": depth_from, "dropout": 0.0}
    classifier = tiny_classifier("vpt_deep", shared=shared, **options)
    prompts = classifier.method.prompts
    assert prompts.shape == (*shape, 32)
    written_out = torch.stack(
        [torch.stack([prompts[i % shape[0], j % shape[1]] for j in range(5)]) for i in range(3)]
    )
    first = classifier.method.prompted_blocks[0]
    assert same(classifier, naive_features(classifier.backbone.model, x, written_out, first, False), x)
    assert classifier.summary().tuned == shape[0] * shape[1] * 32


@pytest.mark.parametrize("name", ["vpt_deep", "vpt_shallow"])
@pytest.mark.parametrize("shared", ["none", "all"])
def test_projected_prompts_share_one_linear_layer(name, shared):
    x, classifier = images(), tiny_classifier(name, num_tokens=5, project=6, dropout=0.0, shared=shared)
    method, layers = classifier.method, 1 if name == "vpt_shallow" else 4
    weight, bias = method.project.weight, method.project.bias
    wide = torch.einsum("lph,dh->lpd", method.prompts.expand(layers, 5, 6), weight) + bias
    assert same(classifier, naive_features(classifier.backbone.model, x, wide, 0, name == "vpt_shallow"), x)
    assert set(classifier.tuned_state()) == {
        "prompts",
        "project.weight",
        "project.bias",
        "head.weight",
        "head.bias",
    }
    own = 6 if shared == "all" else layers * 5 * 6
    assert classifier.summary().tuned == own + 6 * 32 + 32


def test_the_projection_starts_as_the_papers_code_does():
    method = build_method("vpt_deep", VIT_B, num_tokens=50, project=64)
    bound = (6 / (3 * 16**2 + 64)) ** 0.5  # the prompts' width takes the place of the backbone's
    assert bound * 0.999 < method.prompts.abs().max() <= bound
    assert method.project.weight.std().item() == pytest.approx((2 / 768) ** 0.5, rel=0.02)
    assert 0 < method.project.bias.abs().max() <= 1 / 8
    assert sum(p.numel() for p in method.parameters()) == 12 * 50 * 64 + 64 * 768 + 768


def test_dropout_comes_behind_the_projection():
    method = build_method("vpt_deep", TINY, num_tokens=50, project=2, dropout=0.5).train()
    dropped = (method.tokens(0, torch.zeros(2, 17, 32)) == 0).float()
    assert dropped.mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("pool", ["cls", "image", "prompt", "image_prompt"])
@pytest.mark.parametrize("name", ["vpt_deep", "vpt_shallow"])
@pytest.mark.parametrize(
    "model", [{}, {"reg_tokens": 4, "pre_norm": True}, {"global_pool": "avg", "fc_norm": True}]
)
def test_what_the_head_reads_is_a_choice(name, pool, model, exact):
    x, built = images(), tiny_model(**model)
    classifier = tiny_classifier(name, exact, built, num_tokens=5, pool=pool, dropout=0.0)
    prefix, prompts = built.num_prefix_tokens, classifier.method.prompts
    tokens = built.norm_pre(built._pos_embed(built.patch_embed(x)))
    for i, block in enumerate(built.blocks):
        if i < len(prompts):
            after = tokens[:, prefix + 5 * (i > 0) :]
            tokens = torch.cat([tokens[:, :prefix], prompts[i].expand(2, -1, -1), after], 1)
        tokens = block(tokens)
    tokens = built.norm(tokens)
    read = {
        "cls": tokens[:, 0],
        "image": tokens[:, prefix + 5 :].mean(1),
        "prompt": tokens[:, prefix : prefix + 5].mean(1),
        "image_prompt": tokens[:, prefix:].mean(1),
    }
    assert same(classifier, built.fc_norm(read[pool]), x)


@pytest.mark.parametrize("location", ["prepend", "concat_channel"])
def test_frozen_prompts_are_saved_and_never_tuned(location):
    options = {"num_tokens": 3, "frozen": True, "location": location}
    one, x = tiny_classifier("vpt_shallow", **options), images()
    assert one.tuned_names == {"head.weight", "head.bias"}
    assert one.summary().tuned == 0
    extra = {"channel_embed"} if location == "concat_channel" else set()
    assert set(one.tuned_state()) == {"prompts", "head.weight", "head.bias"} | extra
    other = tiny_classifier("vpt_shallow", **options)
    with torch.no_grad():
        other.method.prompts.mul_(3.0)
    assert not torch.equal(other(x), one(x))
    other.load_tuned_state(one.tuned_state())
    assert torch.equal(other(x), one(x))
    assert not torch.allclose(one.features(x), tiny_classifier("linear").features(x), atol=1e-3)


def test_features_under_frozen_prompts_are_computed_once_where_no_noise_changes_them():
    one, x = tiny_classifier("vpt_deep", num_tokens=3, frozen=True, dropout=0.0), images()
    assert one.frozen(x).shape == (2, 32)
    assert torch.equal(one(one.frozen(x)), one(x))
    noisy = tiny_classifier("vpt_deep", frozen=True, depth=2, depth_from="last")
    assert noisy.frozen(x).shape == (2, NUM_IMAGE, 32)
    assert not tiny_classifier("vpt_deep", frozen=True).has_frozen_part
