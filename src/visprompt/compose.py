"""What knows Hydra: composing the config of each task, and saying in one sentence what is wrong with a command line.

A composed *job* is a plain config of one run: its `task` is set, everything is resolved, the recipe's table is gone.
"""

import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from visprompt.data import catalog
from visprompt.errors import UserError, unknown

if TYPE_CHECKING:
    from visprompt.data.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
_SWITCHES = (
    *("compile", "dry_run", "rerun", "diagnostics.best_on_test", "verify", "download", "data.download"),
    *("data.crop", "data.skip_bad", "data.pin_memory", "backbone.exact", "backbone.pretrained"),
)
_WHOLE_NUMBERS = {"seed": 0, "seeds": 0, "resume_every_n_epochs": 1, "data.num_workers": 0}  # with the least of each


def _row(key: str, *, _root_: DictConfig) -> Any:
    """`${row:lr}`: a value of the recipe's table, from the row of the task, of its family, or the default row."""
    for row in _rows(_root_):
        if key in row:
            return row[key]
    raise UserError(f"the chosen recipe has no {key}: take the method's own recipe, or give {key} yourself")


def _rows(cfg: DictConfig) -> list[DictConfig]:
    """The rows of a recipe's table that are for a config's task, the nearest first."""
    spec = catalog.TASKS.get(str(cfg.task))
    names = [cfg.task, spec.family if spec else None, "default"]
    return [cfg.recipe.rows[name] for name in names if name and name in cfg.recipe.rows]


OmegaConf.register_new_resolver("row", _row)
OmegaConf.register_new_resolver("project_root", lambda: str(ROOT))
OmegaConf.register_new_resolver("pid", os.getpid)


def check_words(config_name: str) -> None:
    """Composes the command line before Hydra does, to name the nearest valid word for one that is wrong.

    Args:
        config_name: The entry point's primary config.

    Raises:
        SystemExit: A group option or key is unknown, or a value is none; one sentence says so.
    """
    with one_sentence_errors():
        _check_own(config_name, sys.argv[1:])
        sys.argv[1:] = _with_data(config_name, sys.argv[1:])
    arguments = sys.argv[1:]
    if any(argument.startswith("-") for argument in arguments):
        return  # a flag of Hydra's own, such as --help or --multirun: its commas are no single values
    with one_sentence_errors(), initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            cfg = compose(config_name, arguments)
        except MissingConfigException as error:
            raise _unknown_option(error) from error
        except OverrideParseException as error:
            raise UserError(f"an argument cannot be read: {_in_one_line(error)}") from error
        except ValueError as error:
            raise UserError(f"{_in_one_line(error)}: {' '.join(_choices(arguments))}") from error
        except (HydraException, OmegaConfBaseException) as error:
            raise _unknown_key(config_name, arguments, error) from error
        _check_added(config_name, arguments)
        _check_values(cfg)
        if cfg.get("tasks") is not None:
            _specs(cfg.tasks)


def _check_own(config_name: str, arguments: Iterable[str]) -> None:
    """Refuses keys of the command line that a program sets itself, for each run."""
    own = {"train": ("task",), "tune": ("task", "split", "seed")}.get(config_name, ())
    instead = {"task": "tasks", "seed": "seeds"}
    for key in {_key(argument) for argument in arguments}.intersection(own):
        hint = f": give {instead[key]}=..." if key in instead else f": src/train.py takes {key}=..."
        raise UserError(f"{key} is set for each run, not by hand{hint}")


def _key(argument: str) -> str:
    return argument.lstrip("+~").partition("=")[0]


def _with_data(config_name: str, arguments: list[str]) -> list[str]:
    """Adds the data config of the first task where `tasks=` names it, so that Hydra knows the keys of `data.` options.

    Every job gets the config of its own task afterwards; `jobs` tells this one from a user's by its quotes.
    """
    tasks = [re.sub(r"[\[\]'\"]", "", a.partition("=")[2]) for a in arguments if a.startswith("tasks=")]
    tasks = tasks or _tasks_of_experiment(arguments)
    data = [a for a in arguments if a.lstrip("+").startswith("data=")]
    if not tasks or tasks[-1] == "null" or config_name == "prepare":
        return arguments
    if data:
        raise UserError(f"{data[0]} and tasks={tasks[-1]} both name the data: give one of them")
    return [*arguments, f"data='{catalog.resolve(tasks[-1])[0].config}'"]


def _tasks_of_experiment(arguments: Sequence[str]) -> list[str]:
    names = [a.partition("=")[2] for a in arguments if a.startswith("experiment=")]
    file = CONFIGS / "experiment" / f"{names[-1]}.yaml" if names else None
    if file is None or not file.is_file():
        return []
    found = OmegaConf.to_container(OmegaConf.load(file))
    tasks = found.get("tasks") if isinstance(found, dict) else None
    return [] if tasks is None else [tasks if isinstance(tasks, str) else ",".join(tasks)]


def _specs(tasks: Any) -> list[catalog.TaskSpec]:
    return catalog.resolve(list(tasks) if OmegaConf.is_list(tasks) else str(tasks))


def _unknown_option(error: MissingConfigException) -> UserError:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    top = group.split("/")[0]
    if not error.options or not (CONFIGS / top).is_dir() or not top:
        return UserError(_in_one_line(error))
    below = (path.relative_to(CONFIGS / top).with_suffix("") for path in (CONFIGS / top).rglob("*.yaml"))
    return unknown(top, f"{group}/{option}".removeprefix(f"{top}/"), [path.as_posix() for path in below])


def _choices(arguments: Sequence[str]) -> list[str]:
    """Those arguments that choose an option of a config group."""
    return [a for a in arguments if (CONFIGS / a.lstrip("+~").partition("=")[0].partition("@")[0]).is_dir()]


def _unknown_key(config_name: str, arguments: Sequence[str], error: Exception) -> UserError:
    groups = _choices(arguments)
    try:
        own = [str(group) for group in compose(config_name, return_hydra_config=True).hydra.runtime.choices]
    except HydraException as bare:  # without any argument
        hint = "configs/local/default.yaml may give values, but choose no groups"
        return UserError(f"the files in configs cannot be composed: {_in_one_line(bare)}; {hint}")
    for argument in groups:
        group = argument.lstrip("+~").partition("=")[0].partition("@")[0]
        if group not in own:  # a group of another entry point
            return unknown("key", group, [name for name in own if not name.startswith("hydra")])
    keys = set(_keys(compose(config_name, groups)))
    for argument in arguments:
        key = argument.partition("=")[0]
        if argument not in groups and key[:1].isalpha() and not key.startswith("hydra") and key not in keys:
            return unknown("key", key, keys)
    return UserError(_in_one_line(error))


def _check_added(config_name: str, arguments: Sequence[str]) -> None:
    """Refuses `+key=...` beside the known keys: nothing would read it. Below a known key its reader judges."""
    added = [a.lstrip("+").partition("=")[0].partition(".")[0].partition("@")[0] for a in arguments if a[:1] == "+"]
    known = {"hydra", *map(str, compose(config_name))} if added else set()
    for key in added:
        if key not in known and not (CONFIGS / key).is_dir():
            raise unknown("key", key, known)


def _check_values(cfg: DictConfig) -> None:
    """Refuses a config that lacks a value without default, or whose switches and whole numbers are none."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
    except OmegaConfBaseException as error:  # something else is made of it
        raise UserError(str(error).splitlines()[0].rpartition("resolving interpolation: ")[2]) from error
    if missing:
        raise UserError(f"{missing[0]} has no default: give {missing[0]}=...")
    for key in _SWITCHES:
        value = OmegaConf.select(cfg, key, default=False)
        if not isinstance(value, bool):
            raise UserError(f"{key}={value} is neither true nor false: give one of them")
    for key, least in _WHOLE_NUMBERS.items():
        values = OmegaConf.select(cfg, key, default=least)
        for value in values if OmegaConf.is_list(values) else [values]:
            if type(value) is not int or not least <= value < 2**32:
                raise UserError(f"{key}={values} does not fit: whole numbers from {least} to {2**32 - 1} do")


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, cfg):
        yield f"{prefix}{key}"
        if OmegaConf.is_dict(cfg._get_node(key)) and not OmegaConf.is_missing(cfg, key):
            yield from _keys(cfg[key], f"{prefix}{key}.")


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Prints a `UserError` as its sentence, without a traceback, and exits with status 2.

    Ctrl-C exits with 130 and says how to go on. In a multirun any error goes on to Hydra, which runs the other jobs.
    """
    try:
        yield
    except UserError as error:
        if in_multirun():
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on where it stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception:
        # Hydra would cut the traceback to its own taste
        traceback.print_exc()
        if in_multirun():
            raise
        raise SystemExit(1) from None


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
    _check_own("train", said)
    if cfg.task is not None:
        return [cfg]
    overrides = [o for o in said if not o.startswith("tasks=")] + list(extra)
    given = [o for o in overrides if o.lstrip("+").startswith("data=")]
    if cfg.tasks is None:
        return [job(config_name, overrides)]
    specs = _specs(cfg.tasks)
    if any(not choice.startswith("data='") for choice in given):
        raise UserError(f"{given[0]} and tasks={cfg.tasks} both name the data: give one of them")
    overrides = [o for o in overrides if o not in given]
    return [job(config_name, [*overrides, f"data={spec.config}", "tasks=null"]) for spec in specs]


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
        raise UserError(f"not every job can be composed ({' '.join(overrides)}): {_in_one_line(error)}") from error
    choices = cfg.hydra.runtime.choices
    with open_dict(cfg):
        del cfg.hydra
    cfg.task = choices.data.rpartition("/")[2]
    if choices.get("debug"):
        cfg.tags = [*cfg.tags, "debug"]  # whatever tags the user gives
    _check_values(cfg)
    OmegaConf.resolve(cfg)
    _settle_grid(cfg, {_key(override) for override in overrides})
    with open_dict(cfg):
        del cfg.recipe.rows
    return cfg


def _settle_grid(cfg: DictConfig, said: Set[str]) -> None:
    """Gives a job its grid: that of its row, with the user's own keys beside it and in place of the same ones.

    Nothing is tried of what the command line gives, or of prompts that are off: such a key keeps its own value alone.
    """
    own = OmegaConf.create() if cfg.recipe.grid is None and "recipe.grid" not in said else cfg.recipe.grid
    if not OmegaConf.is_dict(own):  # the user's null is no grid; the protocol refuses anything else
        return
    rows: Any = next((row.grid for row in _rows(cfg) if "grid" in row), {})
    if not OmegaConf.is_dict(rows):  # a sentence that says why there is none
        cfg.recipe.grid = own or rows
        return
    off = {key for key in rows if key.startswith("method.num_") and OmegaConf.select(cfg, key) == 0} - set(own)
    found = {**rows, **own}
    cfg.recipe.grid = found | {key: [OmegaConf.select(cfg, key)] for key in found if key in said | off}


def plans(cfg: DictConfig) -> "list[Plan]":
    """Returns what is to be prepared for each task of a composed `prepare` config.

    Raises:
        UserError: An unknown task or source, or a number that is none.
    """
    from visprompt.data.plan import Plan

    if not isinstance(cfg.image_size, int) or cfg.image_size < 1:
        raise UserError(f"image_size={cfg.image_size} is no number of pixels: give image_size=224, for example")
    specs = _specs(cfg.tasks)
    if cfg.root and cfg.source == "raw" and len({spec.dataset for spec in specs}) > 1:
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
        for spec in specs
    ]


@contextmanager
def composing() -> Iterator[None]:
    """Lets `job` compose outside an entry point, as tests and notebooks do."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield
