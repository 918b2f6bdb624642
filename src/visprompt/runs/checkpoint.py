"""What Lightning calls to keep a run's resume state.

An IO plugin without pickle, and the callback that writes.
"""

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
    """Lightning checkpoints as one safetensors file each, see `resume_state`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint."""
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, its tensors on the CPU."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


class ResumeCheckpoint(Checkpoint):
    """Keeps what a run needs to go on.

    The curve as metrics.csv, and the resume state, both at the ends of epochs.

    The rows of the curve lie in the resume state too, so that both always tell of the same epochs.
    (Lightning's CSV logger deletes the file of a folder that is not empty.) Derived from `Checkpoint` so that
    Lightning runs it after every other hook of an epoch's end.

    Args:
        folder: Where `state.safetensors` and `metrics.csv` are written.
        every_n_epochs: How often the state is written; a killed run repeats at most so many epochs.

    Attributes:
        rows: Metrics of each epoch, by epoch.
        seconds: Training time up to the last state, over all processes that worked on the run.
        owner: Whose state is written; set before the fit, when the number of the attempt is known.
    """

    def __init__(self, folder: Path, every_n_epochs: int = 1) -> None:
        self.path = folder / STATE
        self.csv = folder / "metrics.csv"
        self.every_n_epochs = every_n_epochs
        self.rows: dict[int, dict[str, float]] = {}
        self.seconds = 0.0
        self.owner: Owner | None = None
        self._since = 0.0

    def find(self, owner: Owner) -> Path | None:
        """Return the resume state to go on from, and writes later ones as this owner's.

        Args:
            owner: The attempt that is about to be trained.

        Returns:
            The file, None where training begins.

        Raises:
            UserError: The file is damaged, of another run or attempt, of a version that did not note whose it
                is, or holds numbers that are not finite.
        """
        self.owner = owner
        if not self.path.is_file():
            return None
        checkpoint = read_checkpoint(self.path)
        if trouble := _trouble(checkpoint, self.state_key, owner):
            raise UserError(f"{self.path} {trouble}: delete it to start over")
        return self.path

    def state_dict(self) -> dict[str, Any]:
        """Return the curve and the time so far, and whose they are."""
        return {
            "rows": self.rows,
            "seconds": self.seconds,
            "owner": asdict(self.owner) if self.owner else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the curve of the epochs before the resume."""
        self.rows, self.seconds = state_dict["rows"], state_dict["seconds"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the epoch's row; writes the state after every n-th epoch and after the last."""
        epoch = trainer.current_epoch
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        validated = (epoch + 1) % (
            trainer.check_val_every_n_epoch or 1
        ) == 0  # else its figures are of an earlier epoch
        found = sorted(trainer.callback_metrics.items())
        metrics = {k: float(v) for k, v in found if validated or not k.startswith("val/")}
        self.rows[epoch] = {"epoch": epoch, "step": trainer.global_step} | metrics
        if trainer.is_global_zero:
            self._write_csv()
        if (epoch + 1) % self.every_n_epochs == 0 or epoch + 1 == trainer.max_epochs:
            trainer.save_checkpoint(self.path)

    def _write_csv(self) -> None:
        columns = dict.fromkeys(name for row in self.rows.values() for name in row)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        write_atomically(self.csv, lambda temporary: temporary.write_text(text.getvalue()))


def _trouble(checkpoint: dict[str, Any], key: str, owner: Owner) -> str:
    """Return why a checkpoint is not this owner's to go on from; "" where it is.

    Args:
        checkpoint: What Lightning saved.
        key: Names the state of `ResumeCheckpoint` in it.
        owner: The attempt that is about to be trained.
    """
    try:
        saved = Owner(**checkpoint["callbacks"][key]["owner"])
    except (KeyError, TypeError):
        return "is of an older version, which did not note whose resume state it is"
    if saved.run != owner.run:
        return f"is the resume state of another run (its seed is {saved.seed}, this run's is {owner.seed})"
    if saved.attempt != owner.attempt:
        return (
            f"is the resume state of attempt {saved.attempt} of this run, and this is attempt {owner.attempt}"
        )
    if spoilt := not_finite(checkpoint["state_dict"]):
        return f"holds numbers that are not finite, in {spoilt}"
    return ""
