"""Backbone + method + head as one plain `nn.Module`."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visprompt.errors import UserError, unknown
from visprompt.methods import Method

HEAD_INITS = ("vpt", "zeros")


def _init_head(head: nn.Linear, how: str) -> None:
    if how not in HEAD_INITS:
        raise unknown("head_init", how, HEAD_INITS)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if how == "vpt":  # the bias stands for probabilities of 1 %, whatever the number of classes
        nn.init.kaiming_normal_(head.weight, mode="fan_out")
        nn.init.constant_(head.bias, -math.log(99))


@dataclass(frozen=True)
class Summary:
    """How much a classifier tunes.

    Attributes:
        tuned: Tuned parameters without the head.
        head: Parameters of the head.
        backbone: Parameters of the backbone without its own head.
    """

    tuned: int
    head: int
    backbone: int

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
    """

    def __init__(self, backbone: nn.Module, method: Method, num_classes: int, head_init: str = "vpt") -> None:
        super().__init__()
        method.attach(backbone)
        self.backbone = backbone
        self.method = method
        self.head = nn.Linear(int(backbone.width), num_classes)  # type: ignore[arg-type]  # nn.Module hides the int
        _init_head(self.head, head_init)
        self.tuned_names = method.tuned_names(self)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self.tuned_names)
        self.train()

    def train(self, mode: bool = True) -> "Classifier":
        """Sets training mode; a frozen backbone stays in evaluation mode, so that only prompts see dropout."""
        super().train(mode)
        self.backbone.train(mode and self.method.trains_backbone)
        return self

    def features(self, images: Tensor) -> Tensor:
        """Features [B, width] of normalised images [B, 3, H, W]."""
        out: Tensor = self.backbone(images, self.method)
        return out

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C] of normalised images [B, 3, H, W]."""
        out: Tensor = self.head(self.features(images))
        return out

    @property
    def frozen_features(self) -> bool:
        """Whether the head alone is tuned, so that an image's features never change."""
        return all(name.startswith("head.") for name in self.tuned_names)

    def tuned_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that are tuned, in the module's order."""
        return ((name, p) for name, p in self.named_parameters() if name in self.tuned_names)

    def tuned_state(self) -> dict[str, Tensor]:
        """The tuned parameters, and the buffers of tuned modules, under the names they are saved by."""
        return {name.removeprefix("method."): tensor.detach() for name, tensor in self._tuned_tensors()}

    def load_tuned_state(self, state: Mapping[str, Tensor]) -> None:
        """Loads what `tuned_state` returned.

        Args:
            state: Tensors by name, exactly those that are tuned here.

        Raises:
            UserError: A name or a shape differs; nothing is loaded then.
        """
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
                    f"the tuned state does not fit this classifier: {name} is {tuple(state[name].shape)} in the state "
                    f"and {tuple(tensor.shape)} here; build it with the state's own options and classes"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def summary(self) -> Summary:
        """Counts tuned parameters."""
        head = sum(p.numel() for p in self.head.parameters())
        tuned = sum(p.numel() for _, p in self.tuned_parameters())
        return Summary(tuned - head, head, sum(p.numel() for p in self.backbone.parameters()))

    def _tuned_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Tuned parameters and the saved buffers of modules that hold one, both in the module's order."""
        modules = {name.rpartition(".")[0] for name in self.tuned_names}
        saved = self.state_dict(keep_vars=True)  # without the buffers that a module declares as not saved
        for name, tensor in saved.items():
            is_buffer = not isinstance(tensor, nn.Parameter)
            if name in self.tuned_names or (is_buffer and name.rpartition(".")[0] in modules):
                yield name, tensor
