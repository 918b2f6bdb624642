"""What training minimises of the task: label smoothing, class weights, and images that are mixed.

Mixup (Zhang et al., arXiv:1710.09412) and cutmix (Yun et al., arXiv:1905.04899) combine each image with its
predecessor in the global batch, the first with the last, as torchvision does. One draw is made for a step,
from (seed, epoch, step): it depends neither on devices nor on whether a run was resumed.

The loss of a mixed image is the mean of the losses of both labels, weighted by the images' shares. For a loss
that is linear in its target, such as cross-entropy, that is the loss of the mixed target.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visprompt.data.datasets import Batch
from visprompt.errors import UserError
from visprompt.models.contract import Method
from visprompt.models.kind import SINGLE_LABEL
from visprompt.models.recipe import Recipe
from visprompt.models.task_kind import TaskKind

_STREAM = 2**31 - 1  # tells the draws from those of augmentation, whose third number is a row


@dataclass(frozen=True)
class Mix:
    """How the images of a step are mixed.

    Attributes:
        share: Share of an image itself; that of its partner is the rest.
        box: Left, top, right and bottom of the partner's pixels under cutmix; None is mixup.
    """

    share: float
    box: tuple[int, int, int, int] | None = None

    def of(self, own: Tensor, partners: Tensor) -> Tensor:
        """Return mixed images [B, c, h, w] of images and their partners."""
        if self.box is None:
            return self.share * own + (1 - self.share) * partners
        left, top, right, bottom = self.box
        mixed = own.clone()
        mixed[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
        return mixed


def draw_mix(recipe: Recipe, draw: np.random.Generator, height: int, width: int) -> Mix:
    """Draw how the images of a step are mixed.

    Args:
        recipe: A recipe that mixes.
        draw: The generator of the step.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
    """
    cuts = recipe.cutmix > 0 and (recipe.mixup == 0 or draw.random() < 0.5)
    alpha = recipe.cutmix if cuts else recipe.mixup
    share = float(draw.beta(alpha, alpha))
    if not cuts:
        return Mix(share)
    x, y = draw.integers(width), draw.integers(height)  # the middle of a box, which is cut at the borders
    half_width, half_height = (int(0.5 * (1 - share) ** 0.5 * side) for side in (width, height))
    left, right = max(int(x) - half_width, 0), min(int(x) + half_width, width)
    top, bottom = max(int(y) - half_height, 0), min(int(y) + half_height, height)
    return Mix(1 - (right - left) * (bottom - top) / (width * height), (left, top, right, bottom))


class Objective:
    """The task's part of the loss of each training image.

    Attributes:
        class_weights: [C], or None.
    """

    def __init__(self, recipe: Recipe, kind: TaskKind, num_classes: int, seed: int) -> None:
        """Take the settings of a recipe.

        Raises:
            UserError: The recipe has more or fewer class weights than there are classes, or a setting that
                needs one class for each image.
        """
        self.recipe, self.kind, self.num_classes, self.seed = recipe, kind, num_classes, seed
        self.class_weights: Tensor | None = None
        if kind.dense and (name := _of_whole_images(recipe)):
            raise UserError(
                f"recipe.{name}={getattr(recipe, name)} is for images with one label, and here each pixel "
                "has one: leave it out"
            )
        if recipe.sampling == "balanced" and kind.name != SINGLE_LABEL.name:
            raise UserError(
                "recipe.sampling=balanced draws each class equally often, and multi-label images have more: "
                "give recipe.class_weights=balanced"
            )
        given = recipe.class_weights
        if isinstance(given, list):
            if len(given) != num_classes:
                raise UserError(
                    f"recipe.class_weights has length {len(given)}, but there are {num_classes} classes: "
                    "give one for each class, in the order of their names"
                )
            self.class_weights = torch.tensor(given)

    def balance(self, counts: Tensor) -> None:
        """Set the class weights to images / (classes * images of the class); of several classes, to labels.

        Args:
            counts: Number of training images of each class, [C]; a class without images counts as one.
        """
        self.class_weights = (counts.sum() / (self.num_classes * counts.clamp(min=1))).float()

    def place(self, device: torch.device) -> None:
        """Copy the class weights to a device, so that no step has to."""
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(device)

    def weigh(self, datamodule: Any) -> None:
        """Set balanced class weights, and tell a data module how images are drawn and weighed.

        Args:
            datamodule: A `TaskDataModule`; its class is not imported here, because it needs Lightning.
        """
        labels = datamodule.train_dataset.labels
        if self.recipe.class_weights == "balanced":
            self.balance(self.kind.counts(labels, self.num_classes))
        weights = self.image_weights(labels)
        datamodule.loss_weights = None if weights is None else weights.double().numpy()
        datamodule.balanced, datamodule.pairs = self.recipe.sampling == "balanced", self.recipe.mixes

    def image_weights(self, labels: Tensor) -> Tensor | None:
        """Return the weight of each image's loss, [n]; None if there are no class weights."""
        if self.class_weights is None:
            return None
        return self.kind.weights(labels, self.class_weights.to(labels.device))

    def mixed(self, batch: Batch, epoch: int, step: int, paired: bool) -> tuple[Batch, Tensor, Mix | None]:
        """Mix the images of a batch, if the recipe says so.

        Args:
            batch: Images [B, c, h, w] with their labels.
            epoch: Index of the epoch.
            step: Index of the optimiser step in the epoch.
            paired: Whether the batch begins with an additional image, the partner of the next (see
                `GlobalBatches`); if not, the first image's partner is the last.

        Returns:
            The batch without that image, the labels of the partners, and what was drawn.
        """
        if not self.recipe.mixes:
            return batch, batch.labels, None
        draw = np.random.default_rng([self.seed, epoch, _STREAM, step])
        mix = draw_mix(self.recipe, draw, *batch.images.shape[-2:])
        if paired:
            own = Batch(*(None if part is None else part[1:] for part in batch))  # type: ignore[arg-type]  # scales
            images, labels = batch.images[:-1], batch.labels[:-1]
        else:
            own, images, labels = batch, batch.images.roll(1, 0), batch.labels.roll(1, 0)
        return own._replace(images=mix.of(own.images, images)), labels, mix

    def loss(self, logits: Tensor, batch: Batch, partners: Tensor, mix: Mix | None) -> Tensor:
        """Return the loss of each image, [B].

        Args:
            logits: [B, C] in float32.
            batch: What `mixed` returned.
            partners: The labels of the partners, [B].
            mix: What was drawn.
        """
        weights = None if self.class_weights is None else self.class_weights.to(logits.device)
        smoothing = self.recipe.label_smoothing
        losses = self.kind.loss(logits, batch.labels, smoothing, weights)
        if mix is not None:
            of_partners = self.kind.loss(logits, partners, smoothing, weights)
            losses = mix.share * losses + (1 - mix.share) * of_partners
        return losses if weights is None or batch.scales is None else losses * batch.scales

    def correct(self, logits: Tensor, batch: Batch, partners: Tensor, mix: Mix | None) -> Tensor:
        """Return 1.0 for each correctly predicted image, else 0.0, [B]; of a mixed one, the label's share."""
        right = self.kind.correct(logits, batch.labels)
        if mix is None:
            return right
        return mix.share * right + (1 - mix.share) * self.kind.correct(logits, partners)


def _of_whole_images(recipe: Recipe) -> str:
    """Return the name of the first setting that needs labels of images, or "" if there is no such setting."""
    names = ("mixup", "cutmix", "class_weights", "sampling")
    return next((n for n in names if getattr(recipe, n) != Recipe.model_fields[n].default), "")


def check_method(recipe: Recipe, method: type[Method]) -> None:
    """Refuse settings that a method's loss would not follow, because it reads the labels itself.

    Raises:
        UserError: The recipe mixes images, smooths labels or weighs classes, and the method reads labels.
    """
    if not method.reads_labels:
        return
    for name in ("mixup", "cutmix", "label_smoothing", "class_weights"):
        if (value := getattr(recipe, name)) != Recipe.model_fields[name].default:
            raise UserError(
                "this method's loss reads the classes of the images itself, and would not follow "
                f"recipe.{name}={value}: leave that out"
            )
