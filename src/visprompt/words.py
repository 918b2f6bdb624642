"""Say which word of a command line Hydra does not know, and which ones are near."""

from collections.abc import Iterator, Sequence

from hydra import compose as hydra_compose
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from visprompt import compose
from visprompt.errors import UserError, in_one_line, unknown


def unknown_option(error: MissingConfigException) -> UserError:
    """Build the error for an option that its config group does not have."""
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    top = group.split("/")[0]
    if not error.options or not (compose.CONFIGS / top).is_dir() or not top:
        return UserError(in_one_line(error))
    below = (
        path.relative_to(compose.CONFIGS / top).with_suffix("") for path in (compose.CONFIGS / top).rglob("*.yaml")
    )
    return unknown(top, f"{group}/{option}".removeprefix(f"{top}/"), [path.as_posix() for path in below])


def choices(arguments: Sequence[str]) -> list[str]:
    """Those arguments that choose an option of a config group."""
    return [a for a in arguments if (compose.CONFIGS / a.lstrip("+~").partition("=")[0].partition("@")[0]).is_dir()]


def unknown_key(config_name: str, arguments: Sequence[str], error: Exception) -> UserError:
    """Build the error for the first argument whose key the chosen groups do not have."""
    groups = choices(arguments)
    try:
        own = [str(group) for group in hydra_compose(config_name, return_hydra_config=True).hydra.runtime.choices]
    except HydraException as bare:  # without any argument
        hint = "configs/local/default.yaml may give values, but choose no groups"
        return UserError(f"the files in configs cannot be composed: {in_one_line(bare)}; {hint}")
    for argument in groups:
        group = argument.lstrip("+~").partition("=")[0].partition("@")[0]
        if group not in own:  # a group of another entry point
            return unknown("key", group, [name for name in own if not name.startswith("hydra")])
    keys = set(_keys(hydra_compose(config_name, groups)))
    for argument in arguments:
        key = argument.partition("=")[0]
        if argument not in groups and key[:1].isalpha() and not key.startswith("hydra") and key not in keys:
            return unknown("key", key, keys)
    return UserError(in_one_line(error))


def check_added(config_name: str, arguments: Sequence[str]) -> None:
    """Refuses `+key=...` beside the known keys: nothing would read it. Below a known key its reader judges."""
    added = [a.lstrip("+").partition("=")[0].partition(".")[0].partition("@")[0] for a in arguments if a[:1] == "+"]
    known = {"hydra", *map(str, hydra_compose(config_name))} if added else set()
    for key in added:
        if key not in known and not (compose.CONFIGS / key).is_dir():
            raise unknown("key", key, known)


def _keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, cfg):
        yield f"{prefix}{key}"
        if OmegaConf.is_dict(cfg._get_node(key)) and not OmegaConf.is_missing(cfg, key):
            yield from _keys(cfg[key], f"{prefix}{key}.")
