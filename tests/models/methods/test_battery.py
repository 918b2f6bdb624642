"""What every method holds on every backbone; a new entry of METHODS is tested here without a line of its own.

Names and shapes of what it saves are in tests/golden/tuned_shapes.json, to which `make docs` adds a new
method.
"""

import json

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

import visprompt
from helpers.goldens import SHAPES, shapes
from helpers.tiny import NUM_CLASSES, RECORD, images, mean_loss, relative_error, tiny_classifier, tiny_model
from helpers.wide import REPRESENTATIVES, case, plain_class
from visprompt.errors import UserError
from visprompt.models.backbones import DEMO
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.layers import Wrapped
from visprompt.models.merge import merge
from visprompt.models.methods import METHODS, build_method
from visprompt.models.tuned_state import TunedState, load_state, save_state

BACKBONES = {
    "class token": {},
    "average": {"global_pool": "avg", "class_token": False},
    "registers, map": {"reg_tokens": 4, "global_pool": "map", "qk_norm": True, "init_values": 0.5},
    "pre-norm": {"pre_norm": True},
    "parallel blocks": {"block_fn": ParallelScalingBlock},
}
SITES = {name: ViT(tiny_model(**options)).sites for name, options in BACKBONES.items()}
GOLDEN = json.loads(SHAPES.read_text())
SLOW_STARTERS = {"sidetune"}  # 40 M operations an image: once is enough


def needs(name):
    return plain_class(name).sites


def fits(name, backbone):
    return needs(name) <= SITES[backbone]


PAIRS = [
    (n, b)
    for n in METHODS
    for b in BACKBONES
    if fits(n, b) and not (n in SLOW_STARTERS and b != "class token")
]
every_method = pytest.mark.parametrize("name", METHODS)
# fast: every method on the first backbone; on the others one method of each set of sites, and of tests that
# build two classifiers or two forwards none
every_pair = pytest.mark.parametrize(
    ("name", "backbone"),
    [case(n, b, fast=b == "class token" or n in REPRESENTATIVES, id=f"{n}, {b}") for n, b in PAIRS],
)


every_pair_slowly = pytest.mark.parametrize(
    ("name", "backbone"), [case(n, b, fast=b == "class token", id=f"{n}, {b}") for n, b in PAIRS]
)


def built(name, backbone="class token", **options):
    return tiny_classifier(name, model=tiny_model(**BACKBONES[backbone]), **options)


def loss(classifier):
    labels = torch.arange(3) % NUM_CLASSES
    return mean_loss(classifier, classifier(images(3)), labels)


def buffers(classifier):
    """Names of the buffers of tuned modules, which a step may change and which are saved."""
    tuned = {name.rpartition(".")[0] for name in classifier.tuned_names}
    return {name for name, _ in classifier.named_buffers() if name.rpartition(".")[0] in tuned}


@every_pair
def test_exactly_the_tuned_parameters_get_gradients(name, backbone):
    classifier = built(name, backbone)
    loss(classifier).backward()
    with_gradient = {n for n, p in classifier.named_parameters() if p.grad is not None}
    assert with_gradient == set(classifier.tuned_names) == {n for n, _ in classifier.tuned_parameters()}
    assert {n for n, p in classifier.named_parameters() if p.requires_grad} == with_gradient
    for n, p in classifier.tuned_parameters():
        assert torch.isfinite(p.grad).all(), n
        assert p.grad.abs().max() > 0, n


@every_pair
def test_a_step_changes_what_is_tuned_and_nothing_else(name, backbone):
    classifier = built(name, backbone)
    before = {n: t.clone() for n, t in classifier.state_dict().items()}
    optimizer = torch.optim.SGD([p for _, p in classifier.tuned_parameters()], lr=0.1)
    loss(classifier).backward()
    optimizer.step()
    changed = {n for n, t in classifier.state_dict().items() if not torch.equal(t, before[n])}
    unseen = {n for n in classifier.tuned_names if n.endswith("k_norm.bias")}  # a softmax does not see it
    assert changed - buffers(classifier) - unseen == set(classifier.tuned_names) - unseen


@every_method
def test_a_frozen_backbone_stays_in_evaluation_mode(name):
    classifier = built(name)
    tuned = classifier.method.trains_backbone
    assert tuned or name != "full"
    for mode in (True, False):
        assert classifier.train(mode) is classifier
        assert {m.training for m in classifier.backbone.modules()} == {mode and tuned}
        assert {m.training for m in classifier.method.modules()} == {mode}
        assert (classifier.training, classifier.head.training) == (mode, mode)
    classifier.train()
    assert classifier.eval().backbone.training is False


@every_method
def test_names_and_shapes_of_what_is_saved(name):
    state = built(name).tuned_state()
    assert shapes(name) == GOLDEN.get(name), "run make docs, which adds a method that is new"
    assert any(n.startswith("backbone.") for n in state) == (
        "weights" in needs(name) and name != "da_vpt"  # which tunes biases only with bias=true
    )
    assert list(state) == list(built(name).tuned_state())


def test_every_method_is_in_the_goldens():
    assert set(GOLDEN) == set(METHODS)


@every_pair_slowly
def test_what_is_saved_restores_every_bit(tmp_path, name, backbone):
    """Through a file, into a classifier with other random values, on the same backbone."""
    classifier = built(name, backbone).eval()
    with torch.no_grad():
        for _, p in classifier.tuned_parameters():
            p.add_(0.1 * torch.randn_like(p))
    saved = TunedState(tensors=classifier.tuned_state(), **RECORD | {"method": {"name": name}})
    save_state(tmp_path / "tuned.safetensors", saved)
    restored = built(name, backbone).eval()
    assert not torch.equal(restored(images()), classifier(images()))
    restored.load_tuned_state(load_state(tmp_path).tensors)
    assert restored.tuned_state().keys() == classifier.tuned_state().keys()
    for n, tensor in restored.tuned_state().items():
        assert torch.equal(tensor, classifier.tuned_state()[n]), n
    assert torch.equal(restored(images()), classifier(images()))


@every_pair_slowly
def test_the_frozen_part_may_be_computed_once(name, backbone):
    """Nothing below the first block is tuned, and going on from there gives the same logits."""
    classifier = built(name, backbone).eval()
    first = classifier.method.first_block
    below = [f"backbone.model.blocks.{i}." for i in range(first)]
    below += (
        ["backbone.model.patch_embed", "backbone.model.pos_embed", "backbone.model.cls_token"]
        if first
        else []
    )
    assert not [n for n in classifier.tuned_names if n.startswith(tuple(below))] or not below
    assert classifier.has_frozen_part == (first > 0)
    if first:
        frozen = classifier.frozen(images())
        assert not frozen.requires_grad
        assert relative_error(classifier(frozen), classifier(images())) < 1e-5


@every_method
def test_a_seed_decides_every_initial_value(name):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        backbone = built("linear").backbone
        torch.manual_seed(seed)
        classifier = Classifier(backbone, build_method(name, backbone), NUM_CLASSES)
        states.append(
            {n: t.clone() for n, t in classifier.tuned_state().items() if not n.startswith("backbone.")}
        )
    assert all(torch.equal(tensor, states[1][n]) for n, tensor in states[0].items())
    drawn = {n for n, tensor in states[0].items() if not torch.equal(tensor, states[2][n])}
    assert "head.weight" in drawn
    own = {n for n, tensor in states[0].items() if not n.startswith("head.") and tensor.unique().numel() > 9}
    assert own <= drawn, "what looks drawn follows the seed"


@every_method
def test_the_summary_counts_what_is_saved(name):
    classifier = built(name)
    summary = classifier.summary()
    saved = classifier.tuned_state()
    assert summary.tuned + summary.head == sum(p.numel() for _, p in classifier.tuned_parameters())
    assert sum(summary.parts.values()) == summary.tuned + summary.head
    assert set(summary.parts) <= set(saved)
    assert summary.bytes == sum(t.nbytes for t in saved.values())
    assert summary.backbone == sum(p.numel() for p in tiny_model().parameters())
    assert summary.macs >= built("linear").summary().macs


@every_pair_slowly
def test_bf16_stays_near_float32(name, backbone):
    classifier = built(name, backbone).eval()
    exact = classifier(images())
    with torch.autocast("cpu", torch.bfloat16):
        logits = classifier(images())
    assert torch.isfinite(logits).all()
    assert relative_error(logits, exact) < 0.2


@pytest.mark.parametrize(("name", "backbone"), [(n, b) for n in METHODS for b in BACKBONES if not fits(n, b)])
def test_a_pair_that_cannot_work_says_so(name, backbone):
    model = ViT(tiny_model(**BACKBONES[backbone]))
    missing = ", ".join(sorted(needs(name) - SITES[backbone]))
    message = (
        f"method {name} cannot work on this backbone: it needs the site {missing}, and the backbone offers"
    )
    with pytest.raises(UserError, match=message):
        build_method(name, model)


@every_method
def test_the_public_call_needs_no_more_than_names(name):
    torch.manual_seed(0)
    model = tiny_model()
    plain = model(images())
    classifier = visprompt.build(model, name, 7)
    assert classifier(images()).shape == (2, 7)
    other = visprompt.build(tiny_model(), name, 7)
    other.load_tuned_state(classifier.tuned_state())
    assert torch.equal(other.eval()(images()), classifier.eval()(images()))
    if classifier.method.can_merge:
        merged = merge(classifier)
        assert type(merged) is type(model)
        assert relative_error(merged(images()), classifier(images())) < 1e-5
    assert plain.shape == (2, 32)


@every_method
def test_a_model_may_be_given_again(name):
    """Methods wrap and freeze layers.

    What one did must not be seen by the next, nor by the user's own model.
    """
    model = tiny_model()
    own = {n: t.clone() for n, t in model.state_dict().items()}
    first = visprompt.build(model, name, 5)
    with torch.no_grad():
        for _, parameter in first.tuned_parameters():
            parameter.add_(1.0)
    tuned = set(first.tuned_names)
    second = visprompt.build(model, "linear", 5)
    assert torch.equal(
        second.features(images()), visprompt.build(tiny_model(), "linear", 5).features(images())
    )
    assert {n for n, p in first.named_parameters() if p.requires_grad} == tuned
    assert all(torch.equal(t, own[n]) for n, t in model.state_dict().items())


@every_method
@pytest.mark.parametrize("part", ["backbone", "backbone.model"])
def test_a_model_in_which_a_method_lives_is_refused_until_it_is_merged(name, part):
    """Else the next method would be tuned on top of what neither its state nor its names tell of."""
    first = visprompt.build(tiny_model(), name, 5)
    model = first.get_submodule(part)
    if not any(isinstance(module, Wrapped) for module in model.modules()):
        assert visprompt.build(model, "vpt_deep", 3)(images()).shape == (2, 3)
        return
    message = (
        r"^this model still has a layer of another method, \S+: build from a new model, or from one that"
    )
    with pytest.raises(UserError, match=message):
        visprompt.build(model, "vpt_deep", 3)
    if first.method.can_merge:
        assert visprompt.build(merge(first), "vpt_deep", 3)(images()).shape == (2, 3)


def test_a_model_that_sees_further_channels_is_refused():
    first = visprompt.build(tiny_model(), "vpt_shallow", 5, location="concat_channel")
    with pytest.raises(
        UserError, match=r"still has a layer of another method, patch_embed\.proj: build from a new"
    ):
        visprompt.build(first.backbone.model, "linear", 3)


@every_method
def test_dropout_in_attentions_keeps_no_method_out(name):
    """timm's models come in training mode; a frozen backbone is never in it."""
    model = tiny_model(attn_drop_rate=0.1).train()
    classifier = visprompt.build(model, name, 5)
    assert model.training
    assert classifier.backbone.sites == ViT(tiny_model()).sites
    assert classifier.backbone.carried_blocks() == ([0, 1, 2, 3] if classifier.method.trains_backbone else [])
    assert torch.isfinite(classifier(images())).all()


@every_method
def test_a_backbone_in_16_bits_takes_a_method_in_32(name):
    classifier = visprompt.build(tiny_model().bfloat16(), name, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(classifier(images().bfloat16())).all()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(("vpt_deep", (3, 32, 32)), ("vpt_deep", (3, 32)), ("linear", (3, 17, 32)), ("partial", (3, 32))),
        *(("linear", (3, 1, 32, 32)), ("sidetune", (3, 4, 32, 32))),
    ],
)
def test_what_is_no_batch_of_images_is_refused(name, shape):
    with pytest.raises(
        UserError, match=r"images must be \[B, 3, height, width\], and these have the shape \(3, "
    ):
        built(name)(torch.zeros(*shape))


@pytest.mark.parametrize("name", ["convpass", "vapt", "sa2vp"])
@pytest.mark.parametrize("shape", [(16, 64), (48, 48)])
def test_methods_of_one_grid_refuse_other_images(name, shape):
    classifier = tiny_classifier(name, model=tiny_model(dynamic_img_size=True))
    with pytest.raises(
        UserError, match=rf"needs images of the backbone's own size 32 x 32 and got {shape[0]} x"
    ):
        classifier(torch.zeros(1, 3, *shape))


@pytest.mark.slow
@every_method
def test_a_compiled_classifier_gives_the_same_logits(name):
    """Its graph is captured whole, and once.

    The code that a compiler would make of it is tested for one method elsewhere. Two blocks, because tracing
    takes seconds.
    """
    classifier = tiny_classifier(name, model=tiny_model(depth=2)).eval()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(classifier, backend="aot_eager", fullgraph=True)
    for x in (images(3), images(2)):
        expected = classifier(x)
        torch._dynamo.maybe_mark_dynamic(x, 0)  # as `models.compiled` does
        assert relative_error(compiled(x), expected) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "also for a short batch"


def test_a_model_that_is_not_a_plain_vit_is_refused():
    with pytest.raises(
        UserError, match="backbone class Linear is not supported: choose a model of one of Vision"
    ):
        visprompt.build(nn.Linear(2, 2), "linear", 3)


@pytest.mark.parametrize(
    ("name", "why"), [("vapt", "from the second block on"), ("vpt_gated", "between blocks")]
)
def test_a_method_that_needs_two_blocks_says_so(name, why):
    with pytest.raises(
        UserError, match=f"method {name} cannot work on this backbone: .*{why}, and there is only one"
    ):
        visprompt.build(tiny_model(depth=1), name, 3)


def test_a_named_backbone_says_what_images_are_normalised_with():
    backbone = visprompt.build(DEMO, "linear", 3).backbone
    assert (backbone.mean, backbone.std) == ((0.5,) * 3, (0.5,) * 3)
    assert visprompt.build(tiny_model(), "linear", 3).backbone.mean is None
    imagenet = timm.create_model("test_vit", num_classes=3)
    assert visprompt.build(imagenet, "linear", 3).backbone.mean == imagenet.pretrained_cfg["mean"]
