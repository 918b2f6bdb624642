"""A finished run as a job for this machine.

What its folder says is data, and names nothing that runs or is written to.

Composed from this project's own configs are the data module (by the name of its config), the trainer and all
folders; taken from the run's files are plain values: of the checked tuned state method and backbone, of
result.json recipe, split, seed and precision, of config.yaml the settings of the data and where own images
and weights lay. Everything else in a config.yaml (hydra, callbacks, logger, trainer, paths) is not looked at.
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
from visprompt.runs.compose import CONFIGS, composing
from visprompt.runs.job import Job
from visprompt.runs.result import Result
from visprompt.text import Terminal, visible

console = Terminal()
_MEND = "copy the whole folder of the run again, and do not use it if you do not know who made it"
_THIS_MACHINE = (
    "_target_",
    "data_dir",
    "store_dir",
    "download",
    "num_workers",
    "pin_memory",
)  # of the data's settings
_LARGEST = 2**22  # bytes of a config.yaml
_MOST, _DEEPEST = (
    256,
    2,
)  # entries of a list or mapping among the data's settings, and how many lie in one another


class _Lax(BaseModel):
    """A record of which only the known keys are looked at."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class _Weights(_Lax):
    weights: state_schema.Text | None = None


class _Config(_Lax):
    task: state_schema.Word
    data: dict[str, Any]
    backbone: _Weights


class _Scoring(state_schema.Closed):
    """What of a result.json becomes part of a job."""

    split: Literal["tune", "final"]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    precision: state_schema.Word
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
    """Build the job of a finished run, for this machine.

    Args:
        folder: The run's.
        state: What it tuned, as `state.load_state` checked it.
        result: What it recorded.
        data_dir: This machine's folder of data; None takes that of configs/paths and configs/local.
        weights: The file of backbone weights; None takes the place that the run recorded, which is only read.
        data: The user's own settings of the data, such as another root; `_target_` among them names a data
            module.

    Returns:
        A job for `run.prepare`, with this machine's default trainer.

    Raises:
        UserError: The run's config.yaml cannot be read or says what no run says, or there is no file of
            weights.
    """
    config = _read(folder / "config.yaml")
    stored_data = in_present_words(config.data)
    ours = _compose(config.task, folder / "config.yaml", data_dir)
    given = {name: value for name, value in (data or {}).items() if value is not None}
    weights = weights or (config.backbone.weights if state.backbone["pretrained"] else None)
    if state.backbone["pretrained"] and weights and not Path(weights).expanduser().exists():
        raise UserError(f"there is no file of backbone weights at {weights}: give weights=FILE")
    content = {
        **_scoring(folder, result),
        "task": config.task,
        "data": _data(ours["data"], stored_data, given, folder / "config.yaml"),
        "backbone": {k: v for k, v in state.backbone.items() if k != "sha256"} | {"weights": weights},
        "method": dict(state.method),
        "trainer": ours["trainer"],
        "paths": ours["paths"],
        "callbacks": {},
        "logger": None,
    }
    try:
        job = Job(**content)
    except UserError as error:
        raise UserError(f"{folder / 'config.yaml'} is refused: {error}; {_MEND}") from error
    places = {f"data.{name}": job.data.get(name) for name in ("root", "csv") if name not in given}
    places |= {"weights": weights} if weights == config.backbone.weights else {}
    for name, place in places.items():
        if place:
            _say(f"{name} is {place}, as the run recorded it: {name}=... names another place")
    there = config.data.get("data_dir")
    if isinstance(there, str) and there != ours["data"].get("data_dir") and "data_dir" in ours["data"]:
        _say(f"the run's data lay below {there}, here they are looked for below {ours['data']['data_dir']}")
    return job


def _say(line: str) -> None:
    console.print(line, soft_wrap=True)


def _read(path: Path) -> _Config:
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path} is refused: it is larger than any run's; {_MEND}")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): copy the whole folder of the run"
        ) from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} cannot be read (it is cut or no YAML): copy the whole folder of the run"
        ) from error
    return state_schema.read(_Config, content, path, _MEND)


def _compose(task: str, source: Path, data_dir: str | None) -> dict[str, Any]:
    """This project's own configs for a task's data, resolved for this machine."""
    spec = TASKS.get(task)
    files = [] if spec else sorted((CONFIGS / "data").rglob(f"{task}.yaml"))
    if spec is None and not files:
        raise UserError(
            f"{source} is refused: its data are of the config {task!r}, which is not in {CONFIGS / 'data'}"
        )
    name = spec.config if spec else files[0].relative_to(CONFIGS / "data").with_suffix("").as_posix()
    with nullcontext() if GlobalHydra.instance().is_initialized() else composing():
        cfg = hydra_compose("train", [f"data={name}"])
    if data_dir is not None:
        cfg.paths.data_dir = data_dir
    return {group: OmegaConf.to_container(cfg[group], resolve=True) for group in ("data", "trainer", "paths")}


def _data(
    ours: dict[str, Any], stored: Mapping[str, Any], given: Mapping[str, Any], source: Path
) -> dict[str, Any]:
    """Return the data module's settings.

    This machine's, then those that the run recorded, then the user's own.
    """
    target = str(stored.get("_target_", ours["_target_"]))
    if target != ours["_target_"] and not target.startswith("visprompt.data.") and "_target_" not in given:
        raise UserError(
            f"{source} names the data module {target!r:.80}, and a run's folder does not decide what code "
            "runs: give +data._target_=... yourself if that is your own module"
        )
    values: dict[str, Any] = {}
    for name, value in stored.items():
        if name in _THIS_MACHINE or name in given:
            continue
        if name not in ours:
            raise UserError(
                f"{source} is refused: data.{visible(str(name))} is not a setting of its data; {_MEND}"
            )
        if not _is_plain(value):
            raise UserError(f"{source} is refused: data.{name} is not a plain value; {_MEND}")
        values[name] = value
    # scoring is no occasion to fetch 40 GB
    return {**ours, **values, **({"download": False} if "download" in ours else {}), **given}


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Return whether a value is a number, a switch, a text that OmegaConf takes as it is, or a few of them."""
    if isinstance(value, dict):
        named = all(
            isinstance(name, str) and not name.startswith("_") for name in value
        )  # _target_ is Hydra's word
        return named and _is_plain([*value, *value.values()], depth)
    if isinstance(value, list):
        return (
            len(value) <= _MOST and depth < _DEEPEST and all(_is_plain(entry, depth + 1) for entry in value)
        )
    if isinstance(value, str):
        return not state_schema.has_control(value) and "${" not in value
    return value is None or isinstance(value, bool) or (type(value) in (int, float) and math.isfinite(value))


def _scoring(folder: Path, result: Result) -> dict[str, Any]:
    path = folder / "result.json"
    record = {name: getattr(result, name) for name in _Scoring.model_fields}
    known = state_schema.read(_Scoring, record, path, _MEND)
    try:
        if not known.recipe.keys() <= Recipe.model_fields.keys():
            raise UserError("its recipe is not of this version")
        recipe = Recipe(**known.recipe)
    except UserError as error:
        raise UserError(f"{path} is refused: {error}; {_MEND}") from error
    return known.model_dump() | {"recipe": recipe.model_dump()}


def own_data(cfg: DictConfig) -> dict[str, Any]:
    """Return the user's own settings of the data in a composed config, in plain containers."""
    return dict(OmegaConf.to_container(cfg.data, resolve=True))  # type: ignore[arg-type]  # a group is a mapping
