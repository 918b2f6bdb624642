"""The job: what one run is asked to do.

Composed by Hydra, typed and checked once, then read by everything behind.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from visprompt.data.catalog.task import own_name
from visprompt.errors import UserError, sentence, unknown
from visprompt.models.recipe import Recipe
from visprompt.runs import settings

SPLITS = ("tune", "final")
DEFAULT_MODULE = {"_target_": "visprompt.models.tuning_module.TuningModule"}


class Group(BaseModel):
    """A group of settings, read as attributes.

    What may stand in it is said by `settings` and by who reads it.

    Example:
        `job.method.num_tokens`, `"prune" in job.method`, `dict(job.method)`.
    """

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    if TYPE_CHECKING:  # a setting without a type of its own here, such as a method's option

        def __getattr__(self, name: str) -> Any: ...

    def __contains__(self, name: str) -> bool:
        return name in dict(self)

    def __getitem__(self, name: str) -> Any:
        return dict(self)[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return a setting that need not be there."""
        return dict(self).get(name, default)


class Named(Group):
    """A method or backbone with its options."""

    name: str


class Backbone(Named):
    """See `models.backbones.BackboneSpec`."""

    pretrained: bool


class Trainer(Group):
    """Settings of Lightning's trainer."""

    accelerator: str = "auto"
    devices: Any = 1
    num_nodes: int = 1
    accumulate_grad_batches: int = 1
    check_val_every_n_epoch: int = 1


class Paths(Group):
    """Folders."""

    data_dir: str
    log_dir: str


class Diagnostics(Group):
    """What is logged besides, and read by no choice."""

    best_on_test: bool = False


class Job(BaseModel):
    """What one run is asked to do.

    Attributes:
        task: Name of the data's config: a task id, or "folder".
        split: "tune" or "final".
        seed: Seed of the run.
        precision: Lightning's precision, in full: "32-true".
        data: Settings of the data module, `_target_` among them.
        backbone: Settings of the backbone, see `models.backbones.BackboneSpec`; `weights` is a file.
        method: Its name and options.
        recipe: How it is trained.
        grid: What `tune.py` tries: lists of values by dotted key (`recipe.grid`); None or empty for one
            point.
        trainer: Settings of Lightning's trainer.
        lightning_module: `_target_` of the LightningModule, and arguments of a user's own beside the
            project's.
        callbacks: Configs of callbacks by name; one that is None was removed.
        logger: Configs of loggers by name; None or empty for none.
        paths: Folders: root_dir, data_dir, log_dir.
        preprocessing: The group that `data` took its own from.
        compile: Whether the classifier is compiled.
        rerun: Whether a finished run is run anew.
        resume_every_n_epochs: How often the resume state is written.
        tags: The user's own, and "debug".
        diagnostics: `best_on_test`.

    Raises:
        UserError: A value is of another kind or out of range; one sentence names its key.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    task: str
    split: Literal["tune", "final"]
    seed: int
    precision: str
    data: Group
    backbone: Backbone
    method: Named
    recipe: Recipe
    grid: Any = None
    trainer: Trainer
    lightning_module: Group = Group(**DEFAULT_MODULE)
    callbacks: dict[str, Any] | None = None
    logger: dict[str, Any] | None = None
    paths: Paths
    preprocessing: Group = Group()
    compile: bool = False
    rerun: bool = False
    resume_every_n_epochs: int = 1
    tags: tuple[str, ...] = ()
    diagnostics: Diagnostics = Diagnostics()

    def __init__(self, **content: Any) -> None:
        settings.check(content)
        if content.get("split") not in SPLITS:
            raise unknown("split", content.get("split"), SPLITS)
        recipe = content["recipe"]
        if isinstance(recipe, Mapping):
            content["grid"] = recipe.get("grid", content.get("grid"))
            content["recipe"] = Recipe(
                **{k: v for k, v in recipe.items() if k not in ("grid", "rows", "table")}
            )
        content["precision"] = settings.PRECISIONS.get(str(content["precision"]), str(content["precision"]))
        try:
            super().__init__(**content)
        except ValidationError as error:
            raise sentence(error) from None

    @property
    def name(self) -> str:
        """What it is called where it is reported, such as `dtd/vpt_deep`; own images go by their own name."""
        task = own_name(self.data.root, self.data.name) if self.task == "folder" else self.task
        return f"{task}/{self.method.name}"

    def content(self) -> dict[str, Any]:
        """Return it in plain containers, as its config.yaml has it; `Job(**content)` is this job again."""
        content = self.model_dump()
        content["recipe"]["grid"] = content.pop("grid")
        return deepcopy(content) | {"tags": list(self.tags)}

    @classmethod
    def from_yaml(cls, text: str) -> "Job":
        """Return the job of a text that `as_yaml` made."""
        return cls(**yaml.safe_load(text))

    def as_yaml(self) -> str:
        """Return its config.yaml."""
        return yaml.safe_dump(self.content(), sort_keys=False, allow_unicode=True, width=120)

    def vary(self, values: Mapping[str, Any]) -> "Job":
        """Return a copy with other values, checked as this one was.

        Args:
            values: New values by dotted key, such as {"recipe.lr": 0.1}; each replaces the old one as a
                whole.

        Raises:
            UserError: The job has no such key, or a value does not fit.
        """
        content = self.content()
        for key, value in values.items():
            *parents, name = key.split(".")
            holder: Any = content
            for parent in parents:
                holder = holder.get(parent) if isinstance(holder, dict) else None
            if (
                not isinstance(holder, dict) or name not in holder
            ):  # its value may be null, as that of method.depth
                raise unknown(
                    "key of recipe.grid", key, ["recipe.lr", "recipe.weight_decay", "method.num_tokens"]
                )
            holder[name] = deepcopy(value)
        return Job(**content)


def check_effect(recipe: Recipe) -> None:
    """Refuse a value that the chosen optimiser does not read.

    A run of an older version may have recorded one.
    """
    if not recipe.uses_sgd and recipe.momentum != 0.9:
        raise UserError(
            f"recipe.momentum={recipe.momentum} is of SGD, and recipe.optimizer={recipe.optimizer} has "
            "none: leave it out, or give recipe.optimizer=sgd"
        )
