"""Linear probing and full fine-tuning."""

import pytest
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import nn

from tiny import images, tiny_classifier, tiny_model
from visprompt.backbones.vit import ViT
from visprompt.errors import UserError
from visprompt.methods import Flow, Method, build_method


def test_linear_tunes_the_head_on_features_that_never_change():
    classifier = tiny_classifier("linear")
    assert classifier.tuned_names == {"head.weight", "head.bias"}
    assert list(classifier.method.parameters()) == []
    assert classifier.frozen_features
    assert not tiny_classifier("vpt_deep").frozen_features
    assert not tiny_classifier("full").frozen_features
    assert torch.equal(classifier.features(images()), classifier.features(images()))
    assert not classifier.features(images()).requires_grad


def test_without_prompts_no_token_enters():
    method = build_method("linear", ViT(tiny_model()))
    assert method.token_flow() == (Flow.KEEP,) * 4
    with pytest.raises(LookupError, match="Linear lets no tokens enter before block 2"):
        method.tokens(2, 1)
    assert type(method).tokens is Method.tokens


def drop_rates(model):
    """Stochastic depth of each block's branches."""
    return [
        [
            module.drop_prob if isinstance(module, DropPath) else 0.0
            for name, module in block.named_modules()
            if "drop_path" in name
        ]
        for block in model.blocks
    ]


@pytest.mark.parametrize(
    ("options", "branches"),
    [({}, 2), ({"block_fn": ParallelScalingBlock}, 1), ({"block_fn": ParallelThingsBlock}, 4)],
)
def test_stochastic_depth_grows_linearly_over_the_blocks(options, branches):
    model = tiny_model(**options)
    tiny_classifier("full", model=model, drop_path=0.3)
    expected = [[pytest.approx(rate)] * branches for rate in (0.0, 0.1, 0.2, 0.3)]
    assert drop_rates(model) == expected
    assert drop_rates(tiny_model(drop_path_rate=0.3, **options)) == expected, "as timm's own option"


def test_no_stochastic_depth_where_none_is_asked_for():
    model = tiny_model(drop_path_rate=0.3)
    classifier = tiny_classifier("full", model=model, drop_path=0.0)
    assert not any(isinstance(module, DropPath) for module in model.modules())
    assert isinstance(model.blocks[3].drop_path1, nn.Identity)
    assert torch.equal(classifier.train()(images()), classifier.eval()(images()))


def test_stochastic_depth_is_on_in_training_only():
    classifier = tiny_classifier("full", drop_path=0.5)
    with torch.no_grad():
        training, again = classifier(images()), classifier(images())
        assert not torch.equal(training, again)
        classifier.eval()
        assert torch.equal(classifier(images()), classifier(images()))


def test_a_model_of_one_block_has_no_stochastic_depth():
    model = tiny_model(depth=1)
    tiny_classifier("full", model=model, drop_path=0.5)
    assert drop_rates(model) == [[0.0, 0.0]]


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_a_rate_out_of_range_is_named(rate):
    with pytest.raises(UserError, match=f"method.drop_path={rate} is not a probability: give a number from 0 to below"):
        build_method("full", ViT(tiny_model()), drop_path=rate)
