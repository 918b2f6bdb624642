"""Write the files of a complete attempt, and collect what its result records."""

import csv
import io
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from visprompt.data.datamodule import TaskDataModule
from visprompt.files import write_atomically
from visprompt.models.backbones import Backbone
from visprompt.models.classifier import Classifier
from visprompt.models.kind import KINDS
from visprompt.models.scores import ClassScore
from visprompt.models.tuned_state import TunedState, save_state
from visprompt.runs import environment, run_folder, signals
from visprompt.runs.checkpoint import ResumeCheckpoint
from visprompt.runs.result import Result, write_result
from visprompt.text import csv_cell


def tuned_state(
    classifier: Classifier,
    result: Result,
    datamodule: TaskDataModule,
    backbone: Backbone,
    temperature: float | None,
) -> TunedState:
    """Return the tuned state of a run."""
    return TunedState(
        tensors=classifier.tuned_state(),
        method=result.method,
        task=result.task,
        class_names=datamodule.class_names,
        preprocessing=datamodule.preprocessing,
        backbone=backbone.record(),
        versions=environment.versions(),
        kind=datamodule.kind,
        temperature=temperature,
    )


def finish(run: Path, result: Result, state: TunedState, confusion: Tensor) -> Result:
    """Write tuned state, tables and result to the resume folder, then move the complete attempt into place.

    Args:
        run: The run's folder.
        result: The result without the checksums of files.
        state: The tuned state; it is not written if the run diverged.
        confusion: The counts of the run's scoring, see `TaskKind.figures`.

    Returns:
        The result that was written.
    """
    folder = run / run_folder.RESUME
    tuned, confusion_file, classes_file = (
        folder / name for name in (run_folder.TUNED, run_folder.CONFUSION, run_folder.CLASSES)
    )
    for path in (tuned, confusion_file, classes_file):  # left by a process that was killed here
        if path.exists():
            path.unlink()
    if result.status != "diverged":
        checksum = save_state(tuned, state)
        size = tuned.stat().st_size
        result = result.model_copy(update={"tuned": result.tuned | {"bytes": size, "sha256": checksum}})
    if result.status == "finished":
        kind, names = KINDS[result.kind], state.class_names
        _write_csv(confusion_file, kind.confusion_rows(confusion, names))
        _write_csv(classes_file, _class_rows(kind.class_scores(confusion), names))
    # there is no learning curve if the first epoch diverged
    listed = [folder / name for name in run_folder.LISTED if (folder / name).is_file()]
    sums = {path.name: sha256(path.read_bytes()).hexdigest() for path in listed}
    result = result.model_copy(update={"files": sums})
    write_result(folder, result)
    with signals.deferred():
        run_folder.put_in_place(run)
    return result


def _class_rows(scores: Sequence[ClassScore], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the rows of classes.csv; a figure that is not defined is empty."""
    rows: list[tuple[str, ...]] = [("class", "images", "precision", "recall", "f1")]
    for name, score in zip(names, scores, strict=True):
        figures = (score.precision, score.recall, score.f1)
        shown = ["" if figure is None else f"{figure:.6f}" for figure in figures]
        rows.append((name, str(score.count), *shown))
    return rows


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(map(csv_cell, row) for row in rows)
    write_atomically(path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))


def last_row(resume: ResumeCheckpoint, leak: str) -> dict[str, float]:
    """Return the figures of the last epoch, and the best test figure of all epochs if tests were logged.

    Args:
        resume: Holds the learning curve.
        leak: Name of the test figure of each epoch, which diagnostics.best_on_test=true logs.
    """
    row = resume.rows[max(resume.rows)] if resume.rows else {}
    leaked = [row[leak] for row in resume.rows.values() if leak in row]
    best = {"leak/best_on_test": max(leaked)} if leaked else {}  # a diagnostic that no choice reads
    return {name: value for name, value in row.items() if "/" in name} | best


def tuned_counts(classifier: Classifier) -> dict[str, Any]:
    """Return what the result records of the tuned parameters, without the file's size and checksum."""
    summary = classifier.summary()
    counts = {
        "parameters": summary.tuned,
        "head_parameters": summary.head,
        "share": summary.share,
        "parts": dict(summary.parts),
        "macs": summary.macs,
    }
    # read from the method, because in the config `depth` is null for all blocks
    shape = {name: getattr(classifier.method, name, None) for name in ("depth", "num_tokens", "kept_tokens")}
    return counts | {name: value for name, value in shape.items() if value is not None}


def data_record(datamodule: TaskDataModule) -> dict[str, Any]:
    """Return what the result records of the data in addition to the identity."""
    record: dict[str, Any] = {"form": datamodule.form, "sizes": datamodule.sizes}
    return record | ({"summary": datamodule.summary} if datamodule.summary else {})
