"""Backbone + method + head as one plain `nn.Module`."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from visprompt.errors import UserError
from visprompt.models.backbones.family import Family
from visprompt.models.heads import DenseHead, make_dense_head
from visprompt.models.kind import SINGLE_LABEL
from visprompt.models.methods import Geometry, Method
from visprompt.models.task_kind import TaskKind
from visprompt.models.tensors import in_full_precision, not_finite
from visprompt.models.windows import slide


@dataclass(frozen=True)
class Origin:
    """The record of what a classifier was built from; a tuned state stores it with the tensors.

    Attributes:
        method: The method's name and options.
        backbone: The backbone's record, see `Backbone.record`.
    """

    method: Mapping[str, Any]
    backbone: Mapping[str, Any]


@dataclass(frozen=True)
class Summary:
    """How many parameters a classifier tunes, and how much it computes.

    Attributes:
        tuned: Number of tuned parameters without the head.
        head: Number of parameters of the head.
        backbone: Number of parameters of the backbone, without its own head and without layers of a method.
        parts: Number of tuned parameters by the name they are saved under.
        bytes: Size of the tuned state's tensors.
        macs: Multiply-accumulate operations for the logits of one image.
    """

    tuned: int
    head: int
    backbone: int
    parts: Mapping[str, int]
    bytes: int
    macs: int

    @property
    def share(self) -> float:
        """Tuned parameters divided by the backbone's, both without the head."""
        return self.tuned / self.backbone


class Classifier(nn.Module):
    """A backbone with a method and a head.

    Args:
        backbone: A backbone family's module: `forward(images, method) -> features [B, width]`, and `width`.
        method: The method that decides what is tuned.
        num_classes: Number of classes, the width of the head (C).
        head_init: One of `recipe.HEAD_INITS`.
        kind: The kind of task.
        head: One of `recipe.HEADS`, for a dense kind; other kinds have the method's head, "linear".

    Raises:
        UserError: `num_classes` is not a whole number of 1 or more, `head_init` or `head` is unknown, method
            and backbone do not fit, or the method does not fit the kind of task.
    """

    def __init__(
        self,
        backbone: nn.Module,
        method: Method,
        num_classes: int,
        head_init: str = "vpt",
        kind: TaskKind = SINGLE_LABEL,
        head: str = "linear",
    ) -> None:
        super().__init__()
        whole = isinstance(cast(object, num_classes), Integral) and not isinstance(num_classes, bool)
        if not whole or num_classes < 1:
            raise UserError(
                f"num_classes={num_classes} is not a number of classes: give a whole number of 1 or more"
            )
        if (method.reads_labels or method.images_per_class) and kind.name != SINGLE_LABEL.name:
            raise UserError(
                f"this method reads one class for each image from the labels, and a {kind.name} task has "
                "other labels: choose another method, such as vpt_deep"
            )
        if num_classes < 2 and kind.name != SINGLE_LABEL.name:
            raise UserError(
                "num_classes=1 is one decision for each image: give kind=single_label and two classes"
            )
        # counted before the method adds layers
        self._backbone_size = sum(p.numel() for p in backbone.parameters())
        method.attach(cast(Geometry, backbone))
        self.num_classes, self.kind = num_classes, kind
        self.backbone = backbone
        self.method = method
        if head != "linear" and not kind.dense:
            raise UserError(
                f"recipe.head={head} is the head of segmentation tasks: give recipe.head=linear for this one"
            )
        if kind.dense:
            geometry = cast(Geometry, backbone)
            self.head: nn.Module = make_dense_head(head, geometry, method, num_classes, head_init)
        else:
            self.head = method.make_head(int(backbone.width), num_classes, head_init)  # type: ignore[arg-type]  # an int
        self.tuned_names = self._read(method.tuned_names(self))
        self.origin: Origin | None = None  # set by the caller that built backbone and method
        self.class_names: tuple[str, ...] = ()
        self.temperature = 1.0  # of a tuned state, see `TunedState`
        # whether a state was loaded, or values from training images are in place: training begins from them
        self.initialised = False
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self.tuned_names)
        self.train()

    def _read(self, names: frozenset[str]) -> frozenset[str]:
        """Return names without those of modules whose outputs a dense head does not read."""
        if not isinstance(self.head, DenseHead):
            return names
        final = () if self.head.normed else cast(Geometry, self.backbone).final_names
        unread = tuple(f"backbone.model.{name}." for name in ("attn_pool", *final))
        return frozenset(name for name in names if not name.startswith(unread))

    def train(self, mode: bool = True) -> "Classifier":
        """Set training mode; a frozen backbone stays in evaluation mode, without dropout."""
        super().train(mode)
        self.backbone.train(mode and self.method.trains_backbone)
        return self

    def features(self, x: Tensor) -> Tensor:
        """Return features [B, width] of normalised images [B, 3, H, W], or of a result of `frozen`."""
        self._check_input(x)
        if x.ndim == 2:
            return self.method.resumed(x)
        if x.ndim == 3:
            out: Tensor = self.backbone.from_block(self.first_block, x, self.method)  # type: ignore[operator]  # a method of the backbone
            return out
        return self.method.features(self.backbone(x, self.method), x)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the maps that a dense head reads, of images [B, 3, H, W] or of a result of `frozen`."""
        self._check_input(x)
        backbone, head = cast(Family, self.backbone), cast(DenseHead, self.head)
        if x.ndim == 4:
            return backbone.maps(x, self.method, head.blocks, head.normed)
        if self.first_block < self.method.num_blocks:
            return backbone.maps_from(self.first_block, x, self.method, head.blocks, head.normed)
        parts = x.split([math.prod(backbone.grids[i]) for i in head.blocks], dim=1)
        return [
            part.transpose(1, 2).unflatten(2, backbone.grids[i])
            for part, i in zip(parts, head.blocks, strict=True)
        ]

    def _check_input(self, x: Tensor) -> None:
        rank = 2 if self.first_block == self.method.num_blocks and not self.kind.dense else 3
        if x.ndim not in (4, rank) or (x.ndim < 4 and not self.has_frozen_part):
            raise UserError(
                f"images must be [B, 3, height, width], and these have the shape {tuple(x.shape)}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of normalised images [B, 3, H, W], or of a result of `frozen`.

        Returns:
            [B, C]; of a dense kind [B, C, H, W]. In evaluation, images of another size than the backbone's
            are then covered by windows of its size, see `windows.slide`.
        """
        if not self.kind.dense:
            out: Tensor = self.head(self.features(x))
            return out
        size = self.own_size
        logits: Tensor = slide(self, x, *size) if self.slides(x) else self.head(self.maps(x), size)
        return logits

    def slides(self, x: Tensor) -> bool:
        """Return whether windows cover these images: of a dense kind, in evaluation, of another size."""
        other = x.ndim == 4 and tuple(x.shape[-2:]) != self.own_size
        return self.kind.dense and not self.training and other

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities in float32, calibrated by the tuned state's temperature if it has one.

        Args:
            logits: A result of `forward`, [B, C], or [B, C, H, W] of a dense kind.

        Returns:
            Of the shape of the logits.
        """
        return self.kind.probabilities(logits, self.temperature)

    def losses(
        self, logits: Tensor, labels: Tensor, weights: Tensor, task_loss: Tensor | None = None
    ) -> Tensor:
        """Return the loss of each image [B], the method's terms included; in float32 also under autocast.

        Args:
            logits: [B, C], the result of the last `forward` in training.
            labels: Classes [B].
            weights: Weight of each image in the sum that is minimised, [B]; 0 marks a filler image.
            task_loss: The task's loss of each image, [B]; None is that of the kind, without class weights.
        """
        with in_full_precision(logits.device):
            own = self.kind.loss(logits, labels) if task_loss is None else task_loss
            if isinstance(self.head, DenseHead):
                own = own + self.head.losses(lambda others: self.kind.loss(others, labels))
            return self.method.losses(own, self.head, labels, weights)

    @property
    def own_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the backbone was built for."""
        return cast(Family, self.backbone).own_size

    @property
    def has_frozen_part(self) -> bool:
        """Whether the first part of the forward never changes, so `frozen` can run once for all epochs."""
        return self.first_block > 0

    @property
    def first_block(self) -> int:
        """Index of the first block that is computed in every epoch; the number of blocks if none is."""
        first = self.method.first_block
        if first == self.method.num_blocks or not isinstance(self.head, DenseHead):
            return first
        return first if first <= self.head.blocks[0] else 0  # the head reads outputs of blocks before it

    def frozen(self, images: Tensor) -> Tensor:
        """Compute the part of the forward before anything tuned; `forward` takes the result as images.

        Args:
            images: Normalised images [B, 3, H, W].

        Returns:
            The rows of `Method.stored` [B, any] if no block is tuned, or the patches of all maps of a dense
            head, [B, n, width]; else tokens [B, n, width] before `first_block`.
        """
        if self.first_block == self.method.num_blocks and self.kind.dense:
            return torch.cat([part.flatten(2).transpose(1, 2) for part in self.maps(images)], dim=1)
        if self.first_block == self.method.num_blocks:
            return self.method.stored(self.backbone(images, self.method), images)
        out: Tensor = self.backbone.to_block(self.first_block, images, self.method)  # type: ignore[operator]  # a method of the backbone
        return out

    def tuned_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the names and parameters that are tuned, in the module's order."""
        return ((name, p) for name, p in self.named_parameters() if name in self.tuned_names)

    def tuned_state(self) -> dict[str, Tensor]:
        """Return the tuned parameters and the buffers of tuned modules, under the names in a tuned state."""
        return {name.removeprefix("method."): tensor.detach() for name, tensor in self._tuned_tensors()}

    def tuned_tensor_names(self) -> frozenset[str]:
        """Return the names of the tensors of `tuned_state` in `state_dict`."""
        return frozenset(name for name, _ in self._tuned_tensors())

    def load_tuned_state(self, state: Mapping[str, Tensor]) -> None:
        """Load a result of `tuned_state`; load nothing if it does not fit.

        Args:
            state: Tensors by name, exactly those that are tuned here.

        Raises:
            UserError: A name, a shape or a mask differs, or a number is not finite.
        """
        if name := not_finite(state):
            raise UserError(f"the tuned state has numbers that are not finite, in {name}: tune it again")
        current = self.tuned_state()
        missing, unexpected = sorted(current.keys() - state.keys()), sorted(state.keys() - current.keys())
        if missing or unexpected:
            raise UserError(
                f"the tuned state does not fit this classifier: it lacks {missing[:3] or 'nothing'} "
                f"and has {unexpected[:3] or 'nothing'} in addition; build it with the state's method"
            )
        for name, tensor in current.items():
            if tensor.shape != state[name].shape:
                raise UserError(
                    f"the tuned state does not fit this classifier: {name} is {tuple(state[name].shape)} in "
                    f"the state and {tuple(tensor.shape)} here; build it with the state's options and classes"
                )
            if tensor.dtype == torch.bool and not torch.equal(tensor.cpu(), state[name].cpu()):
                raise UserError(
                    f"the tuned state does not fit this classifier: the mask {name} differs; build it with "
                    "the state's options"
                )
        with torch.no_grad():
            for name, tensor in current.items():
                tensor.copy_(state[name])
        self.initialised = True

    def summary(self, macs: int | None = None) -> Summary:
        """Return the numbers of parameters, the size of the tuned state, and the operations of one image.

        Args:
            macs: The operations, if they are known; counting them takes a forward pass.
        """
        parts = {name.removeprefix("method."): p.numel() for name, p in self.tuned_parameters()}
        head = sum(p.numel() for p in self.head.parameters())
        return Summary(
            tuned=sum(parts.values()) - head,
            head=head,
            backbone=self._backbone_size,
            parts=parts,
            bytes=sum(tensor.nbytes for tensor in self.tuned_state().values()),
            macs=self._macs() if macs is None else macs,
        )

    @torch.no_grad()
    def _macs(self) -> int:
        """Return multiply-accumulates of matrix products and convolutions, half of PyTorch's FLOP count."""
        height, width = self.own_size
        training, like, counter = self.training, next(self.parameters()), FlopCounterMode(display=False)
        # without gradients, because the counter would register hooks on the parameters
        tuned = [p.requires_grad_(False) for _, p in self.tuned_parameters()]
        self.eval()
        try:
            with counter:
                self(torch.zeros(1, 3, height, width, device=like.device, dtype=like.dtype))
        finally:
            self.train(training)
            for parameter in tuned:
                parameter.requires_grad_(True)
        return int(counter.get_total_flops()) // 2

    def _tuned_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield tuned parameters and the persistent buffers that belong to them, in the module's order.

        These are the buffers of modules with a tuned parameter (batch statistics, for example; not those of a
        frozen backbone), and all buffers of the method (masks, frozen prompts).
        """
        trained = self.method.trains_backbone  # a frozen backbone's batch norms keep their statistics
        modules = {n.rpartition(".")[0] for n in self.tuned_names if trained or not n.startswith("backbone.")}
        for name, tensor in self.state_dict(keep_vars=True).items():
            belongs = name.startswith("method.") or name.rpartition(".")[0] in modules
            if name in self.tuned_names or (belongs and not isinstance(tensor, nn.Parameter)):
                yield name, tensor
