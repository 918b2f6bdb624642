"""Backbone + method + head as one plain `nn.Module`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from visprompt.errors import UserError
from visprompt.models.kind import SINGLE_LABEL, TaskKind
from visprompt.models.methods import Geometry, Method
from visprompt.models.tensors import not_finite


@dataclass(frozen=True)
class Origin:
    """What a classifier was built from: what its tuned state says beside the tensors.

    Attributes:
        method: The method's name and options.
        backbone: See `Backbone.record`.
    """

    method: Mapping[str, Any]
    backbone: Mapping[str, Any]


@dataclass(frozen=True)
class Summary:
    """How much a classifier tunes and computes.

    Attributes:
        tuned: Tuned parameters without the head.
        head: Parameters of the head.
        backbone: Parameters of the backbone without its own head and without what a method put into it.
        parts: Tuned parameters by the name they are saved under.
        bytes: Of the tuned state's tensors.
        macs: Pairs of a multiplication and an addition, of one image's logits.
    """

    tuned: int
    head: int
    backbone: int
    parts: Mapping[str, int]
    bytes: int
    macs: int

    @property
    def share(self) -> float:
        """Tuned parameters without the head over those of the backbone without its head."""
        return self.tuned / self.backbone


class Classifier(nn.Module):
    """A backbone with a method and a linear head.

    Args:
        backbone: A backbone family's module: `forward(images, method) -> features [B, width]`, and `width`.
        method: What is tuned.
        num_classes: Width of the head (C).
        head_init: "vpt", the released VPT code's, or "zeros".
        kind: What the task asks of an image.

    Raises:
        UserError: The number of classes is none, there is no such initialisation, or the method does not fit.
    """

    def __init__(
        self,
        backbone: nn.Module,
        method: Method,
        num_classes: int,
        head_init: str = "vpt",
        kind: TaskKind = SINGLE_LABEL,
    ) -> None:
        super().__init__()
        whole = isinstance(cast(object, num_classes), Integral) and not isinstance(num_classes, bool)
        if not whole or num_classes < 1:
            raise UserError(
                f"num_classes={num_classes} is no number of classes: give a whole number of 1 or more"
            )
        self._backbone_size = sum(
            p.numel() for p in backbone.parameters()
        )  # before a method puts its own into it
        method.attach(cast(Geometry, backbone))
        self.num_classes, self.kind = num_classes, kind
        self.backbone = backbone
        self.method = method
        self.head = method.make_head(int(backbone.width), num_classes, head_init)  # type: ignore[arg-type]  # an int
        self.tuned_names = method.tuned_names(self)
        self.origin: Origin | None = None  # set by who knows what it was built from
        self.class_names: tuple[str, ...] = ()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self.tuned_names)
        self.train()

    def train(self, mode: bool = True) -> "Classifier":
        """Set training mode; a frozen backbone stays in evaluation mode, so that only prompts see dropout."""
        super().train(mode)
        self.backbone.train(mode and self.method.trains_backbone)
        return self

    def features(self, x: Tensor) -> Tensor:
        """Return features [B, width] of normalised images [B, 3, H, W], or of what `frozen` made of them."""
        only_head = self.method.first_block == self.method.num_blocks
        if x.ndim not in (4, 2 if only_head else 3) or (x.ndim < 4 and not self.has_frozen_part):
            raise UserError(f"images are [B, 3, height, width], and these have the shape {tuple(x.shape)}")
        if x.ndim == 2:
            return self.method.resumed(x)
        if x.ndim == 3:
            out: Tensor = self.backbone.from_block(self.method.first_block, x, self.method)  # type: ignore[operator]  # a method of the backbone
            return out
        return self.method.features(self.backbone(x, self.method), x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, C] of normalised images [B, 3, H, W], or of what `frozen` made of them."""
        out: Tensor = self.head(self.features(x))
        return out

    def losses(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the loss of each image [B], in float32 under autocast too.

        The task's, and what the method adds.

        Args:
            logits: [B, C], what `forward` has just returned in training.
            labels: Classes [B].
            weights: Of each image in the sum that is minimised; 0 marks a filler.
        """
        with torch.autocast(logits.device.type, enabled=False):
            return self.method.losses(self.kind.loss(logits, labels), self.head, labels, weights)

    @property
    def has_frozen_part(self) -> bool:
        """Whether some of an image's computation never changes, so that `frozen` may do it once for all epochs."""
        return self.method.first_block > 0

    def frozen(self, images: Tensor) -> Tensor:
        """Return the part of the computation before anything tuned.

        Features where no block is tuned, else tokens.

        Args:
            images: Normalised images [B, 3, H, W].

        Returns:
            What `Method.stored` makes of features and images, or tokens [B, n, width] before the method's
            first block; `forward` goes on from both.
        """
        if self.method.first_block == self.method.num_blocks:
            return self.method.stored(self.backbone(images, self.method), images)
        out: Tensor = self.backbone.to_block(self.method.first_block, images, self.method)  # type: ignore[operator]  # a method of the backbone
        return out

    def tuned_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return names and parameters that are tuned, in the module's order."""
        return ((name, p) for name, p in self.named_parameters() if name in self.tuned_names)

    def tuned_state(self) -> dict[str, Tensor]:
        """Return the tuned parameters, and the buffers of tuned modules, under the names they are saved by."""
        return {name.removeprefix("method."): tensor.detach() for name, tensor in self._tuned_tensors()}

    def load_tuned_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `tuned_state` returned.

        Args:
            state: Tensors by name, exactly those that are tuned here.

        Raises:
            UserError: A name or a shape differs, or a number is not finite; nothing is loaded then.
        """
        if spoilt := not_finite(state):
            raise UserError(f"the tuned state holds numbers that are not finite, in {spoilt}: tune it again")
        own = self.tuned_state()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unexpected:
            raise UserError(
                f"the tuned state does not fit this classifier: it lacks {missing[:3] or 'nothing'} "
                f"and holds {unexpected[:3] or 'nothing'} beyond it; build it with the state's own method"
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise UserError(
                    f"the tuned state does not fit this classifier: {name} is {tuple(state[name].shape)} in "
                    "the state "
                    f"and {tuple(tensor.shape)} here; build it with the state's own options and classes"
                )
            if tensor.dtype == torch.bool and not torch.equal(tensor.cpu(), state[name].cpu()):
                raise UserError(
                    f"the tuned state does not fit this classifier: {name} is another mask here; build it "
                    "with the state's own options"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def summary(self) -> Summary:
        """Count tuned parameters, their bytes, and the operations of one image."""
        parts = {name.removeprefix("method."): p.numel() for name, p in self.tuned_parameters()}
        head = sum(p.numel() for p in self.head.parameters())
        return Summary(
            tuned=sum(parts.values()) - head,
            head=head,
            backbone=self._backbone_size,
            parts=parts,
            bytes=sum(tensor.nbytes for tensor in self.tuned_state().values()),
            macs=self._macs(),
        )

    @torch.no_grad()
    def _macs(self) -> int:
        """Of matrix products and convolutions, as PyTorch's counter sees them (two operations each)."""
        height, width = self.backbone.own_size  # type: ignore[misc]  # nn.Module hides the pair
        training, like, counter = self.training, next(self.parameters()), FlopCounterMode(display=False)
        tuned = [
            p.requires_grad_(False) for _, p in self.tuned_parameters()
        ]  # the counter would hang hooks on them
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
        """Yield tuned parameters and the saved buffers of modules that hold one, both in the module's order."""
        trained = self.method.trains_backbone  # frozen, batch norms keep the backbone's own statistics
        modules = {n.rpartition(".")[0] for n in self.tuned_names if trained or not n.startswith("backbone.")}
        saved = self.state_dict(keep_vars=True)  # without the buffers that a module declares as not saved
        for name, tensor in saved.items():
            # a method's own buffers stand for what it does not tune: masks, frozen prompts
            held = name.startswith("method.") or name.rpartition(".")[0] in modules
            if name in self.tuned_names or (held and not isinstance(tensor, nn.Parameter)):
                yield name, tensor
