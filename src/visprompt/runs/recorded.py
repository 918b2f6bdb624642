"""Build a job for this machine from the folder of a finished run, which may come from somebody else.

The files of the folder are data: they never decide which code runs or where files are written. So the data
module, the trainer and all folders come from this project's configs, and only plain values are taken from the
run's files:

- method and backbone from the tuned state, which has been checked,
- recipe, split, seed and precisions from result.json,
- from config.yaml the settings of the data, and where the user's images and the backbone's weights were.

Everything else in config.yaml (hydra, callbacks, logger, trainer, paths) is ignored.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from hydra import compose as hydra_compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, Field

from visprompt.data.catalog import TASKS
from visprompt.data.transforms import in_present_words
from visprompt.errors import UserError
from visprompt.models import state_schema
from visprompt.models.recipe import Recipe
from visprompt.models.tuned_state import TunedState
from visprompt.runs.compose import composing
from visprompt.runs.job import OWN_DATA, Job, MatmulPrecision
from visprompt.runs.paths import CONFIGS
from visprompt.runs.result import Result
from visprompt.text import Terminal, visible

console = Terminal()
_REMEDY = "copy the whole folder of the run again, and do not use it if you do not know who made it"
# settings of the data that come from this machine's configs, not from the run; scoring augments nothing
_FROM_THIS_MACHINE = ("_target_", "data_dir", "store_dir", "download", "num_workers", "pin_memory", "augment")
_MAX_BYTES = 2**22  # of a config.yaml
_MAX_ENTRIES = 2**14  # of a list or mapping among the data's settings
_MAX_DEPTH = 2  # of nested lists and mappings


class _Lax(BaseModel):
    """A record whose unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class _Weights(_Lax):
    weights: state_schema.Text | None = None


class _Config(_Lax):
    task: state_schema.Word
    data: dict[str, Any]
    backbone: _Weights


class _Scoring(state_schema.Closed):
    """The values of a result.json that become part of a job."""

    split: Literal["tune", "final"]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    precision: state_schema.Word
    matmul_precision: MatmulPrecision = "highest"
    recipe: dict[str, Any]


def job_of(
    folder: Path,
    state: TunedState,
    result: Result,
    *,
    data_dir: str | None,
    weights: str | None,
    data: Mapping[str, Any] | None = None,
) -> Job:
    """Build the job of a finished run for this machine.

    Args:
        folder: The run's folder.
        state: The run's tuned state, as `tuned_state.load_state` returns it.
        result: The run's result.
        data_dir: This machine's folder of data; None uses that of configs/paths and configs/local.
        weights: The file of backbone weights; None uses the path that the run recorded, which is only read.
        data: Settings of the data given by the user, such as another root; they may name a `_target_`.

    Returns:
        A job for `run.prepare`, with this machine's default trainer.

    Raises:
        UserError: The run's config.yaml cannot be read or holds something that no run writes, or the file of
            weights does not exist.
    """
    config = _read(folder / "config.yaml")
    stored_data = in_present_words(config.data)
    local = _compose(config.task, folder / "config.yaml", data_dir)
    given = {name: value for name, value in (data or {}).items() if value is not None}
    weights = weights or (config.backbone.weights if state.backbone["pretrained"] else None)
    if state.backbone["pretrained"] and weights and not Path(weights).expanduser().exists():
        raise UserError(f"there is no file of backbone weights at {weights}: give weights=FILE")
    content = {
        **_scoring(folder, result),
        "task": config.task,
        "data": _data(local["data"], stored_data, given, folder / "config.yaml"),
        "backbone": {k: v for k, v in state.backbone.items() if k != "sha256"} | {"weights": weights},
        "method": dict(state.method),
        "trainer": local["trainer"],
        "paths": local["paths"],
        "callbacks": {},
        "logger": None,
    }
    try:
        job = Job(**content)
    except UserError as error:
        raise UserError(f"{folder / 'config.yaml'} is refused: {error}; {_REMEDY}") from error
    recorded_paths = {
        f"data.{name}": job.data.get(name) for name in ("root", "csv", "dataset") if name not in given
    }
    recorded_paths |= {"weights": weights} if weights == config.backbone.weights else {}
    for name, path in recorded_paths.items():
        if path:
            _say(f"{name} is {path}, as the run recorded it: {name}=... names another place")
    recorded_dir, local_dir = config.data.get("data_dir"), local["data"].get("data_dir")
    if isinstance(recorded_dir, str) and recorded_dir != local_dir and "data_dir" in local["data"]:
        _say(f"the run's data were in {recorded_dir}, here they are looked for in {local_dir}")
    return job


def _say(line: str) -> None:
    console.print(line, soft_wrap=True)


def _read(path: Path) -> _Config:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path} is refused: it is larger than that of any run; {_REMEDY}")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): copy the whole folder of the run"
        ) from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} cannot be read (it is cut off or not YAML): copy the whole folder of the run"
        ) from error
    return state_schema.read(_Config, content, path, _REMEDY)


def _compose(task: str, source: Path, data_dir: str | None) -> dict[str, Any]:
    """Compose this project's configs for a task, resolved for this machine.

    Args:
        task: See `Job`; or the name of another config of data.
        source: The file that names the task, for messages.
        data_dir: This machine's folder of data; None uses that of the configs.

    Returns:
        The groups "data", "trainer" and "paths" in plain containers.
    """
    spec = TASKS.get(task)
    files = [] if spec else sorted((CONFIGS / "data").rglob(f"{OWN_DATA.get(task, task)}.yaml"))
    if spec is None and not files:
        raise UserError(
            f"{source} is refused: its task {task!r} has no config in {CONFIGS / 'data'}: add one"
        )
    name = spec.config if spec else files[0].relative_to(CONFIGS / "data").with_suffix("").as_posix()
    with nullcontext() if GlobalHydra.instance().is_initialized() else composing():
        cfg = hydra_compose("train", [f"data={name}"])
    if data_dir is not None:
        cfg.paths.data_dir = data_dir
    return {group: OmegaConf.to_container(cfg[group], resolve=True) for group in ("data", "trainer", "paths")}


def _data(
    local: dict[str, Any], stored: Mapping[str, Any], given: Mapping[str, Any], source: Path
) -> dict[str, Any]:
    """Merge the settings of the data module.

    Args:
        local: The settings of this machine's configs.
        stored: The settings in the run's config.yaml, which take precedence over `local` if they are checked
            plain values and do not depend on the machine.
        given: The user's settings, which take precedence over both.
        source: The run's config.yaml, for messages.
    """
    target = str(stored.get("_target_", local["_target_"]))
    if target != local["_target_"] and not target.startswith("visprompt.data.") and "_target_" not in given:
        raise UserError(
            f"{source} names the data module {target!r:.80}, and a run's folder does not decide what code "
            "runs: give +data._target_=... yourself if the module is yours"
        )
    values: dict[str, Any] = {}
    for name, value in stored.items():
        if name in _FROM_THIS_MACHINE or name in given:
            continue
        if name not in local:
            raise UserError(
                f"{source} is refused: data.{visible(str(name))} is not a setting of its data; {_REMEDY}"
            )
        if not _is_plain(value):
            raise UserError(f"{source} is refused: data.{name} is not a plain value; {_REMEDY}")
        values[name] = value
    # scoring a run must not start to download 40 GB
    no_download = {"download": False} if "download" in local else {}
    return {**local, **values, **no_download, **given}


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Return whether a value is null, a boolean, a number, a text without `${`, or a small list or dict."""
    if isinstance(value, dict):
        # no names with an underscore, because Hydra gives _target_ and the like a meaning
        plain_names = all(isinstance(name, str) and not name.startswith("_") for name in value)
        return plain_names and _is_plain([*value, *value.values()], depth)
    if isinstance(value, list):
        small = len(value) <= _MAX_ENTRIES and depth < _MAX_DEPTH
        return small and all(_is_plain(entry, depth + 1) for entry in value)
    if isinstance(value, str):
        return not state_schema.has_control(value) and "${" not in value
    return value is None or isinstance(value, bool) or (type(value) in (int, float) and math.isfinite(value))


def _scoring(folder: Path, result: Result) -> dict[str, Any]:
    path = folder / "result.json"
    record = {name: getattr(result, name) for name in _Scoring.model_fields if hasattr(result, name)}
    record |= {name: value for name, value in result.trainer.items() if name == "matmul_precision"}
    checked = state_schema.read(_Scoring, record, path, _REMEDY)
    try:
        if not checked.recipe.keys() <= Recipe.model_fields.keys():
            raise UserError("its recipe is not of this version")
        recipe = Recipe(**checked.recipe)
    except UserError as error:
        raise UserError(f"{path} is refused: {error}; {_REMEDY}") from error
    return checked.model_dump() | {"recipe": recipe.model_dump()}


def own_data(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings of the data that the user gave to `src/eval.py`, in plain containers."""
    return dict(OmegaConf.to_container(cfg.data, resolve=True))  # type: ignore[arg-type]  # a group is a mapping
