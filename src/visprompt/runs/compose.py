"""Compose the config of each task. What is wrong with a command line is said by `visprompt.runs.cli`.

What comes out is one typed `Job` for each task, or what is to be prepared.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationKeyError, InterpolationToMissingValueError, OmegaConfBaseException

from visprompt.data import catalog
from visprompt.errors import UserError, in_one_line
from visprompt.runs import paths, recipe_rows, settings
from visprompt.runs.job import Job, check_effect

if TYPE_CHECKING:
    from visprompt.data.stores.plan import Plan

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "configs"


OmegaConf.register_new_resolver("project_root", lambda: str(ROOT))
OmegaConf.register_new_resolver("pid", os.getpid)
OmegaConf.register_new_resolver("expanduser", paths.expanduser)


def check_own(config_name: str, arguments: Iterable[str]) -> None:
    """Refuse keys of the command line that a program sets itself, for each run."""
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


def _as_written(cfg: DictConfig, key: str | None) -> Any:
    """Return a value as it is written, with its references to other keys."""
    written: Any = OmegaConf.to_container(cfg, resolve=False)
    for name in str(key).split("."):
        written = written.get(name) if isinstance(written, dict) else None
    return written


def check_values(cfg: DictConfig, to_run: bool = True) -> None:
    """Refuse a config that has a value of a wrong kind or out of range, or lacks one without default.

    Args:
        cfg: Of any entry point.
        to_run: Whether every value must be there; to be shown, a config may lack some.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        content = plain(cfg)
    except InterpolationKeyError as error:
        key = error.full_key
        raise UserError(f"{key}={_as_written(cfg, key)} refers to a key that does not exist") from error
    except OmegaConfBaseException as error:  # something else is made of it
        raise UserError(str(error).splitlines()[0].rpartition("resolving interpolation: ")[2]) from error
    if missing and to_run:
        raise UserError(f"{missing[0]} has no default: give {missing[0]}=...")
    settings.check(content)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a config in plain containers, without what has no value yet and without the tables of recipes."""
    content: dict[str, Any] = {}
    for key in map(str, cfg):
        if OmegaConf.is_missing(cfg, key) or key == "rows":
            continue
        try:
            value = cfg[key]
        except InterpolationToMissingValueError:
            continue
        content[key] = plain(value) if OmegaConf.is_dict(value) else _in_lists(value)
    return content


def _in_lists(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def in_multirun() -> bool:
    """Return whether Hydra runs this job as one of several (`-m`)."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def has_choosing_sweeper() -> bool:
    """Return whether a sweeper other than Hydra's own runs this job.

    That one goes through its points and reads no score.
    """
    return in_multirun() and not str(HydraConfig.get().sweeper._target_).endswith(".BasicSweeper")


def jobs(cfg: DictConfig, extra: Iterable[str] = ()) -> list[Job]:
    """Compose one job for each task of a command line.

    Args:
        cfg: What `@hydra.main` composed.
        extra: Overrides beyond those of the command line.

    Returns:
        Jobs in the order of `tasks`; one job where only `data` is given.

    Raises:
        UserError: `data=` together with `tasks=`, an unknown task, or a key that is not for the command line.
    """
    hydra = HydraConfig.get()
    said: Any = OmegaConf.to_container(
        hydra.overrides.task, resolve=False
    )  # ${task} is for each job to resolve
    check_own("train", said)
    if cfg.tasks is None and not extra:
        return [complete(cfg.copy(), {key_of(setting) for setting in said}, hydra.runtime.choices)]
    return [job(str(hydra.job.config_name), one) for one in settings_of_tasks([*said, *extra], cfg.tasks)]


def settings_of_tasks(settings: Iterable[str], tasks: Any) -> list[list[str]]:
    """Return the settings of each task's job.

    Args:
        settings: Of a command line.
        tasks: An id, a suite, or a list of both; None where `data` alone says what the job is about.

    Returns:
        Settings in the order of the tasks.

    Raises:
        UserError: `data=` together with `tasks=`, or an unknown task.
    """
    shared = [setting for setting in settings if key_of(setting) != "tasks"]
    if tasks is None:
        return [shared]
    data = [setting for setting in shared if key_of(setting) == "data"]
    if any(not choice.startswith("data='") for choice in data):
        raise UserError(f"{data[0]} and tasks={tasks} both name the data: give one of them")
    shared = [setting for setting in shared if setting not in data]
    return [[*shared, f"data={spec.config}", "tasks=null"] for spec in specs(tasks)]


def data_of_tasks(config_name: str, settings: Iterable[Sequence[str]]) -> list[str]:
    """Return the data config of the first task where `tasks` names it, so that Hydra knows the keys of `data` options.

    Every job gets the config of its own task afterwards: `settings_of_tasks` knows this one by its quotes.

    Args:
        config_name: A primary config.
        settings: The settings of a command line, each with all its values: several in a multirun.

    Returns:
        One setting, or none.

    Raises:
        UserError: `data=` together with `tasks=`, or an unknown task.
    """
    said = {key_of(values[0]): values for values in settings}
    named = [re.sub(r"[\[\]'\"]", "", setting.partition("=")[2]) for setting in said.get("tasks", ())]
    named = named or [
        _tasks_of_experiment(setting.partition("=")[2]) for setting in said.get("experiment", ())
    ]
    if config_name == "prepare" or not named or "null" in named:
        return []
    if "data" in said:
        raise UserError(f"{said['data'][0]} and tasks={named[0]} both name the data: give one of them")
    tasks = [catalog.resolve(one) for one in named]
    return [f"data='{tasks[0][0].config}'"]


def _tasks_of_experiment(name: str) -> str:
    """Return the tasks that an experiment's file names, "null" where it names none or is not one of this project."""
    file = CONFIGS / "experiment" / f"{name}.yaml"
    tasks = OmegaConf.select(OmegaConf.load(file), "tasks") if file.is_file() else None
    return "null" if tasks is None else tasks if isinstance(tasks, str) else ",".join(tasks)


def job(config_name: str, overrides: Sequence[str]) -> Job:
    """Compose one job.

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
        raise UserError(
            f"not every job can be composed ({' '.join(overrides)}): {in_one_line(error)}"
        ) from error
    choices = cfg.hydra.runtime.choices
    with open_dict(cfg):
        del cfg.hydra
    return complete(cfg, {key_of(override) for override in overrides}, choices)


def complete(cfg: DictConfig, said: Set[str], choices: Mapping[str, Any]) -> Job:
    """Make a job of a composed config.

    Args:
        cfg: The config, which is changed.
        said: Keys of the command line.
        choices: The option of each config group, as Hydra chose them.

    Raises:
        UserError: A value does not fit, or one that has no default is missing.
    """
    cfg.task = choices["data"].rpartition("/")[2]
    check_values(cfg)
    if choices.get("debug") or settings.debugs(plain(cfg.trainer)):
        cfg.tags = [*cfg.tags, "debug"]  # whatever tags the user gives
    paths.expand_paths(cfg)
    recipe_rows.apply_table(cfg)
    OmegaConf.resolve(cfg)
    recipe_rows.apply_row(cfg, said)
    job = Job(**plain(cfg))
    check_effect(job.recipe)
    return job


def plans(cfg: DictConfig) -> "list[Plan]":
    """Return what is to be prepared for each task of a composed `prepare` config.

    Raises:
        UserError: An unknown task or source, or a number that is none.
    """
    from visprompt.data.stores.plan import Plan

    chosen = specs(cfg.tasks)
    if cfg.root and cfg.source == "raw" and len({spec.dataset for spec in chosen}) > 1:
        raise UserError(
            f"root={cfg.root} holds the files of one dataset, tasks={cfg.tasks} are several: one at a time"
        )
    where: dict[str, Any] = {"data_dir": Path(cfg.data_dir), "store_dir": Path(cfg.store_dir)}
    where |= {"root": Path(cfg.root).expanduser() if cfg.root else None}
    how: dict[str, Any] = {"source": cfg.source, "revision": cfg.revision, "download": cfg.download}
    how |= {"interpolation": cfg.preprocessing.interpolation}
    return [
        Plan(
            spec=spec,
            size=cfg.image_size * 256 // 224 if spec.family == "fgvc" else cfg.image_size,
            resampling="pillow" if spec.family == "fgvc" else cfg.preprocessing.resampling,
            **where,
            **how,
        )
        for spec in chosen
    ]


@contextmanager
def composing(extra: str | None = None) -> Iterator[None]:
    """Let `job` compose outside an entry point, as tests and notebooks do.

    Args:
        extra: A further folder of configs, which come before this project's.

    Raises:
        UserError: There is no such folder.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        if extra is not None:
            if not Path(extra).is_dir():
                raise UserError(f"--config-dir={extra} is not a folder: give one with configs in it")
            search_path = create_config_search_path(str(CONFIGS))
            search_path.prepend("command-line", f"file://{Path(extra).resolve()}", anchor="schema")
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2("visprompt", search_path)
        yield
