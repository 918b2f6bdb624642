"""Show the config that a command line composes, `--cfg job`, or with the options of all groups, `--help`."""

import string
from collections.abc import Iterator, Sequence

from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf, open_dict

from visprompt.errors import unknown
from visprompt.runs import compose, paths
from visprompt.runs.cli import words


def help_text(script: str, full: DictConfig, resolve: bool) -> str:
    """Return the help of an entry point, from the template in its config as Hydra would write it.

    Args:
        script: The entry point.
        full: The composed config, including `hydra`.
        resolve: Whether references such as `${task}` are replaced by their values.
    """
    with open_dict(full):
        full.hydra.job.name = script
    groups = (f"{group}: {', '.join(sorted(words.options(group)))}\n" for group in sorted(_groups()))
    config = OmegaConf.to_yaml(words.without_hydra(full), resolve=resolve)
    return string.Template(full.hydra.help.template).safe_substitute(
        APP_CONFIG_GROUPS="".join(groups), CONFIG=config
    )


def _groups(parent: str = "") -> Iterator[str]:
    """Yield the config groups that have options, without Hydra's."""
    for name in words.options(parent, ObjectType.GROUP):
        group = f"{parent}/{name}" if parent else name
        if group != "hydra":
            yield from [group] if words.options(group) else []
            yield from _groups(group)


def job_as_yaml(config_name: str, cfg: DictConfig, settings: Sequence[str], package: str | None) -> str:
    """Return the config with which a command would run, with the values of its task filled in.

    Args:
        config_name: A primary config.
        cfg: The composed config.
        settings: The settings of the command line.
        package: A dotted key, to show only what is below it; None or `_global_` shows everything.

    Returns:
        The config as YAML; for several tasks that of the first.

    Raises:
        UserError: The first job cannot be composed, or there is no such package.
    """
    note = ""
    if "task" in cfg:
        jobs = compose.settings_of_tasks(settings, cfg.tasks)
        job = compose.job(config_name, jobs[0])
        note = f"# {job.task}, the first of {len(jobs)} tasks\n" if len(jobs) > 1 else ""
        others = {
            key: value for key, value in compose.plain(cfg).items() if key in ("methods", "seeds", "table")
        }
        cfg = OmegaConf.create(job.content() | others)
    else:
        with open_dict(cfg):
            paths.expand_paths(cfg)
        OmegaConf.resolve(cfg)
    if package in (None, "_global_"):
        return note + OmegaConf.to_yaml(cfg)
    shown = OmegaConf.select(cfg, str(package), throw_on_missing=False)
    if shown is None:
        raise unknown("package", package, map(str, cfg))
    header = f"{note}# @package {package}\n"
    return header + OmegaConf.to_yaml(shown) if OmegaConf.is_config(shown) else f"{shown}\n"
