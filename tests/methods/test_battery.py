"""What every method holds on every backbone; a new entry of METHODS is tested here without a line of its own."""

from types import SimpleNamespace

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch.nn import functional as F

from tiny import NUM_CLASSES, images, tiny_classifier, tiny_model
from visprompt.errors import UserError
from visprompt.methods import METHODS, build_method
from visprompt.state import TunedState, load_state, save_state

BACKBONES = {
    "class token": {},
    "average": {"global_pool": "avg", "class_token": False},
    "registers, map": {"reg_tokens": 4, "global_pool": "map", "qk_norm": True, "init_values": 0.5},
    "pre-norm": {"pre_norm": True},
    "parallel blocks": {"block_fn": ParallelScalingBlock},
}

HEAD = {"head.weight": [5, 32], "head.bias": [5]}
# Names and shapes of what is saved, on the tiny ViT. For the methods that tune the backbone, beside all of it.
GOLDEN = {
    "linear": HEAD,
    "full": HEAD,
    "vpt_shallow": {"prompts": [1, 10, 32], **HEAD},
    "vpt_deep": {"prompts": [4, 10, 32], **HEAD},
}

# Tuned parameters without the head on ViT-B/16 (VPT, Jia et al., section 3.2: p * d and L * p * d).
VIT_B = SimpleNamespace(width=768, num_blocks=12, patch_size=16, sites=frozenset({"tokens", "weights"}))
PAPER = [
    ("vpt_shallow", {"num_tokens": 50}, 38_400),
    ("vpt_deep", {"num_tokens": 50}, 460_800),
    ("vpt_deep", {"num_tokens": 100, "depth": 3}, 230_400),
    ("linear", {}, 0),
    ("full", {}, 0),  # it has none of its own: the backbone's are counted where they are
]

every_method = pytest.mark.parametrize("name", METHODS)
every_pair = pytest.mark.parametrize(
    ("name", "options"), [(n, o) for n in METHODS for o in BACKBONES.values()],
    ids=[f"{n}, {o}" for n in METHODS for o in BACKBONES],
)  # fmt: skip


def loss(classifier):
    labels = torch.arange(3) % NUM_CLASSES
    return F.cross_entropy(classifier(images(3)), labels)


@every_pair
def test_exactly_the_tuned_parameters_get_gradients(name, options):
    classifier = tiny_classifier(name, model=tiny_model(**options))
    loss(classifier).backward()
    with_gradient = {n for n, p in classifier.named_parameters() if p.grad is not None}
    assert with_gradient == set(classifier.tuned_names) == {n for n, _ in classifier.tuned_parameters()}
    assert {n for n, p in classifier.named_parameters() if p.requires_grad} == with_gradient
    for n, p in classifier.tuned_parameters():
        assert torch.isfinite(p.grad).all(), n
        assert p.grad.abs().max() > 0, n


@every_pair
def test_a_step_changes_what_is_tuned_and_nothing_else(name, options):
    classifier = tiny_classifier(name, model=tiny_model(**options))
    before = {n: t.clone() for n, t in classifier.state_dict().items()}
    optimizer = torch.optim.SGD([p for _, p in classifier.tuned_parameters()], lr=0.1)
    loss(classifier).backward()
    optimizer.step()
    changed = {n for n, t in classifier.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == set(classifier.tuned_names)


@every_method
def test_a_frozen_backbone_stays_in_evaluation_mode(name):
    classifier = tiny_classifier(name)
    tuned = classifier.method.trains_backbone
    assert tuned == (name == "full")
    for mode in (True, False):
        assert classifier.train(mode) is classifier
        assert {m.training for m in classifier.backbone.modules()} == {mode and tuned}
        assert {m.training for m in classifier.method.modules()} == {mode}
        assert (classifier.training, classifier.head.training) == (mode, mode)
    classifier.train()
    assert classifier.eval().backbone.training is False


def golden(name, classifier):
    backbone = {f"backbone.{n}": list(p.shape) for n, p in classifier.backbone.named_parameters()}
    return GOLDEN[name] | (backbone if classifier.method.trains_backbone else {})


@every_method
def test_names_and_shapes_of_what_is_saved(name):
    classifier = tiny_classifier(name)
    assert {n: list(t.shape) for n, t in classifier.tuned_state().items()} == golden(name, classifier)
    assert list(classifier.tuned_state()) == list(tiny_classifier(name).tuned_state())


@every_pair
def test_what_is_saved_restores_every_bit(tmp_path, name, options):
    """Through a file, into a classifier with other random values, on the same backbone."""
    classifier = tiny_classifier(name, model=tiny_model(**options)).eval()
    with torch.no_grad():
        for _, p in classifier.tuned_parameters():
            p.add_(torch.randn_like(p))
    saved = TunedState(
        tensors=classifier.tuned_state(), method={"name": name}, task="digits", class_names=tuple("abcde"),
        preprocessing={}, backbone={"sha256": ""}, versions={},
    )  # fmt: skip
    save_state(tmp_path / "tuned.safetensors", saved)
    restored = tiny_classifier(name, model=tiny_model(**options)).eval()
    assert not torch.equal(restored(images()), classifier(images()))
    restored.load_tuned_state(load_state(tmp_path).tensors)
    assert restored.tuned_state().keys() == classifier.tuned_state().keys()
    for n, tensor in restored.tuned_state().items():
        assert torch.equal(tensor, classifier.tuned_state()[n]), n
    assert torch.equal(restored(images()), classifier(images()))


@every_method
def test_a_seed_decides_every_initial_value(name):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        backbone = tiny_classifier("linear").backbone
        torch.manual_seed(seed)
        states.append(build_method(name, backbone).state_dict())
    assert all(torch.equal(tensor, states[1][n]) for n, tensor in states[0].items())
    assert not any(torch.equal(tensor, states[2][n]) for n, tensor in states[0].items())


@pytest.mark.parametrize(("name", "options", "count"), PAPER)
def test_counts_are_the_papers(name, options, count):
    method = build_method(name, VIT_B, **options)
    assert sum(p.numel() for p in method.parameters()) == count


@every_method
def test_the_summary_counts_what_is_saved(name):
    classifier = tiny_classifier(name)
    summary = classifier.summary()
    saved = sum(t.numel() for t in classifier.tuned_state().values())
    assert summary.tuned + summary.head == saved
    assert summary.head == 5 * 32 + 5
    assert summary.backbone == sum(p.numel() for p in tiny_model().parameters())


def test_every_method_is_in_the_goldens_and_counted():
    assert set(GOLDEN) == set(METHODS) == {name for name, _, _ in PAPER}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vpt_dep", {}, r"unknown method 'vpt_dep': did you mean vpt_deep\? \(all: full, linear, vpt_deep"),
        ("adapter", {}, "unknown method 'adapter': choose one of full, linear, vpt_deep, vpt_shallow"),
        ("vpt_deep", {"num_token": 3}, "unknown option of method vpt_deep 'num_token': did you mean num_tokens"),
        (
            "vpt_shallow",
            {"lenght": 3},
            "unknown option of method vpt_shallow 'lenght': choose one of carry_over, depth",
        ),
        ("linear", {"num_tokens": 3}, r"unknown option of method linear 'num_tokens': choose one of \(it has none\)"),
        ("full", {"droppath": 0.1}, "unknown option of method full 'droppath': did you mean drop_path"),
    ],
)
def test_unknown_words_name_the_nearest(name, options, message):
    with pytest.raises(UserError, match=message):
        build_method(name, VIT_B, **options)


@pytest.mark.parametrize(("name", "site"), [("vpt_deep", "tokens"), ("vpt_shallow", "tokens"), ("full", "weights")])
def test_a_backbone_without_the_site_is_named(name, site):
    pixels = SimpleNamespace(width=8, num_blocks=1, patch_size=4, sites=frozenset({"pixels"}))
    message = f"method {name} cannot work on this backbone: it needs the site {site}, and the backbone offers pixels"
    with pytest.raises(UserError, match=message):
        build_method(name, pixels)
    assert build_method("linear", pixels).num_blocks == 1


def test_a_word_where_a_number_belongs_is_one_sentence():
    with pytest.raises(UserError, match="method vpt_deep has an option of the wrong kind"):
        build_method("vpt_deep", VIT_B, num_tokens="abc")
