"""Scoring saved states on their test set, one by itself or several as an ensemble."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from visprompt import run
from visprompt.errors import UserError
from visprompt.lit.module import TuningModule
from visprompt.lit.trainer import build_trainer
from visprompt.methods.ensemble import Ensemble
from visprompt.prediction import restore
from visprompt.results import Result, read_result
from visprompt.state import check_fits, load_state

console = Console()


def evaluate(cfg: DictConfig) -> float:
    """Scores tuned states on their test set, several of them as one ensemble, and says what the runs had scored.

    Args:
        cfg: run (the folder of a run, or a list of folders), trainer, precision, weights and paths.

    Returns:
        test/acc.

    Raises:
        UserError: A folder holds no finished run, or one that has no test set, or the runs do not belong together.
    """
    folders = [Path(folder) for folder in (cfg.run if OmegaConf.is_list(cfg.run) else [cfg.run])]
    if not folders:
        raise UserError("run=[] names no run: give the folder of one, or of several to average their logits")
    states, results = [load_state(folder) for folder in folders], [_finished(folder) for folder in folders]
    job = _job(cfg, folders[0])
    prepared = run.prepare(job)
    for folder, state, result in zip(folders, states, results, strict=True):
        if state.method.get("initial") is not None and len(folders) > 1:
            raise UserError(
                f"{folder} was pruned by itself, and the states of an ensemble have one shape: give runs with "
                "method.prune=false"
            )
        method = prepared.identity["method"]
        check_fits(state, folder, method=method, class_names=prepared.datamodule.class_names)
        if dict(state.preprocessing) != dict(prepared.datamodule.preprocessing):
            raise UserError(
                f"{folder} was tuned with other preprocessing than {folders[0]}: give runs that agree in it"
            )
        check_fits(state, folder, backbone=prepared.backbone.record())
        if prepared.datamodule.fingerprint != result.data["fingerprint"]:
            raise UserError(f"the data of {folder} have changed since it was trained: its test set is another one now")
    # a copy: the next run of this process gets the same backbone
    backbone = replace(prepared.backbone, module=deepcopy(prepared.backbone.module))
    module = TuningModule(restore(states[0], folders[0], backbone), run.make_recipe(job), job.seed)
    if len(states) > 1:
        members = Ensemble(module.classifier, [state.tensors for state in states])
        module.classifier = members.eval()  # type: ignore[assignment]  # it gives logits, all that scoring asks for
    trainer = build_trainer(job)
    trainer.test(module, datamodule=prepared.datamodule, verbose=False)
    score = module.scores["test/acc"]
    own = ", ".join(f"{100 * result.score:.2f} %" for result in results)
    console.print(
        f"test/acc {100 * score:.2f} % on {module.scores['test/count']:.0f} images "
        f"({'the run itself' if len(results) == 1 else f'{len(results)} runs averaged; each by itself'}: {own}), "
        f"test/balanced_acc {100 * module.scores['test/balanced_acc']:.2f} %",
        highlight=False,
    )
    return score


def _finished(folder: Path) -> Result:
    result = read_result(folder)
    if result is None:
        raise UserError(f"{folder} holds no finished run: give the folder that its table named")
    if result.split != "final":
        raise UserError(f"{folder} is a run of split=tune, which has no test set: give a run of split=final")
    return result


def _job(cfg: DictConfig, folder: Path) -> Any:
    """The job of a run, for this machine."""
    job: Any = OmegaConf.load(folder / "config.yaml")
    with open_dict(job):
        job.trainer, job.callbacks, job.logger = cfg.trainer, cfg.callbacks, None
        job.precision = cfg.precision or job.precision
        job.backbone.weights = cfg.weights or job.backbone.weights
        for name, place in (("data_dir", cfg.paths.data_dir), ("store_dir", f"{cfg.paths.data_dir}/stores")):
            if name in job.data and not Path(job.data[name]).is_dir():
                job.data[name] = place  # the run was made on another machine
        if "weights" in job.method:  # of a side network: the state brings the values
            job.method.weights = load_state(folder).method["weights"]
        if "download" in job.data:
            job.data.download = False  # scoring is no occasion to fetch 40 GB
    if job.backbone.weights and not Path(job.backbone.weights).expanduser().exists():
        raise UserError(f"there is no file of backbone weights at {job.backbone.weights}: give weights=FILE")
    return job
