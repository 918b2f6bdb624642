"""Maps of blocks for dense heads: every family's are timm's own, and unread outputs are not computed."""

import pytest
import timm
import torch
from torch import Tensor

from helpers.tiny import relative_error
from visprompt.errors import UserError
from visprompt.models.backbones.families import family
from visprompt.models.classifier import Classifier
from visprompt.models.methods import Method, build_method
from visprompt.models.segmentation import SEGMENTATION

MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 4, "embed_dim": 32, "num_heads": 2}),
    "vit-mean": (
        "vit_tiny_patch16_224",
        {"img_size": 64, "depth": 4, "embed_dim": 32, "num_heads": 2, "global_pool": "avg"},
    ),
    "eva": ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 4, "embed_dim": 48, "num_heads": 2}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 56, "depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)},
    ),
    "convnext": ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}),
    "resnet": ("resnet18", {}),
}


def built(name):
    torch.manual_seed(0)
    architecture, options = MODELS[name]
    model = timm.create_model(architecture, num_classes=0, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return family(model)


def images(backbone) -> Tensor:
    return torch.randn(2, 3, *backbone.own_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_maps_are_what_timms_blocks_return(name):
    backbone = built(name)
    blocks = (0, 2, backbone.num_blocks - 1)
    seen = {}
    for i in blocks:
        backbone.blocks[i].register_forward_hook(lambda *call, i=i: seen.update({i: call[2]}))
    x = images(backbone)
    final = backbone.model.forward_features(x)
    expected = dict(seen)
    found = backbone.maps(x, Method(backbone), blocks, False)
    for i, map_ in zip(blocks, found, strict=True):
        whole = expected[i]
        if whole.ndim == 3:  # tokens, the class token first
            whole = whole[:, backbone.num_prefix :].transpose(1, 2).unflatten(2, backbone.grids[i])
        elif name == "swin":
            whole = whole.movedim(-1, 1)
        assert map_.shape == (2, backbone.widths[i], *backbone.grids[i])
        assert relative_error(map_, whole) < 1e-5, i
    last = backbone.maps(x, Method(backbone), blocks, True)[-1]
    if name.startswith(("vit", "eva")):
        final = backbone.model.fc_norm(final)[:, backbone.num_prefix :].transpose(1, 2)
        final = final.unflatten(2, backbone.grids[-1])
    elif name == "swin":
        final = final.movedim(-1, 1)
    elif name == "convnext":
        final = backbone.model.head.norm(final)
    assert relative_error(last, final) < 1e-5


@pytest.mark.parametrize("name", ["vit", "eva", "swin"])
@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow", "e2vpt"])
def test_the_fast_path_gives_the_maps_and_gradients_of_a_whole_pass(name, method):
    found = {}
    for exact in (True, False):
        backbone = built(name)
        backbone.exact = exact
        torch.manual_seed(2)
        built_method = build_method(method, backbone, num_tokens=3, dropout=0.0)
        head = "linear" if name == "swin" else "setr_pup"
        classifier = Classifier(backbone, built_method, 3, "vpt", SEGMENTATION, head)
        classifier.double()  # batch norm of two small maps enlarges rounding
        logits = classifier(images(backbone).double())
        names, parameters = zip(*classifier.tuned_parameters(), strict=True)
        loss = logits.square().mean() + sum(
            part.square().mean() for part in getattr(classifier.head, "_others", [])
        )
        gradients = torch.autograd.grad(loss, parameters)
        found[exact] = {"logits": logits, **dict(zip(names, gradients, strict=True))}
    for tensor, value in found[True].items():
        assert relative_error(value, found[False][tensor]) < 1e-5, tensor


def test_blocks_after_the_last_map_are_not_run():
    backbone = built("vit")
    ran = []
    for i, block in enumerate(backbone.blocks):
        block.norm1.register_forward_hook(lambda *call, i=i: ran.append(i))
    backbone.maps(images(backbone), Method(backbone), (0, 2), False)
    assert set(ran) == {0, 1, 2}


def test_the_class_token_and_prompts_of_the_last_block_give_keys_and_values_only():
    backbone = built("vit")
    method = build_method("vpt_deep", backbone, num_tokens=3, dropout=0.0)
    classifier = Classifier(backbone, method, 3, "vpt", SEGMENTATION).eval()
    seen = []
    backbone.blocks[-1].mlp.register_forward_hook(lambda *call: seen.append(call[1][0].shape[1]))
    classifier(images(backbone))
    assert seen == [16]


@pytest.mark.parametrize("name", ["vit", "swin", "resnet"])
@pytest.mark.parametrize("method", ["linear", "partial"])
def test_frozen_parts_continue_to_the_same_logits(name, method):
    backbone = built(name)
    classifier = Classifier(backbone, build_method(method, backbone), 3, "vpt", SEGMENTATION).eval()
    x = images(backbone)
    with torch.no_grad():
        frozen = classifier.frozen(x)
        assert frozen.ndim == 3
        assert relative_error(classifier(frozen), classifier(x)) < 1e-5


def test_nothing_is_frozen_before_a_block_whose_output_the_head_reads():
    backbone = built("vit")
    linear = Classifier(backbone, build_method("linear", backbone), 3, "vpt", SEGMENTATION, "setr_pup").eval()
    x = images(backbone)
    with torch.no_grad():
        assert relative_error(linear(linear.frozen(x)), linear(x)) < 1e-5
        linear.train()
        a, b = linear(linear.frozen(x)), linear(x)
        assert relative_error(a, b) < 1e-5
    backbone = built("vit")
    partial = Classifier(backbone, build_method("partial", backbone), 3, "vpt", SEGMENTATION, "setr_pup")
    assert (partial.method.first_block, partial.first_block) == (3, 0)
    with pytest.raises(UserError, match=r"images must be \[B, 3, height, width\]"):
        partial(torch.zeros(2, 17, 32))
