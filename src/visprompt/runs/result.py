"""Read, write and compare the record of a run, result.json, and choose among and average several."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from visprompt.data.transforms import in_present_words
from visprompt.errors import UserError
from visprompt.files import DamagedRecord, read_record, write_record
from visprompt.models.kind import KINDS, SINGLE_LABEL
from visprompt.models.tuned_state import TunedState, load_state, read_checksum
from visprompt.text import in_markdown

SCHEMA: Literal[1] = 1
_ADDED_LATER = {"trainer", "files", "kind"}  # fields that records of older versions lack
_Point = TypeVar("_Point")


class Result(BaseModel):
    """The settings and the outcome of one run: the schema of result.json."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, populate_by_name=True, use_attribute_docstrings=True
    )

    status: Literal["finished", "diverged", "unscored"]
    """`diverged`: the loss was not finite; `unscored`: there was nothing to score (data.test=none)."""
    task: str
    """The task's id, or the name of the user's own images."""
    method: dict[str, Any]
    """Name and options of the method."""
    recipe: dict[str, Any]
    """How the tuned parameters were trained."""
    split: Literal["tune", "final"]
    """`tune`: trained on train800, scored on val200; `final`: trained on both, scored on test."""
    seed: int
    """Seed of the run."""
    attempt: int
    """0, plus 1 for each rerun=true that was completed."""
    precision: str
    """Lightning's precision."""
    data: dict[str, Any]
    """Source, form (lossless or lossy), fingerprint, fraction, preprocessing, sizes of the split sets; and
    augment, if training images were augmented beyond crop and flip, or for segmentation scale and jitter."""
    backbone: dict[str, Any]
    """Name, options, sha256 of the weights, blocks driven without the fast path (carried_blocks), pooling."""
    metrics: dict[str, float]
    """Logged figures by name; accuracies are between 0 and 1."""
    per_class: dict[str, float | None]
    """Test accuracy (of val if split=tune) by class name, of segmentation IoU; null for an absent class."""
    tuned: dict[str, Any]
    """Number of parameters, head parameters, share of the backbone, parameters by name, multiply-adds for one
    image (macs), depth and length of prompts, bytes and sha256 of the file."""
    time: dict[str, float]
    """Seconds of training over all processes (train_s; of a stacked run its share, those of its stack divided
    by the number of points), and of the last process (last_process_s)."""
    peak_memory: dict[str, Any]
    """Bytes, and what was measured."""
    machine: dict[str, Any]
    """Device, number of devices, accumulation steps, threads; stacked is the number of runs that were trained
    together, if this was one of them."""
    versions: dict[str, str | None]
    """Versions of libraries and Python, and the git commit."""
    diverged_step: int | None = None
    """The optimiser step at which the loss was not finite, else null."""
    trainer: dict[str, Any] = {}
    """Settings that may change the numbers: clipping, matmul_precision on GPUs; older records lack it."""
    files: dict[str, str] = {}
    """sha256 of other files in the folder (metrics.csv, confusion.csv, classes.csv) by name; older records
    lack it, or the last two."""
    tags: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """The user's tags, and `debug`."""
    kind: str = SINGLE_LABEL.name
    """Name of the `TaskKind`; older records lack it."""
    version: Annotated[Literal[1], Field(alias="schema")] = SCHEMA
    """Version of this schema."""

    @property
    def score(self) -> float:
        """The figure by which runs are compared: of val if `split=tune`, else of test.

        It is -inf for a diverged run and nan for an unscored one.
        """
        if self.status == "unscored":
            return float("nan")
        if self.status == "diverged":
            return float("-inf")
        return self.metrics[self.score_name]

    @property
    def score_name(self) -> str:
        """The score's name among the metrics, such as "test/acc"."""
        return f"{'val' if self.split == 'tune' else 'test'}/{KINDS[self.kind].score}"

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of the score; None if it has none or the images were not counted."""
        count = self.metrics.get(f"{self.score_name.partition('/')[0]}/count")
        interval = KINDS[self.kind].interval
        if self.status != "finished" or interval is None or not count:
            return None
        return interval(self.score, int(count))


def write_result(folder: Path, result: Result) -> None:
    """Write a run's result.json with its digest, atomically.

    Raises:
        ValueError: A figure is not finite, which JSON cannot express.
    """
    write_record(folder / "result.json", result.model_dump(by_alias=True), indent=1)


def load_result(folder: Path, *, hashed: bool = True, with_state: bool = True) -> Result | None:
    """Read a run's result.json, and check that the tuned state in the folder is the one it recorded.

    Args:
        folder: The run's folder.
        hashed: Whether to hash the state's tensors (1 to 3 ms per MB). Otherwise only the file's size and the
            checksum in its header are compared (0.2 ms), which detects another run's or a truncated file.
        with_state: Whether the state is in the folder. A copy of a run for a report lacks it.

    Returns:
        The result, or None if there is no result.json.

    Raises:
        DamagedRecord: The record or the tuned state is damaged, or they do not belong together.
    """
    path = folder / "result.json"
    record = read_record(path)
    if record is None:
        return None
    record.pop("digest", None)
    if {*record, *_ADDED_LATER} != {field.alias or name for name, field in Result.model_fields.items()}:
        raise DamagedRecord(f"{path} is damaged or of another version of visprompt")
    try:
        result = Result.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["loc"] == ("schema",):
            raise DamagedRecord(f"{path} is damaged or of another version of visprompt") from None
        key = ".".join(map(str, first["loc"]))
        raise DamagedRecord(f"{path} is damaged: its {key} is {first['input']!r}") from None
    if result.kind not in KINDS:
        raise DamagedRecord(f"{path} is damaged: its kind is {result.kind!r}")
    if isinstance(preprocessing := result.data.get("preprocessing"), dict):
        data = result.data | {"preprocessing": in_present_words(preprocessing)}
        result = result.model_copy(update={"data": data})
    if with_state and result.status != "diverged":
        _check_state(folder / "tuned.safetensors", result, hashed)
    return result


def _check_state(path: Path, result: Result, hashed: bool) -> None:
    """Raise `DamagedRecord` if a tuned state is not the one that a result recorded."""
    if not path.is_file():
        raise DamagedRecord(f"{path} is missing, but result.json names it")
    if path.stat().st_size != result.tuned.get("bytes"):
        raise DamagedRecord(f"{path} is not the state that result.json recorded: its size differs")
    if "sha256" not in result.tuned:
        return  # every run of this project records it, but a record written by other code may lack it
    checksum = read_checksum(path, hashed=hashed)
    if checksum is None:
        raise DamagedRecord(f"{path} is damaged: its checksum differs")
    if checksum != result.tuned["sha256"]:
        raise DamagedRecord(
            f"{path} is not the state that result.json recorded: it is another run's or attempt's"
        )


def read_result(folder: Path, *, hashed: bool = True, with_state: bool = True) -> Result | None:
    """Read a run's result like `load_result`, but return None also if it is damaged."""
    try:
        return load_result(folder, hashed=hashed, with_state=with_state)
    except DamagedRecord:
        return None


def open_result(folder: Path) -> Result:
    """Read the result of a finished run, without hashing its tuned state, which `load_state` will do.

    Raises:
        UserError: The folder holds no finished run, or its files are damaged or do not belong together.
    """
    try:
        result = load_result(folder, hashed=False)
    except DamagedRecord as error:
        raise UserError(f"{error}; copy the run's whole folder again, or run its command again") from error
    if result is None:
        raise UserError(f"{folder} holds no finished run: give the folder that was printed below its table")
    return result


def check_same_run(result: Result, identity: Mapping[str, Any], folder: Path) -> None:
    """Refuse a result in a run's folder that another run wrote.

    Args:
        result: The result in the folder.
        identity: Everything that decides the numbers of the folder's run, see `identity.identity_of`.
        folder: The run's folder, for the message.

    Raises:
        UserError: Result and identity differ in task, split, seed, precision, method, recipe, data or
            backbone.
    """
    expected = json.loads(json.dumps(identity, default=list))
    for name in ("task", "split", "seed", "precision", "method", "recipe"):
        if getattr(result, name) != expected[name]:
            raise _of_another_run(folder, name, getattr(result, name), expected[name])
    for name, key in (("data", "fingerprint"), ("backbone", "sha256")):
        recorded = getattr(result, name).get(key)
        if recorded != expected[name][key]:
            raise _of_another_run(folder, f"{name}.{key}", recorded, expected[name][key])


def _of_another_run(folder: Path, name: str, recorded: object, expected: object) -> UserError:
    return UserError(
        f"{folder / 'result.json'} is another run's (its {name} is {recorded}, this run's is {expected}): "
        "move or delete the files in that folder"
    )


def open_state(path: Path) -> TunedState:
    """Read a tuned state; if there is a result.json in its folder, check that they belong together.

    Args:
        path: The file, or the run's folder that holds `tuned.safetensors`.

    Raises:
        UserError: The state cannot be used (see `load_state`), or is not the one that the result recorded.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / "result.json").is_file() and path in (folder, folder / "tuned.safetensors"):
        open_result(folder)
    return load_state(path)


def choose(results: Sequence[Result | None], points: Sequence[_Point]) -> _Point | None:
    """Choose the point of a grid with the best validation score after the last epoch.

    On 200 images equal scores are common. Among equals the smallest learning rate is chosen, then the largest
    weight decay, then the shortest prompt, then the first. A point that failed or diverged is never chosen.

    Args:
        results: Results of runs with `split=tune`; None for a run that failed.
        points: The points of these runs, in the same order.

    Returns:
        The chosen point, or None if all runs failed.

    Raises:
        UserError: A result is not of `split=tune`.
    """
    candidates = []
    for result, point in zip(results, points, strict=True):
        if result is None or result.status == "diverged":
            continue
        if result.split != "tune":
            raise UserError(
                f"a run of split={result.split} is among those to choose from, and only validation scores "
                "may decide: give runs of split=tune"
            )
        length = result.method.get("num_tokens", 0)
        rank = (result.score, -result.recipe["lr"], result.recipe["weight_decay"], -length)
        candidates.append((rank, point))
    return max(candidates, key=lambda candidate: candidate[0])[1] if candidates else None


@dataclass(frozen=True)
class Cell:
    """Scores of one method on one task over several seeds, shown as "81.2 ± 0.4".

    Attributes:
        scores: Test accuracies between 0 and 1, one for each seed.
        interval: The 95 % confidence interval of the score of a single seed; None with several seeds, or if
            it is not known.
    """

    scores: tuple[float, ...]
    interval: tuple[float, float] | None = None

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.scores)

    @property
    def std(self) -> float:
        """Sample standard deviation over the seeds (n - 1); 0 for a single seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0

    def __str__(self) -> str:
        spread = f" ± {100 * self.std:.1f}" if len(self.scores) > 1 else ""
        return f"{100 * self.mean:.1f}{spread}"


def cell(results: Iterable[Result]) -> Cell:
    """Combine the results of runs that differ only in the seed.

    Raises:
        UserError: The runs differ in more than the seed, one has no test score, or two have the same seed.
    """
    runs = list(results)
    stacked = [str(result.seed) for result in runs if is_stacked(result)]
    if 0 < len(stacked) < len(runs):
        raise UserError(
            "runs that were trained in a stack are not averaged with single ones: run the stacked ones (seed "
            f"{', '.join(stacked)}) singly, each with src/train.py and rerun=true"
        )
    protocols = {json.dumps(_protocol(result), sort_keys=True) for result in runs}
    scored = all(result.split == "final" and result.status == "finished" for result in runs)
    if len(protocols) != 1 or not scored:
        raise UserError(
            "runs that differ in more than the seed or have no test score cannot be averaged: leave them out"
        )
    if len({result.seed for result in runs}) < len(runs):
        raise UserError("two runs with the same seed cannot be averaged: leave one of them out")
    return Cell(tuple(result.score for result in runs), runs[0].interval if len(runs) == 1 else None)


def is_stacked(result: Result) -> bool:
    """Return whether a run was trained in a stack, see `runs.stack`."""
    return "stacked" in result.machine


def _protocol(result: Result) -> dict[str, Any]:
    """Return everything in which runs over several seeds must agree."""
    names = ("task", "recipe", "split", "precision", "trainer")
    # pruning chooses masks and stores initial values for each seed
    pruned = ("token_mask", "segment_mask", "initial")
    # random weights are drawn from the seed
    seeded = {"pooling"} if result.backbone.get("pretrained", True) else {"pooling", "sha256"}
    return {name: getattr(result, name) for name in names} | {
        "method": {name: value for name, value in result.method.items() if name not in pruned},
        "data": {name: value for name, value in result.data.items() if name != "summary"},
        "backbone": {name: value for name, value in result.backbone.items() if name not in seeded},
    }


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table with the first column left-aligned and the others right-aligned."""
    columns = list(header)
    marks = [":--"] + ["--:"] * (len(columns) - 1)
    lines = [map(in_markdown, columns), marks, *(map(in_markdown, row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
