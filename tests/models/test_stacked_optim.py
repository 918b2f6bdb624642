"""The optimisers of a stack take the steps of PyTorch's, each point with its own rate and decay."""

from itertools import product

import pytest
import torch

from visprompt.models.optim import build_optimizer
from visprompt.models.recipe import Recipe
from visprompt.models.stacked_optim import StackedOptimizer

SHAPES = {
    "backbone.model.blocks.3.mlp.weight": (7, 33),
    "method.scale": (5,),
    "head.weight": (9, 33),
    "head.bias": (9,),
}
BASE = {"batch_size": 64, "epochs": 5, "warmup_epochs": 1}


def recipes(**changes):
    pairs = product((0.05, 0.5, 5.0), (0.0, 1e-2) if changes["optimizer"] != "vpt_adamw" else (1e-2,))
    return [Recipe(lr=lr, weight_decay=decay, **BASE | changes) for lr, decay in pairs]


def both(made, clip=None, clip_by="norm", steps=20):
    """Parameters after some steps: of the stack, and of an optimiser for each point; and the rates of each step."""
    torch.manual_seed(0)
    initial = {name: torch.randn(len(made), *shape) for name, shape in SHAPES.items()}
    stacked = {name: tensor.clone().requires_grad_() for name, tensor in initial.items()}
    undecayed = frozenset({"scale"})
    optimizer = StackedOptimizer(stacked, made, 4, undecayed, clip, clip_by)
    singles = []
    for point, recipe in enumerate(made):
        own = {name: torch.nn.Parameter(tensor[point].clone()) for name, tensor in initial.items()}
        singles.append((own, *build_optimizer(own.items(), recipe, 4, undecayed)))
    rates = []
    for _ in range(steps):
        gradients = {name: torch.randn_like(tensor) for name, tensor in stacked.items()}
        for point, (own, single, schedule) in enumerate(singles):
            for name, parameter in own.items():
                parameter.grad = gradients[name][point].clone()
            if clip is not None:
                clips = {"norm": torch.nn.utils.clip_grad_norm_, "value": torch.nn.utils.clip_grad_value_}
                clips[clip_by](own.values(), clip)
            rates.append(single.param_groups[0]["lr"])
            single.step()
            schedule.step()
        optimizer.step(list(gradients.values()))
        assert optimizer.rates.tolist() == rates[-len(made) :]
    return stacked, [own for own, *_ in singles]


@pytest.mark.parametrize("schedule", ["per_step", "per_epoch"])
@pytest.mark.parametrize("head_lr", [None, 0.3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "vpt_adamw"])
def test_every_point_takes_the_steps_of_its_own_optimiser_to_the_bit(optimizer, head_lr, schedule):
    stacked, singles = both(recipes(optimizer=optimizer, head_lr=head_lr, schedule=schedule))
    for point, own in enumerate(singles):
        for name, parameter in own.items():
            assert torch.equal(stacked[name][point], parameter), (optimizer, point, name)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_momentum_is_the_recipes(momentum):
    stacked, singles = both(recipes(optimizer="sgd", momentum=momentum), steps=3)
    for point, own in enumerate(singles):
        assert all(torch.equal(stacked[name][point], parameter) for name, parameter in own.items())


@pytest.mark.parametrize(("clip", "clip_by"), [(0.5, "norm"), (1000.0, "norm"), (0.1, "value")])
def test_the_gradient_of_each_point_is_clipped_by_itself(clip, clip_by):
    stacked, singles = both(recipes(optimizer="sgd"), clip, clip_by)
    for point, own in enumerate(singles):
        for name, parameter in own.items():
            assert torch.allclose(stacked[name][point], parameter, rtol=1e-5, atol=1e-6), (point, name)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "vpt_adamw"])
def test_what_is_not_finite_in_one_point_reaches_no_other(optimizer):
    made = recipes(optimizer=optimizer)
    parameters = {name: torch.ones(len(made), *shape) for name, shape in SHAPES.items()}
    optimizer = StackedOptimizer(parameters, made, 4, clip=1.0)
    gradients = [torch.ones_like(tensor) for tensor in parameters.values()]
    for gradient in gradients:
        gradient[1] = torch.nan
    for _ in range(3):
        optimizer.step(gradients)
    for tensor in parameters.values():
        finite = tensor.isfinite().flatten(1).all(1).tolist()
        assert finite == [point != 1 for point in range(len(made))]
