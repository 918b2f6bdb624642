"""Mixing is torchvision's, and the loss under smoothing and class weights is torch's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import CrossEntropyLoss
from torch.nn import functional as F
from torchvision.transforms import v2

from visprompt.data.datasets import Batch
from visprompt.data.sampler import GlobalBatches
from visprompt.errors import UserError
from visprompt.models.kind import SINGLE_LABEL
from visprompt.models.methods import METHODS, method_class
from visprompt.models.objective import Mix, Objective, check_method, draw_mix
from visprompt.models.recipe import Recipe

CLASSES = 5
BASE = {"optimizer": "sgd", "lr": 1.0, "weight_decay": 0.0, "batch_size": 8, "epochs": 2, "warmup_epochs": 0}


def recipe(**settings):
    return Recipe(**BASE | settings)


def objective(**settings):
    return Objective(recipe(**settings), SINGLE_LABEL, CLASSES, seed=3)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loaded(count=8, seed=0):
    labels = torch.arange(count) * 3 % CLASSES
    return Batch(
        noise(count, 3, 10, 14, seed=seed), labels, torch.arange(count), torch.full((count,), 1 / count)
    )


def of_torchvision(batch, mix):
    """Images and targets [B, C] that torchvision's transform makes of a batch."""
    kind = v2.MixUp if mix.box is None else v2.CutMix
    transform = kind(alpha=1.0, num_classes=CLASSES)
    drawn = {"lam": mix.share} if mix.box is None else {"box": mix.box, "lam_adjusted": mix.share}
    transform.make_params = lambda _: drawn
    return transform(batch.images, batch.labels)


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_images_and_their_loss_are_torchvisions_and_torchs(settings, smoothing):
    one, logits, seen = objective(**settings, label_smoothing=smoothing), noise(8, CLASSES), set()
    for step in range(12):
        batch, partners, mix = one.mixed(loaded(), epoch=1, step=step, paired=False)
        images, targets = of_torchvision(loaded(), mix)
        assert torch.allclose(batch.images, images, atol=1e-6)
        expected = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        assert torch.allclose(one.loss(logits, batch, partners, mix), expected, atol=1e-6)
        top = F.one_hot(logits.argmax(1), CLASSES)
        assert torch.allclose(one.correct(logits, batch, partners, mix), (targets * top).sum(1), atol=1e-6)
        seen.add("mixup" if mix.box is None else "cutmix")
    assert seen == settings.keys()


def test_the_box_of_cutmix_is_torchvisions(monkeypatch):
    for share, x, y in [(0.9, 0, 0), (0.5, 7, 5), (0.1, 13, 9), (0.999, 3, 3), (0.0, 6, 4)]:
        numbers = iter([x, y])
        draw = SimpleNamespace(beta=lambda a, b, share=share: share, integers=lambda most, n=numbers: next(n))
        mine = draw_mix(recipe(cutmix=1.0), draw, 10, 14)
        transform, others = v2.CutMix(num_classes=CLASSES), iter([x, y])
        transform._dist = SimpleNamespace(
            sample=lambda _, share=share: torch.tensor(share, dtype=torch.float64)
        )
        monkeypatch.setattr(torch, "randint", lambda *_, size, n=others: torch.tensor([next(n)]))
        params = transform.make_params([loaded().images])
        monkeypatch.undo()
        assert mine.box == params["box"]
        assert mine.share == pytest.approx(params["lam_adjusted"])


def test_shares_are_of_the_beta_distribution():
    draw = np.random.default_rng(0)
    shares = [draw_mix(recipe(mixup=0.2), draw, 4, 4).share for _ in range(4000)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.02)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.2 + 1)), abs=0.01)


def test_a_paired_batch_is_mixed_as_the_whole_batch_is():
    """Two shares of a batch of eight, each with the image before its first, give what one share gives."""
    one, whole = objective(mixup=0.5, cutmix=0.5), loaded()
    for step in range(4):
        expected, partners, mix = one.mixed(whole, 0, step, paired=False)
        for rows in ([7, 0, 1, 2, 3], [3, 4, 5, 6, 7]):
            part = Batch(*(None if tensor is None else tensor[rows] for tensor in whole))
            batch, labels, drawn = one.mixed(part, 0, step, paired=True)
            assert drawn == mix
            assert torch.equal(batch.images, expected.images[rows[1:]])
            assert torch.equal(batch.labels, whole.labels[rows[1:]])
            assert torch.equal(labels, partners[rows[1:]])
            assert torch.equal(batch.weights, whole.weights[rows[1:]])


def test_draws_depend_on_seed_epoch_and_step():
    def share(seed=3, epoch=1, step=2):
        other = Objective(recipe(mixup=1.0), SINGLE_LABEL, CLASSES, seed)
        return other.mixed(loaded(), epoch, step, paired=False)[2].share

    assert share() == share()
    assert len({share(), share(seed=4), share(epoch=2), share(step=3)}) == 4


def test_without_mixing_a_batch_is_left_alone():
    batch = loaded()
    assert objective().mixed(batch, 0, 0, paired=False) == (batch, batch.labels, None)
    assert Mix(1.0).of(batch.images, batch.images.roll(1, 0)).equal(batch.images)


@given(
    count=st.integers(2, 20),
    world=st.integers(1, 3),
    accumulate=st.integers(1, 2),
    smoothing=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_the_sum_over_devices_is_torchs_weighted_mean(count, world, accumulate, smoothing, seed):
    draw = np.random.default_rng(seed)
    classes = draw.uniform(0.2, 4, CLASSES).astype(np.float32)
    logits, labels = noise(count, CLASSES, seed=seed), torch.from_numpy(draw.integers(0, CLASSES, count))
    one = objective(class_weights=classes.tolist(), label_smoothing=smoothing)
    total, size = 0.0, 30  # one step holds all images
    for rank in range(world):
        batches = GlobalBatches(
            num_rows=count,
            batch_size=size - size % (world * accumulate),
            rank=rank,
            world=world,
            accumulate=accumulate,
            training=True,
            loss_weights=one.image_weights(labels).double().numpy(),
        )
        for tickets in batches:
            rows = torch.tensor([ticket.row for ticket in tickets])
            weights, scales = (torch.tensor([getattr(t, n) for t in tickets]) for n in ("weight", "scale"))
            batch = Batch(torch.zeros(len(rows), 1), labels[rows], rows, weights, scales)
            total += float((one.loss(logits[rows], batch, labels[rows], None) * weights).sum())
    expected = CrossEntropyLoss(torch.from_numpy(classes), label_smoothing=smoothing)(logits, labels)
    assert total / (world * accumulate) == pytest.approx(float(expected), rel=1e-5)


def test_balanced_weights_are_those_of_scikit_learn():
    labels = torch.tensor([0] * 7 + [1] * 2 + [2, 3] + [4] * 5)
    one = objective(class_weights="balanced")
    one.balance(SINGLE_LABEL.counts(labels, CLASSES))
    expected = compute_class_weight("balanced", classes=np.arange(CLASSES), y=labels.numpy())
    assert one.class_weights.numpy() == pytest.approx(expected)
    one.balance(torch.tensor([4, 0, 4, 1, 1]))
    assert one.class_weights.tolist() == pytest.approx([0.5, 2.0, 0.5, 2.0, 2.0])


def test_a_wrong_number_of_weights_is_refused():
    with pytest.raises(
        UserError, match=r"^recipe.class_weights has length 2, but there are 5 classes: give one "
    ):
        objective(class_weights=[1, 2])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mixup": -1}, "recipe.mixup=-1.0 does not fit: give a finite number, 0 or above"),
        ({"cutmix": "yes"}, "recipe.cutmix=yes does not fit: give a finite number, 0 or above"),
        ({"label_smoothing": 1}, "recipe.label_smoothing=1.0 does not fit: give a number from 0 to below 1"),
        ({"sampling": "even"}, "unknown recipe.sampling 'even'"),
        (
            {"class_weights": [1, 0]},
            r"give one of none, balanced or a list with a number above 0 for each class",
        ),
        (
            {"class_weights": "equal"},
            r"give one of none, balanced or a list with a number above 0 for each class",
        ),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(setting, message):
    with pytest.raises(UserError, match=message):
        recipe(**setting)


def test_settings_at_their_defaults_are_left_out_of_the_record():
    plain = recipe().record()
    assert plain.keys() == {*BASE, "head_lr", "momentum", "schedule", "head_init"}
    assert recipe(mixup=0, class_weights="none", sampling="shuffled").record() == plain
    assert recipe(mixup=1, class_weights=[1, 2]).record() == plain | {
        "mixup": 1.0,
        "class_weights": [1.0, 2.0],
    }
    assert Recipe(**recipe(cutmix=1).record()) == recipe(cutmix=1)


def test_a_loss_that_reads_labels_takes_no_recipe_that_changes_how_they_count():
    reading = {name for name in METHODS if method_class(name).reads_labels}
    assert reading == {"da_vpt", "sa2vp"}
    for changed in ({"mixup": 0.2}, {"cutmix": 1}, {"label_smoothing": 0.1}, {"class_weights": "balanced"}):
        (name,) = changed
        check_method(recipe(**changed), method_class("vpt_deep"))
        with pytest.raises(
            UserError, match=rf"^this method's loss reads the classes .* not follow recipe.{name}="
        ):
            check_method(recipe(**changed), method_class("da_vpt"))
    check_method(recipe(sampling="balanced"), method_class("da_vpt"))


def test_every_method_that_compares_images_reads_labels():
    assert all(method_class(m).reads_labels for m in METHODS if method_class(m).compares_images)
