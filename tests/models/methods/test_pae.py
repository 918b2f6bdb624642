"""PAE: first prompts from windows of frequencies, and the two terms of the loss, written out as they read."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.cli import frozen, tiny_run
from helpers.tiny import VIT_B_SIZE, geometry, images, naive_features, relative_error, tiny_model, worst_error
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.methods import METHODS
from visprompt.models.methods.describe import build, member
from visprompt.models.methods.pae import IMAGES, PAE
from visprompt.runs import run

TINY, VIT_B = geometry(), geometry(**VIT_B_SIZE)
LABELS = torch.arange(6) % 5
EVEN = torch.full((6,), 1 / 6)
SMALL = {"num_tokens": 3, "koopman_dim": 8, "dropout": 0.0}


def classifier(seed=1, model=None, **options):
    torch.manual_seed(seed)
    backbone = ViT(tiny_model() if model is None else model)
    made = Classifier(backbone, PAE(backbone, **SMALL | options), 5)
    with torch.no_grad():
        made.method.prompts.normal_()
        for name, parameter in made.method.named_parameters():
            if name != "prompts":
                parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def gradients(model, loss):
    names, parameters = zip(*model.tuned_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def clipped(found):
    """Gradients, those of the operators clipped together."""
    operators = [gradient for name, gradient in found.items() if "koopman" in name or "lyapunov" in name]
    norm = torch.cat([gradient.flatten() for gradient in operators]).norm()
    for gradient in operators:
        gradient *= min(1, 10 / float(norm + 1e-6))
    return found, float(norm)


def bowl(z, lyapunov):
    """V of one vector."""
    q = lyapunov.T @ lyapunov
    q = q / torch.linalg.matrix_norm(q, 2)
    z = z if z.norm() <= 1 else z / z.norm()
    return z @ q @ z


def naive_terms(method):
    """Both terms, pair by pair and prompt by prompt."""
    koopman, lyapunov, pairs = 0.0, 0.0, zip(method.prompts[1:-1], method.prompts[2:], strict=True)
    for own, following in pairs:
        distances, growths = [], []
        for p, n in zip(own, following, strict=True):
            z, target = method.koopman_in.weight @ p, method.koopman_in.weight @ n
            evolved = z @ method.koopman
            distances.append((evolved - target).square().mean())
            if method.lyapunov_weight:
                growths.append((1 + (bowl(evolved, method.lyapunov) - bowl(z, method.lyapunov)).exp()).log())
        koopman = koopman + sum(distances) / len(distances)
        if growths:
            lyapunov = lyapunov + 10 * torch.tanh(sum(growths) / len(growths) / 10)
    return method.koopman_weight * koopman, method.lyapunov_weight * lyapunov


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"koopman_weight": 0.0},
        {"lyapunov_weight": 0.0},
        {"koopman_weight": 3.0, "lyapunov_weight": 7.0, "koopman_dim": 40},
    ],
)
@pytest.mark.parametrize("size", [0.01, 1.0])
def test_logits_loss_and_gradients_are_those_of_the_equations(options, size):
    """With vectors shorter and longer than 1."""
    model = classifier(**options)
    with torch.no_grad():
        model.method.prompts.mul_(size)
    logits = model(images(6))
    loss = (model.losses(logits, LABELS, EVEN) * EVEN).sum()
    expected = model.head(naive_features(model.backbone.model, images(6), model.method.prompts, 0, False))
    whole = F.cross_entropy(expected, LABELS) + sum(naive_terms(model.method))
    assert relative_error(logits, expected) < 1e-5
    assert abs(loss - whole) < 1e-5 * abs(whole)
    wanted, norm = clipped(gradients(model, whole))
    assert worst_error(gradients(model, loss), wanted) < 1e-5
    if size == 1 and "koopman_dim" in options:
        assert norm > 10


def test_without_weights_it_is_deep_prompts():
    model = classifier(koopman_weight=0.0, lyapunov_weight=0.0)
    logits = model(images(6))
    assert torch.equal(model.losses(logits, LABELS, EVEN), F.cross_entropy(logits, LABELS, reduction="none"))
    assert set(model.tuned_state()) == {"prompts", "head.weight", "head.bias"}


def filtered(x, top, left, side):
    """Images of the frequencies of one window, by the definition of the transform."""
    size = x.shape[-1]
    grid = torch.arange(size, dtype=torch.float64)
    transform = torch.exp(-2j * math.pi * torch.outer(grid, grid) / size)
    spectrum = transform @ x.to(torch.complex128) @ transform
    kept = torch.zeros_like(spectrum)
    for i in range(top, top + side):
        for j in range(left, left + side):
            row, column = (i - size // 2) % size, (j - size // 2) % size  # the mean is in the middle
            kept[..., row, column] = spectrum[..., row, column]
    inverse = transform.conj() / size
    return (inverse @ kept @ inverse).real.float()


def naive_start(model, x, labels, side, stride):
    """The prompts of all blocks, and the window of each."""
    vit, method = model.backbone.model, model.method
    none = torch.zeros_like(method.prompts)
    scores = []
    for top in range(0, x.shape[-1] - side + 1, stride):
        for left in range(0, x.shape[-1] - side + 1, stride):
            seen = filtered(x, top, left, side)
            logits = model.head(naive_features(vit, seen, none, 0, False))
            scores.append((float(F.cross_entropy(logits, labels)), top, left))
    scores.sort()
    prompts, prefix = [], vit.num_prefix_tokens
    for _, top, left in scores[: none.shape[1]]:
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(filtered(x, top, left, side))))[:, prefix:]
        energies = tokens.norm(dim=-1) ** 2
        prompts.append(torch.einsum("bn,bnd->d", energies / energies.sum(), tokens))
    blocks = [torch.stack(prompts)]
    for block in vit.blocks[:-1]:
        blocks.append(block(blocks[-1][None])[0])
    return torch.stack(blocks), scores


@pytest.mark.parametrize("kind", [{}, {"reg_tokens": 4}, {"global_pool": "avg", "class_token": False}])
@pytest.mark.parametrize(("side", "stride"), [(16, 8), (5, 9)])
def test_the_first_prompts_are_of_the_windows_of_least_loss(kind, side, stride):
    model = classifier(model=tiny_model(**kind), window=side, stride=stride, dropout=0.5)
    with torch.no_grad():
        expected, scores = naive_start(model, images(6), LABELS, side, stride)
    assert scores[2][0] + 1e-4 < scores[3][0], "no tie decides"
    halves = zip(images(6).split(3), LABELS.split(3), strict=True)
    model.method.see_classes(model.backbone, halves, seed=0)
    for own, wanted in zip(model.method.prompts, expected, strict=True):
        assert relative_error(own, wanted) < 1e-5
    assert model.method.prompts.requires_grad
    assert model.method.training


def test_the_chosen_windows_tell_the_classes_best():
    """What the paper promises of them: two classes that differ in one frequency, and a head that reads it."""
    model = classifier(num_tokens=1, window=8, stride=8, koopman_weight=0.0, lyapunov_weight=0.0)
    wave = torch.cos(2 * math.pi * 6 * torch.arange(32) / 32).expand(3, 32, 32)
    other = torch.cos(2 * math.pi * 3 * torch.arange(32) / 32)[:, None].expand(3, 32, 32)
    labels = torch.tensor([0, 1] * 4)
    x = torch.where(labels[:, None, None, None] == 0, wave, -wave) + torch.randn(8, 1, 1, 1) * other
    with torch.no_grad():
        none = torch.zeros_like(model.method.prompts)
        seen = naive_features(model.backbone.model, filtered(x, 16, 16, 8), none, 0, False)
        direction = seen[labels == 0].mean(0) - seen[labels == 1].mean(0)
        model.head.weight.zero_()
        model.head.weight[0] = direction
        model.head.bias.copy_(torch.tensor([-float(direction @ seen.mean(0)), 0, -9, -9, -9]))
        _, scores = naive_start(model, x, labels, 8, 8)
    # columns 6 to the right and to the left of the middle hold the wave
    assert scores[0][1:] in ((16, 16), (16, 8))
    model.method.see_classes(model.backbone, [(x, labels)], seed=0)
    vit = model.backbone.model
    tokens = vit.patch_embed(filtered(x, *scores[0][1:], 8)) + vit.pos_embed[:, 1:]
    energies = tokens.square().sum(-1, keepdim=True)
    assert relative_error(model.method.prompts[0, 0], (energies * tokens).sum((0, 1)) / energies.sum()) < 1e-5


def test_only_the_first_images_count_and_nothing_is_drawn():
    x, labels = images(IMAGES + 10), torch.arange(IMAGES + 10) % 5
    starts = []
    for given, seed in ((x, 1), (x[:IMAGES], 2)):
        model = classifier(seed=3, window=16, stride=16)
        model.method.see_classes(model.backbone, zip(given.split(50), labels.split(50), strict=False), seed)
        starts.append(model.method.prompts.detach().clone())
    assert torch.equal(*starts)


def test_descent_makes_prompts_evolve_by_one_operator():
    """What the paper promises of the loss: each block's prompts are a linear map of the last's."""
    model = classifier(koopman_weight=1.0, lyapunov_weight=1.0)
    optimizer = torch.optim.SGD([p for n, p in model.tuned_parameters() if n.startswith("method.")], lr=0.05)
    before = [float(term.detach()) for term in naive_terms(model.method)]
    for _ in range(100):
        optimizer.zero_grad()
        model.method.losses(torch.zeros(1), model.head, LABELS[:1], torch.ones(1)).sum().backward()
        optimizer.step()
    after = [float(term.detach()) for term in naive_terms(model.method)]
    assert after[0] < 0.2 * before[0]
    assert after[1] < before[1]


def test_the_first_block_is_in_no_pair():
    model = classifier()
    loss = model.losses(model(images(6)), LABELS, EVEN).mean() - F.cross_entropy(model(images(6)), LABELS)
    (gradient,) = torch.autograd.grad(loss, model.method.prompts)
    assert gradient[0].abs().max() < 1e-6
    assert (gradient[1:].abs().amax(dim=(1, 2)) > 1e-3).all()


def test_parts_of_a_batch_add_up():
    model = classifier()
    whole = model.losses(model(images(6)), LABELS, EVEN)
    added = 0.0
    for rows in (slice(0, 4), slice(4, 6)):
        added += (model.losses(model(images(6)[rows]), LABELS[rows], EVEN[rows]) * EVEN[rows]).sum()
    assert added.item() == pytest.approx((whole * EVEN).sum().item(), rel=1e-5)


def test_the_loss_is_in_float32_under_autocast():
    model = classifier()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(model(images(6)), LABELS, EVEN)
    assert losses.dtype == torch.float32
    cross_entropy = F.cross_entropy(model(images(6)), LABELS, reduction="none")
    assert relative_error((losses - cross_entropy).mean(), sum(naive_terms(model.method))) < 0.05


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"num_tokens": 20}, 12 * 20 * 768 + 768 * 256 + 2 * 256**2),
        ({"num_tokens": 20, "lyapunov_weight": 0.0}, 12 * 20 * 768 + 768 * 256 + 256**2),
        ({"num_tokens": 20, "koopman_weight": 0.0, "koopman_dim": 16}, 12 * 20 * 768 + 768 * 16 + 2 * 16**2),
        ({"num_tokens": 5, "koopman_weight": 0.0, "lyapunov_weight": 0.0}, 12 * 5 * 768),
    ],
)
def test_counts_on_vit_b(options, count):
    assert sum(p.numel() for p in PAE(VIT_B, **options).parameters()) == count


def test_operators_start_from_the_identity():
    torch.manual_seed(0)
    method = PAE(VIT_B)
    assert torch.equal(method.koopman, torch.eye(256))
    assert torch.equal(method.lyapunov, torch.eye(256))
    bound = 1 / math.sqrt(768)
    assert 0.999 * bound < method.koopman_in.weight.abs().max() <= bound
    torch.manual_seed(0)
    drawn = METHODS["vpt_deep"](VIT_B, num_tokens=10).prompts
    assert torch.equal(method.prompts, drawn), "until the images are seen"
    value = method.losses(torch.zeros(1), nn.Identity(), LABELS[:1], torch.ones(1))
    value.sum().backward()
    assert value.isfinite()
    assert all(p.grad.isfinite().all() for p in method.parameters())
    growth = 10 * 10 * math.tanh(math.log(2) / 10)  # ten pairs, in which nothing grows
    steps = (drawn[1:-1] - drawn[2:]) @ method.koopman_in.weight.T
    wanted = 0.5 * steps.square().mean(dim=(1, 2)).sum() + 0.2 * growth
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_what_is_saved():
    keys = {"prompts", "koopman_in.weight", "koopman", "head.weight", "head.bias"}
    assert set(classifier().tuned_state()) == keys | {"lyapunov"}
    assert set(classifier(lyapunov_weight=0.0).tuned_state()) == keys


def test_a_prediction_reads_the_prompts_alone():
    model = classifier().eval()
    before = model(images())
    with torch.no_grad():
        for parameter in (model.method.koopman, model.method.lyapunov, model.method.koopman_in.weight):
            parameter.fill_(7)
    assert torch.equal(model(images()), before)


@pytest.mark.parametrize("family", ["EVA-02", "DINOv3"])
def test_prompts_alone_have_no_positions(family):
    model = build(member(family), "pae", 5, num_tokens=3, window=16, stride=8, koopman_dim=8)
    side = int(model.backbone.image_size)
    model.method.see_classes(model.backbone, [(images(6, side), LABELS)], seed=0)
    prompts = model.method.prompts
    assert prompts.isfinite().all()
    with torch.no_grad():
        for block, own, following in zip(model.backbone.model.blocks, prompts, prompts[1:], strict=False):
            assert relative_error(block(own[None])[0], following) < 1e-5


def test_a_backbone_in_16_bits_gives_first_prompts():
    model = classifier(model=tiny_model().bfloat16())
    model.method.see_classes(model.backbone, [(images(6), LABELS)], seed=0)
    assert model.method.prompts.dtype == torch.float32
    assert model.method.prompts.isfinite().all()


@frozen
def test_a_run_makes_its_prompts_of_training_images(tmp_path, monkeypatch):
    seen, original = [], PAE.see_classes

    def note(self, backbone, batches, seed):
        original(self, backbone, batches, seed)
        seen.append(self.prompts.detach().clone())

    monkeypatch.setattr(PAE, "see_classes", note)
    options = ("method=pae", "method.num_tokens=2", "method.stride=24", "recipe.epochs=2")
    result = run.run_job(tiny_run(tmp_path, *options))
    assert result.status == "finished"
    assert len(seen) == 1
    assert seen[0].abs().max() > 0
    run.run_job(tiny_run(tmp_path / "random", *options, "method.init=random"))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "method.num_tokens=0 is too small"),
        ({"dropout": 1.5}, "method.dropout=1.5 is not a probability"),
        ({"window": 0}, "method.window=0 is too small: give at least 1"),
        ({"stride": 0}, "method.stride=0 is too small: give at least 1"),
        ({"koopman_dim": 0}, "method.koopman_dim=0 is too small: give at least 1"),
        ({"koopman_weight": -1.0}, "method.koopman_weight=-1.0 is too small: give at least 0"),
        ({"lyapunov_weight": -0.5}, "method.lyapunov_weight=-0.5 is too small: give at least 0"),
        ({"init": "mpa"}, "unknown method.init 'mpa'"),
    ],
)
def test_options_out_of_range_are_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        PAE(TINY, **options)


def test_two_blocks_have_no_pair():
    method = PAE(geometry(num_blocks=2))
    assert [name for name, _ in method.named_parameters()] == ["prompts"]
    assert torch.equal(method.losses(torch.ones(1), nn.Identity(), LABELS[:1], torch.ones(1)), torch.ones(1))


TOO_FEW = [({"num_tokens": 10}, 9), ({"window": 40}, 0), ({"stride": 99}, 1)]


@pytest.mark.parametrize(("options", "windows"), TOO_FEW)
def test_too_few_windows_are_one_sentence(options, windows):
    model = classifier(**options)
    message = rf"needs as many windows of frequencies, and images of 32 x 32 have {windows} with"
    with pytest.raises(UserError, match=message):
        model.method.see_classes(model.backbone, [(images(6), LABELS)], seed=0)


def test_a_head_of_zeros_compares_nothing():
    backbone = ViT(tiny_model())
    message = r"with recipe\.head_init=zeros all windows have the same: give recipe\.head_init=vpt, or method\.init=r"
    with pytest.raises(UserError, match=message):
        Classifier(backbone, PAE(backbone), 5, "zeros")
    assert Classifier(backbone, PAE(backbone, init="random"), 5, "zeros")(images()).shape == (2, 5)
