"""Save and load a run's resume state: a checkpoint plugin without pickle, and the callback that uses it."""

import csv
import io
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from visprompt.errors import UserError
from visprompt.files import write_atomically
from visprompt.models.tensors import not_finite
from visprompt.runs.resume_state import Owner, read_checkpoint, write_checkpoint
from visprompt.runs.run_folder import STATE


class SafetensorsIO(CheckpointIO):
    """Writes each Lightning checkpoint as one safetensors file, see `resume_state`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint."""
        write_checkpoint(checkpoint, Path(path))

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

    Args:
        folder: Where `state.safetensors` and `metrics.csv` are written.
        every_n_epochs: How often the state is written; a killed run repeats at most this many epochs.

    Attributes:
        rows: The metrics of each epoch, by epoch.
        seconds: Training time up to the last state, summed over all processes that trained the run.
        owner: The attempt that the state belongs to; set before the fit, when the attempt is known.
    """

    def __init__(self, folder: Path, every_n_epochs: int = 1) -> None:
        self.path = folder / STATE
        self.csv = folder / "metrics.csv"
        self.every_n_epochs = every_n_epochs
        self.rows: dict[int, dict[str, float]] = {}
        self.seconds = 0.0
        self.owner: Owner | None = None
        self._since = 0.0
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
        self._since = time.monotonic()
        trainer.should_stop = trainer.should_stop or self._stopped

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the epoch to the curve; write the state after every n-th epoch and after the last."""
        epoch = trainer.current_epoch
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        # in an epoch without validation, callback_metrics still holds the val/ figures of an earlier one
        validated = (epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
        logged = sorted(trainer.callback_metrics.items())
        metrics = {k: float(v) for k, v in logged if validated or not k.startswith("val/")}
        self.rows[epoch] = {"epoch": epoch, "step": trainer.global_step} | metrics
        if trainer.is_global_zero:
            self._write_csv()
        last = epoch + 1 == trainer.max_epochs or trainer.should_stop
        if (epoch + 1) % self.every_n_epochs == 0 or last:
            self._stopped = trainer.should_stop
            trainer.save_checkpoint(self.path)

    def _write_csv(self) -> None:
        columns = dict.fromkeys(name for row in self.rows.values() for name in row)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        write_atomically(self.csv, lambda temporary: temporary.write_text(text.getvalue()))


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
