"""The heads of dense tasks, compared with other code of the same equations, and the counts of the paper's table."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from helpers.tiny import geometry, images, relative_error, tiny_model
from visprompt.errors import UserError
from visprompt.models.api import build
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.heads import make_dense_head
from visprompt.models.heads.setr_pup import SETRPUP
from visprompt.models.methods import METHODS, Method, build_method
from visprompt.models.segmentation import SEGMENTATION

CLASSES = 5


def dense(method="vpt_deep", head="linear", depth=4, exact=True, **options):
    """A classifier of pixels on a tiny ViT, whose tuned numbers are large enough to be seen."""
    torch.manual_seed(0)
    backbone = ViT(tiny_model(depth=depth), exact=exact)
    classifier = Classifier(
        backbone, build_method(method, backbone, **options), CLASSES, "vpt", SEGMENTATION, head
    )
    with torch.no_grad():
        for _, parameter in classifier.tuned_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return classifier


def naive_maps(model, x, prompts):
    """The patches after each block, with VPT-deep's prompts after the class token in every block."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    maps = []
    for block, own in zip(model.blocks, prompts, strict=True):
        tokens = torch.cat([x[:, :1], own.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        tokens = block(tokens)
        x = torch.cat([tokens[:, :1], tokens[:, 1 + len(own) :]], dim=1)
        maps.append(x[:, 1:])
    return maps


def as_map(patches):
    return patches.transpose(1, 2).reshape(len(patches), -1, 4, 4)


def gradients(classifier, loss):
    names, parameters = zip(*classifier.tuned_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same(classifier, ours, theirs):
    assert relative_error(ours, theirs) < 1e-5
    mine, naive = (gradients(classifier, logits.square().mean()) for logits in (ours, theirs))
    for name in naive:
        assert relative_error(mine[name], naive[name]) < 1e-4, name


def test_the_linear_head_gives_each_patch_logits_that_are_interpolated():
    classifier, x = dense(num_tokens=3, dropout=0.0), images()
    model, head = classifier.backbone.model, classifier.head
    patches = model.norm(naive_maps(model, x, classifier.method.prompts)[-1])
    logits = as_map(patches @ head.weight.T + head.bias)
    naive = F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False)
    assert_same(classifier, classifier(x), naive)
    assert classifier.summary().head == 32 * CLASSES + CLASSES


def naive_up(part, x, steps, factor):
    """SETR's upsampling, from the weights of our head; batch norm by its formula."""
    tokens = x.flatten(2).transpose(1, 2)
    tokens = F.layer_norm(tokens, tokens.shape[-1:], part.norm.weight, part.norm.bias, 1e-6)
    x = tokens.transpose(1, 2).reshape(x.shape)
    for i in range(steps):
        x = F.conv2d(x, part.convs[i].weight, padding=1)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
        scale, shift = (v.view(1, -1, 1, 1) for v in (part.norms[i].weight, part.norms[i].bias))
        x = torch.relu((x - mean) / (var + 1e-5).sqrt() * scale + shift)
        x = nn.Upsample(scale_factor=factor, mode="bilinear")(x)
    x = torch.einsum("bchw,kc->bkhw", x, part.last.weight[:, :, 0, 0]) + part.last.bias.view(1, -1, 1, 1)
    return F.interpolate(x, size=(32, 32), mode="bilinear")


def test_setr_pup_upsamples_in_steps_and_classifies_three_other_blocks_in_training():
    classifier, x = dense(head="setr_pup", depth=12, num_tokens=3, dropout=0.0), images()
    head = classifier.head
    assert head.blocks == (4, 7, 9, 11)  # 10, 15 and 20 of 24 blocks, rounded up, and the last
    maps = [as_map(part) for part in naive_maps(classifier.backbone.model, x, classifier.method.prompts)]
    naive = naive_up(head.main, maps[-1], 4, 2)
    others = [naive_up(part, maps[i], 2, 4) for part, i in zip(head.auxiliary, head.blocks, strict=False)]
    labels = torch.randint(0, CLASSES, (2, 32, 32), generator=torch.Generator().manual_seed(1))
    labels[:, :5] = 255
    ours = classifier(x)
    assert relative_error(ours, naive) < 1e-5
    weights = torch.full((2,), 0.5)
    loss = (classifier.losses(ours, labels, weights) * weights).sum()
    terms = [F.cross_entropy(part, labels, ignore_index=255, reduction="sum") for part in (naive, *others)]
    expected = (terms[0] + 0.4 * sum(terms[1:])) / labels.numel()
    torch.testing.assert_close(loss, expected)
    mine, theirs = gradients(classifier, loss), gradients(classifier, expected)
    assert {"head.auxiliary.2.convs.1.weight", "method.prompts", "head.main.norms.3.bias"} <= mine.keys()
    for name in theirs:
        assert relative_error(mine[name], theirs[name]) < 2e-3, name


def test_the_auxiliary_heads_are_not_computed_in_evaluation():
    classifier = dense(head="setr_pup", depth=12, num_tokens=3, dropout=0.0).eval()
    called = []
    for part in classifier.head.auxiliary:
        part.register_forward_hook(lambda *call: called.append(call))
    with torch.no_grad():
        logits = classifier(images())
    assert not called
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    torch.testing.assert_close(
        classifier.losses(logits, labels, torch.ones(2)), SEGMENTATION.loss(logits, labels)
    )


TABLE = {  # of table 3 in Jia et al., in millions, and what is tuned here
    "linear": (13.18, 13.143640),
    "bias": (13.46, 13.143640 + 0.271360),
    "vpt_deep": (13.43, 13.143640 + 0.245760),
    "vpt_deep_bias": (15.79, 13.143640 + 2.457600 + 0.271360),
}


def test_a_pooling_by_attention_is_not_tuned_where_nothing_is_pooled():
    backbone = ViT(tiny_model(global_pool="map", class_token=False))
    classifier = Classifier(backbone, build_method("full", backbone), 3, "vpt", SEGMENTATION)
    classifier(images()).sum().backward()
    assert all(p.grad is not None for _, p in classifier.tuned_parameters())
    assert any(name.startswith("backbone.model.attn_pool.") for name, _ in classifier.named_parameters())


@pytest.mark.parametrize("method", TABLE)
def test_the_counts_of_vpts_segmentation_table(method):
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224", img_size=512, num_classes=0)
        backbone = ViT(model)
        tokens = {"vpt_deep": 10, "vpt_deep_bias": 100}
        options = {"num_tokens": tokens[method]} if method in tokens else {}
        built = build_method(method, backbone, **options)
        classifier = Classifier(backbone, built, 150, "vpt", SEGMENTATION, "setr_pup")
    published, ours = TABLE[method]
    counted = sum(p.numel() for _, p in classifier.tuned_parameters())
    assert counted == round(ours * 1e6)
    assert counted / 1e6 == pytest.approx(published, rel=0.006)
    assert classifier.head.blocks == (9, 14, 19, 23)


def test_full_fine_tuning_tunes_all_but_the_norm_that_the_head_does_not_read():
    classifier = dense("full", "setr_pup", depth=12)
    left = {name for name, _ in classifier.named_parameters()} - classifier.tuned_names
    assert left == {"backbone.model.norm.weight", "backbone.model.norm.bias"}
    classifier(images()).sum().backward()
    loss = classifier.losses(classifier(images()), torch.zeros(2, 32, 32, dtype=torch.long), torch.ones(2))
    loss.sum().backward()
    assert all(p.grad is not None for _, p in classifier.tuned_parameters())
    assert dense("full").tuned_names == {name for name, _ in dense("full").named_parameters()}


REFUSED = {
    **dict.fromkeys(("mlp", "sidetune"), "this method works on the pooled features of an image"),
    **dict.fromkeys(("da_vpt", "pae", "sa2vp"), "this method reads one class for each image"),
}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_method_either_tunes_pixels_or_says_why_not(method):
    if says := REFUSED.get(method):
        with pytest.raises(UserError, match=says):
            dense(method)
        return
    classifier = dense(method)
    logits = classifier(images())
    assert logits.shape == (2, CLASSES, 32, 32)
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    classifier.losses(logits, labels, torch.full((2,), 0.5)).sum().backward()
    unread = {name for name, p in classifier.tuned_parameters() if p.grad is None}
    assert unread == set()


def test_unknown_heads_and_heads_of_other_tasks_are_refused():
    with pytest.raises(
        UserError, match=r"unknown recipe\.head 'setr': did you mean setr_pup\? \(all: linear, setr_pup\)"
    ):
        make_dense_head("setr", geometry(), Method(geometry()), 3, "vpt")
    with pytest.raises(UserError, match=r"recipe\.head=setr_pup is the head of segmentation tasks"):
        build(tiny_model(), "linear", 3, head="setr_pup")


def test_setr_pup_reads_blocks_at_the_published_shares_of_any_depth():
    assert SETRPUP(geometry(num_blocks=6), 3, "vpt").blocks == (2, 3, 4, 5)
    assert SETRPUP(geometry(num_blocks=24), 3, "vpt").blocks == (9, 14, 19, 23)
