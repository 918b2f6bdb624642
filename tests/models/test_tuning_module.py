"""The LightningModule: its loss, its figures, its noise, and frozen features that are computed once."""

import math
import shutil
from collections import OrderedDict

import pytest
import torch
from torch.nn import functional as F

from helpers import miniatures
from helpers.cli import equal, frozen, tensors, tiny_run
from helpers.tiny import images, measured, tiny_classifier, worst_error
from helpers.wide import case, slow
from visprompt.data.datasets import Batch
from visprompt.models import feature_cache as kept_outputs
from visprompt.models.backbones.vit import ViT
from visprompt.models.epoch_sums import NEVER
from visprompt.models.kind import accuracies
from visprompt.models.recipe import Recipe
from visprompt.models.task_kind import Mean
from visprompt.models.tuning_module import TuningModule
from visprompt.runs import run

pytestmark = frozen
RECIPE = Recipe(optimizer="adamw", lr=0.1, weight_decay=0.0, batch_size=4, epochs=1, warmup_epochs=0)
# of tuned tensors after 48 steps: sums in another order leave 2e-6. (Not of all parameters under AdamW: it
# makes full steps of gradients that are nothing but rounding, as those of the keys' biases.)
ROUNDING = 2e-5
OPTIONS = {
    "prompts, AdamW": (),
    "prompts, SGD": ("recipe.optimizer=sgd",),
    "all, SGD": ("method=full", "method.drop_path=0", "recipe.lr=0.5", "recipe.optimizer=sgd"),
}


def module(**options):
    return TuningModule(tiny_classifier(**options), RECIPE, seed=7)


def batch(count=4, weights=None):
    weights = torch.full((count,), 1 / count) if weights is None else torch.tensor(weights)
    return Batch(images(count), torch.arange(count) % 5, torch.arange(count), weights)


def test_accuracies_of_a_confusion_matrix_counted_by_hand():
    confusion = torch.tensor([[3, 1, 0, 0], [0, 0, 0, 0], [2, 0, 2, 0], [0, 0, 0, 2]])
    assert accuracies(confusion) == {
        "acc": 7 / 10,
        "balanced_acc": pytest.approx((3 / 4 + 2 / 4 + 2 / 2) / 3),
        "per_class": [0.75, None, 0.5, 1.0],
        "count": 10,
    }


def test_the_state_is_what_was_tuned_and_loads_strictly():
    one, other = module(num_tokens=2), module(num_tokens=2)
    state = {name: torch.randn_like(tensor) for name, tensor in one.state_dict().items()}
    assert set(state) == {"prompts", "head.weight", "head.bias"}
    other.load_state_dict(state)
    assert equal(other.state_dict(), state)
    del state["head.bias"]
    with pytest.raises(Exception, match=r"lacks \['head.bias'\]"):
        other.load_state_dict(state)


def test_the_loss_is_the_weighted_sum_and_rows_of_no_weight_do_not_count(monkeypatch):
    one = module(num_tokens=2, dropout=0.0)
    monkeypatch.setattr(TuningModule, "global_step", 5)
    given = batch(weights=[0.5, 0.25, 0.25, 0.0])
    logits = one.classifier(given.images)
    losses = F.cross_entropy(logits, given.labels, reduction="none")
    assert float(one.training_step(given, 0).detach()) == pytest.approx(
        float((losses * given.weights).sum().detach())
    )
    bad_step, loss, correct, images = one._epoch.read()
    assert (bad_step, images) == (NEVER, 3)
    assert loss == pytest.approx(float(losses[:3].sum().detach()))
    assert correct == int((logits.argmax(1) == given.labels)[:3].sum())


@pytest.mark.parametrize("stage", ["validation", "test"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
def test_a_filler_is_not_scored(stage, weights):
    one = module(num_tokens=2, dropout=0.0)
    given = batch(weights=weights)
    with torch.no_grad():
        getattr(one, f"{stage}_step")(given, 0)
        said = one.classifier(given.images).argmax(1)
    short = {"validation": "val"}.get(stage, stage)
    figures = getattr(one, f"{short}_figures").compute()
    assert figures["count"] == sum(weights)
    share = float((said == given.labels)[: int(sum(weights))].double().mean())
    assert figures["acc"] == pytest.approx(share, nan_ok=True)
    assert float(getattr(one, f"{short}_loss").weight) == sum(weights)


def test_the_first_step_whose_loss_is_not_finite_is_kept(monkeypatch):
    one = module(num_tokens=2)
    for step, value in [(0, 1.0), (1, float("nan")), (2, 1.0), (3, float("inf"))]:
        monkeypatch.setattr(TuningModule, "global_step", step)
        given = batch()
        one.training_step(given._replace(images=given.images * value), 0)
    assert one._epoch.read()[0] == 1


def test_noise_is_drawn_from_seed_epoch_and_rank(monkeypatch):
    def draw(seed, epoch, rank):
        monkeypatch.setattr(TuningModule, "current_epoch", epoch)
        monkeypatch.setattr(TuningModule, "global_rank", rank)
        one = module(num_tokens=2)
        one.seed = seed
        torch.manual_seed(123)
        one.on_train_epoch_start()
        return float(torch.rand(()))

    cases = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({draw(*case) for case in cases}) == 4
    assert draw(0, 1, 0) == draw(0, 1, 0)


def trained(folder, *options):
    one = tiny_run(folder, *options)
    return one, run.run_job(one)


# fast: the first, the default of the demo; every case trains twice
@pytest.mark.parametrize(
    "options", [case(OPTIONS[name], fast=name == "prompts, AdamW", id=name) for name in OPTIONS]
)
def test_accumulation_changes_the_result_by_rounding_only(tmp_path, options, monkeypatch):
    micro = []
    original = TuningModule.training_step

    def count(self, given, index):
        micro.append(len(given.labels))
        return original(self, given, index)

    monkeypatch.setattr(TuningModule, "training_step", count)
    one, result = trained(tmp_path / "1", *options)
    assert micro == [*[64] * 15, 40] * 3
    micro.clear()
    four, accumulated = trained(tmp_path / "4", *options, "trainer.accumulate_grad_batches=4")
    assert micro == [*[16] * 60, *[10] * 4] * 3, "the short last batch is dealt as well"
    assert accumulated.machine["accumulation"] == 4
    assert result.metrics["train/loss"] == pytest.approx(accumulated.metrics["train/loss"], rel=1e-4)
    a, b = tensors(one.folder), tensors(four.folder)
    assert worst_error(a, b) < ROUNDING


@pytest.fixture
def seen(monkeypatch):
    """Counts the images that pass the backbone."""
    images, original = [], ViT.forward
    monkeypatch.setattr(kept_outputs, "_outputs", OrderedDict())  # of an earlier test

    def forward(self, batch, method):
        if batch.any():  # not the blank image whose operations are counted
            images.append(len(batch))
        return original(self, batch, method)

    monkeypatch.setattr(ViT, "forward", forward)
    return images


@pytest.mark.parametrize(("split", "trained_on", "scored"), [("final", 1000, 797), slow("tune", 800, 200)])
def test_frozen_features_are_computed_once_and_change_nothing(
    tmp_path, monkeypatch, seen, split, trained_on, scored
):
    options = ("method=linear", f"split={split}", "recipe.lr=0.4")
    one, cached = trained(tmp_path / "cached", *options)
    assert sum(seen) == trained_on + scored
    seen.clear()
    monkeypatch.setattr(TuningModule, "on_fit_start", lambda self: None)
    two, plain = trained(tmp_path / "plain", *options)
    # val thrice, and once for the temperature
    assert sum(seen) == 3 * trained_on + (797 if split == "final" else 4 * 200)
    assert worst_error(tensors(one.folder), tensors(two.folder)) < 1e-5
    assert cached.metrics == pytest.approx(plain.metrics, rel=1e-5)
    assert cached.score > 0.2


def test_features_of_augmented_images_are_not_kept(tmp_path, seen):
    root = miniatures.write_folder(tmp_path / "pets", per_class=5)
    folders = ("data=folder", f"data.root={root}", f"paths.data_dir={tmp_path}/data", "recipe.batch_size=4")
    trained(tmp_path / "augmented", "method=linear", *folders)
    assert sum(seen) == 3 * (6 + 2) + 2 + 2, (
        "three of a class's five images and one of val, thrice; one of val for the temperature, and one of test"
    )
    seen.clear()
    trained(tmp_path / "not", "method=linear", *folders, "data.crop=false", "data.flip=0")
    assert sum(seen) == 6 + 2 + 2
    seen.clear()
    trained(tmp_path / "mixed", "method=linear", *folders, "data.crop=false", "data.flip=0", "recipe.mixup=1")
    assert sum(seen) == 3 * 6 + 2 + 2, "mixing changes pixels; those of val stay as they are"


def test_the_mean_lets_what_is_not_finite_through():
    mean = Mean()
    mean.update(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 3.0, 0.0]))
    assert float(mean.compute()) == 7 / 4
    mean.update(torch.tensor([math.nan]), torch.tensor([1.0]))
    assert math.isnan(mean.compute())


def test_the_learning_rate_follows_optimiser_steps_whatever_the_accumulation(tmp_path, monkeypatch):
    rates, original = {1: [], 4: []}, TuningModule.training_step
    for accumulate, found in rates.items():

        def note(self, given, index, found=found):
            found.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return original(self, given, index)

        monkeypatch.setattr(TuningModule, "training_step", note)
        options = (
            "recipe.batch_size=200",
            f"trainer.accumulate_grad_batches={accumulate}",
            f"tags=[by{accumulate}]",
        )
        trained(tmp_path / str(accumulate), *options)
    peak = 0.4 * 200 / 256
    warm_up = [peak * (step + 1) / 5 for step in range(5)]
    expected = warm_up + [peak * 0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert rates[1] == pytest.approx(expected)
    assert rates[4] == pytest.approx([rate for rate in expected for _ in range(4)])


@pytest.mark.slow
def test_a_classifier_that_is_captured_has_the_same_logits_gradients_and_names():
    torch._dynamo.reset()
    one, two = (tiny_classifier(num_tokens=3, dropout=0.0) for _ in range(2))
    two.compile(backend="aot_eager")
    assert list(one.state_dict()) == list(two.state_dict()), "in place: no name changes"
    for count in (4, 3):  # a short last batch is captured anew
        x = images(count)
        assert worst_error(measured(two, two(x)), measured(one, one(x))) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compiled_run_gives_the_same_numbers(tmp_path):
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.fail("compile=true on a CPU needs a C++ compiler, and there is none: install g++")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    short = ("+trainer.limit_train_batches=5", "+trainer.limit_test_batches=3")
    one, plain = trained(tmp_path / "plain", *short)
    assert not torch._dynamo.utils.counters["inductor"]
    two, fast = trained(tmp_path / "compiled", *short, "compile=true")
    assert torch._dynamo.utils.counters["inductor"], "something was compiled"
    assert one.folder.name == two.folder.name
    assert worst_error(tensors(one.folder), tensors(two.folder)) < ROUNDING
    assert fast.metrics["test/acc"] == pytest.approx(plain.metrics["test/acc"], abs=1 / 192)
