"""Make one run: find its folder, skip or resume or start it, train, score, and write its results."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from visprompt.data.datamodule import TaskDataModule
from visprompt.errors import UserError
from visprompt.models.backbones import Backbone, BackboneSpec, build_backbone
from visprompt.models.classifier import Classifier
from visprompt.models.compiled import compile_in_place
from visprompt.models.feature_cache import release
from visprompt.models.kind import KINDS, SINGLE_LABEL
from visprompt.models.methods import build_method, check_options
from visprompt.models.state_schema import check_record
from visprompt.models.tuning_module import Diverged, TuningModule, cache_owner
from visprompt.runs import attempt_files, environment, matmul, run_folder, run_lock, signals
from visprompt.runs.calibrate import Temperature
from visprompt.runs.checkpoint import Owner, ResumeCheckpoint
from visprompt.runs.identity import digest, full_digest, identity_of
from visprompt.runs.instantiate import instantiate
from visprompt.runs.job import Job
from visprompt.runs.quiet import silence_libraries
from visprompt.runs.remote_run import RemoteRun
from visprompt.runs.result import Result, check_same_run, read_result
from visprompt.runs.results_store import Results
from visprompt.runs.resume_state import progress_of
from visprompt.runs.run_lock import Hold
from visprompt.runs.trainer import build_loggers, build_trainer, close
from visprompt.runs.trainer_checks import warn_random
from visprompt.text import Terminal
from visprompt.tuning import pruning

console = Terminal()


@dataclass(frozen=True)
class Run:
    """A job with its data, its backbone and the folder of its results.

    Attributes:
        job: The job.
        datamodule: The job's data.
        backbone: The job's backbone, shared by all runs of this process: copy its module before tuning it.
        identity: Everything that decides the numbers.
        folder: logs/<task>/<method>/<hash of the identity>.
    """

    job: Job
    datamodule: TaskDataModule
    backbone: Backbone
    identity: Mapping[str, Any]
    folder: Path

    @property
    def remote(self) -> RemoteRun | None:
        """Return this run in the store that paths.results names, or None if it is null."""
        results = Results.of(self.job.paths)
        return results.run(self.folder) if results else None


def prepare(job: Job) -> Run:
    """Build a job's data and backbone and find its folder; write and train nothing.

    Args:
        job: A job.

    Returns:
        The run.

    Raises:
        UserError: Data, weights or a setting are missing or wrong, or the run could not be recorded in a
            tuned state.
    """
    check(job)
    seed = 0 if job.backbone.pretrained else job.seed  # loaded weights are the same for every seed
    backbone = load_backbone(json.dumps(dict(job.backbone)), seed)
    datamodule = build_data(job, backbone)
    datamodule.check_sets()
    identity = identity_of(job, backbone, datamodule)
    # check before the training that the tuned state's record will be accepted; a method's file of weights is
    # checked when the method is built
    record = {name: getattr(datamodule, name) for name in ("task", "class_names", "preprocessing")}
    method = {name: value for name, value in identity["method"].items() if name != "weights"}
    record |= {"method": method, "backbone": backbone.record(), "versions": {}}
    check_record(record, "this run", "its tuned state could not be read again")
    folder = Path(job.paths.log_dir) / datamodule.task / job.method.name / digest(identity)
    return Run(job, datamodule, backbone, identity, folder)


def check(job: Job) -> None:
    """Check the options of a job's method before anything is loaded or built.

    Raises:
        UserError: An option of the method is unknown or has a wrong type.
    """
    options = dict(job.method)
    check_options(options.pop("name"), options)


@lru_cache(maxsize=1)
def load_backbone(spec: str, seed: int) -> Backbone:
    """Build the backbone of a config given as JSON; the last one stays in memory for the next run."""
    silence_libraries()  # timm logs each file of weights that it loads
    return build_backbone(BackboneSpec(**json.loads(spec)), seed)


def build_data(job: Job, backbone: Backbone) -> TaskDataModule:
    """Build a job's data module, with the image size and normalisation of a backbone."""
    return instantiate(
        "data",
        dict(job.data),
        TaskDataModule,
        batch_size=job.recipe.batch_size,
        split=job.split,
        seed=job.seed,
        image_size=backbone.image_size,
        mean=backbone.mean,
        std=backbone.std,
        accumulate=job.trainer.accumulate_grad_batches,
    )


def build_classifier(
    job: Job, backbone: Backbone, num_classes: int, kind: str = SINGLE_LABEL.name
) -> Classifier:
    """Build the classifier of a job: a copy of the backbone, method and head, drawn with the job's seed."""
    L.seed_everything(int(job.seed), verbose=False)
    module = deepcopy(backbone.module)
    options = dict(job.method)
    method = build_method(options.pop("name"), module, **options)
    return Classifier(module, method, num_classes, job.recipe.head_init, KINDS[kind], job.recipe.head)


def run_job(run: Run) -> Result:
    """Skip, resume or start a run in this process, which may be one rank of several.

    Args:
        run: What `prepare` returned.

    Returns:
        The result; the stored one if the run was finished before and `rerun` is not set.

    Raises:
        UserError: Another process is working on the run, or a setting is wrong.
    """
    resume = ResumeCheckpoint(run.folder / run_folder.RESUME, run.job.resume_every_n_epochs)
    trainer = build_trainer(run.job, resume)
    if trainer.world_size > 1:
        trainer.strategy.setup_environment()  # makes the process group, for the broadcast in `_next_attempt`
    with _next_attempt(run, trainer) as (attempt, hold):
        if attempt is not None:
            with matmul.matmul_precision(run.job):
                return _train(run, trainer, resume, attempt, hold)
        stored = read_result(run.folder, hashed=False)  # `_next_attempt` has hashed it
        if stored is None:
            raise UserError(f"{run.folder} changed while it was read: run the same command again")
        if trainer.is_global_zero:
            for logger in build_loggers(run.job, run.folder, stored.attempt, stored.tuned):
                logger.log_metrics(dict(stored.metrics))
                close(logger, "failed" if stored.status == "diverged" else "success", run.folder)
        return stored


@contextmanager
def _next_attempt(run: Run, trainer: L.Trainer) -> Iterator[tuple[int | None, Hold | None]]:
    """Hold the run's folder in rank 0, and yield on all ranks the number of the attempt to make.

    Yields:
        The number, or None if the run is finished and not to be run again; and the folder in rank 0.
    """
    attempt: int | None = None
    hold: Hold | None = None
    error: UserError | None = None
    with ExitStack() as stack:
        if trainer.is_global_zero:
            try:
                hold = stack.enter_context(run_lock.locked(run.folder, run.remote))
                if hold.stored:
                    check_same_run(hold.stored, run.identity, run.folder)
                attempt = run_folder.next_attempt(run.folder, hold.stored, run.job.rerun)
            except UserError as refusal:
                error = refusal
        attempt, error = trainer.strategy.broadcast((attempt, error))
        if error:
            raise error
        yield attempt, hold


def _train(run: Run, trainer: L.Trainer, resume: ResumeCheckpoint, attempt: int, hold: Hold | None) -> Result:
    """Train and score a run on all ranks; rank 0, which holds the folder, writes the results."""
    started = time.monotonic()
    resume.hold = hold
    device = trainer.strategy.root_device
    job, datamodule = run.job, run.datamodule
    ckpt_path = resume.find(Owner(full_digest(run.identity), job.seed, attempt))
    _check_alike(trainer, ckpt_path, run.folder)
    classifier = build_classifier(job, run.backbone, datamodule.num_classes, datamodule.kind)
    # free what earlier runs left on the device, unless this run reads the same
    release(cache_owner(datamodule, classifier, job.recipe))
    environment.reset_peak_memory(device)
    pruning.rewind(classifier, run.folder.parent)  # if the method names stored initial values
    leaks = bool(job.diagnostics.best_on_test) and datamodule.is_scored
    arguments = {"classifier": classifier, "recipe": job.recipe, "seed": job.seed, "leaks": leaks}
    module = instantiate("lightning_module", dict(job.lightning_module), TuningModule, **arguments)
    tuned = attempt_files.tuned_counts(module.classifier, run.identity)  # its forward pass is not compiled
    driven = attempt_files.driven(run.backbone, module.classifier)
    if job.compile:
        parts = [run.identity[name] for name in ("backbone", "method", "precision")]
        head = [datamodule.num_classes, datamodule.kind, job.recipe.head]
        compile_in_place(module.classifier, json.dumps([*parts, *head, str(device)]))
    if trainer.is_global_zero and not (job.backbone.pretrained or classifier.method.trains_backbone):
        warn_random(job.method.name)
    if trainer.is_global_zero:
        matmul.hint(job, device)
        attempt_files.write_config(run.folder / run_folder.RESUME, job)
        trainer.loggers = build_loggers(run.job, run.folder, attempt, tuned)
    temperature = Temperature()
    if "debug" not in job.tags:  # a debug run may be limited to a few batches
        trainer.callbacks.append(temperature)  # type: ignore[attr-defined]  # a list
    status, refused = "failed", None
    if trainer.is_global_zero and datamodule.described:
        datamodule.prepare_data()  # finds the images that cannot be decoded, which `described` lists
        for line in datamodule.described:
            console.print(line, soft_wrap=True)
    try:
        diverged = _fit_and_score(trainer, module, datamodule, ckpt_path)
        unscored = diverged is None and not datamodule.is_scored
        if diverged is None and not unscored and module.scored_step != trainer.global_step:
            raise UserError(
                "nothing was scored: trainer.limit_val_batches and trainer.limit_test_batches must not be 0"
            )
        result = attempt_files.record(
            run.identity,
            datamodule,
            resume,
            module,
            diverged,
            trainer.global_step,
            attempt=attempt,
            backbone=run.identity["backbone"] | driven,
            tuned=tuned,
            time={"train_s": resume.seconds, "last_process_s": time.monotonic() - started},
            peak_memory=environment.peak_memory(device),
            machine=environment.machine(device, trainer.world_size, trainer.accumulate_grad_batches),
            versions={**environment.versions(), "git_commit": environment.git_commit()},
            tags=job.tags,
        )
        if hold:
            tuned_state = attempt_files.tuned_state(
                module.classifier, result, datamodule, run.backbone, temperature.value
            )
            try:
                result = attempt_files.finish(hold, job, resume, result, tuned_state, module.confusion)
            except UserError as error:  # raised in all ranks, which go on with the next run together
                refused = error
        # a diverged run counts as failed, so that a sweep does not take its last figure for a score
        status = "failed" if refused or result.status == "diverged" else "success"
    finally:
        for logger in trainer.loggers:
            close(logger, status, run.folder)
    # rank 0's result has the checksum of the file that it wrote
    finished: Result
    finished, refused = trainer.strategy.broadcast((result, refused))
    if refused:
        raise refused
    return finished


def _check_alike(trainer: L.Trainer, ckpt_path: Path | None, folder: Path) -> None:
    """Check that all ranks continue from the same resume state, or that none has one.

    Raises:
        UserError: They do not; raised on all ranks.
    """
    if trainer.world_size == 1:
        return
    mine = progress_of(ckpt_path) if ckpt_path else None
    same = mine == trainer.strategy.broadcast(mine)  # the one that rank 0 found
    if not trainer.strategy.reduce_boolean_decision(same):
        raise UserError(
            f"the ranks of this run find different resume states in {folder}: give them a folder on a file "
            "system that all machines share with paths.log_dir=..."
        )


def _fit_and_score(
    trainer: L.Trainer, module: TuningModule, datamodule: TaskDataModule, ckpt_path: Path | None
) -> int | None:
    """Train, and score once after the last epoch.

    Returns:
        The step at which the run diverged, or None if it did not.
    """
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
        if not all(parameter.isfinite().all() for _, parameter in module.classifier.tuned_parameters()):
            return trainer.global_step  # of the last step: no later loss shows that they are not finite
        if datamodule.split == "final" and datamodule.is_scored:
            trainer.test(module, datamodule=datamodule, verbose=False)
        elif datamodule.is_scored and module.scored_step != trainer.global_step:
            # the last epoch was not validated: check_val_every_n_epoch, or a kill after its resume state
            trainer.validate(module, datamodule=datamodule, verbose=False)
    except Diverged as error:
        return error.step
    except SystemExit as error:
        if trainer.interrupted and not isinstance(error, signals.Ended):
            raise KeyboardInterrupt from None  # Lightning turns Ctrl-C into SystemExit
        raise
    return None
