"""The LightningModule: training, scoring, and the error of a diverged run."""

import json
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from visprompt.data.datamodule import TaskDataModule
from visprompt.data.datasets import Batch, DeviceDataset, TicketDataset
from visprompt.errors import UserError
from visprompt.models.classifier import Classifier
from visprompt.models.compiled import with_any_batch
from visprompt.models.contract import TokenBackbone
from visprompt.models.epoch_sums import NEVER, EpochSums
from visprompt.models.feature_cache import has_own_memory, keep, on_device
from visprompt.models.fit_checks import check_batch_norm, check_comparison
from visprompt.models.frozen_weights import cast_for
from visprompt.models.methods.inits import MAX_IMAGES, initialise
from visprompt.models.methods.ranks import share_from_first
from visprompt.models.objective import Objective, check_method
from visprompt.models.optim import Recipe, build_optimizer
from visprompt.models.seeds import epoch_seed
from visprompt.models.task_kind import Mean
from visprompt.models.training_images import Loader, first_of_each, plain_batches, plain_counts
from visprompt.models.windows import central


class Diverged(Exception):
    """The loss was NaN or infinite, first at the optimiser step `step`, counted from 0."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss is not finite at step {step}: lower recipe.lr")
        self.step = step


class TuningModule(L.LightningModule):
    """Tunes a classifier by a recipe.

    Data come from a `TaskDataModule`, or from plain loaders of pairs (normalised images [B, 3, H, W], labels
    [B]), each of which is one optimiser step.

    A checkpoint's `state_dict` is the tuned state alone. Every epoch seeds torch anew from (seed, epoch,
    rank), so a run that is resumed at an epoch draws the same dropout, and checkpoints need no state of the
    generators.

    Args:
        classifier: The classifier to tune.
        recipe: The settings of training.
        seed: Seed of the run.
        leaks: Whether to log a final run's test figure after every epoch, as `leak/test_acc`. It shows the
            figure of codes that report the best epoch on test; nothing reads it, and nothing else changes.

    Attributes:
        scores: Figures of the last scoring, by metric name.
        scored_step: Number of optimiser steps at the last scoring that counts: of val images, unless a final
            run scores test after them.
        per_class: Accuracy or IoU of each class at that scoring; None for a class without images.
        confusion: The counts of that scoring, see `TaskKind.figures`.
        scored_loss: Mean loss at that scoring; if it is not finite, the accuracies mean nothing.
    """

    def __init__(self, classifier: Classifier, recipe: Recipe, seed: int, leaks: bool = False) -> None:
        super().__init__()
        self._leaks = leaks
        self.classifier = classifier
        self.recipe = recipe
        self.seed = seed
        classes = classifier.num_classes
        self.kind = classifier.kind
        self._objective = Objective(recipe, self.kind, classes, seed)
        self.val_loss, self.test_loss = Mean(), Mean()
        self.val_figures, self.test_figures = self.kind.figures(classes), self.kind.figures(classes)
        self.scores: dict[str, float] = {}
        self.scored_step = -1
        self.per_class: list[float | None] = []
        self.confusion = torch.zeros(0, 0, dtype=torch.int64)
        self.scored_loss = math.nan
        # of the last step: at the end of an epoch the optimiser already has that of the next step
        self._lr = math.nan
        self._epoch = EpochSums()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, C] of normalised images [B, 3, H, W], or of a result of `Classifier.frozen`."""
        images = with_any_batch(self.classifier, images.to(self.dtype))  # pixels may be in another precision
        return cast(Tensor, self.classifier(images))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # one form for all
        """Return the tuned state: a frozen backbone is never written."""
        return self.classifier.tuned_state()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> None:
        """Load a tuned state; a missing or unexpected name is an error."""
        self.classifier.load_tuned_state(state_dict)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Tell the data module which epoch comes next: workers load it before the trainer counts on."""
        if not self._is_plain:
            self._datamodule.first_epoch = int(checkpoint["epoch"]) + 1  # written at the end of an epoch

    def configure_optimizers(self) -> Any:
        """Return the recipe's optimiser with its schedule, stepped after every optimiser step."""
        if self._is_plain:
            self._plain_loader()  # which tells the trainer its length
            steps = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        else:
            # Lightning's estimate of the steps would load the data before frozen features replace it
            steps = math.ceil(len(self._datamodule.train_dataset) / self.recipe.batch_size)
        optimizer, schedule = build_optimizer(
            self.classifier.tuned_parameters(), self.recipe, steps, self.classifier.method.undecayed
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def setup(self, stage: str) -> None:
        """Cast frozen weights before scoring; before training, `on_fit_start` does it."""
        if stage != "fit" and not self._is_plain:
            cast_for(self.classifier, self.trainer.precision)

    def on_fit_start(self) -> None:
        """Initialise the method; without augmentation, compute the output of frozen layers once.

        If there is no such output, a GPU gets the pixels, once.
        """
        self._check()
        datamodule = self._datamodule
        self._weigh()
        self._objective.place(self.device)
        # not of a resumed run, whose state Lightning has loaded by now, nor of a classifier that is tuned on
        if self.classifier.method.needs_images and not self.classifier.initialised:
            self._initialise()
            share_from_first(self.classifier.method)
            self.classifier.initialised = True
        if not self._is_plain:  # the caller of `fit` goes on using the classifier in float32
            cast_for(self.classifier, self.trainer.precision)  # after the initial values
        if not self._is_plain and not datamodule.augments:
            datamodule.train_dataset = self._cached(datamodule.train_dataset, self.recipe.mixes)
            if datamodule.validates:
                datamodule.val_dataset = self._cached(datamodule.val_dataset)

    def _check(self) -> None:
        """Refuse divided batches and a recipe that the method cannot follow."""
        accumulated, plain = self.trainer.accumulate_grad_batches, self._is_plain
        check_batch_norm(
            self.classifier,
            accumulated=accumulated,
            processes=self.trainer.world_size,
            on_cpu=self.device.type == "cpu",
            short=0 if plain else len(self._datamodule.train_dataset) % self.recipe.batch_size,
        )
        check_comparison(self.classifier, accumulated)
        check_method(self.recipe, type(self.classifier.method))

    def _weigh(self) -> None:
        """Set the class weights, and tell the data module how images are drawn and weighed."""
        balances, plain = self.recipe.class_weights == "balanced", self._is_plain
        if plain and self.recipe.sampling != "shuffled":
            raise UserError(
                "recipe.sampling=balanced is for the data modules of this project: give the loader a "
                "torch.utils.data.WeightedRandomSampler"
            )
        if plain and balances:
            counts = plain_counts(self._plain_loader(), self.kind, self.classifier.num_classes)
            self._objective.balance(counts.to(self.device))
        if not plain:
            self._objective.weigh(self._datamodule)

    def _initialise(self) -> None:
        """Compute the method's initial values from training images, the same on every rank."""
        method = self.classifier.method
        if self._is_plain:
            self._initialise_from(plain_batches(self._plain_loader(), method.images_per_class))
            return
        dataset = self._datamodule.train_dataset
        rows = np.random.default_rng(self.seed).permutation(len(dataset))
        if method.images_per_class is None:
            rows = rows[:MAX_IMAGES]
        else:
            rows = first_of_each(dataset.labels.numpy(), rows, method.images_per_class)
        dataloader = self._datamodule.feature_dataloader(dataset.subset(rows))
        self._initialise_from(dataloader)

    def _initialise_from(self, loaded: Iterable[Any]) -> None:
        """Compute the method's initial values from batches of a loader."""
        method, backbone = self.classifier.method, self.classifier.backbone
        batches = (self._as_batch(self._apply_batch_transfer_handler(batch)) for batch in loaded)
        if method.images_per_class is None:
            size = self.classifier.own_size if self.kind.dense else None
            images = (central(batch.images, size) if size else batch.images for batch in batches)
            initialise(method, cast(TokenBackbone, backbone), images, self.seed)
        else:
            method.see_classes(backbone, ((b.images, b.labels) for b in batches), self.seed)

    def on_train_epoch_start(self) -> None:
        """Seed torch's generators for this epoch."""
        seed = epoch_seed(self.seed, self.current_epoch, self.global_rank)
        if self.device.type == "cpu":  # torch's function would note it for GPUs too, in a list that grows
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        self._epoch = EpochSums()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the weighted sum of the losses, whose weights make it the mean over the global batch."""
        step = batch_idx // self.trainer.accumulate_grad_batches if self.recipe.mixes else 0
        paired = self.recipe.mixes and not self._is_plain
        batch, partners, mix = self._objective.mixed(self._as_batch(batch), self.current_epoch, step, paired)
        logits = self(batch.images).float()
        task_loss = self._objective.loss(logits, batch, partners, mix)
        losses = self.classifier.losses(logits, batch.labels, batch.weights, task_loss)
        loss = (losses * batch.weights).sum()
        correct = self._objective.correct(logits, batch, partners, mix)
        self._epoch.add(self.global_step, loss, losses, correct, batch.weights)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Store the learning rate of this step, to be logged."""
        self._lr = float(optimizer.param_groups[0]["lr"])

    def on_train_epoch_end(self) -> None:
        """Log the epoch; end a diverged run on all ranks before its checkpoint is written."""
        bad_step, *sums = self._epoch.read()
        strategy = self.trainer.strategy
        if self.trainer.world_size > 1:
            bad_step = int(strategy.reduce(torch.tensor(bad_step, device=self.device), reduce_op="min"))
            sums = strategy.reduce(torch.tensor(sums, device=self.device), reduce_op="sum").tolist()
        if bad_step != NEVER:
            raise Diverged(bad_step)
        self.classifier.method.end_epoch(self.current_epoch)
        loss, correct = np.array(sums[:2], np.float32) / np.float32(sums[2])
        self.log("train/loss", float(loss), prog_bar=True)
        self.log(f"train/{self.kind.hit}", float(correct), prog_bar=True)
        self.log("lr", self._lr)
        if self._leaks and not self._is_plain and self._datamodule.split == "final":
            self.log(f"leak/test_{self.kind.hit}", self._leak())

    @torch.no_grad()
    def _leak(self) -> float:
        """Return the current score on the test images; every rank scores all of them."""
        dataset, hits = self._datamodule.test_dataset, 0.0
        self.classifier.eval()
        for batch in self._datamodule.feature_dataloader(dataset):
            moved = self._apply_batch_transfer_handler(batch)
            with self.trainer.precision_plugin.forward_context():
                hits += float(self.kind.correct(self(moved.images), moved.labels).sum())
        self.classifier.train()
        return hits / len(dataset)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch of validation images."""
        batch = self._as_batch(batch)
        logits = self(batch.images).float()
        self.val_loss.update(self.kind.loss(logits, batch.labels), batch.weights)
        self.val_figures.update(logits, batch.labels, batch.weights)

    def on_validation_epoch_end(self) -> None:
        """Log the validation figures."""
        self._score("val", self.val_figures, self.val_loss)
        self.scores["val/loss"] = float(self.val_loss.compute())
        self.log("val/loss", self.val_loss)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch of test images; runs once, after the last epoch of a final run."""
        batch = self._as_batch(batch)
        logits = self(batch.images).float()
        self.test_loss.update(self.kind.loss(logits, batch.labels), batch.weights)
        self.test_figures.update(logits, batch.labels, batch.weights)

    def on_test_epoch_end(self) -> None:
        """Log the test figures."""
        self._score("test", self.test_figures, self.test_loss)
        self.test_loss.reset()  # Lightning resets only metrics that are logged

    def _score(self, stage: str, figures: Metric, loss: Mean) -> None:
        """Log the figures of a split set ("val" or "test"), and store them if they are the run's score."""
        values = figures.compute()
        figures.reset()
        per_class, confusion = values.pop("per_class"), values.pop("confusion")
        self.scores = {f"{stage}/{name}": value for name, value in values.items()}
        self.log_dict(self.scores, prog_bar=True)
        if stage == "val" and not self._is_plain and self._datamodule.split == "final":
            return  # only a curve
        self.per_class, self.confusion = per_class, confusion
        self.scored_loss = float(loss.compute())
        self.scored_step = self.trainer.global_step

    def _as_batch(self, loaded: Batch | Sequence[Tensor]) -> Batch:
        """Return a pair of a plain loader as a batch."""
        if isinstance(loaded, Batch):
            return loaded
        images, labels = loaded[0], loaded[1].long()  # several classes are often given as 0.0 and 1.0
        weight = 1 / len(labels) if self.trainer.training else 1.0  # the loss is their mean
        weights = torch.full((len(labels),), weight, device=labels.device)
        of_classes = self._objective.image_weights(labels)
        scales = None if of_classes is None else (len(labels) / of_classes.sum()).expand(len(labels))
        return Batch(images, labels, torch.arange(len(labels), device=labels.device), weights, scales)

    def _plain_loader(self) -> Loader:
        self.trainer.fit_loop.setup_data()
        return cast(Loader, self.trainer.train_dataloader)

    @property
    def _is_plain(self) -> bool:
        return not isinstance(self._datamodule, TaskDataModule)

    @property
    def _datamodule(self) -> TaskDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it at run time

    def _cached(self, dataset: TicketDataset, mixes: bool = False) -> TicketDataset:
        """Return a data set whose images do not have to be prepared in every epoch.

        It holds the outputs of frozen layers, if there are any and no pixels are mixed (all of them on every
        rank), else the pixels on a GPU. If images differ in size, or do not fit, it is the data set itself.
        """
        datamodule, device = self._datamodule, self.device
        if dataset.one_by_one:
            return dataset
        owner = cache_owner(datamodule, self.classifier, self.recipe)
        images = (datamodule.fingerprint, json.dumps(datamodule.preprocessing), *dataset.keys)
        if mixes or not self.classifier.has_frozen_part:
            if not has_own_memory(device):
                return dataset
            return on_device(dataset, device, (owner, device, images))
        first_block = self.classifier.first_block
        key = (owner, device, self.trainer.precision, datamodule.batch_size, first_block, images)
        self.classifier.eval()
        outputs = keep(self._frozen_parts(dataset), len(dataset), self.trainer.world_size, key)
        self.classifier.train()
        return dataset if outputs is None else DeviceDataset(outputs, dataset.labels, dataset.keys)

    @torch.no_grad()
    def _frozen_parts(self, dataset: TicketDataset) -> Iterator[Tensor]:
        """Yield the output of the frozen layers for each batch, float32 on the device."""
        for batch in self._datamodule.feature_dataloader(dataset):
            moved = self._apply_batch_transfer_handler(batch)
            with self.trainer.precision_plugin.forward_context():
                part = self.classifier.frozen(moved.images.to(self.dtype))
            yield part.float()


def cache_owner(datamodule: TaskDataModule, classifier: Classifier, recipe: Recipe) -> tuple[Hashable, int]:
    """Return who owns what a run caches: the images, and the first block that it computes in every epoch."""
    return datamodule.images_key, 0 if recipe.mixes else classifier.first_block
