"""Training on plain loaders is training as the equations of its recipe read."""

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

import visprompt
from helpers.tiny import images, relative_error, tiny_model
from visprompt.errors import UserError
from visprompt.models.training_images import plain_batches
from visprompt.models.tuning_module import TuningModule

# Lightning's hints to use worker processes
pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
RECIPE = {
    "optimizer": "sgd",
    "lr": 12.8,
    "weight_decay": 0.0,
    "batch_size": 4,
    "epochs": 2,
    "warmup_epochs": 0,
}


def loader(count=10, batch_size=4, classes=3):
    labels = torch.arange(count) % classes
    return DataLoader(TensorDataset(images(count), labels), batch_size=batch_size)


def built(method="vpt_deep", **options):
    torch.manual_seed(0)
    return visprompt.build(tiny_model(), method, 3, **{"num_tokens": 2, "dropout": 0.0} | options)


def fitted(classifier, train, val=None, **changed):
    return visprompt.fit(classifier, train, val, visprompt.Recipe(**RECIPE | changed), **QUIET)


def test_it_is_sgd_on_the_mean_loss_of_each_batch_with_a_cosine():
    """Ten images in batches of 4, 4 and 2, twice: lr = 12.8 * 4 / 256 = 0.2 at first, momentum 0.9."""
    classifier, naive = built(), built()
    fitted(classifier, loader())
    tuned = dict(naive.tuned_parameters())
    momentum = {name: torch.zeros_like(value) for name, value in tuned.items()}
    step = 0
    for _ in range(2):
        for x, labels in loader():
            loss = F.cross_entropy(naive(x), labels)
            gradients = dict(zip(tuned, torch.autograd.grad(loss, list(tuned.values())), strict=True))
            rate = 0.2 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 6)))
            with torch.no_grad():
                for name, value in tuned.items():
                    momentum[name] = 0.9 * momentum[name] + gradients[name]
                    value -= rate * momentum[name]
            step += 1
    for name, value in classifier.tuned_parameters():
        assert relative_error(value, tuned[name]) < 1e-5, name
    assert not classifier.training


def by_hand(loss_of, lr=12.8):
    """The tuned parameters after two epochs of SGD without momentum on a loss of (classifier, batch)."""
    naive = built()
    tuned = dict(naive.tuned_parameters())
    for epoch in range(2):
        for step, (x, labels) in enumerate(loader()):
            loss = loss_of(naive, x, labels, epoch, step)
            gradients = torch.autograd.grad(loss, list(tuned.values()))
            rate = lr * 4 / 256 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (3 * epoch + step) / 6)))
            with torch.no_grad():
                for value, gradient in zip(tuned.values(), gradients, strict=True):
                    value -= rate * gradient
    return tuned


@pytest.mark.parametrize("weights", ["balanced", [10 / 12, 10 / 9, 10 / 9]])
def test_class_weights_and_smoothing_are_those_of_torchs_loss(weights):
    """Of the ten labels 0, 1, 2, 0, ... four are 0."""
    criterion = torch.nn.CrossEntropyLoss(torch.tensor([10 / 12, 10 / 9, 10 / 9]), label_smoothing=0.1)
    expected = by_hand(lambda model, x, labels, *_: criterion(model(x), labels))
    classifier = built()
    fitted(classifier, loader(), momentum=0.0, class_weights=weights, label_smoothing=0.1)
    for name, value in classifier.tuned_parameters():
        assert relative_error(value, expected[name]) < 1e-5, name


def test_mixup_is_torchvisions():
    def loss(model, x, labels, epoch, step):
        share = float(np.random.default_rng([0, epoch, 2**31 - 1, step]).beta(0.5, 0.5))
        transform = v2.MixUp(num_classes=3)
        transform.make_params = lambda _: {"lam": share}
        mixed, targets = transform(x, labels)
        return F.cross_entropy(model(mixed), targets)

    expected, classifier = by_hand(loss), built()
    fitted(classifier, loader(), momentum=0.0, mixup=0.5)
    for name, value in classifier.tuned_parameters():
        assert relative_error(value, expected[name]) < 1e-5, name


def test_counting_the_classes_leaves_the_order_of_a_shuffling_loader():
    seen = []

    def note(*batch):
        seen.append(batch[1].tolist())

    for weights in ("none", "balanced"):
        torch.manual_seed(3)
        shuffled = DataLoader(loader().dataset, batch_size=4, shuffle=True)
        module = TuningModule(built(), visprompt.Recipe(**RECIPE | {"class_weights": weights}), seed=0)
        module.on_train_batch_start = lambda batch, _: note(*batch)
        options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        L.Trainer(max_epochs=2, **options, **QUIET).fit(module, shuffled)
    assert len(seen) == 12
    assert seen[:6] == seen[6:]


def test_balanced_sampling_is_the_loaders():
    with pytest.raises(
        UserError, match=r"^recipe.sampling=balanced is for .*: give the loader a torch\.utils"
    ):
        fitted(built(), loader(), sampling="balanced")


def test_the_figures_are_those_of_the_last_epoch_on_all_images_of_the_validation_loader():
    classifier, val = built(), loader(7, batch_size=3)
    classifier.temperature = 2.0
    scores = fitted(classifier, loader(), val)
    assert classifier.temperature == 1.0, "that of another state"
    with torch.no_grad():
        logits, labels = classifier(val.dataset.tensors[0]), val.dataset.tensors[1]
    assert scores["val/acc"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert scores["val/loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert scores["val/count"] == 7
    assert fitted(built(), loader()) == {}


def test_a_trainer_of_one_s_own_does_the_same():
    one, other = built(), built()
    fitted(one, loader())
    trainer = L.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_model_summary=False, **QUIET
    )
    trainer.fit(TuningModule(other, visprompt.Recipe(**RECIPE), seed=0), loader())
    for (name, value), (_, expected) in zip(one.tuned_parameters(), other.tuned_parameters(), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vpt_deep", {"init": "patch_sample"}),
        ("da_vpt", {"num_tokens": 1, "guided_tokens": 2, "dropout": None}),
    ],
)
def test_initial_values_come_from_the_training_loader(method, options):
    options = {name: value for name, value in options.items() if value is not None}
    torch.manual_seed(0)
    classifier = visprompt.build(tiny_model(), method, 3, **options)
    before = {name: value.clone() for name, value in classifier.tuned_state().items()}
    fitted(classifier, loader(), lr=0.0)
    changed = {
        name for name, value in classifier.tuned_state().items() if not torch.equal(value, before[name])
    }
    assert changed == ({"prompts"} if method == "vpt_deep" else {"mapping", "centres"} & changed)
    assert changed


def test_images_of_each_class_are_as_many_as_the_method_sees():
    trainer = L.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_model_summary=False, **QUIET
    )
    found = []
    classifier = built()
    module = TuningModule(classifier, visprompt.Recipe(**RECIPE), seed=0)
    module.on_train_start = lambda: found.extend(plain_batches(module._plain_loader(), 2))
    trainer.fit(module, loader())
    labels = torch.cat([labels for _, labels in found])
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(torch.cat([x for x, _ in found]), images(10)[:6])


def test_after_mixed_precision_a_classifier_is_called_as_before():
    classifier = built()
    before = {name: tensor.clone() for name, tensor in classifier.backbone.state_dict().items()}
    visprompt.fit(
        classifier, loader(), None, visprompt.Recipe(**RECIPE), **QUIET | {"precision": "bf16-mixed"}
    )
    after = classifier.backbone.state_dict()
    assert all(after[name].dtype == t.dtype and torch.equal(after[name], t) for name, t in before.items())
    assert classifier(images(2)).isfinite().all()


def test_a_classifier_that_was_tuned_is_tuned_on():
    """What a method computes from training images is computed once, and not over prompts that were tuned."""
    first, again = (built(init="patch_sample") for _ in range(2))
    fitted(first, loader(), lr=0.4)
    tuned = {name: tensor.clone() for name, tensor in first.tuned_state().items()}
    again.load_tuned_state(tuned)
    for classifier in (first, again):
        fitted(classifier, loader(), lr=0.0)
        assert all(torch.equal(tensor, tuned[name]) for name, tensor in classifier.tuned_state().items())


@pytest.mark.parametrize(("size", "accumulated"), [(5, 1), (4, 2)])
def test_a_batch_size_that_is_not_that_of_a_step_is_refused(size, accumulated):
    recipe = visprompt.Recipe(**RECIPE)
    with pytest.raises(
        UserError, match=rf"batch_size=4, .* optimiser step, {size * accumulated}: give the loader's"
    ):
        visprompt.fit(
            built(), loader(batch_size=size), None, recipe, accumulate_grad_batches=accumulated, **QUIET
        )
    half = DataLoader(loader().dataset, batch_size=2)
    visprompt.fit(built(), half, None, recipe, accumulate_grad_batches=2, **QUIET)


def test_a_loader_without_a_batch_is_refused():
    empty = DataLoader(loader(3).dataset, batch_size=4, drop_last=True)
    with pytest.raises(
        UserError, match=r"the training loader has no batch: give more images, or drop_last=False"
    ):
        fitted(built(), empty)


def test_several_devices_are_refused_and_one_is_the_default():
    recipe = visprompt.Recipe(**RECIPE)
    with pytest.raises(UserError) as error:
        visprompt.fit(built(), loader(), None, recipe, devices=2, **QUIET)
    assert str(error.value) == (
        "fit trains on one device, and its options name 2: give devices=1; "
        "`python src/train.py data=folder trainer=ddp` trains on several"
    )
