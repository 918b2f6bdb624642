"""The small protocol between a method and a backbone.

A backbone offers *sites*; a method names those it needs. The site `tokens` means: before a block, prompt tokens enter
the sequence. Which blocks they enter, and whether their outputs flow on, is the method's `token_flow`; from it alone
the backbone decides what has to be computed.
"""

from enum import Enum
from typing import ClassVar, Protocol

from torch import Tensor, nn


class Flow(Enum):
    """What happens to the prompt tokens of the sequence before a block."""

    KEEP = "keep"  # those in the sequence, if any, flow on into this block
    ENTER = "enter"  # the method's tokens for this block replace them
    DROP = "drop"  # they leave the sequence


class Geometry(Protocol):
    """What a method may ask of a backbone."""

    width: int
    num_blocks: int
    patch_size: int
    sites: ClassVar[frozenset[str]]


class Method(nn.Module):
    """What is tuned and where it enters the backbone; this base tunes the head alone.

    A method's own parameters are saved under their own names (`prompts`), the head's under `head.`, the backbone's
    under `backbone.`.
    """

    sites: ClassVar[frozenset[str]] = frozenset()
    trains_backbone: ClassVar[bool] = False  # keeps the backbone in train mode (stochastic depth, batch statistics)

    def __init__(self, backbone: Geometry) -> None:
        super().__init__()
        self.num_blocks = backbone.num_blocks

    def attach(self, backbone: nn.Module) -> None:
        """Changes the backbone's modules where the method needs it, once, before the first forward."""

    def tuned_names(self, classifier: nn.Module) -> frozenset[str]:
        """Names of the tuned parameters.

        The only oracle of what requires gradients, what the optimiser gets, what is saved and what is counted.

        Args:
            classifier: The module whose `named_parameters` are named.

        Returns:
            Names as in `classifier.named_parameters()`.
        """
        return frozenset(name for name, _ in classifier.named_parameters() if name.startswith(("method.", "head.")))

    def token_flow(self) -> tuple[Flow, ...]:
        """What happens to prompt tokens before each block, one entry for every block."""
        return (Flow.KEEP,) * self.num_blocks

    def tokens(self, block: int, batch_size: int) -> Tensor:
        """Prompt tokens that enter before a block.

        Args:
            block: Index of a block whose flow is `Flow.ENTER`.
            batch_size: Number of images of the batch.

        Returns:
            Tokens [1, p, width] where all images share them, else [batch_size, p, width].
        """
        raise LookupError(f"{type(self).__name__} lets no tokens enter before block {block}")
