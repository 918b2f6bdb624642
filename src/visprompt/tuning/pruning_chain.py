"""E^2VPT's pruning as a chain of runs, each with an identity and folder of its own, so that the whole resumes.

`split=tune`: the initial values are drawn and stored; the unpruned prompts are trained from them on train800;
the importance of tokens and segments is measured on train800; each point of the prune grid is trained from
the stored values; val200 chooses, "nothing pruned" being one of the points. `split=final` starts from the
same stored values with the masks that were chosen, trains on train800val200 and reads test once; where there
are no masks yet it makes the tune chain first. A chain's own files lie in the folder of its own identity, in
which no run lies, beside those of its runs: `initial.json`, `importance.json`, `masks.json`, `pruning.md`,
`pruning.png`; initial values in `initial/` beside it.

Every link is a W&B run of its own. Under a W&B agent, which has one W&B run for a whole command, only the
link whose result is the chain's reports to it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from visprompt.errors import UserError
from visprompt.files import DamagedRecord, read_record, sweep, write_atomically, write_record
from visprompt.models.tuned_state import TunedState
from visprompt.runs import environment
from visprompt.runs.job import Job
from visprompt.runs.result import Result, choose, markdown_table, open_state
from visprompt.runs.run import Run, build_classifier, prepare
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
"""Records of a chain in the folder of its identity, and the names in them."""
_AT_ONCE = 8  # images whose activations are kept in float64: some 165 MB each for ViT-B/16
RunOne = Callable[[Job], Result]


def prunes(job: Job) -> bool:
    """Return whether a job is a whole chain; its links, which name their initial values, are plain runs."""
    found = ("initial", "token_mask", "segment_mask")  # by a chain: a job that has one of them is a plain run
    return job.method.get("prune") is True and all(job.method[name] is None for name in found)


def unpruned(job: Job) -> dict[str, Any]:
    """Return what turns a chain into the plain method, by dotted key; empty for any other job.

    Learning rate, weight decay and lengths are chosen so, before anything is pruned.
    """
    plain = {"prune": False, "prune_tokens": None, "prune_segments": None}
    return {f"method.{name}": value for name, value in plain.items()} if prunes(job) else {}


def run(job: Job, run_one: RunOne) -> Result:
    """Run a job, or the chain of runs that it stands for.

    Args:
        job: A composed job.
        run_one: Runs one job and returns its result; it skips what is finished and resumes what is half done.

    Returns:
        The result of the job; of a chain that of the chosen point, or of the final run. Where the unpruned
        run of a chain diverged, its result.

    Raises:
        UserError: Something of the chain's config is wrong; what `run_one` raises ends the chain, too.
    """
    if not prunes(job):
        return run_one(job)
    prepare(job)  # says what is wrong before anything is trained
    quiet = without_wandb(job) if under_agent() else job  # what this process runs would log into one W&B run
    tune = quiet.vary({"split": "tune", "rerun": bool(job.rerun and job.split == "tune")})
    folder = prepare(tune).folder
    found = stored(folder / "masks.json")
    if job.split == "tune" or found is None or not pruning.has_initial(folder.parent, found["initial"]):
        link, result, found = _tune(tune, folder, run_one)
        if job.split == "tune" or found is None:
            if link.logger != job.logger:  # it was silent; it is finished, so that now it only reports
                run_one(link.vary({"logger": job.logger, "rerun": False}))
            return result
    link = link_of(job, found["initial"], found["options"])
    result = run_one(link)
    if result.status == "finished":
        _report(prepare(link).folder, result, found)
    return result


def _tune(job: Job, folder: Path, run_one: RunOne) -> tuple[Job, Result, dict[str, Any] | None]:
    """Train, scores, tries the prune grid and chooses.

    Returns:
        The link that was chosen, its result, and what was found; the unpruned one and None where that
        diverged.
    """
    initial = _initial(job, folder)
    points = prune_points(job)
    console.print(f"{job.name}: {len(points)} points of pruning, the unpruned first")
    bare = job.vary({"method.prune_tokens": None, "method.prune_segments": None})
    first = link_of(bare, initial)
    trained = run_one(first)
    if trained.status == "diverged":
        (folder / "masks.json").unlink(missing_ok=True)  # of an older result
        return first, trained, None
    found = _importance(first, trained, folder)
    options = [*(pruning.prune(found, point).options() for point in points[:-1]), {}]
    links = [link_of(bare, initial, masks) for masks in options]
    results = [*(run_one(link) for link in links[:-1]), trained]
    best = choose(
        results, range(len(results))
    )  # ties go to what keeps fewer tokens, then fewer segments: it is first
    assert best is not None  # the unpruned one has not diverged
    scores = [result.score if result.status == "finished" else None for result in results]
    record = {
        "initial": initial,
        "options": options[best],
        "chosen": best,
        "points": [asdict(point) | {"score": score} for point, score in zip(points, scores, strict=True)],
        "importance": found.lists(),
        "unpruned": {name: trained.tuned[name] for name in ("parameters", "share")},
    }
    _write(folder / "masks.json", record)
    _report(folder, results[best], record)
    return links[best], results[best], record


def prune_points(job: Job) -> list[Point]:
    """Return the points of pruning that a chain tries; the last one prunes nothing."""
    method = job.method
    # without percentages of the one kind the other kind is tried alone
    tokens, segments = (list(method[name] or (0,)) for name in ("prune_tokens", "prune_segments"))
    return pruning.grid(tokens, segments, method.num_tokens, method.num_segments)


def _initial(job: Job, folder: Path) -> str:
    """Hash of the chain's stored initial values; draws and stores them where that has not been done."""
    with _alone(folder):
        known = stored(folder / "initial.json")
        if known and pruning.has_initial(folder.parent, known["initial"]):
            return str(known["initial"])
        one = prepare(job)
        classifier = build_classifier(one.job, one.backbone, one.datamodule.num_classes)
        state = TunedState(
            tensors=classifier.tuned_state(),
            method=one.identity["method"],
            task=one.datamodule.task,
            class_names=one.datamodule.class_names,
            preprocessing=one.datamodule.preprocessing,
            backbone=one.backbone.record(),
            versions=environment.versions(),
        )
        name = pruning.store_initial(folder.parent, state)
        _write(folder / "initial.json", {"initial": name})
        return name


def _importance(link: Job, trained: Result, folder: Path) -> Importance:
    """Return the importance of the trained run's tokens and segments.

    Measured once, by one process for all.
    """
    with _alone(folder):
        known = stored(folder / "importance.json")
        if known is None or known["of"] != trained.tuned["sha256"]:
            measured = _measure(prepare(link))
            if not (measured.tokens.isfinite().all() and measured.segments.isfinite().all()):
                raise UserError(f"the importance of tokens in {folder} is not finite: lower recipe.lr")
            known = {"of": trained.tuned["sha256"]} | measured.lists()
            _write(folder / "importance.json", known)
    return Importance.of(known)


def _measure(one: Run) -> Importance:
    """Measure importance on the images that the run was trained on, without augmentation."""
    classifier = build_classifier(one.job, one.backbone, one.datamodule.num_classes)
    classifier.load_tuned_state(open_state(one.folder).tensors)
    on_cpu = one.job.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    devices = one.job.trainer.devices
    index = devices[0] if isinstance(devices, list) else 0
    device = torch.device("cpu") if on_cpu else torch.device("cuda", index)
    return pruning.importance(classifier.to(device).double(), _batches(one, device))


def _batches(one: Run, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    datamodule = one.datamodule
    datamodule.prepare_data()
    for batch in datamodule.feature_dataloader(datamodule.train_dataset):
        moved = batch._replace(images=batch.images.to(device), labels=batch.labels.to(device))
        images = datamodule.on_after_batch_transfer(moved, 0).images
        for part, labels in zip(images.split(_AT_ONCE), moved.labels.split(_AT_ONCE), strict=True):
            yield part.double(), labels


def link_of(job: Job, initial: str, masks: dict[str, Any] | None = None) -> Job:
    """Return a run of the chain: it starts from the stored initial values, or from what the masks keep of them."""
    options = {"initial": initial} | (masks or {})
    return job.vary({f"method.{name}": value for name, value in options.items()})


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a chain's folder: of several processes one finds something out, and the others read it."""
    lock = FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error}; choose another folder with paths.log_dir=..."
        ) from error
    try:
        sweep(folder.glob(".*.????????"))
        yield
    finally:
        lock.release()


def stored(path: Path) -> dict[str, Any] | None:
    """Read a record of a chain.

    Args:
        path: One of `RECORDS` in the chain's folder.

    Returns:
        The record; None where that step has not been taken, and, with a line that says so, where the file is
        damaged or another chain's: the step is taken again then.
    """
    try:
        record = read_record(path)
        if record is None:
            return None
        names = set(RECORDS[path.name])
        if set(record) != (names | {"digest", "chain"} if "digest" in record else names):
            raise DamagedRecord(f"{path} is damaged or of another version of visprompt")
        if record.get("chain", path.parent.name) != path.parent.name:  # those of older versions do not say it
            raise DamagedRecord(f"{path} is of another chain, {record['chain']}")
        return {name: record[name] for name in names}
    except DamagedRecord as error:
        log.warning("%s: this step is taken again", error)
        return None


def _write(path: Path, record: Mapping[str, Any]) -> None:
    write_record(path, {**record, "chain": path.parent.name})


def _report(folder: Path, result: Result, found: Mapping[str, Any]) -> None:
    """Write what was pruned where, as a table and a picture, and says where they are."""
    importance, point = Importance.of(found["importance"]), found["points"][found["chosen"]]
    masks = pruning.masks_of(result.method, layers=len(importance.tokens))
    name = f"{result.task}, {result.method['name']}, split={result.split}, seed={result.seed}"
    kept = (
        f"{point['kept_tokens']} of {result.method['num_tokens']} tokens and {point['kept_segments']} of "
        f"{result.method['num_segments']} segments of each are left, "
        f"{_percent(masks.segments.float().mean().item())} of the input prompts"
    )
    parts = [
        _counts(found["unpruned"], result.tuned),
        _tried(found),
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


def _tried(found: Mapping[str, Any]) -> str:
    rows = []
    for index, point in enumerate(found["points"]):
        score = "diverged" if point["score"] is None else _percent(point["score"])
        chosen = "chosen" if index == found["chosen"] else ""
        rows.append([str(point["kept_tokens"]), str(point["kept_segments"]), score, chosen])
    return markdown_table(["tokens left", "segments of each left", "validation accuracy", ""], rows)


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"
