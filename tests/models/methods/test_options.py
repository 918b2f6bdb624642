"""Building a method by name: words, kinds of values and sites that are wrong are one sentence each."""

import numpy as np
import pytest

from helpers.tiny import geometry, tiny_model
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.methods import build_method


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vpt_dep", {}, r"unknown method 'vpt_dep': did you mean vpt_deep"),
        ("adaptor", {}, "unknown method 'adaptor': did you mean adapter"),
        (
            "vpt_deep",
            {"num_token": 3},
            "unknown option of method vpt_deep 'num_token': did you mean num_tokens",
        ),
        (
            "vpt_shallow",
            {"lenght": 3},
            "unknown option of method vpt_shallow 'lenght': choose one of carry_over, depth",
        ),
        (
            "linear",
            {"num_tokens": 3},
            r"unknown option of method linear 'num_tokens': choose one of \(it has no opt",
        ),
        ("full", {"droppath": 0.1}, "unknown option of method full 'droppath': did you mean drop_path"),
    ],
)
def test_unknown_words_name_the_nearest(name, options, message):
    with pytest.raises(UserError, match=message):
        build_method(name, ViT(tiny_model()), **options)


def test_a_backbone_without_the_site_is_named():
    pixels = geometry(sites=frozenset({"pixels"}))
    message = (
        "method full cannot work on this backbone: it needs the site weights, and the backbone offers pixels"
    )
    with pytest.raises(UserError, match=message):
        build_method("full", pixels)
    assert build_method("linear", pixels).num_blocks == 4


@pytest.mark.parametrize(
    ("name", "option", "value", "sentence"),
    [
        ("vpt_deep", "num_tokens", "abc", "method.num_tokens=abc is of the wrong kind: give a whole number"),
        ("vpt_deep", "num_tokens", True, "method.num_tokens=True is of the wrong kind: give a whole number"),
        ("vpt_deep", "depth", 2.0, "method.depth=2.0 is of the wrong kind: give a whole number or null"),
        ("vpt_deep", "carry_over", "no", "method.carry_over=no is of the wrong kind: give true or false"),
        ("vpt_deep", "pool", 3, "method.pool=3 is of the wrong kind: give a word or null"),
        ("vpt_deep", "location", None, "method.location=null is of the wrong kind: give a word"),
        ("vpt_shallow", "frozen", 1, "method.frozen=1 is of the wrong kind: give true or false"),
        ("e2vpt", "prune", "no", "method.prune=no is of the wrong kind: give true or false"),
        ("e2vpt", "kv_blocks", 3, "method.kv_blocks=3 is of the wrong kind: give a word or a list"),
        ("e2vpt", "token_mask", {}, "method.token_mask={} is of the wrong kind: give a list or null"),
        ("e2vpt", "prune_tokens", "50", "method.prune_tokens=50 is of the wrong kind: give a list or null"),
        ("sidetune", "weights", None, "method.weights=null is of the wrong kind: give a word"),
        (
            "adapter_plus",
            "bottleneck",
            None,
            "method.bottleneck=null is of the wrong kind: give a whole number",
        ),
        ("lora", "alpha", "8", "method.alpha=8 is of the wrong kind: give a number or null"),
        ("lora", "alpha", False, "method.alpha=False is of the wrong kind: give a number or null"),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_sentence(name, option, value, sentence):
    with pytest.raises(UserError) as refused:
        build_method(name, ViT(tiny_model()), **{option: value})
    assert str(refused.value) == sentence


def test_what_is_wrong_inside_a_list_is_one_sentence():
    with pytest.raises(
        UserError, match=r"^method e2vpt has an option of the wrong kind: correct method\.<key>=\.\.\.$"
    ):
        build_method("e2vpt", ViT(tiny_model()), kv_blocks=[[0]])


def test_numbers_of_every_kind_do():
    model = ViT(tiny_model())
    assert (
        build_method("lora", model, alpha=4).scale
        == build_method("lora", model, alpha=np.float32(4)).scale
        == 0.5
    )
    assert build_method("vpt_deep", model, num_tokens=np.int64(3), depth=None).prompts.shape == (4, 3, 32)
    assert build_method("e2vpt", model, kv_blocks=(0, 2), prune_tokens=[50]).kv_blocks == (0, 2)
