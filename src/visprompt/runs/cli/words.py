"""Find the word of a command line that Hydra does not know, and suggest similar ones."""

from collections.abc import Iterator, Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from visprompt.errors import UserError, in_one_line, unknown
from visprompt.runs import compose
from visprompt.runs.paths import CONFIGS
from visprompt.runs.settings import no_trainer_key

SCRIPTS = ("train", "tune", "eval", "predict", "prepare", "report", "export", "serve")
"""The entry points, which are also the names of their configs; the one with the most keys is first."""
_OF_TEMPLATES = {
    "ckpt_path": "a run that was stopped goes on by its own command again, and src/eval.py takes run=FOLDER",
    "train": "src/eval.py run=FOLDER scores a finished run without training",
    "test": "split=tune trains without reading the test set, and scores the validation images",
    "hparams_search": (
        "sweeps are W&B's: wandb sweep configs/sweep/lr_wd.yaml, and wandb agent with the id it prints"
    ),
    "task_name": "a run is named by its task, its method and a hash of its settings; tags=[NAME] marks it",
    "optimized_metric": "src/train.py returns the accuracy of the run: val/acc with split=tune",
}
"""Keys of lightning-hydra-template that this project does not have, and what to do instead."""


def composed(config_name: str, settings: Sequence[str]) -> DictConfig:
    """Compose a config as Hydra will.

    Args:
        config_name: A primary config.
        settings: Settings of a command line, without sweeps.

    Returns:
        The config, including `hydra`.

    Raises:
        UserError: An option or a key is unknown.
    """
    try:
        return hydra_compose(config_name, list(settings), return_hydra_config=True)
    except MissingConfigException as error:
        raise _unknown_option(error) from error
    except ValueError as error:  # the option of a group is null, a number or a mapping
        for setting in _choices(settings):
            if setting.partition("=")[2] == "null":
                choices = ", ".join(options(_group(setting)))
                raise UserError(f"{setting} names no option: give one of {choices}") from error
        raise UserError(f"{in_one_line(error)}: {' '.join(_choices(settings))}") from error
    except TypeError as error:  # the option is a list of lists, which Hydra tries to join to a path
        raise UserError(
            f"{' '.join(_choices(settings))} cannot be read: an option is a name, as in data=folder"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise _unknown_key(config_name, settings, error) from error


def without_hydra(cfg: DictConfig) -> DictConfig:
    """Return a composed config without Hydra's settings, some of which have no value before Hydra runs."""
    return OmegaConf.masked_copy(cfg, [key for key in map(str, cfg) if key != "hydra"])


def check_added(config_name: str, settings: Sequence[str]) -> None:
    """Refuse `+key=...` for a new top-level key, which nothing would read.

    A new key below a known one is judged by the code that reads the known one.
    """
    added = [_group(setting) for setting in settings if setting[:1] == "+"]
    known = {"hydra", *map(str, hydra_compose(config_name))} if added else set()
    for key in added:
        top = key.partition(".")[0]
        if top in known:
            continue
        if other := _of_another_script(config_name, key):
            raise other
        if not _is_group(top):
            raise unknown("key", top, known)


def is_config(name: str) -> bool:
    """Return whether there is a primary config of this name."""
    return name in configs()


def configs() -> list[str]:
    """List the primary configs, including those of `--config-dir`."""
    names = options("")
    return [name for name in names if not name.startswith("_")]  # Hydra adds one for internal use


def _is_group(name: str) -> bool:
    return bool(name) and bool(options(name))


def options(group: str, kind: ObjectType = ObjectType.CONFIG) -> list[str]:
    """Return the options of a config group, or the groups below it."""
    loader: Any = GlobalHydra.instance().config_loader()
    # the loader's own function copies all its sources at each call
    found: list[str] = loader.repository.get_group_options(group, kind)
    return found


def _group(setting: str) -> str:
    """Return the config group, or the key, that a setting names: `data` of `+data@other=folder`."""
    return compose.key_of(setting).partition("@")[0]


def _choices(settings: Sequence[str]) -> list[str]:
    """Return the settings that choose an option of a config group."""
    return [setting for setting in settings if _is_group(_group(setting))]


def _unknown_option(error: MissingConfigException) -> UserError:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    top = group.split("/")[0]
    folder = CONFIGS / top
    if not error.options or not group:
        return UserError(in_one_line(error))
    if top == "hydra" or not folder.is_dir():
        return unknown(group, option, error.options)
    below = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    # Hydra's list also has the options of --config-dir
    options = [f"{group}/{name}".removeprefix(f"{top}/") for name in error.options]
    return unknown(top, f"{group}/{option}".removeprefix(f"{top}/"), [*below, *options])


def _unknown_key(config_name: str, settings: Sequence[str], error: Exception) -> UserError:
    choices = _choices(settings)
    try:
        bare = hydra_compose(config_name, return_hydra_config=True)
    except HydraException as bare_error:  # without any setting
        hint = "configs/local/default.yaml may set values, but cannot choose options of config groups"
        return UserError(f"the files in configs cannot be composed: {in_one_line(bare_error)}; {hint}")
    groups = [str(group) for group in bare.hydra.runtime.choices]
    for choice in choices:
        if _group(choice) not in groups:
            others = [name for name in groups if not name.startswith("hydra")]
            return _of_another_script(config_name, _group(choice)) or unknown("key", _group(choice), others)
    try:
        cfg = hydra_compose(config_name, choices, return_hydra_config=True) if choices else bare
    except HydraException as choice_error:  # a choice itself is wrong, such as backbone={a:b}
        return UserError(in_one_line(choice_error))
    keys = {
        key
        for key in _keys(without_hydra(cfg))
        if not key.startswith("recipe.rows") and "_target_" not in key
    }
    tables = {key.rpartition(".")[0] for key in keys}  # groups of keys, which are not suggested themselves
    for setting in settings:
        key = setting.partition("=")[0]
        if setting in choices or not key[:1].isalpha() or key.startswith("hydra") or key in keys:
            continue
        if key.startswith("trainer.") and key.count(".") == 1:
            return no_trainer_key(key.partition(".")[2])
        if key in _OF_TEMPLATES:
            return UserError(f"unknown key {key!r}: {_OF_TEMPLATES[key]}")
        last = key.rpartition(".")[2]  # optimizer.lr means recipe.lr
        if below := sorted(known for known in keys if known.rpartition(".")[2] == last and "." in known):
            return UserError(f"unknown key {key!r}: did you mean {' or '.join(below[:3])}?")
        chosen = dict(cfg.hydra.runtime.choices)
        other = _of_another_script(config_name, key) or _of_another_option(key, chosen, keys)
        return other or unknown("key", key, keys - tables)
    return UserError(in_one_line(error))


def _of_another_script(config_name: str, key: str) -> UserError | None:
    """Build the error for a key that only another entry point has; return None if there is no such one."""
    top = key.partition(".")[0]
    if config_name not in SCRIPTS or top in _top_keys(config_name):
        return None
    for script in SCRIPTS:
        if top in _top_keys(script):
            return UserError(f"{key} belongs to src/{script}.py, not to src/{config_name}.py: leave it out")
    return None


def _top_keys(config_name: str) -> set[str]:
    """Return the top-level keys and config groups of a primary config, read from its file, which is fast."""
    cfg = OmegaConf.load(CONFIGS / f"{config_name}.yaml")
    names = {str(key) for key in cfg} - {"defaults"}
    for entry in OmegaConf.select(cfg, "defaults", default=()):
        if OmegaConf.is_dict(entry):
            names |= {str(group) for group in entry if " " not in str(group)}  # not `override hydra/help`
        elif entry != "_self_":
            names |= _top_keys(str(entry))
    return names


def _of_another_option(key: str, chosen: dict[str, str], keys: set[str]) -> UserError | None:
    """Build the error for a key that only another option of its group has; return None if no option has it.

    Example:
        `method.num_tokens` with `method=linear`.
    """
    group, _, name = key.partition(".")
    if group not in chosen or not _is_group(group):
        return None
    folder = CONFIGS / group
    files = {
        path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))
    }
    owners = [
        option for option, path in files.items() if name in _names(path.relative_to(CONFIGS).as_posix())
    ]
    if not owners:
        return None
    has = sorted(
        other.partition(".")[2] for other in keys if other.startswith(f"{group}.") and other.count(".") == 1
    )
    has = [other for other in has if other not in ("name", "_target_")]
    listed = ", ".join(owners[:8]) + (f" and {len(owners) - 8} more" if len(owners) > 8 else "")
    what = f"has {', '.join(has)}" if has else "has no options"
    return UserError(f"{name} is an option of {listed}: {group} {chosen[group]} {what}")


def _names(file: str) -> set[str]:
    """Return the top-level keys of a config file and of the files that its defaults list includes."""
    cfg = OmegaConf.load(CONFIGS / file)
    if not isinstance(cfg, DictConfig):
        return set()
    names = {str(key) for key in cfg} - {"defaults"}
    for entry in cfg.get("defaults", ()):
        path = str(entry).partition("@")[0]
        if isinstance(entry, str) and path != "_self_":
            folder = "" if path.startswith("/") else f"{file.rpartition('/')[0]}/"
            names |= _names(f"{folder}{path.lstrip('/')}.yaml")
    return names


def _keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, cfg):
        yield f"{prefix}{key}"
        if OmegaConf.is_dict(cfg._get_node(key)) and not OmegaConf.is_missing(cfg, key):
            yield from _keys(cfg[key], f"{prefix}{key}.")
