"""The only place where a learning rate is scaled, warmed up or decayed, and where a weight decay is grouped.

VPT (Jia et al., ECCV 2022, appendix A): lr = base * batch / 256, linear warm-up, cosine decay to zero, SGD with
momentum 0.9 for heads and prompts, AdamW for methods that tune the backbone; the last layer's bias is not decayed.
"""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from visprompt.errors import UserError, unknown
from visprompt.methods.base import HEAD_INITS

OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the tuned parameters are trained.

    Attributes:
        optimizer: One of `OPTIMIZERS`.
        lr: Base learning rate, for a batch of 256.
        head_lr: Base learning rate of the head; None means `lr`.
        weight_decay: Weight decay of everything but the head's bias.
        momentum: Momentum of SGD.
        batch_size: Images of one optimiser step, over all devices and accumulation steps.
        epochs: Passes over the training images.
        warmup_epochs: Epochs of linear warm-up, fewer than `epochs`.
        head_init: One of `HEAD_INITS`.

    Raises:
        UserError: A number lies outside its range or the optimiser is unknown.
    """

    optimizer: str
    lr: float
    head_lr: float | None = None
    weight_decay: float
    momentum: float = 0.9
    batch_size: int
    epochs: int
    warmup_epochs: float
    head_init: str = "vpt"

    def __post_init__(self) -> None:
        if self.head_init not in HEAD_INITS:
            raise unknown("recipe.head_init", self.head_init, HEAD_INITS)
        if self.optimizer not in OPTIMIZERS:
            raise unknown("recipe.optimizer", self.optimizer, OPTIMIZERS)
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"recipe.{name}={value} does not fit: give a whole number, 1 or more")
        for name in ("lr", "head_lr", "weight_decay", "momentum", "warmup_epochs"):
            value = getattr(self, name)
            if value is None and name == "head_lr":
                continue
            if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
                raise UserError(f"recipe.{name}={value} does not fit: give a finite number, 0 or above")
        if self.warmup_epochs >= self.epochs:
            raise UserError(
                f"recipe.warmup_epochs={self.warmup_epochs:g} does not fit: give 0 to below recipe.epochs={self.epochs}"
            )


def scaled_lr(base: float, batch_size: int) -> float:
    """Learning rate of a global batch: base * batch_size / 256."""
    return base * batch_size / 256


def param_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    head_lr: float | None,
    weight_decay: float,
    undecayed: frozenset[str] = frozenset(),
) -> list[dict[str, object]]:
    """Groups tuned parameters by learning rate and weight decay.

    Args:
        parameters: Names and parameters that are tuned.
        lr: Learning rate of everything but the head, already scaled.
        head_lr: Learning rate of the head, already scaled; None means `lr`.
        weight_decay: Weight decay of all but the head's last bias and what is named next.
        undecayed: Parameters of the method, or groups of them, that are not decayed (`Method.undecayed`).

    Returns:
        Groups for a torch optimiser, none of them empty, in a fixed order.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        rate = head_lr if head_lr is not None and name.startswith("head.") else lr
        own = name.removeprefix("method.").partition(".")[0]
        spared = name == "head.bias" or (name.startswith("method.") and own in undecayed)
        decay = 0.0 if spared else weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def warmup_cosine(total_steps: int, warmup_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate after a number of optimiser steps.

    Args:
        total_steps: Optimiser steps of the whole run.
        warmup_steps: Steps of linear warm-up, fewer than `total_steps`.

    Returns:
        step -> factor: (step + 1) / warmup_steps while warming up, then half a cosine that would reach 0 at
        `total_steps`, one step after the last.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return factor


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    recipe: Recipe,
    steps_per_epoch: int,
    undecayed: frozenset[str] = frozenset(),
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Builds the optimiser and its schedule, which is stepped after every optimiser step.

    Args:
        parameters: Names and parameters that are tuned.
        recipe: How they are tuned.
        steps_per_epoch: Optimiser steps of an epoch.
        undecayed: See `param_groups`.

    Returns:
        Optimiser and scheduler.
    """
    lr = scaled_lr(recipe.lr, recipe.batch_size)
    head_lr = None if recipe.head_lr is None else scaled_lr(recipe.head_lr, recipe.batch_size)
    groups = param_groups(parameters, lr, head_lr, recipe.weight_decay, undecayed)
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=recipe.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, lr=lr)
    schedule = warmup_cosine(recipe.epochs * steps_per_epoch, round(recipe.warmup_epochs * steps_per_epoch))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
