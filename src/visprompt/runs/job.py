"""The job: all settings of one run, composed by Hydra and then typed and checked once."""

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from visprompt.data.catalog.task import own_name
from visprompt.errors import UserError, sentence, unknown
from visprompt.models.recipe import Recipe
from visprompt.runs import settings
from visprompt.runs.object_store import checked_url

SPLITS = ("tune", "final")
OWN_DATA = {"folder": "folder", "hf": "hf", "segmentation_folder": "segmentation/folder"}
"""Task of a job with the user's own images -> its data, as `data=` takes it"""
DEFAULT_MODULE = {"_target_": "visprompt.models.tuning_module.TuningModule"}


class Group(BaseModel):
    """A group of settings, with any keys; `settings` and the code that reads them check the values.

    Example:
        `job.method.num_tokens`, `"prune" in job.method`, `dict(job.method)`.
    """

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    if TYPE_CHECKING:  # lets mypy accept settings that no field declares, such as `job.method.num_tokens`

        def __getattr__(self, name: str) -> Any: ...

    def __contains__(self, name: str) -> bool:
        return name in dict(self)

    def __getitem__(self, name: str) -> Any:
        return dict(self)[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return a setting, or the default if there is no such setting."""
        return dict(self).get(name, default)


class Named(Group):
    """A group of settings with a name: a method or backbone and its options."""

    name: str


class Backbone(Named):
    """Settings of the backbone, see `models.backbones.BackboneSpec`."""

    pretrained: bool


class Trainer(Group):
    """Settings of Lightning's trainer."""

    accelerator: str = "auto"
    devices: Any = 1
    num_nodes: int = 1
    accumulate_grad_batches: int = 1
    check_val_every_n_epoch: int = 1


class Paths(Group):
    """Folders for data and results, and the object storage that machines share results on."""

    data_dir: str
    log_dir: str
    results: str | None = None


class Diagnostics(Group):
    """Additional figures to log, which no choice reads."""

    best_on_test: bool = False


MatmulPrecision = Literal["highest", "high", "medium"]


class Job(BaseModel):
    """All settings of one run.

    Attributes:
        task: A task id, or a name of `OWN_DATA` for the user's own images.
        split: "tune" or "final".
        seed: Seed of the run.
        precision: Lightning's precision, in full: "32-true".
        matmul_precision: How precisely a GPU multiplies float32 matrices: "highest", "high" or "medium".
        data: Settings of the data module, including `_target_`.
        backbone: Settings of the backbone, see `models.backbones.BackboneSpec`; `weights` is a file.
        method: Name and options of the method.
        recipe: How the tuned parameters are trained.
        grid: The grid that `tune.py` tries, for example {"recipe.lr": [0.1, 1.0]} (on the command line
            `recipe.grid`); None or {} means a single point.
        trainer: Settings of Lightning's trainer.
        lightning_module: `_target_` of the LightningModule, and arguments of a user's class.
        callbacks: Configs of callbacks by name; None in place of a config removes that callback.
        logger: Configs of loggers by name; None or {} logs nowhere.
        paths: Folders: root_dir, data_dir, log_dir; and results, the address of a store or None.
        preprocessing: The config group that `data` takes its preprocessing from.
        compile: Whether the classifier is compiled.
        rerun: Whether a finished run is run again.
        resume_every_n_epochs: How often the resume state is written; None: see `ResumeCheckpoint`.
        tags: The user's tags, and "debug" for a run that is not a result.
        diagnostics: Additional figures to log: `best_on_test`.

    Raises:
        UserError: A value has the wrong type or is out of range; the message names its key.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    task: str
    split: Literal["tune", "final"]
    seed: int
    precision: str
    matmul_precision: MatmulPrecision = "highest"
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
    resume_every_n_epochs: int | None = None
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
        if self.paths.results:
            checked_url(self.paths.results)

    @property
    def name(self) -> str:
        """Name of the job in messages, such as `dtd/vpt_deep`; own images have their name for the task."""
        task = self.task
        if self.has_own_images:
            task = own_name(self.data.get("dataset") or self.data.root, self.data.name)
        return f"{task}/{self.method.name}"

    @property
    def has_own_images(self) -> bool:
        """Whether the data are the user's own images, not those of a catalogued task."""
        return self.task in OWN_DATA

    def content(self) -> dict[str, Any]:
        """Return a copy of the settings as plain dicts and lists; `Job(**content)` builds the job again."""
        content = self.model_dump()
        content["recipe"]["grid"] = content.pop("grid")
        return content | {"tags": list(self.tags)}

    @classmethod
    def from_yaml(cls, text: str) -> "Job":
        """Return the job that `as_yaml` wrote."""
        return cls(**yaml.safe_load(text))

    def as_yaml(self) -> str:
        """Return the job as YAML, the text of the run's config.yaml."""
        return yaml.safe_dump(self.content(), sort_keys=False, allow_unicode=True, width=120)

    def vary(self, values: Mapping[str, Any]) -> "Job":
        """Return a checked copy with some values replaced.

        Args:
            values: New values by dotted key, such as {"recipe.lr": 0.1}; a mapping is replaced as a whole,
                not merged.

        Raises:
            UserError: The job has no such key, or a value does not fit.
        """
        content = self.content()
        for key, value in values.items():
            *parents, name = key.split(".")
            holder: Any = content
            for parent in parents:
                holder = holder.get(parent) if isinstance(holder, dict) else None
            if not isinstance(holder, dict) or name not in holder:
                raise unknown(
                    "key of recipe.grid", key, ["recipe.lr", "recipe.weight_decay", "method.num_tokens"]
                )
            holder[name] = deepcopy(value)  # the caller may change its own later
        return Job(**content)


def check_effect(recipe: Recipe) -> None:
    """Refuse a value that the chosen optimiser does not read.

    `Recipe` itself accepts it, because runs of older versions may have recorded one.
    """
    if not recipe.uses_sgd and recipe.momentum != 0.9:
        raise UserError(
            f"recipe.momentum={recipe.momentum} has no effect on recipe.optimizer={recipe.optimizer}, which "
            "has no momentum: leave it out, or give recipe.optimizer=sgd"
        )
