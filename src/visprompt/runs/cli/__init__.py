"""Check what a user typed before Hydra reads it, and print errors as one sentence."""

import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from visprompt.errors import UserError, unknown
from visprompt.models.recipe import Recipe
from visprompt.runs import compose, memory, signals
from visprompt.runs.cli import arguments, flags, points, words
from visprompt.runs.cli.show import help_text, job_as_yaml
from visprompt.runs.paths import check_writable
from visprompt.text import visible


class PointFailed(UserError, CompactHydraException):
    """A job of a multirun failed for a reason that its message explains; Hydra prints the message alone."""


def check_words(config_name: str) -> None:
    """Check the command line before Hydra reads it, and rewrite `sys.argv` in a form that Hydra can read.

    The config is composed here as Hydra will compose it (under `-m` for every job of the multirun), so that a
    misspelt word gives one sentence with the nearest valid word. Flags may be before, between and after the
    settings. `--help` and `--cfg job` are answered here.

    Args:
        config_name: The entry point's primary config.

    Raises:
        SystemExit: A flag, key, option or value is wrong, and the error has been printed; or `--help` or
            `--cfg job` has been answered.
    """
    with one_sentence_errors():
        line = flags.split(sys.argv[1:])
        settings = line.settings if line.settings_are_hydras else _checked(config_name, line)
        sys.argv[1:] = [*line.flags, *settings]


def _checked(script: str, line: flags.CommandLine) -> list[str]:
    settings = [arguments.plain(setting) for setting in line.settings]
    parsed = arguments.parse(settings, script, line.multirun)
    config_name = str(line.options.config_name or script).removesuffix(".yaml")
    compose.check_own(config_name, settings)
    if config_name == "train" and any(
        compose.key_of(setting).startswith("recipe.grid") for setting in settings
    ):
        raise UserError(
            "recipe.grid has no effect on src/train.py, which runs one point: give it to src/tune.py"
        )
    with compose.composing(line.options.config_dir):
        if not words.is_config(config_name):
            raise unknown("config", config_name, words.configs())
        given = points.axes(parsed)
        data = compose.data_of_tasks(config_name, [axis.settings for axis in given])
        for number, point in enumerate(points.combinations(given)):
            full = words.composed(config_name, [*point, *data])
            cfg = words.without_hydra(full)
            words.check_added(config_name, point)
            _check(cfg, given, line.runs)
            _check_values_of(cfg, given)
            if number == 0 and line.runs:
                _check_folder(cfg, Path(full.hydra.sweep.dir if line.multirun else full.hydra.run.dir))
        if line.options.help:
            print(help_text(script, full, line.options.resolve))
            raise SystemExit(0)
        if line.options.cfg == "job":
            print(job_as_yaml(config_name, cfg, [*settings, *data], line.options.package), end="")
            raise SystemExit(0)
    return [*settings, *data]


def _check(cfg: DictConfig, given: Sequence[points.Axis], to_run: bool) -> None:
    compose.check_values(cfg, to_run)
    if cfg.get("tasks") is not None:
        compose.specs(cfg.tasks)
    if "recipe" in cfg and any(len(axis.settings) > 1 and axis.key.startswith("recipe.") for axis in given):
        recipe = compose.plain(cfg.recipe)
        Recipe(**{name: value for name, value in recipe.items() if name not in ("grid", "table")})


def _check_values_of(cfg: DictConfig, given: Sequence[points.Axis]) -> None:
    """Check the second and later values of each swept setting, one at a time."""
    for values in points.other_values(given):
        for setting in values:
            override = OverridesParser.create().parse_override(setting)
            with open_dict(cfg):
                OmegaConf.update(cfg, override.key_or_group, override.value(), merge=False, force_add=True)
            _check(cfg, given, to_run=True)


def _check_folder(cfg: DictConfig, output_dir: Path) -> None:
    """Refuse a place where Hydra could not make its output folder."""
    log_dir = str(OmegaConf.select(cfg, "paths.log_dir", default=""))
    below = log_dir and output_dir.is_relative_to(Path(log_dir).expanduser())
    key, value = ("paths.log_dir", log_dir) if below else ("hydra.run.dir", str(output_dir))
    check_writable(output_dir.parent, key, value)


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Print a `UserError` as its sentence, without a traceback, and exit with status 2.

    `signals.Ended` passes through. In a multirun every error is passed on to Hydra, which runs the other
    jobs.
    """
    if compose.in_multirun():
        signals.install()  # a worker of a Hydra launcher has not run the entry point's first lines
    try:
        with (
            signals.consequences(),
            memory.explained(lambda: "end other programs, or take a machine that has more"),
        ):
            yield
    except UserError as error:
        if compose.in_multirun():
            raise PointFailed(f"error: {error}") from None
        print(f"error: {visible(str(error), keep=chr(10))}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # raised by another signal handler than ours
        print(f"\n{signals.sentence(signal.SIGINT)}", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception:  # a bug: Hydra would shorten the traceback, so it is printed here
        traceback.print_exc()
        if compose.in_multirun():
            raise
        raise SystemExit(1) from None
