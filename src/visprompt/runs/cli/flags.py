"""Split a command line into Hydra's flags and settings, wherever the flags are."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser  # the only list of Hydra's flags

from visprompt.errors import UserError

_INFO = ("-i", "--info")
_SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class CommandLine:
    """A command line, split into flags and settings.

    Attributes:
        flags: Hydra's flags in their long form, each as one argument: `--cfg=job`.
        settings: `key=value`, `+key=value` and `~key`, in the order typed.
        options: The flags as parsed by Hydra: `options.cfg` is "job".
    """

    flags: list[str]
    settings: list[str]
    options: argparse.Namespace

    @property
    def settings_are_hydras(self) -> bool:
        """Whether Hydra reads no config of this project: completion, its help, a rerun, --config-path."""
        given = self.options
        return bool(
            given.hydra_help or given.shell_completion or given.experimental_rerun or given.config_path
        )

    @property
    def runs(self) -> bool:
        """Whether something is run, not only shown."""
        return not (self.options.help or self.options.cfg or self.options.info)

    @property
    def multirun(self) -> bool:
        """Whether `key=a,b` means one run for each value: `-m`, or `hydra.mode=MULTIRUN`."""
        return bool(self.options.multirun) or "hydra.mode=MULTIRUN" in self.settings


def split(arguments: Sequence[str]) -> CommandLine:
    """Split a command line with Hydra's parser, but allow settings also between and after flags.

    Args:
        arguments: The arguments after the program's name.

    Returns:
        Flags and settings.

    Raises:
        UserError: A flag is unknown, has no value or cannot be combined with another.
    """
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]  # argparse would print its usage and exit
    options, unknown = parser.parse_known_intermixed_args(_with_info(arguments))
    settings: list[str] = options.overrides
    for flag in unknown:
        name, _, value = flag.lstrip("-").partition("=")
        hint = f"type {name}={value}" if value else "type key=value, such as seed=1"
        raise UserError(
            f"{flag} is not a flag: settings have no dashes: {hint}; --hydra-help lists the flags"
        )
    given = {
        name: value
        for name, value in vars(options).items()
        if name != "overrides" and value not in (None, False)
    }
    _check_combination(given)
    if options.hydra_help:
        settings = []  # Hydra would look for them in its config of the help
    if options.shell_completion:
        settings = [_subcommand(word) for word in settings if _subcommand(word)]
        if len(settings) != 1:
            raise UserError(
                "-sc takes one of install=bash, uninstall=bash and query=bash, or another shell's name"
            )
    return CommandLine([_flag(name, value) for name, value in given.items()], settings, options)


def _with_info(arguments: Sequence[str]) -> list[str]:
    """Replace a bare `--info` by `--info=all`: else it takes the setting after it for its value."""
    following = [*arguments, ""][1:]
    return [
        "--info=all" if word in _INFO and ("=" in after or after.startswith("~")) else word
        for word, after in zip(arguments, following, strict=False)
    ]


def _subcommand(word: str) -> str:
    """Return a subcommand of shell completion: `install=bash` for `bash`, "" for a setting."""
    if word in _SHELLS:
        return f"install={word}"
    return word if word.startswith(("install=", "uninstall=", "query=")) else ""


def _flag(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag}={value}"


def _check_combination(given: Iterable[str]) -> None:
    modes = [name for name in ("run", "multirun", "cfg", "info", "shell_completion") if name in given]
    if len(modes) > 1:
        shown = " and ".join(_flag(name, True) for name in modes)
        raise UserError(f"{shown} ask for different things: give one of them")
    if "resolve" in given and not {"cfg", "help"}.intersection(given):
        raise UserError("--resolve belongs to --cfg or --help: leave it out, or add --cfg job")


def _refuse(message: str) -> NoReturn:
    raise UserError(
        f"Hydra's flags cannot be read: {message.removeprefix('argument ')}; --hydra-help lists them"
    )
