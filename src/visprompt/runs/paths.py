"""List the settings that are paths, and expand `~` and relative paths in them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from visprompt.errors import UserError
from visprompt.runs.object_store import SCHEME

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "configs"

PATHS = (
    *("paths.root_dir", "paths.data_dir", "paths.log_dir", "data_dir", "store_dir", "root"),
    *(
        "data.root",
        "data.csv",
        "data.data_dir",
        "data.store_dir",
        "backbone.weights",
        "method.weights",
        "recipe.table",
    ),
    *("run", "state", "states", "images", "output", "weights", "runs", "inspect", "table"),
    *("trainer.profiler.dirpath",),
)
"""Keys of all entry points whose values are paths; `paths.*` are first, because others refer to them."""

_MAYBE = ("data.dataset", "data.classes")  # keys whose values may be paths, or something else

LISTS = ("run", "runs", "inspect", "state", "states")
"""Keys whose values may be a list of paths."""

STORED = ("run", "runs", "inspect", "state")
"""Keys whose folders of runs may be on object storage."""

TEXTS = (*PATHS, "data.name")
"""Keys whose values are free text, chosen by the user."""


_TILDE = re.compile(r"(?:^|(?<=[\[,]))\s*(~[^/,\]]*)")  # at the start of a value or of an entry in a list


def expanduser(path: str) -> str:
    """Expand `~` and `~name` at the start of a path; leave an unknown name as it is."""
    return os.path.expanduser(path)  # noqa: PTH111  # pathlib's raises an error for an unknown user


def expand_paths(cfg: DictConfig) -> None:
    """Make every path of a config one that can be opened.

    `~` is expanded, relative paths are made absolute if Hydra has changed the folder, and runs on object
    storage are brought into a local copy.

    Args:
        cfg: The config of any entry point; its paths are changed in place.

    Raises:
        UserError: A path is on object storage and is not that of a run, or the store cannot be read.
    """
    chdir = HydraConfig.initialized() and HydraConfig.get().job.chdir
    start = Path(HydraConfig.get().runtime.cwd) if chdir else Path()
    for key, value in given(cfg, start):
        # a report reads tuned states only to look into runs
        with_states = key != "runs" or OmegaConf.select(cfg, "inspect") is not None
        expanded: Any = (
            [_opened(v, key, start, with_states) for v in value]
            if OmegaConf.is_list(value)
            else _opened(value, key, start, with_states)
        )
        if expanded != value:
            OmegaConf.update(cfg, key, expanded)


def given(cfg: DictConfig, start: Path = Path()) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a config whose values are paths, with their values; each is read when its turn comes.

    Args:
        cfg: The config of any entry point.
        start: The folder that relative paths are relative to.
    """
    for key in (*PATHS, *_MAYBE):
        value = OmegaConf.select(cfg, key, throw_on_missing=False)
        is_something_else = key in _MAYBE and not (
            isinstance(value, str) and (start / expanduser(value)).exists()
        )
        if value is not None and not is_something_else:
            yield key, value


def _opened(value: Any, key: str, start: Path, with_states: bool) -> Any:
    if not isinstance(value, str) or not value.startswith(SCHEME):
        return _expanded(value, start)
    if key not in STORED:
        where = "give a local folder, and paths.results for the runs" if key == "paths.log_dir" else ""
        raise UserError(f"{key}={value} is on object storage: {where or 'give a local path'}")
    from visprompt.runs.copies import bring  # imported late: it imports torch

    return str(bring(value, key, with_states))


def _expanded(value: Any, start: Path) -> Any:
    # `inspect=auto` is not a path; a value of the wrong type is refused later
    if not isinstance(value, str) or value in ("", "auto"):
        return value
    return expanduser(value) if start == Path() else str(start / expanduser(value))


def expand_argument(argument: str) -> str:
    """Expand `~` in `key=value` if the key is a path: Hydra's grammar cannot read `~`.

    Args:
        argument: An argument of a command line, for example `runs=[~/a,~/b]`.

    Returns:
        For example `runs=[/home/me/a,/home/me/b]`.
    """
    key, _, value = argument.partition("=")
    if key.lstrip("+") not in PATHS:
        return argument
    return f"{key}={_TILDE.sub(lambda match: expanduser(match[1]), value)}"


def check_writable(folder: Path, key: str, value: str) -> None:
    """Make the folder that will hold Hydra's output folders, and check that it can be written to.

    Args:
        folder: The folder.
        key: The setting that decides where the folder is.
        value: The setting's value.

    Raises:
        UserError: The folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = next((path for path in (folder, *folder.parents) if path.is_file()), None)
        reason = f"{file} is a file" if file else f"{folder} cannot be made ({error.strerror})"
    else:
        if os.access(folder, os.W_OK | os.X_OK):
            return
        reason = f"{folder} cannot be written to"
    raise UserError(
        f"{key}={value} cannot hold what is written: {reason}; give {key}= a folder that you may write to"
    )
