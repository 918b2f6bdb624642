"""The points of a grid trained together, beside one run.

In each round one point of the grid is trained singly, as `engine.stack=off` does, and then all points in one
stack; both are whole runs on a demo task, from the composed job to the files of every point, on frozen
outputs that were computed before. A ratio is the time of the stack over that of the single run of its round.

On a CPU `partial` is not stacked; this script does it, to show what it would take.
"""

import argparse
import contextlib
import tempfile
from itertools import product
from pathlib import Path
from statistics import median

import torch

from measuring import machine, milliseconds
from visprompt.runs import compose, stack
from visprompt.runs.job import Job
from visprompt.runs.result import markdown_table
from visprompt.runs.run_all import Outcome, console, run_all

DECAYS = (0.01, 0.001, 0.0001, 0.0)
HEADER = ("points", "one run, s", "the stack, s", "stack / one run", "points / ratio")


def make_job(method: str, logs: Path, options: argparse.Namespace) -> Job:
    words = [f"method={method}", f"data=demo/{options.task}", f"trainer={options.trainer}", "callbacks=none"]
    if options.epochs:
        words += [f"recipe.epochs={options.epochs}", "recipe.warmup_epochs=1"]
    with compose.composing():
        job = compose.job("tune", [*words, f"paths.log_dir={logs}"])
    return job.vary({"split": "tune"})


def grid(job: Job, points: int) -> list[Job]:
    """Rates around the recipe's, four decays of each."""
    rates = [job.recipe.lr * 1.5**power for power in range(-(points // 8), points - points // 8)]
    pairs = list(product(rates, DECAYS))[:points]
    return [job.vary({"recipe.lr": rate, "recipe.weight_decay": decay}) for rate, decay in pairs]


def seconds(jobs: list[Job], device: str, stacks: bool) -> tuple[float, list[Outcome]]:
    outcomes: list[Outcome] = []
    with contextlib.redirect_stdout(None):
        taken = milliseconds(lambda: outcomes.extend(run_all(jobs, stacks=stacks)), device)
    assert all(outcome.result is not None for outcome in outcomes), outcomes
    return taken / 1000, outcomes


def measured(method: str, points: int, options: argparse.Namespace) -> list[str]:
    ones, stacks = [], []
    device = "cuda" if options.trainer == "gpu" else "cpu"
    for place in range(options.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            single = grid(make_job(method, Path(folder) / "single", options), points)
            together = grid(make_job(method, Path(folder) / "stack", options), points)
            one, _ = seconds([single[place % points]], device, False)
            whole, outcomes = seconds(together, device, True)
            parts = {outcome.result.machine["stacked"] for outcome in outcomes if outcome.result}
            assert max(parts) > 1
        if place:  # the first round fills caches
            ones.append(one)
            stacks.append(whole)
    ratios = [whole / one for whole, one in zip(stacks, ones, strict=True)]
    spread = f"{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
    runs = f"{points / median(ratios):.1f}"
    return [method, str(points), f"{median(ones):.1f}", f"{median(stacks):.1f}", spread, runs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stacks", nargs="+", default=["linear:3", "linear:40", "mlp:3", "mlp:40", "partial:4"]
    )
    parser.add_argument("--task", default="digits_loc")
    parser.add_argument("--trainer", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="instead of those of the recipe")
    options = parser.parse_args()
    console.quiet = True
    stack.has_own_memory = lambda device: True  # also where a stack is not the faster way
    rows = []
    for given in options.stacks:
        method, _, points = given.partition(":")
        rows.append(measured(method, int(points), options))
        print(rows[-1], flush=True)
    clock = "CPU time" if torch.get_num_threads() == 1 and options.trainer == "cpu" else "wall time"
    print(f"\n{options.task}, {options.rounds} rounds, {clock}; {machine()}\n")
    print(markdown_table(["method", *HEADER], rows), end="")


if __name__ == "__main__":
    main()
