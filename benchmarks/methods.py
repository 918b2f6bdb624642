"""Every method on a demo task.

Accuracy by the protocol, and the time and memory of a training step side by side.

First the protocol of `experiment=demo_methods` (the grid on val200, the choice, three seeds on test): what is
finished in logs/ is read, what is missing is trained, which takes hours on a CPU; stop it and run it again as
you like (`engine=processes` makes several runs at a time). Then a step of each method is measured under equal
conditions, since the runs may have had company: with the chosen options, pruned as for the first seed.

A step is forward, loss, backward and the optimiser's step, on random images of the task's size, or on what is
kept of them where frozen layers run once for all epochs. The methods take turns, a round is one step of each;
a ratio is taken within a round. The table goes to standard output, all else to standard error.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import fmean, median
from typing import Any

import hydra

from measuring import added_mib, machine, milliseconds
from visprompt.errors import UserError
from visprompt.models.methods import METHODS
from visprompt.runs import compose
from visprompt.runs.engine.choose import opened
from visprompt.runs.engine.drive import drive
from visprompt.runs.job import Job
from visprompt.runs.result import Result, cell, markdown_table
from visprompt.runs.run import build_classifier, prepare
from visprompt.runs.run_all import asks_for_stacks
from visprompt.tuning import pruning
from visprompt.tuning.dry_run.pace import Bench
from visprompt.tuning.protocol import job_points, tune_one

BESIDE = "full"  # the method whose step is 1
HEADER = (
    "test accuracy, %",
    "tuned parameters + head",
    "share, %",
    "epochs",
    "training accuracy, %",
    "chosen on val200",
    "step, ms",
    "of full",
    "added, MiB",
)


def make_job(method: str, words: Sequence[str]) -> Job:
    """The composed job of one method; tuned as the protocol does."""
    with compose.composing():
        return compose.job("tune", ["experiment=demo_methods", "tasks=null", f"method={method}", *words])


def make_step(
    method: str, options: Mapping[str, Any], words: Sequence[str], device: str
) -> Callable[[], None]:
    """A training step of a method with options of a run."""
    # a hash, not a place
    changes = {f"method.{name}": value for name, value in options.items() if name != "weights"}
    job = make_job(method, words).vary(changes)
    run = prepare(job)
    classifier = build_classifier(job, run.backbone, run.datamodule.num_classes).to(device)
    return Bench(job, classifier, run.datamodule.augments).step(job.recipe.batch_size)


def memory(method: str, options: Mapping[str, Any], words: Sequence[str], device: str) -> float:
    return added_mib(make_step(method, options, words, device), device)


def chosen(results: Sequence[Result], grid: Mapping[str, Sequence[float]]) -> str:
    """What val200 chose of what was tried; of E2VPT also what each seed's own pruning left."""
    found = []
    for key, tried in grid.items():
        holder, _, name = key.rpartition(".")
        value = getattr(results[0], holder)[name]
        edge = " (an edge)" if _is_edge(value, tried) else ""
        found.append(f"{name} {_word(value)}{edge} of {', '.join(map(_word, tried))}")
    if "prune" in results[0].method:
        masks = [pruning.masks_of(result.method) for result in results]
        left = [f"{m.tokens.float().mean():.0%} and {m.segments[m.tokens].float().mean():.0%}" for m in masks]
        found.append(f"tokens and their segments left {'; '.join(left)}")
    return "; ".join(found) or "-"


def _is_edge(value: Any, tried: Sequence[Any]) -> bool:
    """Whether a value is the least or greatest of several numbers: a wider grid might give more."""
    numbers = [each for each in tried if isinstance(each, int | float)]
    return len(tried) == len(numbers) > 1 and value in (min(numbers), max(numbers))


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def score(methods: Sequence[str], words: Sequence[str]) -> dict[str, tuple[list[str], Mapping[str, Any]]]:
    """The first cells of each method's row, and the options of its first final run."""
    with compose.composing():
        cfg = hydra.compose("tune", list(words))
    jobs, seeds = [make_job(method, words) for method in methods], list(cfg.seeds)
    total = sum(len(job_points(job)) + len(seeds) for job in jobs)
    with (
        contextlib.redirect_stdout(sys.stderr),
        opened(compose.plain(cfg.engine), jobs, total) as engine,
    ):
        by_method = drive(engine, [tune_one(job, seeds) for job in jobs], asks_for_stacks(cfg))
    failed = [f"{each.name}: {each.reason}" for outcomes in by_method for each in outcomes if each.reason]
    if failed:
        raise UserError("; ".join(failed))
    found = {}
    for method, job, outcomes in zip(methods, jobs, by_method, strict=True):
        results = [outcome.result for outcome in outcomes if outcome.result]
        found[method] = cells(results, dict(job.grid or {})), results[0].method
    return found


def cells(results: Sequence[Result], grid: Mapping[str, Sequence[float]]) -> list[str]:
    """The first cells of a method's row, from its final runs."""
    names = ("parameters", "head_parameters", "share")
    parameters, head, share = (fmean(result.tuned[name] for result in results) for name in names)
    return [
        str(cell(results)),
        f"{parameters:,.0f} + {head:,.0f}",
        f"{100 * share:.2f}",
        str(results[0].recipe["epochs"]),
        f"{100 * fmean(result.metrics['train/acc'] for result in results):.1f}",
        chosen(results, grid),
    ]


def measured(
    methods: Mapping[str, Mapping[str, Any]], words: Sequence[str], options: argparse.Namespace
) -> dict[str, list[str]]:
    """The last cells of each method's row, with the options that are given for it."""
    steps = {
        m: make_step(m, given, words, options.device) for m, given in ({BESIDE: {}} | dict(methods)).items()
    }
    for step in steps.values():
        step()  # warms up
    rounds = [
        {m: milliseconds(step, options.device) for m, step in steps.items()} for _ in range(options.rounds)
    ]
    found = {}
    for method, given in methods.items():
        ratios = [times[method] / times[BESIDE] for times in rounds]
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            mib = fresh.submit(memory, method, given, words, options.device).result()
        spread = f"{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        found[method] = [f"{median(times[method] for times in rounds):.0f}", spread, f"{mib:.0f}"]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="more of src/tune.py's command line, such as trainer=cpu")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where steps are measured, in float32"
    )
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    try:
        rows = score(options.methods, options.words)
        steps = measured({method: given for method, (_, given) in rows.items()}, options.words, options)
    except UserError as error:
        sys.exit(str(error))
    print(f"batch of the recipe, float32 on {options.device}, {options.rounds} rounds; {machine()}\n")
    print(markdown_table(["method", *HEADER], [[m, *rows[m][0], *steps[m]] for m in options.methods]), end="")


if __name__ == "__main__":
    main()
