"""Show the config that a command line composes: `--cfg job`."""

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf, open_dict

from visprompt.errors import unknown
from visprompt.runs import compose, paths


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
