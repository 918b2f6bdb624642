"""Check what a user typed before Hydra reads it, and print errors as one sentence."""

import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from visprompt import compose, signals, words
from visprompt.data import catalog
from visprompt.errors import UserError, in_one_line


def check_words(config_name: str) -> None:
    """Composes the command line before Hydra does, to name the nearest valid word for one that is wrong.

    Args:
        config_name: The entry point's primary config.

    Raises:
        SystemExit: A group option or key is unknown, or a value does not fit; one sentence says so.
    """
    with one_sentence_errors():
        compose.check_own(config_name, sys.argv[1:])
        sys.argv[1:] = _with_data(config_name, sys.argv[1:])
    arguments = sys.argv[1:]
    if any(argument.startswith("-") for argument in arguments):
        return  # a flag of Hydra's own, such as --help or --multirun: its commas are no single values
    with one_sentence_errors(), initialize_config_dir(str(compose.CONFIGS), version_base="1.3"):
        try:
            cfg = hydra_compose(config_name, arguments)
        except MissingConfigException as error:
            raise words.unknown_option(error) from error
        except OverrideParseException as error:
            raise UserError(f"an argument cannot be read: {in_one_line(error)}") from error
        except ValueError as error:
            raise UserError(f"{in_one_line(error)}: {' '.join(words.choices(arguments))}") from error
        except (HydraException, OmegaConfBaseException) as error:
            raise words.unknown_key(config_name, arguments, error) from error
        words.check_added(config_name, arguments)
        compose.check_values(cfg)
        if cfg.get("tasks") is not None:
            compose.specs(cfg.tasks)


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Prints a `UserError` as its sentence, without a traceback, and exits with status 2.

    A signal goes through, as `signals.Ended`. In a multirun any error goes on to Hydra, which runs the other jobs.
    """
    if compose.in_multirun():
        signals.install()  # a launcher's worker runs no entry point
    try:
        with signals.consequences():
            yield
    except UserError as error:
        if compose.in_multirun():
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # of a handler that is not ours
        print(f"\n{signals.sentence(signal.SIGINT)}", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception:
        # Hydra would cut the traceback to its own taste
        traceback.print_exc()
        if compose.in_multirun():
            raise
        raise SystemExit(1) from None


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
    file = compose.CONFIGS / "experiment" / f"{names[-1]}.yaml" if names else None
    if file is None or not file.is_file():
        return []
    found = OmegaConf.to_container(OmegaConf.load(file))
    tasks = found.get("tasks") if isinstance(found, dict) else None
    return [] if tasks is None else [tasks if isinstance(tasks, str) else ",".join(tasks)]
