"""The small protocol between a method and a backbone.

A backbone offers *sites*. A method names the sites it needs, and implements the functions that the backbone
calls there:

- `weights`: the backbone's parameters may be tuned;
- `modules`: its convolutions, linear layers and norms may be wrapped (`attach`);
- `pixels`: the images may be changed before the first convolution (`pixels`), which may be wrapped too;
- `tokens`: prompt tokens may enter the sequence before a block (`token_flow`, `tokens`), image tokens may be
  changed there (`shift`), and any outputs of the last block may be pooled (`pool`);
- `keys_values`: rows may join the keys and values of an attention (`keys_values`);
- `branches`: a term may be added at a place in a block (`places`, `branch`);
- `stream`: one sequence of one width runs through all blocks, and every attention sees all of it.

From the results of these functions alone the backbone decides what it has to compute.
"""

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from visprompt.models.layers import init_linear

POOLS = ("cls", "image", "prompt", "image_prompt")


class Flow(Enum):
    """What happens to the prompt tokens of the sequence before a block."""

    KEEP = "keep"  # prompts in the sequence, if any, stay for this block
    ENTER = "enter"  # the method's tokens for this block replace them
    MIX = "mix"  # the method computes this block's tokens from the prompt outputs of the block before
    DROP = "drop"  # they leave the sequence


class Place(Enum):
    """Where a branch adds to the residual stream of a block x + Attention(LN(x)), then + MLP(LN(x))."""

    ATTENTION = "attention"  # parallel to the attention; reads the stream and its norm
    BETWEEN = "between"  # between attention and MLP; reads the stream
    OUTPUT = "output"  # on the output of the MLP, before it is added to the stream; reads that output
    MLP = "mlp"  # parallel to the MLP; reads the stream and its norm
    AFTER = "after"  # after the block; reads the stream


class Geometry(Protocol):
    """The properties of a backbone that a method reads.

    Blocks are residual blocks, counted through all stages.

    Attributes:
        model: The timm model that is run, without its head.
        width: Width of the pooled features.
        widths: Width of the tokens, or number of channels, in each block.
        blocks: The blocks in their order.
        heads: Number of heads of each block's attention; 0 if the block has none that a method may enter.
        grids: Positions along height and width in each block, for images of the backbone's own size.
        block_names: Each block's name in `model`.
        between_names: For each block, the name of the module between it and the block before (a merging or
            downsampling), or None. The first block has None: the stem is not counted.
        final_names: Names of the norms after the last block.
        stem: Name in `model` of the first convolution.
        patch_size: Side in pixels of that convolution's kernel.
        image_size: Side of the input in pixels.
        any_size: Whether images of another size are supported too.
        num_prefix: Number of class and register tokens, which come before the patch tokens.
        has_class_token: Whether the first of them is a class token.
        sites: The sites that the backbone offers.
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
    """The functions of a frozen token backbone that a method may call; see `backbones.token_family`."""

    def embed(self, images: Tensor, method: "Method") -> Tensor:
        """Return image tokens [B, n, width] before the first block."""
        ...

    def states(self, images: Tensor) -> list[Tensor]:
        """Return image tokens [B, n, width] before each block and after the last."""
        ...

    def carry(self, index: int, x: Tensor, num_image: int) -> Tensor:
        """Run a block on all tokens x [B, n, width]: `num_image` image tokens, then prompts."""
        ...


class Method(nn.Module):
    """The tuned parameters and where they enter the backbone; this base class tunes the head alone.

    A method's parameters are saved under their names (`prompts`), the head's under `head.`, the backbone's
    under `backbone.`.

    Attributes:
        sites: Sites that the method needs.
        trains_backbone: Whether training puts the backbone in training mode (stochastic depth, batch
            statistics).
        places: Places in a block at which `branch` is called.
        tokenwise: Whether `branch` treats each token separately. If not, it is given either all image tokens
            or only class and register tokens.
        fixed_size: Whether images must have the backbone's own size.
        undecayed: Names of the method's parameters that have no weight decay.
        can_merge: Whether the tuned values can be merged into the weights of a plain timm model.
        compares_images: Whether `losses` compares the images of a batch with each other, so that the loss of
            a batch is not the sum over its parts.
        reads_labels: Whether `losses` reads the labels themselves, so that mixed images, smoothed labels and
            class weights would not reach it.
        images_per_class: Number of images of each class that `see_classes` gets; None if the method does not
            implement it.
        pool: Which outputs of the last block are pooled, one of `POOLS`; None for the backbone's pooling.
        reads_image: Whether the prompts that enter (`Flow.ENTER`) depend on the image.
        mixes: Whether a pass of the backbone may hold images of other methods too; not if the functions pass
            values to each other.
    """

    sites: ClassVar[frozenset[str]] = frozenset()
    trains_backbone: ClassVar[bool] = False
    places: ClassVar[frozenset[Place]] = frozenset()
    tokenwise: ClassVar[bool] = True
    fixed_size: bool = False
    undecayed: ClassVar[frozenset[str]] = frozenset()
    can_merge: ClassVar[bool] = False
    compares_images: ClassVar[bool] = False
    reads_labels: ClassVar[bool] = False
    images_per_class: ClassVar[int | None] = None
    pool: str | None = None
    reads_image: ClassVar[bool] = False
    mixes: ClassVar[bool] = True

    def __init__(self, backbone: Geometry) -> None:
        super().__init__()
        self.num_blocks = backbone.num_blocks

    @property
    def exact_modules(self) -> Iterable[nn.Module]:
        """The modules of the backbone that the method calls outside autocast."""
        return ()

    @property
    def needs_images(self) -> bool:
        """Whether `inits.initialise` has to be called with training images before the first epoch."""
        return False

    def initialise(self, backbone: TokenBackbone, images: Iterable[Tensor], seed: int) -> None:
        """Compute the initial values from training images, in place, if `needs_images`.

        Called by `inits.initialise`.

        Args:
            backbone: The frozen backbone in evaluation mode, with the method attached.
            images: Batches of normalised images [B, 3, H, W], at most `inits.MAX_IMAGES`; can be iterated
                once.
            seed: Seed of everything that is drawn.
        """
        raise LookupError(f"{type(self).__name__} needs no images")

    def see_classes(self, backbone: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> None:
        """Compute the initial values from training images and labels, in place.

        Called instead of `initialise` if `images_per_class` is not None.

        Args:
            backbone: As for `initialise`.
            batches: Batches of normalised images [B, 3, H, W] with labels [B], up to `images_per_class` of
                each class, the same on all ranks.
            seed: Seed of everything that is drawn.
        """
        raise LookupError(f"{type(self).__name__} sees no classes")

    @property
    def first_block(self) -> int:
        """Index of the first block whose input or weights are tuned; earlier outputs never change."""
        return 0

    def attach(self, backbone: Geometry) -> None:
        """Wrap or change modules of the backbone; called once, before the first forward."""

    def tuned_names(self, classifier: nn.Module) -> frozenset[str]:
        """Return the names of the tuned parameters.

        This alone decides what requires gradients, what the optimiser gets, what is saved and what is
        counted.

        Args:
            classifier: The classifier that holds method, head and backbone.

        Returns:
            Names as in `classifier.named_parameters()`.
        """
        return frozenset(
            name for name, _ in classifier.named_parameters() if name.startswith(("method.", "head."))
        )

    def make_head(self, width: int, num_classes: int, init: str) -> nn.Module:
        """Build the head: features [B, width] -> logits [B, num_classes].

        Raises:
            UserError: The initialisation `init` is unknown.
        """
        return init_linear(nn.Linear(width, num_classes), init)

    def pixels(self, images: Tensor) -> Tensor:
        """Change normalised images [B, 3, H, W] before the patch embedding."""
        return images

    def token_flow(self) -> tuple[Flow, ...]:
        """Return what happens to prompt tokens before each block, one entry for each block."""
        return (Flow.KEEP,) * self.num_blocks

    def tokens(self, block: int, x: Tensor, last: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the prompt tokens that enter before a block.

        Args:
            block: Index of a block whose flow is `Flow.ENTER` or `Flow.MIX`.
            x: The image tokens before that block, [B, n, width].
            last: Only for `Flow.MIX`: the prompt tokens that entered the block before, and their outputs.

        Returns:
            Tokens [1, p, width] if all images share them, else [B, p, width].
        """
        raise LookupError(f"{type(self).__name__} has no tokens that enter before block {block}")

    def shift(self, block: int, x: Tensor) -> Tensor:
        """Change the image tokens [B, n, width] before a block."""
        return x

    def keys_values(self, block: int) -> tuple[Tensor, Tensor] | None:
        """Return rows that join a block's keys and values, each [heads, t, width / heads], or None.

        Rows that differ from image to image are [B, heads, t, width / heads].
        """
        return None

    def present(self, block: int) -> tuple[Tensor, Tensor] | None:
        """Return which prompts and which rows of `keys_values` each image has; None if each has all.

        Returns:
            bool [B, p] and bool [B, t].
        """
        return None

    def branch(self, place: Place, block: int, x: Tensor, normed: Tensor | None) -> Tensor:
        """Return the term that is added at a place of `places`.

        Args:
            place: The place in the block.
            block: Index of the block.
            x: Tokens [B, n, width], as `Place` says.
            normed: The tokens after the block's norm, if the place has one; else None.

        Returns:
            [B, n, width].
        """
        raise LookupError(f"{type(self).__name__} has no branch at {place.value}")

    @classmethod
    def branches(
        cls,
        methods: Sequence[tuple["Method", int]],
        place: Place,
        block: int,
        x: Tensor,
        normed: Tensor | None,
    ) -> Tensor:
        """Return the terms of a batch in which several methods of this class have their images.

        Args:
            methods: Each method with its number of images, in the order of the batch.
            place: As for `branch`.
            block: As for `branch`.
            x: Tokens of all images, [B, n, width].
            normed: As for `branch`.

        Returns:
            [B, n, width].
        """
        sizes = [size for _, size in methods]
        norms = [None] * len(sizes) if normed is None else normed.split(sizes)
        parts = zip(methods, x.split(sizes), norms, strict=True)
        return torch.cat([method.branch(place, block, part, own) for (method, _), part, own in parts])

    def freeze(self) -> None:
        """Compute what depends on the tuned values alone; called once they do not change any more."""

    def features(self, pooled: Tensor, images: Tensor) -> Tensor:
        """Return the features [B, width] that the head reads, from the pooled ones and the images."""
        return pooled

    def losses(self, task_loss: Tensor, head: nn.Module, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the loss of each image, [B], that training minimises; called after each forward in training.

        The sum of these losses times `weights`, over all devices, is the mean over the global batch. A term
        of the whole global batch is added to the loss of every image; `ranks.gathered` collects rows of all
        devices for it.

        Args:
            task_loss: The task's loss of each image, such as cross-entropy, [B] in float32.
            head: The classifier's head.
            labels: Classes [B].
            weights: Weight of each image in the sum, [B]; 0 marks a filler image that is not in the batch.
        """
        return task_loss

    def end_epoch(self, epoch: int) -> None:
        """Update the method after a training epoch, on all ranks; called before the checkpoint is written.

        Args:
            epoch: Index of the epoch, from 0.
        """

    def stored(self, pooled: Tensor, images: Tensor) -> Tensor:
        """Return rows [B, any] of images that are computed once for all epochs.

        Called only if no block is tuned; `resumed` computes features from these rows in every epoch.
        """
        return self.features(pooled, images)

    def resumed(self, stored: Tensor) -> Tensor:
        """Return the features [B, width] from rows that `stored` returned."""
        return stored
