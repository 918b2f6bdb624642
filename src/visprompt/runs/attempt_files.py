"""Write the files of a complete attempt, and collect what its result records."""

import csv
import io
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from visprompt.data.datamodule import TaskDataModule
from visprompt.files import claimed, file_sha256, write_atomically
from visprompt.models.backbones import Backbone
from visprompt.models.classifier import Classifier
from visprompt.models.heads import head_name
from visprompt.models.kind import KINDS
from visprompt.models.scores import ClassScore
from visprompt.models.tuned_state import TunedState, save_state
from visprompt.runs import environment, run_folder, signals
from visprompt.runs.checkpoint import ResumeCheckpoint
from visprompt.runs.job import Job
from visprompt.runs.result import Result, write_result
from visprompt.runs.run_lock import Hold
from visprompt.text import csv_cell

_macs: dict[str, int] = {}


class Scoring(Protocol):
    """The figures of a run's scoring, see `TuningModule`."""

    scores: dict[str, float]
    per_class: list[float | None]
    scored_loss: float


def record(
    identity: Mapping[str, Any],
    datamodule: TaskDataModule,
    resume: ResumeCheckpoint,
    scored: Scoring,
    diverged: int | None,
    steps: int,
    **measured: Any,
) -> Result:
    """Return the result of a run that was trained and scored, without the checksums of files.

    Args:
        identity: Everything that decides the numbers, see `identity.identity_of`.
        datamodule: The run's data.
        resume: Holds the learning curve.
        scored: The figures of the last scoring.
        diverged: The step at which the run diverged, as far as the losses and parameters show it.
        steps: Optimiser steps of the run, at which it diverged if a figure is not finite.
        **measured: Other fields of the result.
    """
    kind = KINDS[datamodule.kind]
    unscored = diverged is None and not datamodule.is_scored
    metrics = last_row(resume, f"leak/test_{kind.hit}") | scored.scores
    figures = [*metrics.values()] if unscored else [scored.scored_loss, *metrics.values()]
    if diverged is None and not all(map(math.isfinite, figures)):
        diverged = steps  # the parameters are finite, but the loss or a figure is not
    fields: dict[str, Any] = {
        "status": "diverged" if diverged is not None else "unscored" if unscored else "finished",
        **{name: value for name, value in identity.items() if name not in ("data", "backbone")},
        "data": identity["data"] | data_record(datamodule),
        "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
        "per_class": dict(zip(datamodule.class_names, scored.per_class, strict=False)),
        "diverged_step": diverged,
        "kind": datamodule.kind,
    }
    return Result(**fields, **measured)


def driven(backbone: Backbone, classifier: Classifier) -> dict[str, Any]:
    """Return what the result records of how a backbone is driven, in addition to the identity."""
    family = backbone.module
    return {"carried_blocks": family.carried_blocks(), "pooling": family.pooling(classifier.method.pool)}


def write_config(folder: Path, job: Job) -> None:
    """Write the config.yaml of an attempt to a folder."""
    path = folder / run_folder.CONFIG
    write_atomically(path, lambda temporary: temporary.write_text(job.as_yaml(), encoding="utf-8"))


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
        head=str(result.recipe.get("head", "linear")),
        temperature=temperature,
    )


@contextmanager
def _new_attempt(hold: Hold) -> Iterator[Path]:
    """Make a folder for the files of an attempt, and put them in place when the body has written them.

    Args:
        hold: The run's folder.

    Yields:
        The folder to write to.

    Raises:
        AtWork: Another process has taken the run; nothing has been put in place.
        UserError: The folder cannot be written.
    """
    folder = hold.folder
    try:
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=f"{run_folder.COMPLETE}."))
        temporary.chmod(0o755)
        try:
            with claimed(temporary):
                yield temporary
                with signals.deferred():
                    hold.check()
                    temporary.rename(folder / run_folder.COMPLETE)
                    run_folder.put_in_place(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise run_folder.refused(folder, error) from error


def finish(
    hold: Hold, job: Job, curve: ResumeCheckpoint, result: Result, state: TunedState, confusion: Tensor
) -> Result:
    """Write a complete attempt, and put it in place as the result of its run.

    Args:
        hold: The run's folder. What is under `resume/` there is not read: a process that lost the run may
            have written it.
        job: The run's job.
        curve: Holds the learning curve.
        result: What `record` returned.
        state: The tuned state.
        confusion: The counts of the scoring, see `TaskKind.figures`.

    Returns:
        The result that counts: the one that was written, except if a store has that of another process.

    Raises:
        AtWork: Another process has taken the run; nothing has been put in place.
        UserError: The folder cannot be written, or the store gives no answer.
    """
    with _new_attempt(hold) as folder:
        write_config(folder, job)
        if curve.rows:  # a run that diverged in its first epoch has no curve
            curve.write_csv(folder / run_folder.CURVE)
        if result.status != "diverged":
            tuned = folder / run_folder.TUNED
            checksum = save_state(tuned, state)
            size = tuned.stat().st_size
            result = result.model_copy(update={"tuned": result.tuned | {"bytes": size, "sha256": checksum}})
        if result.status == "finished":
            kind, names = KINDS[result.kind], state.class_names
            _write_csv(folder / run_folder.CONFUSION, kind.confusion_rows(confusion, names))
            _write_csv(
                folder / run_folder.CLASSES, _class_rows(kind.class_scores(confusion), names, kind.unit)
            )
        listed = [folder / name for name in run_folder.LISTED if (folder / name).is_file()]
        sums = {path.name: file_sha256(path) for path in listed}
        result = result.model_copy(update={"files": sums})
        write_result(folder, result)
    return hold.push_finished(result)


def _class_rows(scores: Sequence[ClassScore], names: Sequence[str], unit: str) -> list[tuple[str, ...]]:
    """Return the rows of classes.csv; a figure that is not defined is empty."""
    rows: list[tuple[str, ...]] = [("class", unit, "precision", "recall", "f1")]
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


def tuned_counts(classifier: Classifier, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the result records of the tuned parameters, without the file's size and checksum.

    Args:
        classifier: The run's classifier.
        identity: Its identity. Runs of a process with the same backbone, method and head have the same number
            of operations, which takes a forward pass to count.
    """
    head = [classifier.num_classes, classifier.kind.name, head_name(classifier.head)]
    key = json.dumps([identity["backbone"], identity["method"], head], sort_keys=True, default=list)
    # masks, which say what is left of a method, are no part of the identity
    masked = any(tensor.dtype == torch.bool for tensor in classifier.tuned_state().values())
    summary = classifier.summary(None if masked else _macs.get(key))
    if not masked:
        _macs[key] = summary.macs
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
