"""Convolutional networks equal timm's own forward; each method on them equals what its formula reads."""

import copy
from collections import Counter

import pytest
import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, RmsNorm2d
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torchvision.transforms.functional import resize

from helpers.pairs import options, working
from helpers.tiny import NUM_CLASSES, RECORD, images, measured, relative_error, worst_error
from helpers.wide import case, star
from visprompt.errors import UserError
from visprompt.models.backbones import BackboneSpec, build_backbone
from visprompt.models.backbones.convnet import ConvNeXt as ConvNeXtFamily
from visprompt.models.backbones.families import family
from visprompt.models.classifier import Classifier
from visprompt.models.merge import merge
from visprompt.models.methods import METHODS, build_method
from visprompt.models.tuned_state import TunedState, load_state, save_state

FLOAT32, SIDE, BATCH_NORM = 1e-5, 64, nn.BatchNorm2d
STAGES = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
BASIC = {"block": BasicBlock, "layers": (1, 2, 1, 1), "channels": (8, 16, 24, 32)}
MODELS = {
    "resnet": (ResNet, BASIC),
    "deep stem, squeeze": (ResNet, {
        "block": Bottleneck, "layers": (1, 2, 1, 1), "channels": (8, 8, 12, 16), "cardinality": 2, "base_width": 32,
        "stem_width": 8, "stem_type": "deep_tiered", "avg_down": True, "block_args": {"attn_layer": "se"},
    }),
    "group norm, twofold pooling": (ResNet, BASIC | {"norm_layer": "groupnorm1", "global_pool": "catavgmax"}),
    "convnext": (ConvNeXt, STAGES),
    "norm first": (ConvNeXt, STAGES | {"head_norm_first": True, "conv_mlp": True, "patch_size": 2}),
    "response norm": (ConvNeXt, STAGES | {
        "use_grn": True, "ls_init_value": None, "stem_type": "overlap_tiered", "head_hidden_size": 20,
    }),
    "root mean square": (ConvNeXt, STAGES | {"norm_layer": "rmsnorm2d", "conv_mlp": True}),
}  # fmt: skip
PIXELS = {"num_tokens": 3, "depth": 1, "dropout": 0.0}
METHOD_OPTIONS = {
    "linear": ("linear", {}),
    "mlp": ("mlp", {"dropout": 0.0}),
    "partial": ("partial", {"num_blocks": 2}),
    "full": ("full", {}),
    "bias": ("bias", {}),
    "layernorm": ("layernorm", {}),
    "ssf": ("ssf", {}),
    "pad": ("vpt_shallow", PIXELS | {"location": "pad"}),
    "grown": ("vpt_deep", PIXELS | {"location": "pad", "pad_resize": False}),
    "channels": ("vpt_shallow", PIXELS | {"location": "concat_channel"}),
    "pad, bias": ("vpt_deep_bias", PIXELS | {"location": "pad"}),
    "channels, bias": ("vpt_shallow_bias", PIXELS | {"location": "concat_channel"}),
}
MERGED = {"linear", "partial", "full", "bias", "layernorm", "ssf"}
NO_LAYER_NORM = {"root mean square", "group norm, twofold pooling"}
USUAL = ("resnet", "deep stem, squeeze", "convnext", "response norm")
PAIRS = [(method, name) for method in METHOD_OPTIONS for name in USUAL]
PAIRS += [
    (method, name) for method in ("ssf", "partial") for name in ("group norm, twofold pooling", "norm first")
]
every_model = pytest.mark.parametrize("name", MODELS)
PAIRS += [("sidetune", "resnet"), ("sidetune", "convnext")]  # 40 M operations an image: twice is enough
every_pair = pytest.mark.parametrize(
    ("method", "name"),
    [case(m, n, id=f"{m}, {n}", fast=n in ("resnet", "convnext") and m != "sidetune") for m, n in PAIRS],
)


def tiny(name="resnet", **options):
    """Random weights and statistics of a size that keeps all branches in the output."""
    cls, own = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(**{"num_classes": 0} | own | options).eval()
        model.pretrained_cfg = {"input_size": (3, SIDE, SIDE)}
        for p in model.parameters():
            p.data = (
                p + 0.3 * torch.randn_like(p) if p.ndim == 1 else torch.randn_like(p) / p[0].numel() ** 0.5
            )
        for module in model.modules():
            if isinstance(module, BATCH_NORM):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return model


def built(method="linear", name="resnet", model=None, seed=1, **options):
    backbone = family(tiny(name) if model is None else model)
    called, given = METHOD_OPTIONS.get(method, (method, {}))
    torch.manual_seed(seed)
    classifier = Classifier(backbone, build_method(called, backbone, **given | options), NUM_CLASSES)
    for name, p in classifier.method.named_parameters():
        if "bias" not in name and not name.startswith("side."):
            p.data += 0.2 * torch.randn_like(p)
    classifier.head.bias.data.normal_()
    return classifier


def own_features(model, x):
    return model.forward_head(model.forward_features(x), pre_logits=True)


def equal_ways(classifier, features, x):
    """Logits and all gradients of a classifier, and of features that its formula reads."""
    ways = [measured(classifier, logits) for logits in (classifier(x), classifier.head(features))]
    assert set(ways[0]) == {"logits", *classifier.tuned_names}
    return worst_error(*ways) < FLOAT32


@every_model
@pytest.mark.parametrize("size", [(64, 64), (53, 53), (40, 72)])
def test_features_are_timms_own_at_every_size(name, size):
    model, x = tiny(name), torch.randn(2, 3, *size)
    expected = own_features(model, x)
    classifier = built(model=model)
    assert torch.equal(classifier.features(x), expected)
    assert classifier.backbone.width == expected.shape[1]
    assert classifier.backbone.carried_blocks() == []


FACTS = {  # final norms, stem, side of what it sees, widths
    "resnet": ((), "conv1", 7, (8, 16, 16, 24, 32)),
    "deep stem, squeeze": ((), "conv1.0", 3, (32, 32, 32, 48, 64)),
    "convnext": (("head.norm",), "stem.0", 4, (8, 16, 24, 24, 32)),
    "norm first": (("norm_pre",), "stem.0", 2, (8, 16, 24, 24, 32)),
    "response norm": (("head.norm",), "stem.0", 3, (8, 16, 24, 24, 32)),
}
JOINS = {1: "stages.1.downsample", 2: "stages.2.downsample", 4: "stages.3.downsample"}
BLOCKS = {
    ResNet: ("layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0"),
    ConvNeXt: tuple(
        f"stages.{name}" for name in ("0.blocks.0", "1.blocks.0", "2.blocks.0", "2.blocks.1", "3.blocks.0")
    ),
}


@pytest.mark.parametrize("name", FACTS)
def test_what_a_method_is_told(name):
    told, cls = family(tiny(name)), MODELS[name][0]
    assert (told.final_names, told.stem, told.patch_size, told.widths) == FACTS[name]
    assert told.block_names == BLOCKS[cls]
    assert told.between_names == tuple(JOINS.get(i) if cls is ConvNeXt else None for i in range(5))
    assert told.grids == tuple(
        (side, side) for side in ((16, 8, 8, 4, 2) if cls is ResNet else (16, 8, 4, 4, 2))
    )
    assert (told.heads, told.any_size, told.num_prefix, told.has_class_token) == ((0,) * 5, True, 0, False)
    assert (told.sites, told.image_size) == ({"weights", "modules", "pixels"}, 64)
    assert {type(block) for block in told.blocks} == {type(told.blocks[0])}


@pytest.mark.parametrize(("size", "own"), [(None, 160), (96, 96)])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_a_named_backbone_has_the_size_that_was_asked_for(name, size, own):
    backbone = build_backbone(BackboneSpec(name=name, pretrained=False, image_size=size))
    assert (backbone.image_size, backbone.module.grids[0]) == (own, (own // 4, own // 4))


@pytest.mark.parametrize(
    ("name", "method"), star([*MODELS], ["full", "linear", "mlp", "partial", "bias", "layernorm"])
)
def test_tuned_weights_get_the_gradients_of_timms_own_forward(method, name):
    if method == "layernorm" and name in NO_LAYER_NORM:
        with pytest.raises(
            UserError, match="this backbone has no layer or batch norms to tune: choose another method"
        ):
            built(method, name)
        return
    classifier, x = built(method, name).eval(), images(3, SIDE)
    assert equal_ways(classifier, own_features(classifier.backbone.model, x), x)


@every_model
def test_full_tuning_draws_stochastic_depth_and_trains_batch_norm_as_timm_does(name):
    one, x = built("full", name, drop_path=0.5), images(4, SIDE)
    other = copy.deepcopy(one)
    assert [type(block.drop_path) for block in one.backbone.blocks] == [nn.Identity, *[DropPath] * 4]
    assert [block.drop_path.drop_prob for block in one.backbone.blocks[1:]] == [0.125, 0.25, 0.375, 0.5]
    results = []
    for classifier, forward in (
        (one, one.features),
        (other, lambda x: own_features(other.backbone.model, x)),
    ):
        torch.manual_seed(4)
        results.append(measured(classifier, classifier.head(forward(x))))
    assert worst_error(*results) < FLOAT32
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items()), "statistics too"
    with torch.no_grad():
        assert not torch.equal(one(x), one(x)), "branches are drawn anew"
        assert torch.equal(one.eval()(x), one(x))
        assert torch.equal(one.features(x), own_features(one.backbone.model, x))


@pytest.mark.parametrize(
    ("method", "name"),
    star(["full", *(m for m in METHOD_OPTIONS if m != "full")], ["resnet", "deep stem, squeeze"]),
)
def test_only_full_tuning_changes_batch_statistics_and_they_are_saved(method, name):
    classifier = built(method, name)
    statistics = {n: t.clone() for n, t in classifier.backbone.named_buffers()}
    classifier(images(3, SIDE)).sum().backward()
    changed = {n for n, t in classifier.backbone.named_buffers() if not torch.equal(t, statistics[n])}
    assert changed == (set(statistics) if method == "full" else set())
    assert {m.training for m in classifier.backbone.modules()} == {method == "full"}
    assert {f"backbone.{n}" for n in changed} <= classifier.tuned_state().keys()


def framed(image, prompts):
    """An image in its frame: a strip is laid above, the whole is turned clockwise, and so on, four times."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    width = prompts.shape[2]
    canvas = F.pad(image, (width,) * 4)
    for strip in prompts:
        canvas[:, :, :width, :-width] = (strip - mean) / std
        canvas = torch.rot90(canvas, -1, (2, 3))
    return canvas


@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_sidetuning_mixes_timms_own_features_with_those_of_the_side_network(name):
    classifier, x = built("sidetune", name).eval(), images(2, SIDE)
    share, side = classifier.method.alpha.sigmoid(), classifier.method.features(torch.zeros(()), x)
    assert equal_ways(classifier, share * own_features(classifier.backbone.model, x) + side, x)


@pytest.mark.parametrize(("name", "method"), star([*MODELS], ["pad", "grown", "pad, bias"]))
def test_a_padded_image_is_the_image_in_a_frame(method, name):
    classifier, x = built(method, name), images(2, SIDE)
    prompts = classifier.method.prompts
    assert prompts.shape == ((4, 3, 3, 67) if method == "grown" else (4, 3, 3, 61))
    inside = x if method == "grown" else resize(x, [58, 58], antialias=True)
    assert equal_ways(classifier, own_features(classifier.backbone.model, framed(inside, prompts)), x)


@pytest.mark.parametrize(("name", "method"), star([*MODELS], ["channels", "channels, bias"]))
def test_further_channels_are_convolved_by_one_kernel_with_the_three(method, name):
    classifier, x = built(method, name), images(2, SIDE)
    path, plain = classifier.backbone.stem, tiny(name, in_chans=6)
    own = dict(classifier.backbone.model.named_parameters())
    weights = {n.replace(f"{path}.base.", f"{path}."): p for n, p in own.items()}
    weights[f"{path}.weight"] = torch.cat([weights[f"{path}.weight"], classifier.method.channel_embed], 1)
    joined = torch.cat([x, classifier.method.prompts.expand(2, -1, -1, -1)], 1)
    features = functional_call(plain, weights | dict(tiny(name).named_buffers()), joined)
    assert classifier.method.prompts.shape == (3, 64, 64)
    assert equal_ways(classifier, features, x)


@every_model
def test_scaled_layers_have_scaled_weights(name):
    classifier, plain, x = built("ssf", name), tiny(name), images(2, SIDE)
    layers = {
        path: m for path, m in plain.named_modules() if "weight" in m._parameters and not path.endswith("grn")
    }
    weights, seen = {}, Counter()
    for path, layer in layers.items():
        block = next((b for b in classifier.backbone.block_names if path.startswith(f"{b}.")), None)
        key = path.removeprefix(f"{block}.").removeprefix("mlp.").replace(".", "_")
        # of a ResNet, whose blocks have such names too
        key = f"stem_{key}" if path in ("conv1", "bn1") else key
        gamma, beta = classifier.method.gamma[key], classifier.method.beta[key]
        if block is not None:
            gamma, beta = gamma[seen[key]], beta[seen[key]]
            seen[key] += 1
        weights[f"{path}.weight"] = torch.einsum("o...,o->o...", layer.weight, gamma)
        weights[f"{path}.bias"] = beta if getattr(layer, "bias", None) is None else layer.bias * gamma + beta
        layer.bias = nn.Parameter(torch.zeros(len(beta)))
        if isinstance(layer, RmsNorm2d):  # which would not add it
            layer.register_forward_hook(lambda layer, _, out: out + layer.bias[:, None, None])
    assert equal_ways(classifier, functional_call(plain, weights, x), x)
    assert classifier.summary().tuned == 2 * sum(len(layer.weight) for layer in layers.values())


@every_pair
def test_exactly_the_tuned_parameters_get_gradients_and_are_counted(method, name):
    classifier = built(method, name)
    classifier(images(3, SIDE)).logsumexp(1).square().mean().backward()
    assert {n for n, p in classifier.named_parameters() if p.grad is not None} == set(classifier.tuned_names)
    assert all(p.grad.isfinite().all() and p.grad.any() for _, p in classifier.tuned_parameters())
    summary, saved = classifier.summary(), classifier.tuned_state()
    assert summary.tuned + summary.head == sum(p.numel() for _, p in classifier.tuned_parameters())
    assert summary.bytes == sum(t.nbytes for t in saved.values())
    assert summary.backbone == sum(p.numel() for p in tiny(name).parameters())


@every_pair
def test_what_is_saved_restores_every_bit(tmp_path, method, name):
    classifier, x = built(method, name, seed=7), images(2, SIDE)
    classifier(x)  # in training, so that batch statistics have moved where they may
    for _, p in classifier.tuned_parameters():
        p.data += 0.1 * torch.randn_like(p)
    save_state(tmp_path / "tuned.safetensors", TunedState(tensors=classifier.tuned_state(), **RECORD))
    restored = built(method, name).eval()
    assert not torch.equal(restored(x), classifier.eval()(x))
    restored.load_tuned_state(load_state(tmp_path).tensors)
    assert torch.equal(restored(x), classifier(x))


@every_pair
def test_the_frozen_part_the_16_bits_and_the_merged_model_agree(method, name):
    classifier, x = built(method, name).eval(), images(3, SIDE)
    expected = classifier(x)
    if classifier.has_frozen_part:
        frozen = classifier.frozen(x)
        assert not frozen.requires_grad
        assert frozen.ndim == (3 if method == "partial" else 2)
        assert relative_error(classifier(frozen), expected) < FLOAT32
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(classifier(x), expected) < 0.1
    channels_last = copy.deepcopy(classifier.to(memory_format=torch.channels_last))
    assert relative_error(channels_last(x.to(memory_format=torch.channels_last)), expected) < FLOAT32
    if method in MERGED:
        merged = merge(classifier)
        assert type(merged) is type(tiny(name))
        assert relative_error(merged(x), expected) < FLOAT32
    else:
        with pytest.raises(UserError, match="merge"):
            merge(classifier)


@pytest.mark.parametrize(("name", "size"), [("resnet", 48), ("convnext", 64), ("convnext", 72)])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 5])
def test_partial_tunes_the_last_blocks_and_what_joins_them(num_blocks, name, size):
    classifier, x = built("partial", name, num_blocks=num_blocks).eval(), images(2, size)
    first, joins = 5 - num_blocks, JOINS if name == "convnext" else {}
    tuned = [*BLOCKS[MODELS[name][0]][first:], *[join for i, join in joins.items() if i > first], "head"]
    own = [
        n
        for n, _ in classifier.backbone.model.named_parameters()
        if n.startswith(tuple(f"{t}." for t in tuned))
    ]
    assert classifier.tuned_names == {"head.weight", "head.bias", *[f"backbone.model.{n}" for n in own]}
    frozen = classifier.frozen(x) if num_blocks < 5 else x
    assert frozen.ndim == (3 if num_blocks < 5 else 4)
    ways = [measured(classifier, logits) for logits in (classifier(frozen), classifier(x))]
    assert worst_error(*ways) < FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name"), [("channels", "resnet"), ("ssf", "convnext"), ("pad", "response norm")]
)
def test_a_compiled_classifier_gives_the_same_logits(method, name):
    classifier, x = built(method, name).eval(), images(2, SIDE)
    torch.compiler.reset()
    compiled = torch.compile(classifier, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), classifier(x)) < FLOAT32


@pytest.mark.parametrize(("name", "stem"), [("resnet50", 64 * 2 * 49), ("convnext_base", 128 * 2 * 16)])
def test_counts_on_the_papers_backbones(name, stem):
    with torch.device("meta"):
        backbone = family(timm.create_model(name))
    assert (backbone.image_size, backbone.num_blocks) == (224, 16 if name == "resnet50" else 36)
    grown = build_method("vpt_shallow", backbone, location="pad", num_tokens=5, pad_resize=False)
    assert grown.prompts.numel() == 3 * (234**2 - 224**2) == 13_740
    kept = build_method("vpt_shallow", backbone, location="pad", num_tokens=5)
    assert kept.prompts.numel() == 3 * (224**2 - 214**2)
    channels = build_method("vpt_shallow", backbone, location="concat_channel", num_tokens=2)
    assert channels.prompts.numel() + channels.channel_embed.numel() == 2 * 224**2 + stem


@pytest.mark.parametrize(
    ("method", "name"),
    star(
        sorted(METHODS.keys() - {m for m in working("ResNet") if not options(m, "ResNet")}),
        ["resnet", "convnext"],
    ),
)
def test_a_method_that_cannot_enter_says_so(method, name):
    needed = {"lora": "has no linear layer attn.qkv"}.get(
        method, "it needs the site .*, and the backbone offers mod"
    )
    with pytest.raises(UserError, match=needed):
        built(method, name)


class Resized(ResNet):
    pass


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: family(Resized(**BASIC)), "backbone class Resized is not supported"),
        (lambda: ConvNeXtFamily(tiny("resnet")), "backbone class ResNet is not a plain timm ConvNeXt: choose one"),
        (lambda: family(tiny("resnet", global_pool="")), "the backbone has no pooling: set backbone.global_pool to"),
        (lambda: family(tiny("convnext", global_pool="")), "the backbone has no pooling: set backbone.global_pool to"),
        (lambda: family(tiny("convnext", depths=(1, 1, 0, 1))), "stage 2 of the backbone has no blocks: give backbone"),
        (lambda: built("pad", pool="image"), "method.pool=image reads tokens, which this backbone does not have: give"),
        (lambda: built("pad", pool="cls"), "method.pool=cls reads tokens, which this backbone does not have: give"),
        (lambda: built("pad", dropout=0.1), "method.dropout=0.1 is for prompts that are vectors, and those of"),
        (lambda: built("pad", depth=2), "method.location=pad enters before the first block alone: give method.depth=1"),
        (lambda: built("linear")(torch.zeros(1, 1, 64, 64)), r"images must be \[B, 3, height, width\], and these have"),
        (lambda: built("pad")(images(1, 32)), "this method needs images of the backbone's own size 64 x 64 and got 32"),
        (lambda: built("partial").frozen(torch.zeros(1, 3, 64, 96)), "needs square images, and these are 64 x 96"),
        (lambda: built("partial").frozen(torch.zeros(1, 3, 32, 128)), "needs square images, and these are 32 x 128"),
        (lambda: built("partial", num_blocks=6), "method.num_blocks=6 does not fit: give 1 to 5, the"),
        (lambda: merge(built("ssf", "root mean square")), "method ssf cannot be merged into an RmsNorm, which has"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_sentence(build, message):
    with pytest.raises(UserError, match=message):
        build()
