"""Tune a classifier on one's own data loaders, through Lightning and without Hydra."""

from typing import Any

import lightning.pytorch as L
from torch.utils.data import DataLoader

from visprompt.errors import UserError
from visprompt.models.classifier import Classifier
from visprompt.models.recipe import Recipe
from visprompt.models.tuning_module import TuningModule


def fit(
    classifier: Classifier,
    train: DataLoader[Any],
    val: DataLoader[Any] | None,
    recipe: Recipe,
    *,
    seed: int = 0,
    **trainer: Any,
) -> dict[str, float]:
    """Tune a classifier.

    Its `head_init` was chosen when it was built; that of the recipe is not read. Runs from configs also
    compute frozen features once, can be resumed, and write results: `python src/train.py data=folder`.

    Args:
        classifier: A classifier from `visprompt.build`; one from `visprompt.load` or an earlier `fit`
            continues from its tuned values. It is changed in place, and in evaluation mode afterwards.
        train: A loader of pairs: images [B, 3, H, W], normalised with `classifier.backbone.mean` and `.std`,
            and labels [B], int64, or [B, C] of 0 and 1 for a multi-label classifier.
        val: A loader of images that are scored after every epoch, in the same form; None for none.
        recipe: The settings of training; its `batch_size` is the loader's, times accumulated batches.
            `mixup` and `cutmix` mix the images of a loader's batch with each other, and
            `class_weights="balanced"` counts the labels in one pass over the loader before training.
        seed: Seed of dropout and of what is computed from training images. The loader draws its own order.
        **trainer: Options of Lightning's `Trainer`, such as `accelerator="gpu"`, `precision="bf16-mixed"`,
            `callbacks` or `logger`. It takes one device.

    Returns:
        The figures of the last validation, such as "val/acc" and "val/loss"; empty without `val`.

    Raises:
        UserError: The recipe's batch size is not that of the steps, there is no batch, the options name
            several devices, or the recipe asks for `sampling="balanced"`, which is the loader's part.
        Diverged: The loss is not finite.
    """
    if not len(train):
        raise UserError("the training loader has no batch: give more images, or drop_last=False")
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    if val is None:  # or Lightning warns about a validation without a loader
        quiet["limit_val_batches"] = 0
    length = {"max_epochs": recipe.epochs, "max_steps": recipe.max_steps or -1}
    options: dict[str, Any] = {**quiet, "devices": 1, "num_sanity_val_steps": 0, **length, **trainer}
    module = TuningModule(classifier, recipe, seed)
    fitting = L.Trainer(**options)
    if fitting.world_size > 1:  # a plain loader says neither which images a rank repeats nor which it sees
        raise UserError(
            f"fit trains on one device, and its options name {fitting.world_size}: give devices=1; "
            "`python src/train.py data=folder trainer=ddp` trains on several"
        )
    loaded = train.batch_size or getattr(train.batch_sampler, "batch_size", None)
    whole = (loaded or 0) * fitting.accumulate_grad_batches
    if whole not in (0, recipe.batch_size):
        raise UserError(
            f"recipe.batch_size={recipe.batch_size}, by which the learning rate is scaled, is not the number "
            f"of images of an optimiser step, {whole}: give the loader's, times accumulated batches"
        )
    fitting.fit(module, train, val)
    classifier.eval()
    classifier.temperature = 1.0  # one that it was loaded with belongs to the logits before
    return dict(module.scores)
