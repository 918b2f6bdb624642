"""What a run adds to Lightning's own loop: milliseconds of a step and of an epoch, seconds of preparation.

*run* is `linear` on the demo backbone, on frozen features that are computed once, as `src/train.py` does it.
*bare* is a LightningModule of a few lines on the same features in Lightning's trainer: the same head,
optimiser, schedule, batch size, steps and epochs, and nothing is logged, written or scored. Its batches are
gathered from one tensor by a permutation, which is the least that a loader can do; *loader* is the same
module with torch's `DataLoader` of a `TensorDataset`, as most code has it.

A step is the time between the ends of two steps of one epoch; an epoch is the time between the last step of
one and the first of the next, less a step; preparation is the time before the first step ends, less a step.
Steps and epochs are in CPU time, if the process has one thread and no GPU. The ways take turns in the middle
of each epoch, so that what else the machine does meets all of them. Of the steps and epochs of a round the
tenth percentile counts, because it only adds to a time. The table shows the median [least, greatest] of the
rounds.
"""

import argparse
import logging
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from measuring import machine
from visprompt.models.optim import build_optimizer
from visprompt.models.recipe import Recipe
from visprompt.runs import compose, run
from visprompt.runs.job import Job
from visprompt.runs.result import markdown_table

WAYS = ("bare", "loader", "run")
FIGURES = ("ms a step", "ms an epoch", "s of preparation")


class Turns:
    """Lets one of several threads run at a time."""

    def __init__(self, count: int) -> None:
        self._changed, self._waiting = threading.Condition(), list(range(count))

    def wait(self, number: int) -> None:
        """Wait for the turn of a thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[0] == number)

    def pass_on(self, number: int, done: bool) -> None:
        """Give the turn to the next thread, and wait for the next one unless the thread is done."""
        with self._changed:
            self._waiting.remove(number)
            self._waiting += [] if done else [number]
            self._changed.notify_all()
        if not done:
            self.wait(number)


class Clock(L.Callback):
    """Notes when each step ends, and passes the turn on in the middle of an epoch."""

    def __init__(self, pass_on: Callable[[], None]) -> None:
        self.began = time.perf_counter()
        self.pass_on = pass_on
        self.runs: list[list[tuple[int, float, float]]] = [[]]  # epoch, CPU and wall time; cut at each turn

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Note the time."""
        self.runs[-1].append((trainer.current_epoch, time.process_time(), time.perf_counter()))
        if batch_idx + 1 == int(trainer.num_training_batches) // 2:
            self.pass_on()
            self.runs.append([(trainer.current_epoch, time.process_time(), time.perf_counter())])

    def figures(self) -> tuple[float, float, float]:
        """Return the milliseconds of a step and of an epoch, and the seconds of preparation."""
        pairs = [pair for run in self.runs for pair in pairwise(run)]
        clock = 1 if torch.get_num_threads() == 1 and not torch.cuda.is_available() else 2
        step = quiet(b[clock] - a[clock] for a, b in pairs if a[0] == b[0])
        epoch = quiet(b[clock] - a[clock] - step for a, b in pairs if a[0] != b[0])
        return 1000 * step, 1000 * epoch, self.runs[0][0][2] - self.began - step


class Bare(L.LightningModule):
    """A linear head on features, with the recipe's optimiser."""

    def __init__(self, width: int, classes: int, recipe: Recipe, steps: int) -> None:
        super().__init__()
        self.head, self.recipe, self.steps = nn.Linear(width, classes), recipe, steps

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self.head(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Return the run's optimiser and schedule."""
        named = ((f"head.{name}", parameter) for name, parameter in self.head.named_parameters())
        optimizer, schedule = build_optimizer(named, self.recipe, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Gathered:
    """Shuffled batches, gathered from one tensor."""

    def __init__(self, features: Tensor, labels: Tensor, size: int) -> None:
        self.features, self.labels, self.size = features, labels, size

    def __len__(self) -> int:
        return -(-len(self.labels) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.labels)).split(self.size):
            yield self.features[rows], self.labels[rows]


def make_job(folder: Path, options: argparse.Namespace, seed: int) -> Job:
    """Compose the job of a run, each with its seed, so that none is found finished."""
    words = ["method=linear", "data=demo/digits", "callbacks=none", f"split={options.split}"]
    words += [f"trainer.accelerator={'gpu' if options.device == 'cuda' else 'cpu'}", f"seed={seed}"]
    words += [f"recipe.epochs={options.epochs}", f"paths.log_dir={folder}", *options.words]
    with compose.composing():
        return compose.job("train", words)


def measure_run(job: Job, pass_on: Callable[[], None] = lambda: None) -> tuple[float, float, float]:
    """Make a run, and return its figures."""
    clock = Clock(pass_on)
    built = run.build_trainer

    def with_clock(job: Job, *callbacks: L.Callback) -> L.Trainer:
        return built(job, *callbacks, clock)

    run.build_trainer = with_clock
    try:
        run.run_job(run.prepare(job))
    finally:
        run.build_trainer = built
    return clock.figures()


def measure_bare(
    job: Job, features: Tensor, labels: Tensor, usual: bool, pass_on: Callable[[], None]
) -> tuple[float, float, float]:
    """Train the bare module, and return its figures."""
    clock, size = Clock(pass_on), job.recipe.batch_size
    loader: Any = Gathered(features, labels, size)
    if usual:
        loader = DataLoader(TensorDataset(features.cpu(), labels.cpu()), batch_size=size, shuffle=True)
    module = Bare(features.shape[1], int(labels.max()) + 1, job.recipe, len(loader))
    quiet: Mapping[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = L.Trainer(
        accelerator=job.trainer.accelerator,
        devices=1,
        max_epochs=job.recipe.epochs,
        callbacks=[clock],
        **quiet,
    )
    trainer.fit(module, loader)
    return clock.figures()


def features_of(job: Job) -> tuple[Tensor, Tensor]:
    """Return the frozen features of a job's training images, and their labels, on its device."""
    prepared = run.prepare(job)
    dataset = prepared.datamodule.train_dataset
    device = "cuda" if job.trainer.accelerator == "gpu" else "cpu"
    classifier = run.build_classifier(job, prepared.backbone, prepared.datamodule.num_classes).to(device)
    classifier.eval()
    parts = []
    with torch.no_grad():
        for batch in prepared.datamodule.feature_dataloader(dataset):
            moved = batch._replace(images=batch.images.to(device))
            parts.append(classifier.frozen(prepared.datamodule.on_after_batch_transfer(moved, 0).images))
    return torch.cat(parts), dataset.labels.to(device)


def in_turns(*ways: Callable[..., tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Call functions that pass the turn on, and return their results."""
    turns = Turns(len(ways))

    def call(number: int) -> tuple[float, float, float]:
        turns.wait(number)
        try:
            return ways[number](pass_on=lambda: turns.pass_on(number, done=False))
        finally:
            turns.pass_on(number, done=True)

    with ThreadPoolExecutor(len(ways)) as threads:
        return list(threads.map(call, range(len(ways))))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="more of src/train.py's command line")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--split", choices=("final", "tune"), default="final", help="tune validates each epoch"
    )
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rounds: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        features, labels = features_of(make_job(folder, options, 0))
        for seed in range(options.rounds + 1):  # the first warms up
            job = make_job(folder, options, seed)
            measured = in_turns(
                partial(measure_bare, job, features, labels, False),
                partial(measure_bare, job, features, labels, True),
                partial(measure_run, job),
            )
            for way, figures in zip(WAYS, measured, strict=True):
                rounds[way] += [figures] if seed else []
    rows = [[way, *(spread(each) for each in zip(*rounds[way], strict=True))] for way in WAYS]
    pairs = zip(rounds["run"], rounds["bare"], strict=True)
    added = [tuple(a - b for a, b in zip(*pair, strict=True)) for pair in pairs]
    rows.append(["run - bare", *(spread(each) for each in zip(*added, strict=True))])
    steps = -(-len(labels) // job.recipe.batch_size)
    print(
        f"linear on {len(labels)} x {features.shape[1]} features on {options.device}, split={options.split}, "
        f"{options.epochs} epochs of {steps} steps, batch {job.recipe.batch_size}, {options.rounds} rounds; "
        f"{machine()}\n"
    )
    print(markdown_table(["way", *FIGURES], rows), end="")


def quiet(values: Iterable[float]) -> float:
    """Return the lowest tenth's upper limit: other programs of the machine only add to a time."""
    return quantiles(values, n=10)[0]


def spread(values: Sequence[float]) -> str:
    """Return the median of values with the least and the greatest."""
    return f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


if __name__ == "__main__":
    main(sys.argv[1:])
