"""VPT: where prompts enter, what becomes of their outputs, how they are drawn and dropped out."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from tiny import NUM_IMAGE, SIZE, images, tiny_classifier, tiny_model
from visprompt.errors import UserError
from visprompt.methods import Flow, build_method

TINY = SimpleNamespace(width=32, num_blocks=4, patch_size=8, sites=frozenset({"tokens"}))
VIT_B = SimpleNamespace(width=768, num_blocks=12, patch_size=16, sites=frozenset({"tokens"}))

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
            assert torch.equal(method.eval().tokens(i, 7), method.prompts[i - first].unsqueeze(0))


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
    assert len(passed) == (3 if exact else 4)  # the exact path reads one token of the last block, without calling it
    assert torch.equal(passed[0][0][:, NUM_IMAGE:], classifier.method.prompts[0].detach().expand(2, -1, -1))
    for (_, before), (entering, _) in pairwise(passed):
        assert torch.equal(entering, before)


def test_prompts_change_the_features_and_an_image_keeps_its_own():
    """A batch of two equals two singles."""
    classifier, linear = tiny_classifier("vpt_deep", num_tokens=3).eval(), tiny_classifier("linear").eval()
    x = images(2)
    both = classifier.features(x)
    assert not torch.allclose(both, linear.features(x), atol=0.1)
    assert torch.allclose(both, torch.cat([classifier.features(x[:1]), classifier.features(x[1:])]), atol=1e-5)


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
    tokens = method.train().tokens(1, 3).detach()
    assert tokens.shape == (3, 50, 32)
    kept = tokens != 0
    assert torch.equal(tokens[kept], (2 * prompts).expand(3, -1, -1)[kept])
    assert [image.float().mean().item() for image in kept] == [pytest.approx(0.5, abs=0.06)] * 3
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(method.eval().tokens(1, 3), prompts.unsqueeze(0))


def test_without_dropout_training_draws_nothing():
    method = build_method("vpt_deep", TINY, dropout=0.0).train()
    before = torch.get_rng_state()
    assert method.tokens(0, 3).shape == (1, 10, 32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "method.num_tokens=0 is too small: give at least 1, or use method=linear"),
        ({"depth": 0}, "method.depth=0 does not fit: give 1 to 4, the backbone's blocks"),
        ({"depth": 5}, "method.depth=5 does not fit: give 1 to 4, the backbone's blocks"),
        ({"depth_from": "frist"}, "unknown method.depth_from 'frist': did you mean first"),
        ({"dropout": 1.0}, "method.dropout=1.0 is not a probability: give a number from 0 to below 1"),
        ({"dropout": float("nan")}, "method.dropout=nan is not a probability"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        build_method("vpt_deep", TINY, **options)


def test_prompts_are_shaped_by_the_backbone_they_are_for():
    classifier = tiny_classifier("vpt_deep", model=tiny_model(**SIZE | {"embed_dim": 64, "depth": 2}), num_tokens=7)
    assert classifier.method.prompts.shape == (2, 7, 64)
    assert classifier(images()).shape == (2, 5)
