"""Run E^2VPT's pruning as a chain of runs with separate identities and folders, so that it can be resumed.

With `split=tune`:

1. Draw and store the initial values.
2. Train the unpruned prompts from these values on train800.
3. Measure the importance of tokens and segments on train800.
4. Train each point of the grid of pruning from the stored values.
5. Choose the point with the best score on val200; "nothing pruned" is one of the points.

`split=final` starts from the same stored values with the chosen masks, trains on train800val200 and scores
the test set once. If no masks have been chosen yet, it runs the steps above first.

The chain has a folder, named by the hash of its settings like those of its runs, for `initial.json`,
`importance.json`, `masks.json`, `pruning.md` and `pruning.png`. The initial values are in the folder
`initial/` next to it.

Each run of the chain is a separate W&B run. A W&B agent has a single W&B run for a whole command; then only
the run whose result is the result of the chain reports to it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visprompt.data.datamodule import TaskDataModule
from visprompt.errors import UserError
from visprompt.files import DamagedRecord, read_record, write_atomically, write_record
from visprompt.models.kind import KINDS
from visprompt.models.tuned_state import TunedState
from visprompt.runs import environment
from visprompt.runs.instantiate import import_target
from visprompt.runs.job import Job
from visprompt.runs.result import Result, choose, markdown_table, open_state
from visprompt.runs.results_store import Results
from visprompt.runs.run import Run, build_classifier, prepare
from visprompt.runs.run_lock import locked_in_turn
from visprompt.runs.trainer import under_agent, without_wandb
from visprompt.text import Terminal, in_markdown, visible
from visprompt.tuning import pruning
from visprompt.tuning.pruning import Importance, Point

log = logging.getLogger(__name__)
console = Terminal()
RECORDS = {
    "initial.json": ("initial",),
    "importance.json": ("of", "tokens", "segments"),
    "masks.json": ("initial", "options", "chosen", "points", "importance", "unpruned"),
}
"""The records in a chain's folder, and the names in them."""
_BATCH = 8  # images; the activations of one take about 165 MB in float64 with ViT-B/16
RunOne = Callable[[Job], Result]


def prunes(job: Job) -> bool:
    """Return whether a job means a chain of runs; the chain's runs themselves name their initial values."""
    set_by_chain = ("initial", "token_mask", "segment_mask")
    return job.method.get("prune") is True and all(job.method[name] is None for name in set_by_chain)


def check(job: Job) -> None:
    """Refuse to prune on a segmentation task, before its data are read.

    Raises:
        UserError: A chain of pruning is meant, and the task has a class for each pixel.
    """
    kind = getattr(import_target("data", job.data["_target_"]), "kind", "") if prunes(job) else ""
    if kind in KINDS and KINDS[kind].dense:
        raise UserError(
            "pruning needs one loss for each image, and a segmentation task has one for each pixel: give "
            "method.prune=false"
        )


def unpruned(job: Job) -> dict[str, Any]:
    """Return the values by dotted key that turn pruning off; {} for a job without pruning.

    The protocol chooses learning rate, weight decay and prompt lengths without pruning.
    """
    plain = {"prune": False, "prune_tokens": None, "prune_segments": None}
    return {f"method.{name}": value for name, value in plain.items()} if prunes(job) else {}


def run(job: Job, run_one: RunOne) -> Result:
    """Run a job, or the chain of runs that a job with pruning means.

    Args:
        job: A composed job.
        run_one: Runs one job and returns its result; it skips a finished run and resumes an unfinished one.

    Returns:
        The result of the job. For a chain it is that of the chosen point, or of the final run, or of the
        unpruned run if that diverged.

    Raises:
        UserError: A setting of the chain is wrong; errors of `run_one` also end the chain.
    """
    if not prunes(job):
        return run_one(job)
    check(job)
    prepare(job)  # finds errors before anything is trained
    # else all runs would log to the agent's one W&B run
    silent = without_wandb(job) if under_agent() else job
    tune = silent.vary({"split": "tune", "rerun": bool(job.rerun and job.split == "tune")})
    folder = prepare(tune).folder
    _bring(job, folder)
    choice = stored(folder / "masks.json")
    if job.split == "tune" or choice is None or not pruning.has_initial(folder.parent, choice["initial"]):
        link, result, choice = _tune(tune, folder, run_one)
        if job.split == "tune" or choice is None:
            if link.logger != job.logger:  # the run is finished: run again with the logger, it only reports
                run_one(link.vary({"logger": job.logger, "rerun": False}))
            return result
    link = link_of(job, choice["initial"], choice["options"])
    result = run_one(link)
    if result.status == "finished":
        _report(prepare(link).folder, result, choice)
    return result


def _tune(job: Job, folder: Path, run_one: RunOne) -> tuple[Job, Result, dict[str, Any] | None]:
    """Run the steps of `split=tune` and choose a point.

    Returns:
        The job of the chosen point, its result, and the record `masks.json`; if the unpruned run diverged,
        its job, its result and None.
    """
    initial = _initial(job, folder)
    points = prune_points(job)
    console.print(f"{job.name}: {len(points)} points of pruning, the unpruned first")
    base = job.vary({"method.prune_tokens": None, "method.prune_segments": None})
    first = link_of(base, initial)
    unpruned_result = run_one(first)
    if unpruned_result.status == "diverged":
        (folder / "masks.json").unlink(missing_ok=True)  # of an older result
        return first, unpruned_result, None
    importance = _importance(first, unpruned_result, folder)
    options = [*(pruning.prune(importance, point).options() for point in points[:-1]), {}]
    links = [link_of(base, initial, masks) for masks in options]
    results = [*(run_one(link) for link in links[:-1]), unpruned_result]
    # among equal scores the first point is chosen, which keeps the fewest tokens and then segments
    best = choose(results, range(len(results)))
    assert best is not None  # the unpruned run has not diverged
    scores = [result.score if result.status == "finished" else None for result in results]
    record = {
        "initial": initial,
        "options": options[best],
        "chosen": best,
        "points": [asdict(point) | {"score": score} for point, score in zip(points, scores, strict=True)],
        "importance": importance.lists(),
        "unpruned": {name: unpruned_result.tuned[name] for name in ("parameters", "share")},
    }
    _store(job, folder / "masks.json", record)
    _report(folder, results[best], record)
    return links[best], results[best], record


def prune_points(job: Job) -> list[Point]:
    """Return the points of pruning that a chain tries; the last one prunes nothing."""
    method = job.method
    # null prunes 0 % of the tokens (or segments), so that only the other percentages are tried
    tokens, segments = (list(method[name] or (0,)) for name in ("prune_tokens", "prune_segments"))
    return pruning.grid(tokens, segments, method.num_tokens, method.num_segments)


def _initial(job: Job, folder: Path) -> str:
    """Return the hash of the chain's initial values; draw and store them if that has not been done."""
    with _locked(job, folder):
        record = stored(folder / "initial.json")
        if record and pruning.has_initial(folder.parent, record["initial"]):
            return str(record["initial"])
        prepared = prepare(job)
        data = prepared.datamodule
        classifier = build_classifier(prepared.job, prepared.backbone, data.num_classes, data.kind)
        state = TunedState(
            tensors=classifier.tuned_state(),
            method=prepared.identity["method"],
            task=data.task,
            class_names=data.class_names,
            preprocessing=data.preprocessing,
            backbone=prepared.backbone.record(),
            versions=environment.versions(),
            kind=data.kind,
        )
        name = pruning.store_initial(folder.parent, state)
        if results := Results.of(job.paths):
            results.run(folder.parent).push_file(pruning.initial_file(name))
        _store(job, folder / "initial.json", {"initial": name})
        return name


def _importance(link: Job, trained: Result, folder: Path) -> Importance:
    """Return the importance of the tokens and segments of a trained run; only one process measures it."""
    with _locked(link, folder):
        record = stored(folder / "importance.json")
        if record is None or record["of"] != trained.tuned["sha256"]:
            measured = _measure(prepare(link))
            if not (measured.tokens.isfinite().all() and measured.segments.isfinite().all()):
                raise UserError(f"the importance of tokens in {folder} is not finite: lower recipe.lr")
            record = {"of": trained.tuned["sha256"]} | measured.lists()
            _store(link, folder / "importance.json", record)
    return Importance.of(record)


def _measure(trained: Run) -> Importance:
    """Measure importance on the images that a run was trained on, without augmentation."""
    data = trained.datamodule
    classifier = build_classifier(trained.job, trained.backbone, data.num_classes, data.kind)
    classifier.load_tuned_state(open_state(trained.folder).tensors)
    on_cpu = trained.job.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    devices = trained.job.trainer.devices
    index = devices[0] if isinstance(devices, list) else 0
    device = torch.device("cpu") if on_cpu else torch.device("cuda", index)
    return pruning.importance(classifier.to(device).double(), _batches(data, device))


def _batches(datamodule: TaskDataModule, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the training images in float64 and their labels, in small batches."""
    datamodule.prepare_data()
    for batch in datamodule.feature_dataloader(datamodule.train_dataset):
        moved = batch._replace(images=batch.images.to(device), labels=batch.labels.to(device))
        images = datamodule.on_after_batch_transfer(moved, 0).images
        for part, labels in zip(images.split(_BATCH), moved.labels.split(_BATCH), strict=True):
            yield part.double(), labels


def link_of(job: Job, initial: str, masks: dict[str, Any] | None = None) -> Job:
    """Return the job of one run of the chain.

    Args:
        job: The job of the chain.
        initial: Hash of the stored initial values that the run starts from.
        masks: The options `token_mask` and `segment_mask`; None for the unpruned run.
    """
    options = {"initial": initial} | (masks or {})
    return job.vary({f"method.{name}": value for name, value in options.items()})


@contextmanager
def _locked(job: Job, folder: Path) -> Iterator[None]:
    """Hold a chain's folder, so that one process computes a record and the others read it."""
    results = Results.of(job.paths)
    with locked_in_turn(folder, results.run(folder) if results else None):
        _bring(job, folder)
        yield


def _bring(job: Job, folder: Path) -> None:
    """Bring the records of a chain, and the initial values that they name, from the store if there is one."""
    results = Results.of(job.paths)
    if results is None:
        return
    for name in RECORDS:
        results.run(folder).pull_file(name)
    record = stored(folder / "initial.json")
    if record and not pruning.has_initial(folder.parent, record["initial"]):
        results.run(folder.parent).pull_file(pruning.initial_file(record["initial"]))


def stored(path: Path) -> dict[str, Any] | None:
    """Read a record of a chain.

    Args:
        path: One of `RECORDS` in the chain's folder.

    Returns:
        The record, or None if this step of the chain is still to be done. None, with a warning, also if the
        file is damaged or belongs to another chain.
    """
    try:
        record = read_record(path)
        if record is None:
            return None
        names = set(RECORDS[path.name])
        if set(record) != (names | {"digest", "chain"} if "digest" in record else names):
            raise DamagedRecord(f"{path} is damaged or of another version of visprompt")
        if record.get("chain", path.parent.name) != path.parent.name:  # records of older versions lack it
            raise DamagedRecord(f"{path} belongs to another chain, {record['chain']}")
        return {name: record[name] for name in names}
    except DamagedRecord as error:
        log.warning("%s: this step is taken again", error)
        return None


def _write(path: Path, record: Mapping[str, Any]) -> None:
    write_record(path, {**record, "chain": path.parent.name})


def _store(job: Job, path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, here and to the store if there is one."""
    _write(path, record)
    if results := Results.of(job.paths):
        results.run(path.parent).push_file(path.name)


def _report(folder: Path, result: Result, choice: Mapping[str, Any]) -> None:
    """Write a table and a picture of what was pruned, and print where they are.

    Args:
        folder: Where to write them.
        result: The result of the pruned run.
        choice: The record `masks.json`.
    """
    importance, point = Importance.of(choice["importance"]), choice["points"][choice["chosen"]]
    masks = pruning.masks_of(result.method, layers=len(importance.tokens))
    name = f"{result.task}, {result.method['name']}, split={result.split}, seed={result.seed}"
    kept = (
        f"{point['kept_tokens']} of {result.method['num_tokens']} tokens and {point['kept_segments']} of "
        f"{result.method['num_segments']} segments of each are left, "
        f"{_percent(masks.segments.float().mean().item())} of the input prompts"
    )
    parts = [
        _counts(choice["unpruned"], result.tuned),
        _tried(choice),
        pruning.table(masks, importance),
    ]
    text = "\n".join([f"# {in_markdown(name)}\n\n{kept}.\n", *parts])
    write_atomically(folder / "pruning.md", lambda path: path.write_text(text, encoding="utf-8"))
    image = pruning.picture(masks, f"{visible(name)}\n{kept}")
    write_atomically(folder / "pruning.png", lambda path: image.save(path, "PNG"))
    console.print(f"{kept}: {folder / 'pruning.md'}", soft_wrap=True)


def _counts(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    share = _percent(now["parameters"] / before["parameters"])
    rows = [
        ["parameters", f"{before['parameters']:,}", f"{now['parameters']:,}", share],
        ["share of the backbone", _percent(before["share"], 3), _percent(now["share"], 3), ""],
    ]
    return markdown_table(["tuned without the head", "unpruned", "left", "share left"], rows)


def _tried(choice: Mapping[str, Any]) -> str:
    rows = []
    for index, point in enumerate(choice["points"]):
        score = "diverged" if point["score"] is None else _percent(point["score"])
        chosen = "chosen" if index == choice["chosen"] else ""
        rows.append([str(point["kept_tokens"]), str(point["kept_segments"]), score, chosen])
    return markdown_table(["tokens left", "segments of each left", "validation accuracy", ""], rows)


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"
