"""Compose one typed `Job` for each task of a command line, or the plans of `src/prepare.py`.

Mistakes on the command line itself are reported by `visprompt.runs.cli`.
"""

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
from visprompt.machine import process_name
from visprompt.runs import paths, recipe_rows, settings
from visprompt.runs.job import OWN_DATA, Job, check_effect
from visprompt.runs.paths import CONFIGS, ROOT

if TYPE_CHECKING:
    from visprompt.data.stores.plan import Plan


OmegaConf.register_new_resolver("project_root", lambda: str(ROOT))
OmegaConf.register_new_resolver("process", process_name)
OmegaConf.register_new_resolver("expanduser", paths.expanduser)


def check_own(config_name: str, arguments: Iterable[str]) -> None:
    """Refuse keys on the command line that the program sets itself for each run."""
    reserved = {"train": ("task",), "tune": ("task", "split", "seed")}.get(config_name, ())
    instead = {"task": "tasks", "seed": "seeds"}
    for key in {key_of(argument) for argument in arguments}.intersection(reserved):
        hint = f": give {instead[key]}=..." if key in instead else f": src/train.py takes {key}=..."
        raise UserError(f"{key} is set for each run, not by hand{hint}")


def key_of(argument: str) -> str:
    """Return the key of an argument: `recipe.lr` of `+recipe.lr=0.1`."""
    return argument.lstrip("+~").partition("=")[0]


def specs(tasks: Any) -> list[catalog.TaskSpec]:
    """Return the catalog's records of the tasks in `tasks=`: an id, a suite, or a list of both."""
    return catalog.resolve(list(tasks) if OmegaConf.is_list(tasks) else str(tasks))


def _as_written(cfg: DictConfig, key: str | None) -> Any:
    """Return a value as written in the config, with unresolved `${...}` references."""
    written: Any = OmegaConf.to_container(cfg, resolve=False)
    for name in str(key).split("."):
        written = written.get(name) if isinstance(written, dict) else None
    return written


def check_values(cfg: DictConfig, to_run: bool = True) -> None:
    """Refuse a config with a value that is of the wrong type, out of range or missing.

    Args:
        cfg: The config of any entry point.
        to_run: Whether every value must be present; a config that is only shown may lack some.

    Raises:
        UserError: A value does not fit.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        content = plain(cfg)
    except InterpolationKeyError as error:
        key = error.full_key
        raise UserError(f"{key}={_as_written(cfg, key)} refers to a key that does not exist") from error
    # a resolver failed, for example because a value is of a wrong type
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0].rpartition("resolving interpolation: ")[2]) from error
    if missing and to_run:
        raise UserError(f"{missing[0]} has no default: give {missing[0]}=...")
    settings.check(content)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a config as plain dicts and lists, without missing values and without the tables of recipes."""
    content: dict[str, Any] = {}
    for key in map(str, cfg):
        if OmegaConf.is_missing(cfg, key) or key == "rows":
            continue
        try:
            value = cfg[key]
        except InterpolationToMissingValueError:
            continue
        content[key] = plain(value) if OmegaConf.is_dict(value) else _plain_list(value)
    return content


def _plain_list(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def in_multirun() -> bool:
    """Return whether Hydra runs this job as one of several (`-m`)."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def has_choosing_sweeper() -> bool:
    """Return whether a sweeper that reads scores runs this job: any but Hydra's basic one."""
    return in_multirun() and not str(HydraConfig.get().sweeper._target_).endswith(".BasicSweeper")


def jobs(cfg: DictConfig, extra: Iterable[str] = ()) -> list[Job]:
    """Compose one job for each task of a command line.

    Args:
        cfg: The config that `@hydra.main` composed.
        extra: Overrides in addition to those of the command line.

    Returns:
        Jobs in the order of `tasks`, or one job if only `data` is given.

    Raises:
        UserError: `data=` together with `tasks=`, an unknown task, or a key that is not for the command line.
    """
    hydra = HydraConfig.get()
    # unresolved, because ${task} differs between the jobs
    overrides: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    check_own("train", overrides)
    if cfg.tasks is None and not extra:
        return [complete(cfg.copy(), {key_of(setting) for setting in overrides}, hydra.runtime.choices)]
    config_name = str(hydra.job.config_name)
    return [job(config_name, settings) for settings in settings_of_tasks([*overrides, *extra], cfg.tasks)]


def settings_of_tasks(settings: Iterable[str], tasks: Any) -> list[list[str]]:
    """Return the settings of each task's job.

    Args:
        settings: The settings of a command line.
        tasks: An id, a suite, or a list of both; None if `data` alone says what the job is about.

    Returns:
        One list of settings for each task, in order. `["seed=1", "tasks=[dtd,svhn]"]` gives
        `["seed=1", "data=vtab/dtd", "tasks=null"]` and `["seed=1", "data=vtab/svhn", "tasks=null"]`.

    Raises:
        UserError: `data=` together with `tasks=`, or an unknown task.
    """
    shared = [setting for setting in settings if key_of(setting) != "tasks"]
    if tasks is None:
        return [shared]
    data = [setting for setting in shared if key_of(setting) == "data"]
    if any(not choice.startswith("data='") for choice in data):  # quoted by `data_of_tasks`, not by the user
        raise UserError(f"{data[0]} and tasks={tasks} both name the data: give one of them")
    shared = [setting for setting in shared if setting not in data]
    return [[*shared, f"data={spec.config}", "tasks=null"] for spec in specs(tasks)]


def data_of_tasks(config_name: str, settings: Iterable[Sequence[str]]) -> list[str]:
    """Return a setting `data='...'` for the first task of `tasks=`, so that Hydra knows the keys `data.*`.

    `settings_of_tasks` replaces it by the config of each job's task; it recognises the setting by its quotes.

    Args:
        config_name: A primary config.
        settings: The settings of a command line, each with all its values (several in a multirun).

    Returns:
        A list with that setting, or an empty list if the command line names no tasks.

    Raises:
        UserError: `data=` together with `tasks=`, or an unknown task.
    """
    by_key = {key_of(values[0]): values for values in settings}
    named = [re.sub(r"[\[\]'\"]", "", setting.partition("=")[2]) for setting in by_key.get("tasks", ())]
    named = named or [
        _tasks_of_experiment(setting.partition("=")[2]) for setting in by_key.get("experiment", ())
    ]
    if config_name == "prepare" or not named or "null" in named:
        return []
    if "data" in by_key:
        raise UserError(f"{by_key['data'][0]} and tasks={named[0]} both name the data: give one of them")
    tasks = [catalog.resolve(names) for names in named]
    return [f"data='{tasks[0][0].config}'"]


def _tasks_of_experiment(name: str) -> str:
    """Return the tasks in an experiment's file as "dtd,svhn"; "null" if there are none or no such file."""
    file = CONFIGS / "experiment" / f"{name}.yaml"
    tasks = OmegaConf.select(OmegaConf.load(file), "tasks") if file.is_file() else None
    return "null" if tasks is None else tasks if isinstance(tasks, str) else ",".join(tasks)


def job(config_name: str, overrides: Sequence[str]) -> Job:
    """Compose one job.

    Args:
        config_name: A primary config, for example "train".
        overrides: Settings as on a command line, without `tasks`.

    Returns:
        The job.

    Raises:
        UserError: An override does not fit this job, or a value without a default is missing.
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


def complete(cfg: DictConfig, given: Set[str], choices: Mapping[str, Any]) -> Job:
    """Build a job from a composed config.

    Args:
        cfg: The config; it is modified.
        given: Keys that the command line sets.
        choices: The chosen option of each config group, for example {"data": "vtab/dtd"}.

    Raises:
        UserError: A value does not fit, or a value without a default is missing.
    """
    own = {config: task for task, config in OWN_DATA.items()}
    cfg.task = own.get(choices["data"], choices["data"].rpartition("/")[2])
    check_values(cfg)
    if choices.get("debug") or settings.debugs(plain(cfg.trainer)):
        cfg.tags = [*cfg.tags, "debug"]  # in addition to the user's tags
        cfg.paths.results = None  # which others read
    paths.expand_paths(cfg)
    recipe_rows.apply_table(cfg)
    OmegaConf.resolve(cfg)
    recipe_rows.apply_row(cfg, given)
    job = Job(**plain(cfg))
    check_effect(job.recipe)
    return job


def plans(cfg: DictConfig) -> "list[Plan]":
    """Return the plan of the data to prepare, for each task of a composed `prepare` config.

    Raises:
        UserError: A task or source is unknown, or a number does not fit.
    """
    from visprompt.data.stores.plan import Plan

    chosen = specs(cfg.tasks)
    if cfg.root and cfg.source == "raw" and len({spec.dataset for spec in chosen}) > 1:
        raise UserError(
            f"root={cfg.root} holds the files of one dataset, and tasks={cfg.tasks} are of several: "
            "give the tasks of one dataset at a time"
        )
    return [
        Plan(
            spec=spec,
            size=cfg.image_size * 256 // 224 if spec.family == "fgvc" else cfg.image_size,
            resampling="pillow" if spec.family == "fgvc" else cfg.preprocessing.resampling,
            interpolation=cfg.preprocessing.interpolation,
            data_dir=Path(cfg.data_dir),
            store_dir=Path(cfg.store_dir),
            root=Path(cfg.root).expanduser() if cfg.root else None,
            source=cfg.source,
            revision=cfg.revision,
            download=cfg.download,
        )
        for spec in chosen
    ]


@contextmanager
def composing(extra: str | None = None) -> Iterator[None]:
    """Initialise Hydra so that `job` can compose outside an entry point, as tests and notebooks do.

    Args:
        extra: Another folder of configs, which take precedence over this project's.

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
