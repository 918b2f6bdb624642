"""The settings of training: typed and checked here, applied in `optim`."""

import sys
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from visprompt.errors import (
    NULL,
    SWITCH,
    Allowed,
    UserError,
    is_finite,
    list_of,
    number,
    one_of,
    sentence,
    unknown,
)

OPTIMIZERS = ("sgd", "adamw", "vpt_adamw")
SCHEDULES = ("per_step", "per_epoch", "poly")
HEADS = ("linear", "setr_pup")
HEAD_INITS = ("vpt", "zeros", "normal")
SAMPLINGS = ("shuffled", "balanced")
WEIGHINGS = ("none", "balanced")
VPT_DECAY = 0.01  # weight decay of vpt_adamw for every setting above 0
_NUMBER = number("a finite number, 0 or above", lambda value: value >= 0)
_COUNT = Allowed("a whole number, 1 or more", lambda value: type(value) is int and value >= 1)
_SHARE = number("a number from 0 to below 1", lambda value: 0 <= value < 1)
_WEIGHTS = one_of(*WEIGHINGS) | list_of(
    number("", lambda value: value > 0), "a list with a number above 0 for each class"
)
_WORDS = {
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "head": HEADS,
    "head_init": HEAD_INITS,
    "sampling": SAMPLINGS,
}
_RATES = ("lr", "head_lr", "weight_decay", "momentum", "mixup", "cutmix", "label_smoothing")
ADDED_LATER = (
    "mixup",
    "cutmix",
    "label_smoothing",
    "class_weights",
    "sampling",
    "fused",
    "head",
    "max_steps",
)
"""Settings that records of older versions lack, and that `Recipe.record` leaves out at their defaults."""


class Recipe(BaseModel):
    """How the tuned parameters are trained.

    Attributes:
        optimizer: One of `OPTIMIZERS`.
        lr: Base learning rate, for a batch of 256.
        head_lr: Base learning rate of the head; None means `lr`.
        weight_decay: Weight decay of everything but the head's bias. With `vpt_adamw` any value above 0
            becomes 0.01, and 0 selects SGD with momentum.
        momentum: Momentum of SGD.
        batch_size: Images of one optimiser step, summed over devices and accumulation steps.
        epochs: Passes over the training images.
        warmup_epochs: Epochs of linear warm-up, fewer than `epochs`.
        schedule: One of `SCHEDULES`: "per_step" and "per_epoch" say when the learning rate changes by a
            cosine, "poly" is mmsegmentation's polynomial (see `optim.poly`), without a warm-up.
        head_init: One of `HEAD_INITS`.
        head: One of `HEADS`, the head of a segmentation task; other tasks have only "linear".
        max_steps: Optimiser steps after which training ends, even if not all `epochs` are over; None for no
            such limit.
        mixup: Alpha of the Beta distribution from which mixup draws the share of each image in a step; 0 is
            no mixup.
        cutmix: The same for cutmix. If both are above 0, each step draws which of them it takes.
        label_smoothing: Share of the target that is spread over all classes.
        class_weights: Weights of the classes in the loss, as `torch.nn.CrossEntropyLoss` has them: "none",
            "balanced" (images / (classes * images of the class)), or a list with a number for each class.
        sampling: "shuffled": an epoch has each image once; "balanced": it draws as many images with
            replacement, each class with equal probability.
        fused: Whether the optimiser updates all parameters in one pass, on devices where PyTorch can (CPU,
            CUDA, MPS). It is faster and rounds differently.

    Raises:
        UserError: A number lies outside its range, or a word is unknown.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    optimizer: str
    lr: Annotated[float, _NUMBER.type]
    head_lr: Annotated[float | None, Allowed(_NUMBER.words, (_NUMBER | NULL).fits).type] = None
    weight_decay: Annotated[float, _NUMBER.type]
    momentum: Annotated[float, _NUMBER.type] = 0.9
    batch_size: Annotated[int, _COUNT.type]
    epochs: Annotated[int, _COUNT.type]
    warmup_epochs: Annotated[float, _NUMBER.type]
    schedule: str = "per_step"
    head_init: str = "vpt"
    mixup: Annotated[float, _NUMBER.type] = 0.0
    cutmix: Annotated[float, _NUMBER.type] = 0.0
    label_smoothing: Annotated[float, _SHARE.type] = 0.0
    class_weights: Annotated[str | list[float], _WEIGHTS.type] = "none"
    sampling: str = "shuffled"
    fused: Annotated[bool, SWITCH.type] = False
    head: str = "linear"
    max_steps: Annotated[int | None, Allowed(_COUNT.words, (_COUNT | NULL).fits).type] = None

    def __init__(self, **values: Any) -> None:
        for key in values.keys() - type(self).model_fields.keys():
            raise unknown("key of recipe", key, type(self).model_fields)
        # as floats, because 1 and 1.0 should be the same run
        values |= {
            name: float(values[name])
            for name in _RATES
            if type(values.get(name)) is int and is_finite(values[name])
        }
        if isinstance(weights := values.get("class_weights"), list | tuple) and all(map(is_finite, weights)):
            values["class_weights"] = [float(weight) for weight in weights]
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise sentence(error, "recipe.") from None

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        for name, choices in _WORDS.items():
            if getattr(self, name) not in choices:
                raise unknown(f"recipe.{name}", getattr(self, name), choices)
        if self.warmup_epochs >= self.epochs:
            raise UserError(
                f"recipe.warmup_epochs={self.warmup_epochs:g} does not fit: give 0 to below "
                f"recipe.epochs={self.epochs}"
            )
        if self.schedule == "per_epoch" and self.epochs == 1 and self.warmup_epochs:
            raise UserError(
                "recipe.schedule=per_epoch trains the first epoch of a warm-up at a learning rate of 0, and "
                "recipe.epochs=1 has no other: give recipe.warmup_epochs=0 or recipe.schedule=per_step"
            )
        if self.schedule == "poly" and self.warmup_epochs:
            raise UserError("recipe.schedule=poly has no warm-up: give recipe.warmup_epochs=0")
        if self.max_steps and self.schedule == "per_epoch":
            raise UserError(
                "recipe.max_steps ends training within an epoch, and recipe.schedule=per_epoch counts whole "
                "ones: give recipe.schedule=per_step or poly"
            )
        if self.fused and not self.uses_sgd and self.optimizer == "vpt_adamw":
            raise UserError(
                "recipe.fused=true has no effect on recipe.optimizer=vpt_adamw, which is not PyTorch's: give "
                "recipe.optimizer=adamw, or leave it out"
            )
        if self.optimizer == "vpt_adamw" and self.weight_decay:
            object.__setattr__(self, "weight_decay", VPT_DECAY)  # records show the value that is used
        return self

    @property
    def uses_sgd(self) -> bool:
        """Whether the optimiser is SGD with momentum, which `vpt_adamw` without weight decay is too."""
        return self.optimizer == "sgd" or (self.optimizer == "vpt_adamw" and not self.weight_decay)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, by mixup or cutmix."""
        return self.mixup > 0 or self.cutmix > 0

    def steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimiser steps of a run."""
        return min(self.epochs * steps_per_epoch, self.max_steps or sys.maxsize)

    def record(self) -> dict[str, Any]:
        """Return the settings as values for JSON, without those of later versions that have no effect.

        So a run that was recorded before these settings existed is still the same run.
        """
        content = self.model_dump()
        defaults = {name: type(self).model_fields[name].default for name in ADDED_LATER}
        return {
            name: value
            for name, value in content.items()
            if name not in ADDED_LATER or value != defaults[name]
        }
