"""result.json: one run's record, its schema, and how several are read together or chosen from."""

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
_LATER = {"trainer", "files", "kind"}  # fields that records of older versions lack
_Point = TypeVar("_Point")


class Result(BaseModel):
    """What one run was and what came of it: the schema of result.json."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, populate_by_name=True, use_attribute_docstrings=True
    )

    status: Literal["finished", "diverged", "unscored"]
    """diverged: the loss was not finite.

    Unscored: the run was to train and score nothing (data.test=none).
    """
    task: str
    """Task id, or the name of the user's own images."""
    method: dict[str, Any]
    """Name and options."""
    recipe: dict[str, Any]
    """How it was trained."""
    split: str
    """tune or final."""
    seed: int
    """Seed of the run."""
    attempt: int
    """0, and one more for each rerun=true that was completed."""
    precision: str
    """Lightning's precision."""
    data: dict[str, Any]
    """Source, form (lossless or lossy), fingerprint, fraction, preprocessing, sizes of the split sets."""
    backbone: dict[str, Any]
    """Name, options, sha256 of the weights, the blocks that carried prompt tokens in full, and what was pooled."""
    metrics: dict[str, float]
    """Logged figures by name; accuracies are shares, not per cent."""
    per_class: dict[str, float | None]
    """Test (in split=tune: validation) accuracy by class name; null for a class without images."""
    tuned: dict[str, Any]
    """Parameters, head parameters, share of the backbone, parameters by name, multiply-adds for one image (macs),
    depth and length of prompts, bytes and sha256 of the file."""
    time: dict[str, float]
    """Seconds of training, and of the last process of a run that was resumed."""
    peak_memory: dict[str, Any]
    """Bytes, and what was measured."""
    machine: dict[str, Any]
    """Device, devices, accumulation, threads."""
    versions: dict[str, str | None]
    """Libraries, Python, git commit."""
    diverged_step: int | None = None
    """The optimiser step at which the loss was not finite, else null."""
    trainer: dict[str, Any] = {}
    """Settings of the trainer that may change the numbers, such as clipped gradients.

    Older records lack it.
    """
    files: dict[str, str] = {}
    """sha256 of further files of the folder, by name: metrics.csv; older records lack it."""
    tags: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """The user's own, and debug."""
    kind: str = SINGLE_LABEL.name
    """What the task asks of an image; older records lack it."""
    version: Annotated[Literal[1], Field(alias="schema")] = SCHEMA
    """Version of this record."""

    @property
    def score(self) -> float:
        """What this run is judged by: a figure of val in `split=tune`, else of test; -inf diverged.

        Nan unscored.
        """
        if self.status == "unscored":
            return float("nan")
        if self.status == "diverged":
            return float("-inf")
        return self.metrics[f"{'val' if self.split == 'tune' else 'test'}/{KINDS[self.kind].score}"]


def write_result(folder: Path, result: Result) -> None:
    """Write a run's result.json with its digest, atomically.

    Raises:
        ValueError: A figure is not finite; JSON has no word for it.
    """
    write_record(folder / "result.json", result.model_dump(by_alias=True), indent=1)


def load_result(folder: Path, *, hashed: bool = True) -> Result | None:
    """Read a run's result.json and compares the tuned state beside it with the checksum that it recorded.

    Args:
        folder: The run's folder.
        hashed: Whether the state's tensors are hashed, 1 to 3 ms for each MB. Else only its size and the
            checksum in its header are compared, 0.2 ms at any size, which finds another run's state and a cut
            one: for reports over thousands of runs.

    Returns:
        The result, None where there is no result.json.

    Raises:
        DamagedRecord: The record or the tuned state is damaged, or they do not belong together. The message
            names the file and says why, not what to do.
    """
    path = folder / "result.json"
    record = read_record(path)
    if record is None:
        return None
    record.pop("digest", None)
    if {*record, *_LATER} != {field.alias or name for name, field in Result.model_fields.items()}:
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
    if isinstance(how := result.data.get("preprocessing"), dict):
        result = result.model_copy(update={"data": result.data | {"preprocessing": in_present_words(how)}})
    if result.status != "diverged":
        _check_state(folder / "tuned.safetensors", result, hashed)
    return result


def _check_state(path: Path, result: Result, hashed: bool) -> None:
    """Raise `DamagedRecord` where a tuned state is not the one that a result recorded."""
    if not path.is_file():
        raise DamagedRecord(f"{path} is missing, which result.json names")
    if path.stat().st_size != result.tuned.get("bytes"):
        raise DamagedRecord(f"{path} is not the state that result.json recorded: its size differs")
    if "sha256" not in result.tuned:
        return  # every run of this project records it; a record that somebody else wrote may lack it
    checksum = read_checksum(path, hashed=hashed)
    if checksum is None:
        raise DamagedRecord(f"{path} is damaged: its checksum differs")
    if checksum != result.tuned["sha256"]:
        raise DamagedRecord(
            f"{path} is not the state that result.json recorded: it is another run's or attempt's"
        )


def read_result(folder: Path, *, hashed: bool = True) -> Result | None:
    """Read a run's result where it is finished: `load_result`, with None for what is damaged too."""
    try:
        return load_result(folder, hashed=hashed)
    except DamagedRecord:
        return None


def open_result(folder: Path) -> Result:
    """Read the result of a run that has to be finished, without hashing its state, which `load_state` does.

    Raises:
        UserError: The folder holds no finished run, or its files are damaged or do not belong together.
    """
    try:
        result = load_result(folder, hashed=False)
    except DamagedRecord as error:
        raise UserError(f"{error}; copy the run's whole folder again, or run its command again") from error
    if result is None:
        raise UserError(f"{folder} holds no finished run: give the folder that its table named")
    return result


def check_same_run(result: Result, identity: Mapping[str, Any], folder: Path) -> None:
    """Refuse a whole result, state and all, that another run wrote.

    Args:
        result: What lies in the folder.
        identity: What decides the numbers of the run that the folder is for, see `identity.identity_of`.
        folder: The run's folder, for the message.

    Raises:
        UserError: They differ in task, split, seed, precision, method, recipe, data or backbone.
    """
    wanted = json.loads(json.dumps(identity, default=list))
    for name in ("task", "split", "seed", "precision", "method", "recipe"):
        if getattr(result, name) != wanted[name]:
            raise _another(folder, name, getattr(result, name), wanted[name])
    for name, key in (("data", "fingerprint"), ("backbone", "sha256")):
        if getattr(result, name).get(key) != wanted[name][key]:
            raise _another(folder, f"{name}.{key}", getattr(result, name).get(key), wanted[name][key])


def _another(folder: Path, name: str, found: object, wanted: object) -> UserError:
    return UserError(
        f"{folder / 'result.json'} is another run's (its {name} is {found}, this run's is {wanted}): move "
        "or delete what lies in that folder"
    )


def open_state(path: Path) -> TunedState:
    """Read a tuned state, after comparing it with the result.json beside it where there is one.

    Args:
        path: The file, or the run's folder that holds `tuned.safetensors`.

    Raises:
        UserError: The state cannot be used, see `load_state`, or is not the one that the result recorded.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / "result.json").is_file() and path in (folder, folder / "tuned.safetensors"):
        open_result(folder)
    return load_state(path)


def choose(results: Sequence[Result | None], points: Sequence[_Point]) -> _Point | None:
    """Choose a point of a grid by its validation accuracy after the last epoch.

    Ties, common on 200 images, go to the smallest learning rate, then the largest weight decay, then the
    shortest prompt, then to the first. A point that failed or diverged is never chosen.

    Args:
        results: Results of runs of `split=tune`, None where a run failed.
        points: What they were runs of, in the same order.

    Returns:
        The chosen point, None where every one failed.

    Raises:
        UserError: A result is not of `split=tune`.
    """
    candidates = []
    for result, point in zip(results, points, strict=True):
        if result is None or result.status == "diverged":
            continue
        if result.split != "tune":
            raise UserError(f"a run of split={result.split} was offered to a choice: only val200 may decide")
        length = result.method.get("num_tokens", 0)
        rank = (result.score, -result.recipe["lr"], result.recipe["weight_decay"], -length)
        candidates.append((rank, point))
    return max(candidates, key=lambda candidate: candidate[0])[1] if candidates else None


@dataclass(frozen=True)
class Cell:
    """Scores of one method on one task over seeds.

    Attributes:
        scores: Test accuracies as shares, one for each seed.
    """

    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.scores)

    @property
    def std(self) -> float:
        """Sample standard deviation over the seeds (n - 1); 0 of a single seed, which has none."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0

    def __str__(self) -> str:
        spread = f" ± {100 * self.std:.1f}" if len(self.scores) > 1 else ""
        return f"{100 * self.mean:.1f}{spread}"


def cell(results: Iterable[Result]) -> Cell:
    """Put runs together that differ in nothing but the seed.

    Raises:
        UserError: They differ in protocol, one of them has no test score, or two are of one seed.
    """
    found = list(results)
    alike = {json.dumps(_protocol(result), sort_keys=True) for result in found}
    scored = all(result.split == "final" and result.status == "finished" for result in found)
    if len(alike) != 1 or not scored:
        raise UserError(
            "runs that differ in more than the seed, or have no test score, are not averaged together"
        )
    if len({result.seed for result in found}) < len(found):
        raise UserError("two runs of one seed are not averaged together: keep the one that is meant")
    return Cell(tuple(result.score for result in found))


def _protocol(result: Result) -> dict[str, Any]:
    names = ("task", "method", "recipe", "split", "precision", "data", "trainer")
    found = {name: getattr(result, name) for name in names}
    own = ("token_mask", "segment_mask", "initial")  # what a seed's own chain of pruning found
    follows = (
        {"pooling"} if result.backbone.get("pretrained", True) else {"pooling", "sha256"}
    )  # of the seed's weights
    found["data"] = {
        name: value for name, value in result.data.items() if name != "summary"
    }  # where it was, and so on
    found["backbone"] = {name: value for name, value in result.backbone.items() if name not in follows}
    return found | {"method": {name: value for name, value in result.method.items() if name not in own}}


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table, its first column left-aligned, the others right-aligned."""
    columns = list(header)
    marks = [":--"] + ["--:"] * (len(columns) - 1)
    lines = [map(in_markdown, columns), marks, *(map(in_markdown, row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
