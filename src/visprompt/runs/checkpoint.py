"""Save and load a run's resume state: a checkpoint plugin without pickle, and the callback that uses it."""

import csv
import io
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from visprompt.errors import UserError
from visprompt.files import write_atomically
from visprompt.models.tensors import not_finite
from visprompt.runs.resume_state import Owner, Snapshot, read_checkpoint, snapshot
from visprompt.runs.run_folder import CURVE, STATE
from visprompt.runs.run_lock import Hold

log = logging.getLogger(__name__)
_SHARE = 20  # the time between two states is at least so many times what a state takes
_LONGEST = 600.0  # seconds between two states, if an epoch is shorter
_FIRST, _SPEED = (
    0.01,
    2e8,
)  # seconds that a small state takes, and bytes per second: guesses for the first one


class SafetensorsIO(CheckpointIO):
    """Writes each Lightning checkpoint as one safetensors file, see `resume_state`.

    Args:
        beside: Whether files are written in a thread while training goes on; `wait` waits for the last one.

    Attributes:
        seconds: What the last file that is complete took; None before the first.
        after: Called when a file is complete.
    """

    def __init__(self, beside: bool = False) -> None:
        self.seconds: float | None = None
        self.after: Callable[[], None] = lambda: None
        self._beside = beside
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, after the one before it; a copy is made at once.

        Raises:
            UserError: This file, or the one before it, cannot be written.
        """
        self.wait()
        since = time.monotonic()
        thread = threading.Thread(
            target=self._write, args=(snapshot(checkpoint), Path(path), since), name="resume state"
        )
        thread.start()
        self._thread = thread  # not before: a signal here must not find one to wait for that never began
        if not self._beside:
            self.wait()

    def wait(self) -> None:
        """Wait until the last file is complete.

        Raises:
            UserError: It could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, copy: Snapshot, path: Path, since: float) -> None:
        try:
            copy.write(path)
            self.after()
        except BaseException as error:  # raised by `wait` in the main thread
            self._error = error
        else:
            self.seconds = time.monotonic() - since

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint with its tensors on the CPU."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


class ResumeCheckpoint(Checkpoint):
    """Writes a run's resume state and its learning curve (`metrics.csv`) at the ends of epochs.

    The resume state contains the curve, so that after a resume `metrics.csv` and the state agree about the
    epochs. (Lightning's CSV logger would delete the existing file.) The class derives from `Checkpoint`
    because Lightning runs checkpoint callbacks after all others.

    Without a fixed interval, the state is written after an epoch if the last one is older than `_SHARE` times
    what a write takes, or than `_LONGEST`: at most a twentieth of the time goes into states, and a kill costs
    at most ten minutes, the epoch that it falls in, and a write that it cuts off.

    Args:
        folder: Where `state.safetensors` and `metrics.csv` are written.
        every_n_epochs: How often the state is written; None for as often as said above.

    Attributes:
        rows: The metrics of each epoch, by epoch.
        seconds: Training time up to the last state, summed over all processes that trained the run.
        owner: The attempt that the state belongs to; set before the fit, when the attempt is known.
        hold: The run's folder, in the process that holds it; set before the fit.
    """

    def __init__(self, folder: Path, every_n_epochs: int | None = None) -> None:
        self.path = folder / STATE
        self.csv = folder / CURVE
        self.every_n_epochs = every_n_epochs
        self.rows: dict[int, dict[str, float]] = {}
        self.seconds = 0.0
        self.owner: Owner | None = None
        self.hold: Hold | None = None
        self._since = 0.0
        self._written = 0.0  # when the last state was begun
        self._columns: tuple[str, ...] = ()  # of the file `csv`, if this process has written it
        self._stopped = False  # whether a callback ended training after the last epoch

    def find(self, owner: Owner) -> Path | None:
        """Return the resume state to continue from, and remember the owner for the states written later.

        Args:
            owner: The attempt that is about to be trained.

        Returns:
            The file, or None if training starts from the beginning.

        Raises:
            UserError: The file is damaged, belongs to another run or attempt, was written by a version that
                did not record the owner, or holds numbers that are not finite.
        """
        self.owner = owner
        if not self.path.is_file():
            return None
        checkpoint = read_checkpoint(self.path)
        if fault := _fault(checkpoint, self.state_key, owner):
            raise UserError(f"{self.path} {fault}: delete it to start over")
        return self.path

    def state_dict(self) -> dict[str, Any]:
        """Return the curve, the training time so far and the owner."""
        return {
            "rows": self.rows,
            "seconds": self.seconds,
            "owner": asdict(self.owner) if self.owner else None,
            "stopped": self._stopped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curve and the training time of the epochs before the resume."""
        self.rows, self.seconds = state_dict["rows"], state_dict["seconds"]
        self._stopped = bool(state_dict.get("stopped"))  # states of earlier versions lack it

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; train no further if training had been ended before this process began."""
        self._since = self._written = time.monotonic()
        if self.hold:
            _io_of(trainer).after = self.hold.push_state
        trainer.should_stop = trainer.should_stop or self._stopped
        if trainer.is_global_zero:  # a killed process may have written rows of epochs behind the last state
            if self.rows:
                self.write_csv(self.csv)
            else:
                self.csv.unlink(missing_ok=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the epoch to the curve; write the state if it is due, and after the last epoch."""
        epoch = trainer.current_epoch
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        # in an epoch without validation, callback_metrics still holds the val/ figures of an earlier one
        validated = (epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
        logged = sorted(trainer.callback_metrics.items())
        metrics = {k: float(v) for k, v in logged if validated or not k.startswith("val/")}
        self.rows[epoch] = {"epoch": epoch, "step": trainer.global_step} | metrics
        if trainer.is_global_zero:
            self._add_to_csv(self.rows[epoch])
        last = epoch + 1 == trainer.max_epochs or trainer.should_stop
        if last or self._is_due(trainer, epoch):
            if self.hold:
                self.hold.check()
            self._stopped = trainer.should_stop
            self._written = time.monotonic()
            trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait until the last state is complete."""
        _io_of(trainer).wait()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Wait until the last state is complete, before another process can take the run."""
        try:
            _io_of(trainer).wait()
        except Exception as error:  # what ended the training is reported, not this
            log.warning("%s", error)

    def _is_due(self, trainer: L.Trainer, epoch: int) -> bool:
        """Return whether the state is due after an epoch; the same on all ranks, because all take part."""
        if self.every_n_epochs is not None:
            return (epoch + 1) % self.every_n_epochs == 0
        took = _io_of(trainer).seconds
        if took is None:
            groups = trainer.optimizers[0].param_groups
            tuned = sum(parameter.nbytes for group in groups for parameter in group["params"])
            took = _FIRST + 3 * tuned / _SPEED  # with two moments of each parameter
        due = time.monotonic() - self._written >= min(_SHARE * took, _LONGEST)
        return bool(trainer.strategy.broadcast(due))  # rank 0 knows what a write takes

    def _add_to_csv(self, row: Mapping[str, float]) -> None:
        """Append the last row to the curve; write the whole file if it is new, or if a column is."""
        known = dict.fromkeys(self._columns)
        if self._columns and row.keys() <= known.keys():
            with suppress(OSError), self.csv.open("a", newline="") as file:  # else the whole file is tried
                csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
                return
        self.write_csv(self.csv)

    def write_csv(self, path: Path) -> None:
        """Write the learning curve to a file."""
        self._columns = tuple(dict.fromkeys(name for row in self.rows.values() for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        write_atomically(path, lambda temporary: temporary.write_text(text.getvalue()))


def _io_of(trainer: L.Trainer) -> SafetensorsIO:
    return cast(SafetensorsIO, trainer.strategy.checkpoint_io)


def _fault(checkpoint: dict[str, Any], key: str, owner: Owner) -> str:
    """Return why an attempt cannot continue from a checkpoint, or "" if it can.

    Args:
        checkpoint: What Lightning saved.
        key: The key of `ResumeCheckpoint`'s state in the checkpoint.
        owner: The attempt that is about to be trained.
    """
    try:
        saved = Owner(**checkpoint["callbacks"][key]["owner"])
    except (KeyError, TypeError):
        return "was written by an older version, which did not record the run it belongs to"
    if saved.run != owner.run:
        return f"is the resume state of another run (its seed is {saved.seed}, this run's is {owner.seed})"
    if saved.attempt != owner.attempt:
        return (
            f"is the resume state of attempt {saved.attempt} of this run, and this is attempt {owner.attempt}"
        )
    if names := not_finite(checkpoint["state_dict"]):
        return f"holds numbers that are not finite, in {names}"
    return ""
