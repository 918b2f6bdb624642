"""Compose the config of each task. What is wrong with a command line is said by `visprompt.cli`.

A composed *job* is a plain config of one run: its `task` is set, everything is resolved, the recipe's table is gone.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from visprompt import recipe_rows, settings
from visprompt.data import catalog
from visprompt.errors import UserError, in_one_line

if TYPE_CHECKING:
    from visprompt.data.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


OmegaConf.register_new_resolver("project_root", lambda: str(ROOT))
OmegaConf.register_new_resolver("pid", os.getpid)


def check_own(config_name: str, arguments: Iterable[str]) -> None:
    """Refuses keys of the command line that a program sets itself, for each run."""
    own = {"train": ("task",), "tune": ("task", "split", "seed")}.get(config_name, ())
    instead = {"task": "tasks", "seed": "seeds"}
    for key in {key_of(argument) for argument in arguments}.intersection(own):
        hint = f": give {instead[key]}=..." if key in instead else f": src/train.py takes {key}=..."
        raise UserError(f"{key} is set for each run, not by hand{hint}")


def key_of(argument: str) -> str:
    """Return the key of an argument: `recipe.lr` of `+recipe.lr=0.1`."""
    return argument.lstrip("+~").partition("=")[0]


def specs(tasks: Any) -> list[catalog.TaskSpec]:
    """Return the records of what `tasks=` names: an id, a suite, or a list of both."""
    return catalog.resolve(list(tasks) if OmegaConf.is_list(tasks) else str(tasks))


def check_values(cfg: DictConfig) -> None:
    """Refuse a config that lacks a value without default, or has one of a wrong kind or out of range."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
    except OmegaConfBaseException as error:  # something else is made of it
        raise UserError(str(error).splitlines()[0].rpartition("resolving interpolation: ")[2]) from error
    if missing:
        raise UserError(f"{missing[0]} has no default: give {missing[0]}=...")
    settings.check(cfg)


def in_multirun() -> bool:
    """Whether Hydra runs this job as one of several (`-m`)."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def has_choosing_sweeper() -> bool:
    """Whether a sweeper other than Hydra's own runs this job: that one goes through its points and reads no score."""
    return in_multirun() and not str(HydraConfig.get().sweeper._target_).endswith(".BasicSweeper")


def jobs(cfg: DictConfig, extra: Iterable[str] = ()) -> list[DictConfig]:
    """Composes one job for each task of a command line.

    Args:
        cfg: What `@hydra.main` composed. A job that was composed before is returned as it is.
        extra: Overrides beyond those of the command line.

    Returns:
        Jobs in the order of `tasks`; one job where only `data` is given.

    Raises:
        UserError: `data=` together with `tasks=`, an unknown task, or a key that is not for the command line.
    """
    hydra = HydraConfig.get()
    config_name = str(hydra.job.config_name)
    said: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)  # ${task} is for each job to resolve
    check_own("train", said)
    if cfg.task is not None:
        return [cfg]
    overrides = [o for o in said if not o.startswith("tasks=")] + list(extra)
    given = [o for o in overrides if o.lstrip("+").startswith("data=")]
    if cfg.tasks is None:
        return [job(config_name, overrides)]
    chosen = specs(cfg.tasks)
    if any(not choice.startswith("data='") for choice in given):
        raise UserError(f"{given[0]} and tasks={cfg.tasks} both name the data: give one of them")
    overrides = [o for o in overrides if o not in given]
    return [job(config_name, [*overrides, f"data={spec.config}", "tasks=null"]) for spec in chosen]


def job(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Composes one job.

    Args:
        config_name: A primary config, "train" for example.
        overrides: What a command line would say; `tasks` is not among them.

    Returns:
        The job.

    Raises:
        UserError: An override does not fit this job, or a value that has no default is missing.
    """
    try:
        cfg = compose(config_name, list(overrides), return_hydra_config=True)
    except HydraException as error:
        raise UserError(f"not every job can be composed ({' '.join(overrides)}): {in_one_line(error)}") from error
    choices = cfg.hydra.runtime.choices
    with open_dict(cfg):
        del cfg.hydra
    cfg.task = choices.data.rpartition("/")[2]
    check_values(cfg)
    if choices.get("debug") or settings.debugs(cfg):
        cfg.tags = [*cfg.tags, "debug"]  # whatever tags the user gives
    OmegaConf.resolve(cfg)
    recipe_rows.settle(cfg, {key_of(override) for override in overrides})
    return cfg


def plans(cfg: DictConfig) -> "list[Plan]":
    """Returns what is to be prepared for each task of a composed `prepare` config.

    Raises:
        UserError: An unknown task or source, or a number that is none.
    """
    from visprompt.data.plan import Plan

    chosen = specs(cfg.tasks)
    if cfg.root and cfg.source == "raw" and len({spec.dataset for spec in chosen}) > 1:
        raise UserError(f"root={cfg.root} holds the files of one dataset, tasks={cfg.tasks} are several: one at a time")
    where: dict[str, Any] = {"data_dir": Path(cfg.data_dir), "store_dir": Path(cfg.store_dir)}
    where |= {"root": Path(cfg.root).expanduser() if cfg.root else None}
    how: dict[str, Any] = {"source": cfg.source, "revision": cfg.revision, "download": cfg.download}
    how |= {"interpolation": cfg.preprocessing.interpolation}
    return [
        Plan(
            spec=spec,
            size=cfg.image_size * 256 // 224 if spec.family == "fgvc" else cfg.image_size,
            antialias=spec.family == "fgvc" or cfg.preprocessing.antialias,
            **where,
            **how,
        )
        for spec in chosen
    ]


@contextmanager
def composing() -> Iterator[None]:
    """Lets `job` compose outside an entry point, as tests and notebooks do."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield
