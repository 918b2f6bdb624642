"""Learning rates and weight decays: scaled, warmed up, decayed and grouped as the paper does."""

import math

import pytest
import torch
from torch import nn

from helpers.tiny import tiny_classifier
from visprompt.errors import UserError
from visprompt.models.optim import VPTAdamW, build_optimizer, param_groups, poly, scaled_lr, warmup_cosine
from visprompt.models.recipe import Recipe

BASE = {
    "optimizer": "sgd",
    "lr": 0.5,
    "weight_decay": 0.01,
    "batch_size": 64,
    "epochs": 10,
    "warmup_epochs": 2,
}


def recipe(**changes):
    return Recipe(**BASE | changes)


@pytest.mark.parametrize(
    ("base", "batch", "lr"), [(0.1, 256, 0.1), (0.5, 64, 0.125), (1.0, 512, 2.0), (50.0, 128, 25.0)]
)
def test_the_learning_rate_is_that_of_256_images(base, batch, lr):
    assert scaled_lr(base, batch) == lr


def test_warm_up_is_linear_and_reaches_the_rate_at_its_end():
    factor = warmup_cosine(total_steps=100, warmup_steps=4)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_the_decay_is_half_a_cosine_to_zero_one_step_behind_the_last():
    factor = warmup_cosine(total_steps=100, warmup_steps=20)
    assert factor(20) == 1.0
    assert factor(40) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert factor(60) == pytest.approx(0.5)
    assert 0 < factor(99) < 0.001
    assert factor(100) == pytest.approx(0.0)
    falling = [factor(step) for step in range(20, 101)]
    assert falling == sorted(falling, reverse=True)


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert warmup_cosine(total_steps=10, warmup_steps=0)(0) == 1.0
    assert warmup_cosine(total_steps=1, warmup_steps=0)(0) == 1.0


def named(groups, classifier):
    """Names of each group, with its settings."""
    names = {id(p): n for n, p in classifier.named_parameters()}
    return [({names[id(p)] for p in group["params"]}, group["lr"], group["weight_decay"]) for group in groups]


def test_the_last_bias_is_not_decayed_and_the_head_may_have_a_rate_of_its_own():
    classifier = tiny_classifier("vpt_deep")
    own = param_groups(classifier.tuned_parameters(), lr=0.1, head_lr=0.01, weight_decay=0.5)
    assert named(own, classifier) == [
        ({"method.prompts"}, 0.1, 0.5),
        ({"head.weight"}, 0.01, 0.5),
        ({"head.bias"}, 0.01, 0.0),
    ]
    same = param_groups(classifier.tuned_parameters(), lr=0.1, head_lr=None, weight_decay=0.5)
    assert named(same, classifier) == [
        ({"method.prompts", "head.weight"}, 0.1, 0.5),
        ({"head.bias"}, 0.1, 0.0),
    ]
    (alone,) = param_groups(classifier.tuned_parameters(), lr=0.1, head_lr=0.1, weight_decay=0.0)
    assert len(alone["params"]) == 3


def test_a_head_rate_of_zero_is_a_rate():
    classifier = tiny_classifier("vpt_deep")
    groups = param_groups(classifier.tuned_parameters(), lr=0.1, head_lr=0.0, weight_decay=0.0)
    assert [(names, lr) for names, lr, _ in named(groups, classifier)] == [
        ({"method.prompts"}, 0.1),
        ({"head.weight", "head.bias"}, 0.0),
    ]


@pytest.mark.parametrize("name", ["linear", "vpt_deep", "full"])
def test_every_tuned_parameter_is_in_one_group(name):
    classifier = tiny_classifier(name)
    groups = param_groups(classifier.tuned_parameters(), lr=0.1, head_lr=0.2, weight_decay=0.3)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for _, p in classifier.tuned_parameters())


@pytest.mark.parametrize(("optimizer", "cls"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_the_optimiser_is_scaled_and_its_schedule_runs_by_steps(optimizer, cls):
    classifier = tiny_classifier("vpt_deep")
    parameters = list(classifier.tuned_parameters())
    built, schedule = build_optimizer(
        parameters, recipe(optimizer=optimizer, head_lr=0.25), steps_per_epoch=5
    )
    assert type(built) is cls
    assert built.defaults.get("momentum", 0.9) == 0.9
    assert [group["initial_lr"] for group in built.param_groups] == [0.125, 0.0625, 0.0625]
    assert [group["weight_decay"] for group in built.param_groups] == [0.01, 0.01, 0.0]
    factor, rates = warmup_cosine(total_steps=50, warmup_steps=10), []
    for _ in range(50):
        rates.append(built.param_groups[0]["lr"])
        built.step()
        schedule.step()
    assert rates == pytest.approx([0.125 * factor(step) for step in range(50)])
    assert rates[9] == max(rates) == 0.125


def test_a_step_of_sgd_is_what_its_definition_says():
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    plain = recipe(lr=1.0, batch_size=128, weight_decay=0.1, momentum=0.5, warmup_epochs=0)
    optimizer, _ = build_optimizer([("method.prompts", parameter)], plain, steps_per_epoch=1)
    value, velocity = 2.0, 0.0
    for _ in range(3):
        parameter.grad = torch.tensor([1.0])
        optimizer.step()
        velocity = 0.5 * velocity + 1.0 + 0.1 * value
        value -= 0.5 * velocity
    assert parameter.item() == pytest.approx(value)


def rates(recipe, steps_per_epoch):
    """The learning rate of every step that a recipe takes."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer, schedule = build_optimizer([("head.weight", parameter)], recipe, steps_per_epoch)
    found = []
    for _ in range(recipe.epochs * steps_per_epoch):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_per_epoch_the_rate_is_that_of_the_released_code():
    """Ten epochs with a warm-up of four, written out by hand.

    The first is at 0, the fifth at the whole rate.
    """
    half_cosine = [math.cos(math.pi * i / 12) ** 2 for i in range(6)]  # of the six epochs behind the warm-up
    expected = [0.0, 0.25, 0.5, 0.75, *half_cosine]
    found = rates(recipe(lr=4.0, epochs=10, warmup_epochs=4, schedule="per_epoch"), 3)
    assert found == pytest.approx([rate for rate in expected for _ in range(3)])


def test_the_sum_of_the_rates_of_100_epochs_is_that_of_the_released_code():
    """Measured there at a rate of 1.25, over epochs of 16 steps.

    62.50, and 62.58 where the rate changes per step.
    """
    usual = {"lr": 5.0, "batch_size": 64, "epochs": 100, "warmup_epochs": 10}
    sums = {name: sum(rates(recipe(**usual, schedule=name), 16)) / 16 for name in ("per_epoch", "per_step")}
    assert sums == {"per_epoch": pytest.approx(62.50, abs=0.005), "per_step": pytest.approx(62.58, abs=0.005)}


def test_per_epoch_without_warm_up_begins_at_the_whole_rate():
    assert rates(recipe(lr=4.0, epochs=2, warmup_epochs=0, schedule="per_epoch"), 2) == pytest.approx(
        [1, 1, 0.5, 0.5]
    )


def test_vpt_s_adamw_takes_the_steps_of_its_definition():
    """Number by number; two groups, of which one is decayed by 0.01 whatever the recipe says, and eps is 1e-6."""
    parameters = {
        name: torch.nn.Parameter(torch.tensor([2.0, -1e-3])) for name in ("method.prompts", "a.bias")
    }
    own = recipe(optimizer="vpt_adamw", lr=0.4, batch_size=128, weight_decay=0.0001, warmup_epochs=0)
    optimizer, _ = build_optimizer(parameters.items(), own, steps_per_epoch=1)
    expected = {name: [2.0, -1e-3] for name in parameters}
    moments = {name: [[0.0, 0.0], [0.0, 0.0]] for name in parameters}
    for step, gradient in enumerate(([1.0, 1e-6], [-0.5, 3e-6], [2.0, 0.0]), start=1):
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradient)
            for i, g in enumerate(gradient):
                first, second = moments[name]
                first[i] = 0.9 * first[i] + 0.1 * g
                second[i] = 0.999 * second[i] + 0.001 * g * g
                rate = 0.2 * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
                value = expected[name][i] - rate * first[i] / (math.sqrt(second[i]) + 1e-6)
                expected[name][i] = value - 0.2 * (0.01 if name == "method.prompts" else 0.0) * value
        assert optimizer.step(lambda: 3.5) == 3.5
    for name, parameter in parameters.items():
        assert parameter.tolist() == pytest.approx(expected[name], rel=1e-5), name


def test_vpt_s_adamw_spares_every_name_with_bias_and_is_sgd_without_a_decay():
    classifier = tiny_classifier("full")
    optimizer, _ = build_optimizer(
        classifier.tuned_parameters(), recipe(optimizer="vpt_adamw"), steps_per_epoch=1
    )
    assert type(optimizer) is VPTAdamW
    for names, _, decay in named(optimizer.param_groups, classifier):
        assert {("bias" in name) for name in names} == {decay == 0.0}
        assert decay in (0.0, 0.01)
    assert len(optimizer.param_groups) == 2
    plain, _ = build_optimizer(
        classifier.tuned_parameters(), recipe(optimizer="vpt_adamw", weight_decay=0.0), steps_per_epoch=1
    )
    assert type(plain) is torch.optim.SGD
    assert [(group["momentum"], group["weight_decay"]) for group in plain.param_groups] == [(0.9, 0.0)]


def test_a_recipe_records_the_decay_that_vpt_s_adamw_takes():
    decays = [
        recipe(optimizer="vpt_adamw", weight_decay=given).weight_decay for given in (0.0, 0.0001, 0.01, 0.5)
    ]
    assert decays == [0.0, 0.01, 0.01, 0.01]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_fused_optimiser_takes_the_same_steps_up_to_rounding(optimizer):
    tuned = []
    for fused in (False, True):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 50))
        own = recipe(optimizer=optimizer, fused=fused, warmup_epochs=0, weight_decay=0.01)
        built, _ = build_optimizer([("method.prompts", parameter)], own, steps_per_epoch=8)
        assert bool(built.defaults["fused"]) is fused
        for step in range(5):
            parameter.grad = torch.sin(step + torch.arange(50.0))
            built.step()
        tuned.append(parameter.detach())
    assert tuned[1].tolist() == pytest.approx(tuned[0].tolist(), rel=1e-5)


def test_a_recipe_records_fused_only_where_it_is_on():
    assert "fused" not in recipe().record()
    assert recipe(fused=True).record()["fused"] is True
    with pytest.raises(UserError) as error:
        recipe(optimizer="vpt_adamw", fused=True)
    assert str(error.value) == (
        "recipe.fused=true has no effect on recipe.optimizer=vpt_adamw, which is not PyTorch's: give "
        "recipe.optimizer=adamw, or leave it out"
    )


def test_part_of_an_epoch_may_be_warm_up():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer, _ = build_optimizer([("head.bias", parameter)], recipe(warmup_epochs=0.5), steps_per_epoch=8)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.125 / 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sdg"}, r"unknown recipe\.optimizer 'sdg': did you mean sgd"),
        ({"schedule": "epoch"}, r"unknown recipe\.schedule 'epoch': did you mean per_epoch"),
        (
            {"schedule": "per_epoch", "epochs": 1, "warmup_epochs": 0.5},
            r"^recipe\.schedule=per_epoch trains the first epoch of a warm-up at a learning rate of 0, and "
            r"recipe",
        ),
        ({"head_init": "zero"}, r"unknown recipe\.head_init 'zero': did you mean zeros"),
        ({"epochs": 0}, r"recipe\.epochs=0 does not fit: give a whole number, 1 or more"),
        ({"epochs": 2.5}, r"recipe\.epochs=2\.5 does not fit"),
        ({"lr": True}, r"recipe\.lr=true does not fit"),
        ({"batch_size": 0}, r"recipe\.batch_size=0 does not fit: give a whole number, 1 or more"),
        ({"warmup_epochs": 10}, r"recipe\.warmup_epochs=10 does not fit: give 0 to below recipe\.epochs=10"),
        ({"warmup_epochs": -0.5}, r"recipe\.warmup_epochs=-0\.5 does not fit"),
        ({"lr": -0.1}, r"recipe\.lr=-0\.1 does not fit: give a finite number, 0 or above"),
        ({"lr": math.nan}, r"recipe\.lr=nan does not fit"),
        ({"head_lr": math.inf}, r"recipe\.head_lr=inf does not fit"),
        ({"weight_decay": -1.0}, r"recipe\.weight_decay=-1\.0 does not fit"),
        ({"momentum": -1.0}, r"recipe\.momentum=-1\.0 does not fit"),
        ({"lr": 10**400}, r"recipe\.lr=10+ does not fit: give a finite number"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        recipe(**changes)


def test_a_recipe_is_plain_and_frozen():
    assert (recipe().momentum, recipe().head_lr, recipe().head_init) == (0.9, None, "vpt")
    with pytest.raises(ValueError, match="Instance is frozen"):
        recipe().lr = 1.0


def test_a_warm_up_that_fills_a_run_of_few_steps_is_refused():
    one = recipe(warmup_epochs=5, epochs=20, max_steps=30)
    with pytest.raises(UserError, match=r"warmup_epochs=5 takes 50 steps, and training ends after 30"):
        build_optimizer([("head.bias", nn.Parameter(torch.zeros(1)))], one, 10)


def test_poly_is_mmsegmentations_for_each_group():
    one = recipe(
        schedule="poly", warmup_epochs=0, epochs=20, max_steps=100, lr=0.256, head_lr=2.56, batch_size=1
    )
    parameters = [(name, nn.Parameter(torch.zeros(1))) for name in ("method.prompts", "head.weight")]
    optimizer, schedule = build_optimizer(parameters, one, 10)
    seen = []
    for _ in range(101):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    for step in (0, 37, 99, 100):
        left = (1 - step / 100) ** 0.9
        expected = [(base - 1e-4) * left + 1e-4 for base in (1e-3, 1e-2)]
        assert seen[step] == pytest.approx(expected), step
    assert poly(100, 5e-5)(60) == 1, "a rate below the least one stays"


def test_max_steps_is_refused_with_a_schedule_of_whole_epochs():
    with pytest.raises(UserError, match=r"recipe\.max_steps ends training within an epoch"):
        recipe(schedule="per_epoch", warmup_epochs=0, max_steps=5)
    with pytest.raises(UserError, match=r"recipe\.schedule=poly has no warm-up"):
        recipe(schedule="poly", warmup_epochs=1)
