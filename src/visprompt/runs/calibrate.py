"""Fit the temperature of a run after its last epoch, on validation images that it was not trained on."""

import lightning.pytorch as L
import numpy as np
import torch

from visprompt.data.datamodule import TaskDataModule
from visprompt.models.tuning_module import TuningModule

MOST = 10_000  # images that the temperature is fitted on, at most: it is one number


class Temperature(L.Callback):
    """Fits the temperature when training ends; changes neither the classifier nor its figures.

    Attributes:
        value: The temperature; None if it was not fitted: there are no validation images, the run was trained
            on them, its kind of task has no temperature, or see `fit_temperature`.
    """

    def __init__(self) -> None:
        self.value: float | None = None

    @torch.no_grad()
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit the temperature in rank 0, which writes the tuned state."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, TaskDataModule) or not isinstance(pl_module, TuningModule):
            return
        if not trainer.is_global_zero or not has_unseen_images(data) or pl_module.kind.dense:
            return
        module, dataset = pl_module, data.val_dataset
        # Lightning has moved it to the CPU; not `on_train_end`, which a run that resumes at its end skips
        module.to(trainer.strategy.root_device)
        if len(dataset) > MOST:
            rows = np.random.default_rng(0).permutation(len(dataset))[:MOST]
            dataset = dataset.subset(np.sort(rows))
        logits, labels = [], []
        module.classifier.eval()
        for batch in data.feature_dataloader(dataset):
            moved = module._apply_batch_transfer_handler(batch)
            with trainer.precision_plugin.forward_context():
                logits.append(module(moved.images).float().cpu())
            labels.append(batch.labels.cpu())
        module.classifier.train()
        module.cpu()
        self.value = module.kind.fit_temperature(torch.cat(logits), torch.cat(labels))


def has_unseen_images(data: TaskDataModule) -> bool:
    """Return whether there are validation images that a run under this split is not trained on."""
    return data.val_set not in data.train_sets[data.split] and bool(data.sizes.get(data.val_set))
