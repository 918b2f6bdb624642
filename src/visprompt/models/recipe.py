"""The settings of training: typed and checked here, applied in `optim`."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from visprompt.errors import NULL, Allowed, UserError, is_finite, number, sentence, unknown

OPTIMIZERS = ("sgd", "adamw", "vpt_adamw")
SCHEDULES = ("per_step", "per_epoch")
HEAD_INITS = ("vpt", "zeros")
VPT_DECAY = 0.01  # weight decay of vpt_adamw for every setting above 0
_NUMBER = number("a finite number, 0 or above", lambda value: value >= 0)
_COUNT = Allowed("a whole number, 1 or more", lambda value: type(value) is int and value >= 1)
_WORDS = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "head_init": HEAD_INITS}
_RATES = ("lr", "head_lr", "weight_decay", "momentum")


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
        schedule: One of `SCHEDULES`: when the learning rate changes.
        head_init: One of `HEAD_INITS`.

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

    def __init__(self, **values: Any) -> None:
        for key in values.keys() - type(self).model_fields.keys():
            raise unknown("key of recipe", key, type(self).model_fields)
        # as floats, because 1 and 1.0 should be the same run
        values |= {
            name: float(values[name])
            for name in _RATES
            if type(values.get(name)) is int and is_finite(values[name])
        }
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
        if self.optimizer == "vpt_adamw" and self.weight_decay:
            object.__setattr__(self, "weight_decay", VPT_DECAY)  # records show the value that is used
        return self

    @property
    def uses_sgd(self) -> bool:
        """Whether the optimiser is SGD with momentum, which `vpt_adamw` without weight decay is too."""
        return self.optimizer == "sgd" or (self.optimizer == "vpt_adamw" and not self.weight_decay)
