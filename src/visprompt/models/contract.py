"""The small protocol between a method and a backbone.

A backbone offers *sites*; a method names those it needs and answers when the backbone asks at one of them:

- `weights`: the backbone's own parameters may be tuned;
- `modules`: its convolutions, linear layers and norms may be wrapped (`attach`);
- `pixels`: the images may be changed before the first convolution (`pixels`), and that one may be wrapped;
- `tokens`: prompt tokens enter the sequence before a block (`token_flow`, `tokens`), image tokens may be
shifted there
  (`shift`), and the pooling may read what it likes (`pool`);
- `keys_values`: rows join the keys and values of an attention (`keys_values`);
- `branches`: something is added at a place in a block (`places`, `branch`);
- `stream`: one sequence of one width runs through all blocks, and every attention sees the whole of it.

From the answers alone the backbone decides what has to be computed.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from visprompt.errors import UserError, unknown
from visprompt.models.recipe import HEAD_INITS

POOLS = ("cls", "image", "prompt", "image_prompt")


class Flow(Enum):
    """What happens to the prompt tokens of the sequence before a block."""

    KEEP = "keep"  # those in the sequence, if any, flow on into this block
    ENTER = "enter"  # the method's tokens for this block replace them
    MIX = "mix"  # the method makes the tokens of this block from those that come out of the last one
    DROP = "drop"  # they leave the sequence


class Place(Enum):
    """Where a branch adds to the residual stream of a block x + Attention(LN(x)), then + MLP(LN(x))."""

    ATTENTION = "attention"  # beside the attention; from the stream and its norm
    BETWEEN = "between"  # between attention and MLP; from the stream
    OUTPUT = "output"  # on the output of the MLP, before it is added; from that output
    MLP = "mlp"  # beside the MLP; from the stream and its norm
    AFTER = "after"  # behind the block; from the stream


class Geometry(Protocol):
    """What a method may ask of a backbone. Blocks are residual blocks, counted through all stages.

    Attributes:
        model: The model of timm that is driven, without its head.
        width: Of the pooled features.
        widths: Width of the tokens, or number of channels, in each block.
        blocks: The blocks in their order.
        heads: Heads of each block's attention; 0 where a method may not enter it, or there is none.
        grids: Positions along height and width in each block, for images of the backbone's own size.
        block_names: Each block's name in `model`.
        between_names: What stands between a block and the one before it (a merging or downsampling) or None;
            the stem and what follows it are before the first block.
        final_names: Norms behind the last block.
        stem: Name in `model` of the first convolution.
        patch_size: Side in pixels of what that convolution sees.
        image_size: Side of the input in pixels.
        any_size: Whether images of another side are taken too.
        num_prefix: Class and register tokens, which stand before the patch tokens.
        has_class_token: Whether the first of them is a class token.
        sites: What it offers.
    """

    model: nn.Module
    width: int
    widths: tuple[int, ...]
    heads: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    block_names: tuple[str, ...]
    between_names: tuple[str | None, ...]
    final_names: tuple[str, ...]
    stem: str
    patch_size: int
    image_size: int
    any_size: bool
    num_prefix: int
    has_class_token: bool
    sites: frozenset[str]

    @property
    def num_blocks(self) -> int:
        """Number of blocks (L)."""
        ...

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks in their order."""
        ...


class TokenBackbone(Geometry, Protocol):
    """What a method may ask of a frozen backbone made of tokens, see `backbones.family.TokenFamily`."""

    def embed(self, images: Tensor, method: "Method") -> Tensor:
        """Image tokens [B, n, width] before the first block."""
        ...

    def states(self, images: Tensor) -> list[Tensor]:
        """Image tokens [B, n, width] before each block and behind the last."""
        ...

    def carry(self, index: int, x: Tensor, num_image: int) -> Tensor:
        """Return outputs of a block, of all tokens x [B, n, width].

        `num_image` image tokens, prompts behind them.
        """
        ...


class Method(nn.Module):
    """What is tuned and where it enters the backbone; this base tunes the head alone.

    A method's own parameters are saved under their own names (`prompts`), the head's under `head.`, the
    backbone's under `backbone.`.

    Attributes:
        pool: Which outputs of the last block are pooled, one of `POOLS`; None for the backbone's own pooling.
    """

    sites: ClassVar[frozenset[str]] = frozenset()
    trains_backbone: ClassVar[bool] = (
        False  # keeps the backbone in train mode (stochastic depth, batch statistics)
    )
    places: ClassVar[frozenset[Place]] = frozenset()
    # whether `branch` treats every token by itself; else it gets all, or class and register tokens alone
    tokenwise: ClassVar[bool] = True
    fixed_size: bool = False  # whether images must have the backbone's own size
    undecayed: ClassVar[frozenset[str]] = frozenset()  # its own parameters that weight decay leaves alone
    can_merge: ClassVar[bool] = False  # whether what is tuned goes into the weights of a plain model of timm
    # whether `losses` compares the images of a batch with each other, so that parts of a batch give another
    # loss
    compares_images: ClassVar[bool] = False
    images_per_class: ClassVar[int | None] = (
        None  # how many `see_classes` is shown; None for a method without it
    )
    pool: str | None = None

    def __init__(self, backbone: Geometry) -> None:
        super().__init__()
        self.num_blocks = backbone.num_blocks

    def check_pool(self, backbone: Geometry) -> None:
        """Refuse a `pool` that reads what is not there; to be called when the token flow is known.

        Raises:
            UserError: The word is unknown, or there are no such outputs behind the last block.
        """
        if self.pool is None:
            return
        if self.pool not in POOLS:
            raise unknown("method.pool", self.pool, POOLS)
        if "tokens" not in backbone.sites:
            raise UserError(
                f"method.pool={self.pool} reads tokens, and this backbone has none: give method.pool=null"
            )
        if self.pool == "cls" and not backbone.has_class_token:
            raise UserError("method.pool=cls needs a class token, which this backbone does not have")
        there = False
        for flow in self.token_flow():
            there = there if flow is Flow.KEEP else flow is not Flow.DROP
        if self.pool in ("prompt", "image_prompt") and not there:
            raise UserError(
                f"method.pool={self.pool} reads prompts behind the last block, where there are none: let "
                "them enter or "
                "flow there (method.depth=null, depth_from=last or carry_over=true, and a location that "
                "prepends)"
            )

    @property
    def needs_images(self) -> bool:
        """Whether `inits.initialise` has to be called with training images before the first epoch."""
        return False

    def initialise(self, backbone: TokenBackbone, images: Iterable[Tensor], seed: int) -> None:
        """Write its first values in place, where `needs_images`; called by `inits.initialise`.

        The backbone is frozen and in evaluation mode, with the method attached. Images are batches of
        normalised training images [B, 3, H, W], at most `inits.MAX_IMAGES`, to be read once; the seed decides
        what is drawn.
        """
        raise LookupError(f"{type(self).__name__} needs no images")

    def see_classes(self, backbone: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> None:
        """Make first values of training images and labels, in place of `initialise` where `images_per_class` is given.

        Batches are normalised images [B, 3, H, W] with labels [B], up to `images_per_class` of each class,
        the same on all ranks; else as `initialise`.
        """
        raise LookupError(f"{type(self).__name__} sees no classes")

    @property
    def first_block(self) -> int:
        """The first block whose input or weights are tuned.

        What comes before gives the same tokens in every epoch.
        """
        return 0

    def attach(self, backbone: Geometry) -> None:
        """Change the backbone's modules where the method needs it, once, before the first forward."""

    def tuned_names(self, classifier: nn.Module) -> frozenset[str]:
        """Return names of the tuned parameters.

        The only oracle of what requires gradients, what the optimiser gets, what is saved and what is
        counted.

        Args:
            classifier: The module whose `named_parameters` are named.

        Returns:
            Names as in `classifier.named_parameters()`.
        """
        return frozenset(
            name for name, _ in classifier.named_parameters() if name.startswith(("method.", "head."))
        )

    def make_head(self, width: int, num_classes: int, init: str) -> nn.Module:
        """Build the head: features [B, width] -> logits [B, num_classes].

        Raises:
            UserError: There is no such initialisation.
        """
        return init_linear(nn.Linear(width, num_classes), init)

    def pixels(self, images: Tensor) -> Tensor:
        """Change normalised images [B, 3, H, W] before the patch embedding."""
        return images

    def token_flow(self) -> tuple[Flow, ...]:
        """Return what happens to prompt tokens before each block, one entry for every block."""
        return (Flow.KEEP,) * self.num_blocks

    def tokens(self, block: int, x: Tensor, last: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Prompt tokens that enter before a block.

        Args:
            block: Index of a block whose flow is `Flow.ENTER` or `Flow.MIX`.
            x: The image tokens before that block, [B, n, width].
            last: Where the flow is `Flow.MIX`: the prompt tokens as they entered the last block, and as they
                left it.

        Returns:
            Tokens [1, p, width] where all images share them, else [B, p, width].
        """
        raise LookupError(f"{type(self).__name__} lets no tokens enter before block {block}")

    def shift(self, block: int, x: Tensor) -> Tensor:
        """Change the image tokens [B, n, width] before a block."""
        return x

    def keys_values(self, block: int) -> tuple[Tensor, Tensor] | None:
        """Return rows that join a block's keys and values, each [heads, t, width / heads]; None for none."""
        return None

    def branch(self, place: Place, block: int, x: Tensor, normed: Tensor | None) -> Tensor:
        """Return what is added at a place of `places`.

        Args:
            place: Where.
            block: Index of the block.
            x: Tokens [B, n, width], as `Place` says.
            normed: Their norm, where the place has one.

        Returns:
            [B, n, width].
        """
        raise LookupError(f"{type(self).__name__} has no branch at {place.value}")

    def features(self, pooled: Tensor, images: Tensor) -> Tensor:
        """Make the features [B, width] that the head reads of the pooled ones and of the images."""
        return pooled

    def losses(self, task_loss: Tensor, head: nn.Module, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the losses that training minimises; called behind each forward in training.

        The weighted sum of what it returns is the mean over the global batch. A term of the whole global
        batch is added to every image's loss; `ranks.gathered` brings what other devices have.

        Args:
            task_loss: The task's own loss of each image, cross-entropy for example, [B] in float32.
            head: The classifier's head.
            labels: Classes [B].
            weights: Of each image in the sum [B]; 0 marks a filler, which is no image of the batch.
        """
        return task_loss

    def end_epoch(self, epoch: int) -> None:
        """Called behind every epoch of training, counted from 0, on every rank, before the checkpoint is written."""

    def stored(self, pooled: Tensor, images: Tensor) -> Tensor:
        """Return what is kept of images, [B, any], where `first_block` is behind the last.

        `resumed` goes on from it.
        """
        return self.features(pooled, images)

    def resumed(self, stored: Tensor) -> Tensor:
        """Return the features [B, width] of what `stored` made."""
        return stored


class Wrapped(nn.Module):
    """A layer that a method put around one of the backbone's; it must work token by token.

    Attributes:
        base: The layer inside.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base


def drop(dropout: nn.Dropout, prompts: Tensor, batch_size: int) -> Tensor:
    """Return prompts [1, p, width], or [batch_size, p, width] while dropout is active.

    It is drawn for every image anew.
    """
    if dropout.training and dropout.p > 0:
        prompts = prompts.expand(batch_size, -1, -1)
    dropped: Tensor = dropout(prompts)
    return dropped


def per_block(
    shapes: Sequence[tuple[int, ...]], draw: Callable[[Tensor], object]
) -> nn.Parameter | nn.ParameterList:
    """Make a parameter of every block: one tensor where their shapes agree, a list where they do not.

    Args:
        shapes: Of each block's part.
        draw: Fills a tensor in place: [blocks, *shape] where the shapes agree, else each [*shape].

    Returns:
        What `[i]` gives block i's part of, saved as `name` or as `name.<i>`.
    """
    if len(set(shapes)) == 1:
        stacked = torch.empty(len(shapes), *shapes[0])
        draw(stacked)
        return nn.Parameter(stacked)
    parts = [torch.empty(shape) for shape in shapes]
    for part in parts:
        draw(part)
    return nn.ParameterList(parts)


def split_heads(attn: Any, projected: Tensor) -> tuple[Tensor, ...]:
    """Split tokens [B, n, parts * width], projected by timm's attention, into parts of [B, heads, n, head_dim]."""
    return projected.unflatten(-1, (-1, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


def init_linear(layer: nn.Linear, how: str) -> nn.Linear:
    """Initialise a head's last layer in place and returns it.

    Args:
        layer: The layer.
        how: "vpt" (the released code's: kaiming fan-out, and a bias that stands for probabilities of 1 %,
            whatever the number of classes) or "zeros".

    Raises:
        UserError: There is no such initialisation.
    """
    if how not in HEAD_INITS:
        raise unknown("head_init", how, HEAD_INITS)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    if how == "vpt":
        nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        nn.init.constant_(layer.bias, -math.log(99))
    return layer
