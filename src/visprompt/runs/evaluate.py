"""Score finished runs on their test set: one run, several as an ensemble, or each of several."""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from visprompt.errors import UserError
from visprompt.models.api import restore
from visprompt.models.backbones import Backbone
from visprompt.models.bank import Bank
from visprompt.models.classifier import Classifier
from visprompt.models.dense_prediction import MultiScale
from visprompt.models.ensemble import Ensemble
from visprompt.models.frozen_weights import TRUE
from visprompt.models.kind import KINDS
from visprompt.models.scores import in_percent
from visprompt.models.task_kind import TaskKind
from visprompt.models.tuned_state import TunedState, check_fits, load_state
from visprompt.models.tuning_module import TuningModule
from visprompt.runs import memory, run, run_lock
from visprompt.runs.class_table import print_classes
from visprompt.runs.job import Job
from visprompt.runs.matmul import matmul_precision
from visprompt.runs.recorded import job_of, own_data
from visprompt.runs.result import Result, open_result
from visprompt.runs.run_folder import CLASSES, CONFUSION
from visprompt.runs.score_each import Finished, ScoreEach, by_test_set
from visprompt.runs.trainer import build_trainer
from visprompt.text import Terminal

console = Terminal()
_FILES = {CLASSES: "all classes", CONFUSION: "confusion matrix"}


@memory.explained(lambda: "give precision=bf16-mixed, or trainer=cpu")
def evaluate(cfg: DictConfig) -> float:
    """Score runs on their test set, several as one ensemble; print the new score and the recorded scores.

    Args:
        cfg: The config of `src/eval.py`; its `run` is the folder of a run, or a list of folders,
            `average` says whether these are an ensemble, and `multi_scale` whether segmentation runs are
            scored on several sizes of each image too.

    Returns:
        The test score; the mean of all if `average` is false; that of all scales if `multi_scale` is true.

    Raises:
        UserError: A folder holds no finished run, or a run without a test set, or the runs cannot be
            averaged.
    """
    folders = [Path(folder) for folder in (cfg.run if OmegaConf.is_list(cfg.run) else [cfg.run])]
    if not folders:
        raise UserError(
            "run=[] names no run: give a run's folder, or several folders to average their logits"
        )
    results = [_scored(folder) for folder in folders]
    states = [load_state(folder) for folder in folders]
    _check_multi_scale(cfg, folders, states)
    if not cfg.average:
        return _each([Finished(*one) for one in zip(folders, states, results, strict=True)], cfg)
    job = _job(cfg, folders[0], states[0], results[0])
    prepared = run.prepare(job)
    for folder, state, result in zip(folders, states, results, strict=True):
        if state.method.get("initial") is not None and len(folders) > 1:
            raise UserError(
                f"the prompts in {folder} were pruned for one seed, and an ensemble needs prompts of one "
                "shape: give runs with method.prune=false"
            )
        check_prepared(prepared, state, result, folder, folders[0])
    module = TuningModule(restore_on(prepared, states[0], folders[0]), job.recipe, job.seed)
    if len(states) > 1:
        members = Ensemble(module.classifier, [state.tensors for state in states])
        module.classifier = members.eval()  # type: ignore[assignment]  # scoring needs only its logits
    _test(module, job, prepared, folders[0])
    count = int(module.scores["test/count"])
    recorded = ", ".join(f"{100 * result.score:.2f} %" for result in results)
    print_classes(console, module.kind, module.confusion, prepared.datamodule.class_names)
    for file in [folders[0] / name for name in (CLASSES, CONFUSION)] if len(folders) == 1 else ():
        if file.is_file():
            console.print(f"{_FILES[file.name]}: {file}", soft_wrap=True)
    score = _show(
        module,
        f" on {count} images "
        f"({'the run itself' if len(results) == 1 else f'{len(results)} runs averaged; each by itself'}: "
        f"{recorded})",
    )
    if cfg.multi_scale:
        module.classifier = MultiScale(module.classifier).eval()  # type: ignore[assignment]  # as an ensemble
        _test(module, job, prepared, folders[0])
        score = _show(module, f" on {count} images (multi-scale with flip)")
    return score


def _check_multi_scale(cfg: DictConfig, folders: Sequence[Path], states: Sequence[TunedState]) -> None:
    """Refuse multi-scale scoring of what has no masks, and of several runs one by one."""
    if not cfg.multi_scale:
        return
    if not KINDS[states[0].kind].dense:
        raise UserError(
            f"multi_scale=true is for segmentation runs, and {folders[0]} labels whole images: leave it out"
        )
    if not cfg.average:
        raise UserError(
            "multi_scale=true scores one run, or the mean of several, and average=false scores each by "
            "itself: leave one of the two out"
        )


def _test(module: TuningModule, job: Job, prepared: run.Run, folder: Path) -> None:
    """Score a module on the test set; its figures are in the module."""
    trainer = build_trainer(job)
    with matmul_precision(job):
        trainer.test(module, datamodule=prepared.datamodule, verbose=False)
    if not math.isfinite(module.scored_loss):
        raise UserError(
            f"{folder} cannot be scored, because its loss on the test set is not finite: run it again"
        )


def _show(module: TuningModule, of_what: str) -> float:
    """Print the test figures of a module with words about them; return the score."""
    first, *others = module.kind.shares
    score, count = module.scores[f"test/{first}"], int(module.scores["test/count"])
    console.print(
        f"test/{first} {_with_interval(module.kind, score, count)}{of_what}, "
        + ", ".join(f"test/{name} {100 * module.scores[f'test/{name}']:.2f} %" for name in others),
        soft_wrap=True,
    )
    return score


def _with_interval(kind: TaskKind, score: float, count: int) -> str:
    return in_percent(score, kind.interval(score, count) if kind.interval else None)


def _job(cfg: DictConfig, folder: Path, state: TunedState, result: Result) -> Job:
    """Return the job of a finished run, with the trainer and the precisions that the command asks for."""
    where: Any = {"data_dir": cfg.paths.data_dir, "weights": cfg.weights, "data": own_data(cfg)}
    job = job_of(folder, state, result, **where)
    trainer, callbacks = (
        OmegaConf.to_container(cfg[name], resolve=True) for name in ("trainer", "callbacks")
    )
    precisions = {name: cfg[name] for name in ("precision", "matmul_precision") if cfg[name]}
    return job.vary({"trainer": trainer, "callbacks": callbacks, **precisions})


def _each(runs: Sequence[Finished], cfg: DictConfig) -> float:
    """Score each run, those of one test set in one pass; print the scores and return their mean."""
    scores: list[float] = []
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise UserError("run=[...] names a run twice: give each run once")
    for group in by_test_set(runs, cfg.precision):
        first = group[0]
        job = _job(cfg, first.folder, first.state, first.result)
        prepared = run.prepare(job)
        for one in group:
            of_its_own = replace(prepared, identity={**prepared.identity, "method": dict(one.state.method)})
            check_prepared(of_its_own, one.state, one.result, one.folder, first.folder)
        trainer = build_trainer(job)
        backbone = own_backbone(prepared)
        kind = KINDS[prepared.datamodule.kind]
        # Lightning does not convert the weights of a bank
        bank = Bank(backbone, device=trainer.strategy.root_device, dtype=TRUE.get(job.precision))
        module = ScoreEach(bank, group, kind)
        with matmul_precision(job):
            trainer.test(module, datamodule=prepared.datamodule, verbose=False)
        name = kind.shares[0]
        for one, figures in zip(group, module.scores, strict=True):
            scores.append(figures[name])
            shown = _with_interval(kind, figures[name], figures["count"])
            console.print(
                f"{one.folder}: test/{name} {shown} on {figures['count']:.0f} images "
                f"(the run itself: {100 * one.result.score:.2f} %)",
                soft_wrap=True,
            )
    return sum(scores) / len(scores)


def _scored(folder: Path) -> Result:
    run_lock.tidy(folder)
    result = open_result(folder)
    if result.split != "final":
        raise UserError(f"{folder} is a run of split=tune, which has no test set: give a run of split=final")
    if result.status != "finished":
        why = "diverged" if result.status == "diverged" else "has no test score (data.test=none)"
        raise UserError(f"{folder} {why}, so there is nothing to repeat: give a finished run of split=final")
    return result


def check_prepared(prepared: run.Run, state: TunedState, result: Result, folder: Path, source: Path) -> None:
    """Refuse data and a backbone that are not those of a finished run.

    Args:
        prepared: The run that `run.prepare` built with the data and backbone of this machine.
        state: The finished run's tuned state.
        result: The finished run's result.
        folder: The finished run's folder, for messages.
        source: The folder that the settings of `prepared` come from, for messages.

    Raises:
        UserError: Method, classes, preprocessing, backbone or data differ.
    """
    check_fits(state, folder, method=prepared.identity["method"], class_names=prepared.datamodule.class_names)
    preprocessing = prepared.datamodule.preprocessing
    if missing := [name for name in preprocessing if name not in state.preprocessing]:
        raise UserError(
            f"{folder} is of an older version, which did not record its {missing[0]}: run its command again"
        )
    if dict(state.preprocessing) != preprocessing:
        if folder == source:
            raise UserError(
                f"{folder} is of an older version, which recorded its preprocessing otherwise: run its "
                "command again"
            )
        raise UserError(
            f"{folder} was tuned with other preprocessing than {source}: give runs with the same one"
        )
    check_fits(state, folder, backbone=prepared.backbone.record())
    if prepared.datamodule.fingerprint != result.data["fingerprint"]:
        raise UserError(
            f"the data of {folder} have changed since it was trained: restore them, or train again"
        )


def restore_on(prepared: run.Run, state: TunedState, path: Path) -> Classifier:
    """Return the classifier of a tuned state, on a copy of the backbone, which later runs share."""
    return restore(state, path, own_backbone(prepared))


def own_backbone(prepared: run.Run) -> Backbone:
    """Return a copy of a prepared run's backbone, which later runs share."""
    return replace(prepared.backbone, module=deepcopy(prepared.backbone.module))
