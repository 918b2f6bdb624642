"""Scoring saved states on their test set, one by itself or several as an ensemble."""

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from visprompt.errors import UserError
from visprompt.models.api import restore
from visprompt.models.classifier import Classifier
from visprompt.models.ensemble import Ensemble
from visprompt.models.tuned_state import TunedState, check_fits, load_state
from visprompt.models.tuning_module import TuningModule
from visprompt.runs import memory, run, run_folder
from visprompt.runs.recorded import job_of, own_data
from visprompt.runs.result import Result, open_result
from visprompt.runs.trainer import build_trainer
from visprompt.text import Terminal

console = Terminal()


@memory.explained(lambda: "give precision=bf16-mixed, or trainer=cpu")
def evaluate(cfg: DictConfig) -> float:
    """Score tuned states on their test set, several of them as one ensemble, and says what the runs had scored.

    Args:
        cfg: run (the folder of a run, or a list of folders), trainer, precision, weights, data and paths.

    Returns:
        test/acc.

    Raises:
        UserError: A folder holds no finished run, or one that has no test set, or the runs do not belong
            together.
    """
    folders = [Path(folder) for folder in (cfg.run if OmegaConf.is_list(cfg.run) else [cfg.run])]
    if not folders:
        raise UserError("run=[] names no run: give the folder of one, or of several to average their logits")
    results = [_scored(folder) for folder in folders]
    states = [load_state(folder) for folder in folders]
    where: Any = {"data_dir": cfg.paths.data_dir, "weights": cfg.weights, "data": own_data(cfg)}
    job = job_of(folders[0], states[0], results[0], **where)
    trainer, callbacks = (
        OmegaConf.to_container(cfg[name], resolve=True) for name in ("trainer", "callbacks")
    )
    job = job.vary({"trainer": trainer, "callbacks": callbacks, "precision": cfg.precision or job.precision})
    prepared = run.prepare(job)
    for folder, state, result in zip(folders, states, results, strict=True):
        if state.method.get("initial") is not None and len(folders) > 1:
            raise UserError(
                f"{folder} is of a chain that prunes for its own seed, and the states of an ensemble have "
                "one shape: give runs with method.prune=false"
            )
        check_prepared(prepared, state, result, folder, folders[0])
    module = TuningModule(restore_on(prepared, states[0], folders[0]), job.recipe, job.seed)
    if len(states) > 1:
        members = Ensemble(module.classifier, [state.tensors for state in states])
        module.classifier = members.eval()  # type: ignore[assignment]  # it gives logits, all that scoring asks for
    trainer = build_trainer(job)
    trainer.test(module, datamodule=prepared.datamodule, verbose=False)
    if not math.isfinite(module.scored_loss):
        raise UserError(
            f"{folders[0]} cannot be scored: its loss on the test set is not finite, so run it again"
        )
    first, *others = module.kind.shares
    score = module.scores[f"test/{first}"]
    own = ", ".join(f"{100 * result.score:.2f} %" for result in results)
    console.print(
        f"test/{first} {100 * score:.2f} % on {module.scores['test/count']:.0f} images "
        f"({'the run itself' if len(results) == 1 else f'{len(results)} runs averaged; each by itself'}: "
        f"{own}), " + ", ".join(f"test/{name} {100 * module.scores[f'test/{name}']:.2f} %" for name in others)
    )
    return score


def _scored(folder: Path) -> Result:
    run_folder.tidy(folder)
    result = open_result(folder)
    if result.split != "final":
        raise UserError(f"{folder} is a run of split=tune, which has no test set: give a run of split=final")
    return result


def check_prepared(prepared: run.Run, state: TunedState, result: Result, folder: Path, source: Path) -> None:
    """Refuse data and a backbone that are not those of a finished run.

    Args:
        prepared: What `run.prepare` made of a job.
        state: What the run tuned.
        result: What it recorded.
        folder: Where it lies, for messages.
        source: Where the job comes from, for messages.

    Raises:
        UserError: Method, classes, preprocessing, backbone or data differ.
    """
    check_fits(state, folder, method=prepared.identity["method"], class_names=prepared.datamodule.class_names)
    found = prepared.datamodule.preprocessing
    if missing := [name for name in found if name not in state.preprocessing]:
        raise UserError(
            f"{folder} does not say its {missing[0]}: an older version wrote it, run its command again"
        )
    if dict(state.preprocessing) != found:
        raise UserError(
            f"{folder} was tuned with other preprocessing than {source}: give runs that agree in it"
        )
    check_fits(state, folder, backbone=prepared.backbone.record())
    if prepared.datamodule.fingerprint != result.data["fingerprint"]:
        raise UserError(
            f"the data of {folder} have changed since it was trained: its test set is another one now"
        )


def restore_on(prepared: run.Run, state: TunedState, path: Path) -> Classifier:
    """Return the classifier of a tuned state on a copy of a prepared backbone, which the process's next run gets too."""
    return restore(state, path, replace(prepared.backbone, module=deepcopy(prepared.backbone.module)))
