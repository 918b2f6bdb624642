"""Pruning: importance against single images, what is kept exactly, rewinding bit for bit, the table and the picture."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from helpers.tiny import NUM_CLASSES, RECORD, images, tiny_model
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.kind import MULTI_LABEL, SINGLE_LABEL
from visprompt.models.methods.e2vpt import E2VPT
from visprompt.models.tuned_state import TunedState
from visprompt.tuning import pruning
from visprompt.tuning.pruning import Importance, Masks, Point


def classifier(seed=1, kind=SINGLE_LABEL, **options):
    torch.manual_seed(seed)
    backbone = ViT(tiny_model())
    method = E2VPT(backbone, **{"num_tokens": 3, "num_kv_tokens": 2, "num_segments": 8} | options)
    made = Classifier(backbone, method, NUM_CLASSES, kind=kind)
    with torch.no_grad():
        made.method.prompts.mul_(3.0)
    return made


LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1])


def loss_of(made, prompts, image, label):
    """The loss of one image under given prompts, without the code under test."""
    with torch.no_grad():
        before = made.method.prompts.clone()
        made.method.prompts.copy_(prompts)
        loss = F.cross_entropy(made(image[None]).double(), label[None])
        made.method.prompts.copy_(before)
    return loss


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("options", [{}, {"depth": 2}, {"depth": 1, "carry_over": True}])
def test_importance_is_the_mean_absolute_gradient_of_single_images(per_layer, options):
    made = classifier(mask_per_layer=per_layer, dropout=0.5, **options).double()
    x = images(7).double()
    found = pruning.importance(made, [(x[:4], LABELS[:4]), (x[4:], LABELS[4:])])
    assert made.training
    assert made.method.gates is None
    tokens, segments = torch.zeros_like(found.tokens), torch.zeros_like(found.segments)
    made.eval()
    for image, label in zip(x, LABELS, strict=True):
        (gradient,) = torch.autograd.grad(
            F.cross_entropy(made(image[None]), label[None]), made.method.prompts
        )
        gradient = (gradient * made.method.prompts.detach()).double()  # the mask stands before the value
        gradient = gradient if per_layer else gradient.sum(0, keepdim=True)
        tokens += gradient.sum(-1).abs() / 7
        segments += gradient.unflatten(-1, (8, 4)).sum(-1).abs() / 7
    for one, other in ((found.tokens, tokens), (found.segments, segments)):
        assert (one - other).abs().max() <= 1e-5 * other.max()
        assert (one >= 0).all()


def test_importance_agrees_with_finite_differences():
    made = classifier().double().eval()
    x, full = images(2).double(), made.method.prompts.detach().clone()
    found = pruning.importance(made, [(x, LABELS[:2])])
    for token, segment in ((0, None), (2, None), (1, 3), (2, 7)):
        slopes = []
        for image, label in zip(x, LABELS[:2], strict=True):
            step = torch.zeros(3, 32, dtype=torch.float64)
            step[token, slice(None) if segment is None else slice(4 * segment, 4 * segment + 4)] = 1e-4
            up, down = (loss_of(made, full * (1 + sign * step), image, label) for sign in (1, -1))
            slopes.append(abs(up - down) / 2e-4)
        mean = float(sum(slopes) / 2)
        measured = found.tokens[0, token] if segment is None else found.segments[0, token, segment]
        assert float(measured) == pytest.approx(mean, rel=1e-3, abs=1e-7)


def test_images_of_several_classes_have_the_loss_of_their_kind():
    made = classifier(kind=MULTI_LABEL).double().eval()
    x, labels = images(3).double(), (torch.arange(3 * NUM_CLASSES).reshape(3, -1) % 2).double()
    found = pruning.importance(made, [(x, labels)])
    own = []
    for image, label in zip(x, labels, strict=True):
        made.method.gates = torch.ones(1, made.method.depth, 3, 8, dtype=torch.float64, requires_grad=True)
        loss = F.binary_cross_entropy_with_logits(made(image[None]), label[None])
        (gradient,) = torch.autograd.grad(loss, made.method.gates)
        own.append(gradient[0].sum(0).abs())
        made.method.gates = None
    assert torch.allclose(found.segments[0], torch.stack(own).mean(0), rtol=1e-9, atol=0)


def test_a_norm_behind_deep_prompts_leaves_little_of_a_tokens_own_importance():
    """LN(rho P) = LN(P) but for the norm's epsilon; segments, and prompts that flow on, do not have this."""
    found = {}
    for eps in (1e-6, 0.0):
        for options in ({}, {"depth": 1, "carry_over": True}):
            made = classifier(**options).double()
            for block in made.backbone.model.blocks:
                block.norm1.eps = eps
            scores = pruning.importance(made, [(images(7).double(), LABELS)])
            found[eps, len(options)] = (scores.tokens / scores.segments.mean(-1)).max()
    assert found[0.0, 0] < 1e-12 < 1e-8 < found[1e-6, 0] < 1e-2 < found[0.0, 2]


def random_importance(layers=1, tokens=10, segments=16):
    draw = torch.Generator().manual_seed(0)
    return Importance(
        torch.rand(layers, tokens, generator=draw, dtype=torch.float64),
        torch.rand(layers, tokens, segments, generator=draw, dtype=torch.float64),
    )


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("point", [Point(1, 4), Point(3, 8), Point(10, 16), Point(10, 5)])
def test_exactly_the_stated_number_of_the_most_important_is_kept(layers, point):
    found = random_importance(layers)
    masks = pruning.prune(found, point)
    assert masks.tokens.shape == (layers, 10)
    assert masks.segments.shape == (layers, 10, 16)
    for layer in range(layers):
        best = sorted(found.tokens[layer].tolist())[-point.kept_tokens :]
        kept = masks.tokens[layer].nonzero().flatten().tolist()
        assert sorted(found.tokens[layer][kept].tolist()) == best
        for token in range(10):
            left = masks.segments[layer, token].nonzero().flatten().tolist()
            best = (
                sorted(found.segments[layer, token].tolist())[-point.kept_segments :] if token in kept else []
            )
            assert sorted(found.segments[layer, token][left].tolist()) == best


def test_of_equals_the_first_are_kept():
    equal = Importance(torch.ones(1, 5), torch.ones(1, 5, 8))
    masks = pruning.prune(equal, Point(2, 4))
    assert masks.tokens.tolist() == [[True, True, False, False, False]]
    assert masks.segments[0].int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]] * 2 + [[0] * 8] * 3


def test_the_grid_holds_nothing_pruned_last_and_each_point_once():
    nine = list(range(10, 100, 10))
    assert pruning.grid([20, 50, 80], [20, 50, 80], 10, 16)[-1] == Point(10, 16)
    assert pruning.grid([20, 50, 80], [20, 50, 80], 10, 16)[:4] == [
        Point(2, 4),
        Point(2, 8),
        Point(2, 13),
        Point(5, 4),
    ]
    assert len(pruning.grid([20, 50, 80], [20, 50, 80], 10, 16)) == 10 <= 12
    # per cent are rounded down: of 16 segments 80 % and 90 % are both held at 4 that stay
    assert len(pruning.grid(nine, nine, 100, 16)) == 9 * 8 + 1
    assert pruning.grid(nine, nine, 1, 4) == [Point(1, 4)]
    assert {p.kept_tokens for p in pruning.grid(nine, nine, 5, 16)} == {5, 4, 3, 2, 1}
    assert pruning.grid([], [], 5, 16) == [Point(5, 16)]
    assert pruning.grid([0, 90], [0, 90], 5, 2) == [Point(1, 2), Point(5, 2)]


@pytest.mark.parametrize("layers", [1, 4])
def test_masks_go_through_the_options_of_the_method(layers):
    masks = pruning.prune(random_importance(layers, 3, 8), Point(2, 4))
    options = masks.options() | {"num_tokens": 3, "num_segments": 8}
    again = pruning.masks_of(options)
    assert torch.equal(again.tokens, masks.tokens)
    assert torch.equal(again.segments, masks.segments)
    made = classifier(mask_per_layer=layers > 1, **options)
    assert made.method.prompts.shape == (4, 2 * 4 * 4)
    everything = pruning.masks_of({"num_tokens": 3, "num_segments": 8, "token_mask": None}, layers)
    assert (everything.tokens.shape, everything.segments.shape) == ((layers, 3), (layers, 3, 8))
    assert everything.tokens.all()
    assert everything.segments.all()


@pytest.mark.parametrize("point", [Point(2, 4), Point(3, 8)])
def test_masks_per_layer_of_one_prompted_layer_go_through_the_options_too(tmp_path, point):
    options = {"depth": 1, "mask_per_layer": True}
    start = classifier(**options)
    found = pruning.importance(start.double(), [(images(7).double(), LABELS)])
    masks, name = pruning.prune(found, point), stored(start.float(), tmp_path)
    again = classifier(seed=8, initial=name, **options, **masks.options())
    pruning.rewind(again, tmp_path)
    kept = start.method.prompts[0].unflatten(-1, (8, 4))[masks.segments[0]].flatten()
    assert torch.equal(again.method.prompts, kept[None])
    assert again.method.segment_mask.shape == (3, 8)
    once_more = classifier(seed=9, **options, **masks.options())
    once_more.load_tuned_state(again.tuned_state())
    assert torch.equal(once_more.eval()(images()), again.eval()(images()))


def test_importance_goes_through_json_without_loss():
    found = random_importance(2)
    again = Importance.of(found.lists())
    assert torch.equal(again.tokens, found.tokens)
    assert torch.equal(again.segments, found.segments)


def stored(made, folder):
    return pruning.store_initial(folder, TunedState(tensors=made.tuned_state(), **RECORD))


@pytest.mark.parametrize("layers", [0, 1, 4])
def test_rewinding_restores_the_stored_values_bit_for_bit(tmp_path, layers):
    start = classifier()
    before = {n: t.clone() for n, t in start.tuned_state().items()}
    name = stored(start, tmp_path)
    assert pruning.has_initial(tmp_path, name)
    assert stored(start, tmp_path) == name
    assert not pruning.has_initial(tmp_path, "0" * 16)
    options = {}
    if layers:
        options = pruning.prune(random_importance(layers, 3, 8), Point(2, 5)).options() | {
            "mask_per_layer": layers > 1
        }
    again = classifier(seed=8, initial=name, **options)  # another seed: nothing can be right by accident
    pruning.rewind(again, tmp_path)
    found = again.tuned_state()
    kept = before["prompts"]
    if layers:
        mask = again.method.segment_mask.expand(4, 3, 8)
        kept = torch.stack([p.unflatten(-1, (8, 4))[m].flatten() for p, m in zip(kept, mask, strict=True)])
        assert kept.shape == (4, 2 * 5 * 4)
    assert torch.equal(found["prompts"], kept)
    assert all(torch.equal(found[n], before[n]) for n in ("kv_prompts", "head.weight", "head.bias"))


def test_rewinding_leaves_alone_what_names_no_initial_values(tmp_path):
    made = classifier()
    before = made.method.prompts.clone()
    pruning.rewind(made, tmp_path)
    assert torch.equal(made.method.prompts, before)


def test_initial_values_that_are_gone_or_others_are_named(tmp_path):
    name = stored(classifier(), tmp_path)
    other = stored(classifier(seed=2), tmp_path)
    files = tmp_path / "initial"
    (files / f"{other}.safetensors").replace(files / f"{name}.safetensors")
    with pytest.raises(
        UserError, match="holds other initial values than its name says: delete it and run split=tune"
    ):
        pruning.rewind(classifier(initial=name), tmp_path)
    (files / f"{name}.safetensors").unlink()
    with pytest.raises(UserError, match="is missing, which has the initial values of this run"):
        pruning.rewind(classifier(initial=name), tmp_path)


def test_the_table_says_of_every_token_what_is_left():
    masks = Masks(torch.tensor([[True, False]]), torch.tensor([[[1, 1, 0, 1, 0, 0, 1, 1], [0] * 8]]).bool())
    found = Importance(torch.tensor([[0.5, 0.00012345]]), torch.zeros(1, 2, 8))
    assert pruning.table(masks, found).splitlines()[2:] == [
        "| all | 1 | 0.5 | 1-2, 4, 7-8 |",
        "| all | 2 | 0.000123 | pruned |",
    ]
    twice = Masks(masks.tokens.expand(2, 2), masks.segments.expand(2, 2, 8))
    of_each = Importance(torch.tensor([[0.1, 0.2], [0.3, 0.4]]), found.segments)
    assert pruning.table(twice, of_each).splitlines()[2:] == [
        "| 1 | 1 | 0.1 | 1-2, 4, 7-8 |",
        "| 1 | 2 | 0.2 | pruned |",
        "| 2 | 1 | 0.3 | 1-2, 4, 7-8 |",
        "| 2 | 2 | 0.4 | pruned |",
    ]


def pixels(image, colour):
    wanted = np.array(Image.new("RGB", (1, 1), colour))[0, 0]
    return int((np.array(image) == wanted).all(-1).sum())


@pytest.mark.parametrize(("layers", "tokens"), [(1, 5), (12, 10), (1, 100)])
def test_the_picture_shows_each_segment_in_the_colour_of_its_fate(layers, tokens):
    masks = pruning.prune(random_importance(layers, tokens), Point(tokens // 2, 6))
    image = pruning.picture(masks, "digits, e2vpt, seed=1\nof the input prompts")
    cell = {"kept": masks.segments, "token pruned": ~masks.tokens.unsqueeze(-1).expand(masks.segments.shape)}
    cell["segment pruned"] = ~cell["kept"] & ~cell["token pruned"]
    one = {word: pixels(image, pruning.COLOURS[word]) / int(mask.sum()) for word, mask in cell.items()}
    assert max(one.values()) < 1.6 * min(one.values())  # the legend has a little of each
    assert max(image.size) < 3000
