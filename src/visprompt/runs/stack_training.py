"""Train a stack of runs whose folders are locked, and write the files of each."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from visprompt.data.datasets import ArrayDataset, Batch, TicketDataset
from visprompt.data.sampler import GlobalBatches
from visprompt.errors import UserError
from visprompt.models.epoch_sums import NEVER
from visprompt.models.feature_cache import free_on, has_own_memory, keep, release
from visprompt.models.kind import KINDS
from visprompt.models.objective import Objective
from visprompt.models.stacked import Images, Scored, StackedTraining
from visprompt.models.stacked_classifier import StackedClassifier, step_bytes
from visprompt.models.stacked_optim import StackedOptimizer
from visprompt.models.tuning_module import cache_owner
from visprompt.runs import attempt_files, environment, matmul, run_folder, signals
from visprompt.runs.calibrate import MOST, has_unseen_images
from visprompt.runs.checkpoint import ResumeCheckpoint
from visprompt.runs.result import Result
from visprompt.runs.run import Run, build_classifier
from visprompt.runs.run_lock import Hold
from visprompt.runs.trainer_checks import warn_random
from visprompt.text import Terminal

PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16}
"""The precisions in which a stack is trained, with the type of autocast."""
console = Terminal()
_SHARE = 4  # a stack, and the frozen outputs on a GPU, each take at most this part of the free memory


@dataclass(frozen=True)
class Point:
    """A point of a stack.

    Attributes:
        place: Its place among the jobs of the group.
        run: Its run.
        attempt: The number of the attempt.
        hold: The folder of the run, which this process holds.
    """

    place: int
    run: Run
    attempt: int
    hold: Hold


class Stack:
    """Trains points that differ in learning rate, weight decay and seed only.

    Args:
        points: The points.
        device: The device of the training.
    """

    def __init__(self, points: Sequence[Point], device: torch.device) -> None:
        self.points, self.device = points, device
        self.job, self.data = points[0].run.job, points[0].run.datamodule
        self.kind = KINDS[self.data.kind]
        self.classifier, self._states = _initial(points, device)
        self.has_frozen_part = self.classifier.has_frozen_part
        self.only_head = self.classifier.method.first_block == self.classifier.method.num_blocks
        self.tuned = attempt_files.tuned_counts(self.classifier, points[0].run.identity)
        dtype = PRECISIONS[self.job.precision]
        self._autocast: Any = partial(torch.autocast, device.type, dtype) if dtype else nullcontext

    def train(self) -> dict[int, tuple[Run, Result]]:
        """Train all points, in several parts if they do not fit into memory together.

        Returns:
            The runs with their results by place; empty if there is no room for two of them.
        """
        started, job, data = time.monotonic(), self.job, self.data
        release(cache_owner(data, self.classifier, job.recipe))
        environment.reset_peak_memory(self.device)
        matmul.hint(job, self.device)
        data.prepare_data()
        for line in data.described:
            console.print(line, soft_wrap=True)
        if not job.backbone.pretrained:
            warn_random(job.method.name)
        images = self._images(data.train_dataset)
        val = self._images(data.val_dataset) if images and data.validates else None
        if images is None or (data.validates and val is None):
            return {}
        step = step_bytes(self.classifier, images.outputs[: job.recipe.batch_size])
        room = free_on(self.device) // _SHARE // step
        if room < min(2, len(self.points)):
            return {}
        done: dict[int, tuple[Run, Result]] = {}
        for part in np.array_split(np.arange(len(self.points)), -(-len(self.points) // room)):
            done |= self._train([self.points[place] for place in part], images, val, started)
            started = time.monotonic()
        return done

    def _train(
        self, points: Sequence[Point], images: Images, val: Images | None, started: float
    ) -> dict[int, tuple[Run, Result]]:
        """Train points that fit into memory together, and write their files."""
        job, data = self.job, self.data
        console.print(f"{job.name}: {len(points)} points are trained together", highlight=False)
        training = self._training(points, images)
        curves = [ResumeCheckpoint(point.run.folder / run_folder.RESUME) for point in points]
        scored = [Scored() for _ in points]
        diverged: dict[int, int] = {}
        for epoch in self._epochs():
            signals.check()
            alive = [place for place in range(len(points)) if place not in diverged]
            if not alive:
                break
            logged = training.epoch(epoch)
            if val is not None:
                self._score(training, "val", [val], alive, scored)
            bad_steps = training.bad_step.tolist()
            for place in alive:
                if bad_steps[place] != NEVER:
                    diverged[place] = bad_steps[place]
                    continue
                figures = logged[place] | (scored[place].scores if val is not None else {})
                # a run logs numbers of single precision, in this order
                rounded = {name: float(np.float32(value)) for name, value in sorted(figures.items())}
                curves[place].rows[epoch] = {"epoch": epoch, "step": training.steps} | rounded
        seconds = (time.monotonic() - started) / len(points)
        finite = training.classifier.finite().tolist()
        diverged |= {p: training.steps for p in range(len(points)) if p not in diverged and not finite[p]}
        alive = [place for place in range(len(points)) if place not in diverged]
        if data.split == "final" and data.is_scored and alive:
            self._score(training, "test", self._frozen(data.test_dataset), alive, scored)
        temperatures = self._temperatures(training, val, alive)
        measured = {
            "backbone": points[0].run.identity["backbone"]
            | attempt_files.driven(points[0].run.backbone, self.classifier),
            "tuned": self.tuned,
            "peak_memory": environment.peak_memory(self.device),
            "machine": environment.machine(self.device, 1, 1) | {"stacked": len(points)},
            "versions": {**environment.versions(), "git_commit": environment.git_commit()},
            "tags": job.tags,
        }
        done = {}
        lost: UserError | None = None
        for place, point in enumerate(points):
            signals.check()
            measured["time"] = {"train_s": seconds, "last_process_s": time.monotonic() - started}
            run, curve = point.run, curves[place]
            steps = training.steps
            made = (run.identity, data, curve, scored[place], diverged.get(place), steps)
            result = attempt_files.record(*made, attempt=point.attempt, **measured)
            self.classifier.load_state_dict(training.classifier.state(place), strict=False)
            state = attempt_files.tuned_state(
                self.classifier, result, data, run.backbone, temperatures.get(place)
            )
            files = (point.hold, run.job, curve, result, state, scored[place].confusion)
            try:
                done[point.place] = run, attempt_files.finish(*files)
            # another process has taken this point while this one stood still, or the store gives no answer
            except UserError as error:
                lost = error
        if lost and data.split == "final":  # of final runs, all are stacked or none
            raise lost
        return done

    def _epochs(self) -> Any:
        """Return the epochs to train, with a progress bar if the job has one."""
        removed = (self.job.callbacks or {}).get("progress_bar") is None
        shown = self.job.trainer.get("enable_progress_bar", True) and not removed and console.is_terminal
        epochs = range(self.job.recipe.epochs)
        return track(epochs, self.job.name, console=console, transient=True, disable=not shown)

    def _training(self, points: Sequence[Point], images: Images) -> StackedTraining:
        """Return the training of points from their initial values."""
        job, train_set = self.job, self.data.train_dataset
        objective = Objective(job.recipe, self.kind, self.data.num_classes, job.seed)
        seeds = list(dict.fromkeys(point.run.job.seed for point in points))
        samplers = []
        for seed in seeds:
            data = next(point.run.datamodule for point in points if point.run.job.seed == seed)
            # only its sampler is used, which does not read the images
            labels = train_set.labels.numpy()
            data.train_dataset = ArrayDataset(np.empty((len(labels), 0)), labels, train_set.keys)
            objective.weigh(data)
            samplers.append(cast(GlobalBatches, data.train_dataloader().batch_sampler))
        states = [self._states[point.run.job.seed] for point in points]
        stacked = StackedClassifier(self.classifier, states)
        trainer = job.trainer
        optimizer = StackedOptimizer(
            stacked.parameters,
            [point.run.job.recipe for point in points],
            len(samplers[0]),
            self.classifier.method.undecayed,
            trainer.get("gradient_clip_val"),
            trainer.get("gradient_clip_algorithm") or "norm",
        )
        seed_of = [seeds.index(point.run.job.seed) for point in points]
        return StackedTraining(
            stacked, optimizer, objective, images, samplers, seeds, seed_of, self._autocast
        )

    def _score(
        self, training: StackedTraining, stage: str, images: Any, alive: Sequence[int], scored: list[Scored]
    ) -> None:
        """Score images and set the figures of the points that have not diverged."""
        for place, figures in zip(alive, training.score(stage, images, alive), strict=True):
            if stage == "val":
                figures.scores["val/loss"] = figures.scored_loss
            if stage == "val" and self.data.split == "final":  # only a curve
                scored[place].scores = figures.scores
            else:
                scored[place] = figures

    def _temperatures(
        self, training: StackedTraining, val: Images | None, alive: Sequence[int]
    ) -> dict[int, float | None]:
        """Fit the temperature of each point, see `calibrate.Temperature`."""
        if val is None or not has_unseen_images(self.data):
            return {}
        if len(val.labels) > MOST:
            rows = np.sort(np.random.default_rng(0).permutation(len(val.labels))[:MOST])
            chosen = torch.from_numpy(rows).to(self.device)
            val = Images(val.outputs[chosen], val.labels[chosen])
        parts = [*training.logits([val])]
        logits, labels = torch.cat([part for part, _ in parts], 1), torch.cat([part for _, part in parts])
        return {place: self.kind.fit_temperature(logits[place], labels) for place in alive}

    def _images(self, dataset: TicketDataset) -> Images | None:
        """Return images with the outputs of the frozen layers on the device; None if they have no room.

        Single runs of this process find the outputs by the same key, see `TuningModule`.
        """
        data, device = self.data, self.device
        images = (data.fingerprint, json.dumps(data.preprocessing), *dataset.keys)
        owner, first_block = (
            cache_owner(data, self.classifier, self.job.recipe),
            self.classifier.method.first_block,
        )
        key = (owner, device, self.job.precision, data.batch_size, first_block, images)
        self.classifier.eval()
        outputs = keep((part.outputs for part in self._frozen(dataset)), len(dataset), 1, key)
        self.classifier.train()
        if outputs is None or (has_own_memory(device) and outputs.nbytes > free_on(device) // _SHARE):
            return None
        return Images(outputs.to(device), dataset.labels.to(device))

    @torch.no_grad()
    def _frozen(self, dataset: TicketDataset) -> Iterator[Images]:
        """Yield images with the outputs of the frozen layers, float32 on the device, batch by batch."""
        for batch in self.data.feature_dataloader(dataset):
            on_device = Batch(*(None if part is None else part.to(self.device) for part in batch))  # type: ignore[arg-type]  # scales
            batch = self.data.on_after_batch_transfer(on_device, 0)
            with self._autocast():
                part = self.classifier.frozen(batch.images.float())
            yield Images(part.float(), batch.labels)


def _initial(points: Sequence[Point], device: torch.device) -> tuple[Any, dict[int, dict[str, Tensor]]]:
    """Return a classifier of the points, and the initial tuned tensors of each seed."""
    states: dict[int, dict[str, Tensor]] = {}
    for point in points:
        run = point.run
        if run.job.seed not in states:
            data = run.datamodule
            classifier = build_classifier(run.job, run.backbone, data.num_classes, data.kind).to(device)
            names, tensors = classifier.tuned_tensor_names(), classifier.state_dict()
            states[run.job.seed] = {name: tensors[name].clone() for name in tensors if name in names}
    return classifier, states
