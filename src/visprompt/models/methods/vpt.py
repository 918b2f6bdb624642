"""Visual prompt tuning. Jia et al., Visual Prompt Tuning, ECCV 2022, section 3.2, equations 4 to 8.

Shallow: [x_1, Z_1, E_1] = L_1([x_0, P, E_0]), and the prompt outputs Z flow on through all blocks.
Deep:    [x_i, _, E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}]): each block has its prompts; their outputs are
         dropped.

One class implements both: shallow is depth 1 with carry-over; the paper's ablations (section 4.3) are its
options. Different from the released code: prompts come after the image tokens and not after the class token
(attention without positions does not depend on the order); outputs that nothing reads are not computed (see
`visprompt.models.backbones.block`); and prompts in the last n blocks keep every image token (that code drops
the first p).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError, unknown
from visprompt.models.contract import Flow, Geometry, Method, TokenBackbone
from visprompt.models.layers import Buffers, drop, per_block
from visprompt.models.methods import locations, vipamin
from visprompt.models.methods.checks import check_pool, check_probability, check_size
from visprompt.models.methods.inits import features

SHARED = ("none", "intra", "inter", "all")
INITS = ("random", "cls", "cls_layer", "patch_sample", "patch_pool", "patch_kmeans", "vipamin")


class VPT(Method):
    """Prompts before some or all blocks; everything else but the head stays frozen.

    Args:
        backbone: The backbone whose width, patch size and number of blocks shape the prompts.
        num_tokens: Prompt tokens of a block (p). For locations of pixels, the number of patches
            (prepend_pixel), of pixels on each side (pad), or of channels (concat_channel). Ignored by `add`,
            which has one vector for each patch, and by `add_one`, which has one.
        depth: Number of blocks that get prompts; None means all.
        depth_from: "first" or "last": which blocks these are.
        carry_over: Whether the prompt outputs of the last prompted block flow on into the blocks after it;
            with depth 1 from the first block this is VPT-shallow. Refused if nothing could flow on.
        dropout: Dropout on prompt values, after the projection, drawn for every image anew.
        location: One of `locations.LOCATIONS`; those of pixels enter before the first block only.
        shared: "none", "intra" (the tokens of a layer are one vector), "inter" (all layers have one set) or
            "all".
        project: Width of the prompts (h) if a linear layer, shared by all blocks, maps them to the backbone's
            width; None for prompts of the backbone's width.
        pool: Which outputs of the last block are pooled, one of `POOLS`; None for the backbone's pooling
            (Swin's is over image and prompts, as in the paper).
        init: "random", or features of training images that `inits.initialise` writes: "cls" (class tokens
            after the last block), "cls_layer" (after each prompted block), "patch_sample", "patch_pool" or
            "patch_kmeans" (patch tokens before each prompted block, as in SPT), "vipamin" (see
            `methods.vipamin`).
        matched_patches: Only init=vipamin: number of patches each prompt is matched with (the paper's K).
        orthogonal_share: Only init=vipamin: share of the orthogonal part (the paper's lambda), 0 to 1.
        frozen: Whether the prompts keep their initial values, so that only the head is tuned.
        pad_resize: Only location=pad: whether images shrink first, so that padding restores their side;
            otherwise the side grows.

    Attributes:
        prompts: [depth, num_tokens, width], U(-v, v) with v = sqrt(6 / (3 * patch^2 + width)) as in the
            released code (on Swin with the first stage's width everywhere). With `project`, h replaces width.
            An axis that is shared has length 1. A list over the layers if their widths (Swin's stages) or
            numbers of patches (`add`) differ. For locations of pixels see `locations.draw_pixels`.
        project: Linear(h -> width), weight Kaiming-normal by fan-out and PyTorch's bias, as in the released
            code.
        channel_embed: [width, num_tokens, patch, patch], the patch embedding of the further channels; only
            location=concat_channel.

    Raises:
        UserError: A number lies outside its range, a word is unknown, or two options contradict each other.
    """

    prompts: Tensor | nn.ParameterList | Buffers
    channel_embed: Tensor

    def __init__(
        self,
        backbone: Geometry,
        num_tokens: int = 10,
        depth: int | None = None,
        depth_from: str = "first",
        carry_over: bool = False,
        dropout: float = 0.1,
        location: str = "prepend",
        shared: str = "none",
        project: int | None = None,
        pool: str | None = None,
        init: str = "random",
        frozen: bool = False,
        pad_resize: bool = True,
        matched_patches: int = vipamin.MATCHED_PATCHES,
        orthogonal_share: float = vipamin.ORTHOGONAL_SHARE,
    ) -> None:
        super().__init__(backbone)
        depth = self.num_blocks if depth is None else depth
        _check_numbers(num_tokens, depth, self.num_blocks, dropout, project)
        _check_words(depth_from, location, shared, init)
        self.fixed_size = self.fixed_size or location in ("add", "pad", "concat_channel")
        locations.check_sites(location, backbone)
        self._first = 0 if depth_from == "first" else self.num_blocks - depth
        if location not in locations.VECTORS:
            _check_pixels(location, self._first, depth, dropout, shared, project)
        _check_init(init, location, project, frozen)
        vipamin.check_options(init, matched_patches, orthogonal_share)
        if carry_over:
            _check_flow(location, self._first, depth)
        self.depth, self.carry_over, self.location, self.frozen = depth, carry_over, location, frozen
        self.pool, self.init, self.pad_resize = pool, init, pad_resize
        self.matched_patches, self.orthogonal_share = matched_patches, orthogonal_share
        self._counts = [
            locations.tokens_at(location, num_tokens, backbone, i) for i in range(self.num_blocks)
        ]
        self.num_tokens = self._counts[self._first]
        self.dropout = nn.Dropout(dropout)
        self._check_widths(backbone, shared, project)
        self._draw(backbone, shared, project)
        self.project = None if project is None else _projection(project, backbone.widths[self._first])
        check_pool(self, backbone)
        self._prefix = backbone.num_prefix if location in ("add", "add_one") else 0
        # in a tuple, so that torch does not register the backbone's parameters as this method's
        self._patch_embed: tuple[nn.Module, ...] = ()
        self._patch = backbone.patch_size if "tokens" in backbone.sites else 1
        self._conv_options: dict[str, Any] = {}  # of the first convolution, for location=concat_channel

    def _draw(self, backbone: Geometry, shared: str, project: int | None) -> None:
        """Draw and register `prompts` and, for further channels, `channel_embed`."""

        def draw(values: Tensor) -> None:  # the same bound for all stages
            bound = locations.vpt_bound(backbone.patch_size, project or backbone.widths[0])
            values.uniform_(-bound, bound)

        if self.location in locations.VECTORS:
            shapes = [
                (
                    1 if shared in ("intra", "all") else self._counts[block],
                    backbone.widths[block] if project is None else project,
                )
                for block in self.prompted_blocks
            ]
            prompts = per_block(shapes[:1] if shared in ("inter", "all") else shapes, draw)
            self._register("prompts", prompts, not self.frozen)
            return
        count = self._counts[0]
        pixels = nn.Parameter(locations.draw_pixels(self.location, count, backbone, self.pad_resize))
        self._register("prompts", pixels, not self.frozen)
        if self.location == "concat_channel":
            conv: nn.Conv2d = backbone.model.get_submodule(backbone.stem)  # type: ignore[assignment]  # the stem is one
            bound = locations.vpt_bound(backbone.patch_size, conv.out_channels)
            shape = (conv.out_channels, count, *conv.kernel_size)
            channel_embed = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
            self._register("channel_embed", channel_embed, not self.frozen)

    def _register(self, name: str, values: nn.Parameter | nn.ParameterList, tuned: bool) -> None:
        """Register values as parameters, or as buffers if they are not tuned; the state holds both."""
        if tuned:
            setattr(self, name, values)
        elif isinstance(values, nn.ParameterList):
            self.add_module(name, Buffers(values))
        else:
            self.register_buffer(name, values.data)

    def _check_widths(self, backbone: Geometry, shared: str, project: int | None) -> None:
        """Refuse prompts or a projection that layers of different shapes would share."""
        shapes = {(backbone.widths[block], self._counts[block]) for block in self.prompted_blocks}
        if len(shapes) > 1 and (shared in ("inter", "all") or project is not None):
            option = f"shared={shared}" if shared in ("inter", "all") else f"project={project}"
            raise UserError(
                f"method.{option} needs layers of one shape, and those of this backbone grow from stage to "
                "stage: give method.shared=none or intra with method.project=null, or a method.depth within "
                "one stage"
            )

    @property
    def first_block(self) -> int:
        """The first block with prompts; `num_blocks` if frozen prompts leave the features always the same."""
        return self.num_blocks if self.frozen and self.dropout.p == 0 else self._first

    @property
    def prompted_blocks(self) -> range:
        """The indices of the blocks that get prompts."""
        return range(self._first, self._first + self.depth)

    @property
    def needs_images(self) -> bool:
        """Whether `inits.initialise` has to be called with training images before the first epoch."""
        return self.init != "random"

    def initialise(self, backbone: TokenBackbone, images: Iterable[Tensor], seed: int) -> None:
        """Compute the prompts from training images as `init` says; see `Method.initialise`."""
        blocks, count = self.prompted_blocks[: len(self.prompts)], self.prompts[0].shape[0]
        if self.init == "vipamin":
            drawn = [self.prompts[i].expand(self._counts[block], -1) for i, block in enumerate(blocks)]
            values = vipamin.prompts(
                backbone, blocks, drawn, images, self.matched_patches, self.orthogonal_share, seed
            )
        else:
            values = features(self.init, backbone, blocks, count, images, seed)
        with torch.no_grad():
            for i, value in enumerate(values):
                self.prompts[i].copy_(value[:count])

    def attach(self, backbone: Geometry) -> None:
        """Wrap the first convolution for further channels; check options that depend on the model."""
        if self.init in ("cls", "cls_layer") and not backbone.has_class_token:
            raise UserError(
                f"method.init={self.init} needs a class token, which this backbone does not have: give "
                "another method.init"
            )
        if self.init == "vipamin":
            vipamin.check(backbone, self.prompted_blocks, self.matched_patches)
        if self.location == "pad" and not self.pad_resize:
            locations.check_padded_side(backbone, self.num_tokens)
        if self.location == "prepend_pixel":
            self._patch_embed = (backbone.model.get_submodule("patch_embed"),)
        if self.location == "concat_channel":
            conv: nn.Conv2d = backbone.model.get_submodule(backbone.stem)  # type: ignore[assignment]  # the stem is one
            self._conv_options = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
            backbone.model.set_submodule(backbone.stem, locations.MoreChannels(conv, self.more_channels))

    def more_channels(self) -> Tensor:
        """Return what further channels add to the first convolution, [1, channels, height, width]."""
        return F.conv2d(self.prompts[None], self.channel_embed, **self._conv_options)  # type: ignore[index, call-overload]  # one tensor here

    def pixels(self, images: Tensor) -> Tensor:
        """Return normalised images [B, 3, H, W], with a frame of prompts if the location is "pad"."""
        if self.location != "pad":
            return images
        return locations.pad(images, self.prompts, self.pad_resize, self._patch)  # type: ignore[arg-type]  # one tensor here

    def token_flow(self) -> tuple[Flow, ...]:
        """Return `ENTER` for each prompted block; after the last of them the prompts are dropped or kept."""
        flow = [Flow.KEEP] * self.num_blocks
        if self.location in ("prepend", "prepend_pixel"):
            end = self._first + self.depth
            flow[self._first : end] = [Flow.ENTER] * self.depth
            if end < self.num_blocks and not self.carry_over:
                flow[end] = Flow.DROP
        return tuple(flow)

    def tokens(self, block: int, x: Tensor, last: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return a block's prompts, [1, p, width], or [B, p, width] while dropout is active."""
        if self.location == "prepend_pixel":
            return locations.patch_tokens(self._patch_embed[0], self.prompts)  # type: ignore[arg-type]  # one tensor here
        return self._vectors(block, x.shape[0])

    def shift(self, block: int, x: Tensor) -> Tensor:
        """Add a prompted block's vectors to the patch tokens of x [B, n, width], not to the prefix tokens."""
        if self.location not in ("add", "add_one") or block not in self.prompted_blocks:
            return x
        vectors = self._vectors(block, x.shape[0])
        vectors = vectors.expand(-1, x.shape[1] - self._prefix, -1) if self.location == "add_one" else vectors
        return x + F.pad(vectors, (0, 0, self._prefix, 0))

    def _vectors(self, block: int, batch_size: int) -> Tensor:
        """Return the vectors of a block after projection and dropout, [1 or B, p, width]."""
        stored = self.prompts[block - self._first if len(self.prompts) > 1 else 0]
        vectors = stored.expand(self._counts[block], -1)
        if self.project is not None:
            vectors = self.project(vectors)
        vectors = vectors.unsqueeze(0)
        return drop(self.dropout, vectors, batch_size)


def _projection(width: int, out: int) -> nn.Linear:
    layer = nn.Linear(width, out)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return layer


def _check_numbers(num_tokens: int, depth: int, num_blocks: int, dropout: float, project: int | None) -> None:
    check_size("num_tokens", num_tokens)
    if not 1 <= depth <= num_blocks:
        raise UserError(f"method.depth={depth} does not fit: give 1 to {num_blocks}, the backbone's blocks")
    check_probability("dropout", dropout)
    if project is not None and project < 1:
        raise UserError(f"method.project={project} is too small: give at least 1, or null for no projection")


def _check_words(depth_from: str, location: str, shared: str, init: str) -> None:
    words = (
        ("depth_from", depth_from, ("first", "last")),
        ("location", location, locations.LOCATIONS),
        ("shared", shared, SHARED),
        ("init", init, INITS),
    )
    for option, word, choices in words:
        if word not in choices:
            raise unknown(f"method.{option}", word, choices)


def _check_pixels(
    location: str, first: int, depth: int, dropout: float, shared: str, project: int | None
) -> None:
    """Refuse options that prompts of pixels cannot have."""
    if (first, depth) != (0, 1):
        raise UserError(
            f"method.location={location} enters before the first block alone: give method.depth=1 and "
            "depth_from=first, or use method=vpt_shallow"
        )
    given = {"dropout": (dropout, 0), "shared": (shared, "none"), "project": (project, None)}
    for option, (value, only) in given.items():
        if value != only:
            only = "null" if only is None else only
            raise UserError(
                f"method.{option}={value} is for prompts that are vectors, and those of "
                f"method.location={location} are pixels: give method.{option}={only}"
            )


def _check_flow(location: str, first: int, depth: int) -> None:
    """Refuse `carry_over` if no prompt outputs can flow on; every location allows it with depth 1."""
    if first > 0:
        why = "depth_from=last leaves no block after the prompted ones"
    elif location in ("add", "add_one") and depth > 1:
        why = f"location={location} has no prompt outputs"
    else:
        return
    raise UserError(
        f"method.carry_over=true has no effect here, since method.{why}: give method.carry_over=false"
    )


def _check_init(init: str, location: str, project: int | None, frozen: bool) -> None:
    if project is not None and frozen:
        raise UserError(
            "method.project is tuned and method.frozen=true tunes the head alone: give one of them"
        )
    if init == "random":
        return
    if project is not None:
        raise UserError(
            f"method.init={init} gives prompts of the backbone's width, and method.project={project} needs "
            "another width: give method.init=random or method.project=null"
        )
    if location != "prepend":
        raise UserError(
            f"method.init={init} gives tokens, which method.location={location} does not take: give "
            "method.init=random or method.location=prepend"
        )
