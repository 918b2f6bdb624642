"""Show the epoch of a run, counted from 1, and the time left of the run and of those that come after it."""

import math
import time
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import CustomTimeColumn
from rich.progress import ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from visprompt.models.tuning_module import TuningModule
from visprompt.runs import one_by_one


class RunProgressBar(RichProgressBar):
    """Lightning's bar with "epoch 3 of 20" and the time left until the last epoch, not only of this one.

    If the process makes several runs one after the other, it also shows "run 2 of 7" and the time left of
    all runs. The times are estimates: the rest is expected to take as long as what has been done.
    """

    _runs: one_by_one.OneByOne | None = None
    _began = 0.0  # by time.monotonic()
    _since = (0.0, 0.0)  # a time, and the epochs that had been done by then
    _done = 0.0  # epochs
    _epoch_s: float | None = None  # seconds of an epoch with its validation
    _max_steps: int | None = None  # of the recipe: `LastStep` ends the run, not Lightning

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to measure; a resumed run begins after the epochs that it has done."""
        super().on_train_start(trainer, pl_module)
        self._runs = one_by_one.current()
        self._max_steps = pl_module.recipe.max_steps if isinstance(pl_module, TuningModule) else None
        if self._runs is not None:
            self._runs.trains()
        self._began, self._done, self._epoch_s = time.monotonic(), trainer.current_epoch, None
        self._since = self._began, self._done

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure anew after the first epoch, in which images are decoded and frozen features computed."""
        super().on_train_epoch_start(trainer, pl_module)
        if self._epoch_s is not None and self._since[0] == self._began:
            self._since = time.monotonic(), trainer.current_epoch

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the seconds that an epoch takes."""
        self._done = trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches
        then, done = self._since
        self._epoch_s = (time.monotonic() - then) / (self._done - done)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def seconds_left(self) -> float | None:
        """Estimate the seconds until training of the last run ends; None before the first step."""
        epochs = self._epochs()
        if self._epoch_s is None or epochs is None:
            return None
        left = self._epoch_s * (epochs - self._done)
        this = time.monotonic() - self._began + left
        return left + (self._runs.seconds_after(this) if self._runs else 0.0)

    def _epochs(self) -> float | None:
        """Return the epochs of the run, with a part of the last one if it ends by a number of steps."""
        trainer, epochs = self.trainer, self.trainer.max_epochs
        if epochs is None or epochs < 0:
            return None
        if not self._max_steps:
            return epochs
        steps_of_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        return min(epochs, self._max_steps / steps_of_epoch)

    def time_left(self) -> str:
        """Return the time left in words: "0:04:10 left of 7 runs", or "" before the first step."""
        left = self.seconds_left()
        if left is None:
            return ""
        minutes, seconds = divmod(round(left), 60)
        words = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
        return f"{words} of {self._runs.total} runs" if self._runs and self._runs.total > 1 else words

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self._epochs()
        of = f" of {math.ceil(epochs)}" if epochs else ""
        runs = self._runs
        run = f"run {runs.done + 1} of {runs.total}, " if runs and runs.total > 1 else ""
        return f"{run}epoch {current_epoch + 1}{of}"

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Return Lightning's columns, with the time left of the runs in place of that of the epoch."""
        columns = super().configure_columns(trainer)
        return [_TimeLeft(self) if isinstance(column, CustomTimeColumn) else column for column in columns]


class _TimeLeft(ProgressColumn):
    """The time left, beside the bar of training; that of the test has none."""

    max_refresh = 0.5

    def __init__(self, bar: RunProgressBar) -> None:
        self._bar = bar
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        trains = self._bar.train_progress_bar_id == task.id
        return Text(self._bar.time_left() if trains else "", style=str(self._bar.theme.time))
