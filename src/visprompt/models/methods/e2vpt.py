"""Visual prompts before blocks and in attentions, pruned.

Han et al., E^2VPT: An Effective and Efficient Approach for Visual Prompt Tuning, ICCV 2023, section 3.

Input prompts as in VPT, and key-value prompts inside the attentions, equations 4 to 6:
    Attention(Q, [K, P_K], [V, P_V]), with P_K = P_V unless `share_kv` is off.
Pruning, section 3.3: P_j -> rho_j * [rho_j1 * s_1, ..., rho_jS * s_S], with masks rho in {0, 1} for a token j
and for each of its segments s. The masks are options here; `visprompt.tuning.pruning` and
`visprompt.tuning.pruning_chain` compute them.

Different from the released code: a pruned token is removed from the sequence instead of set to zeros;
segments are contiguous instead of strided; only the values that are left are parameters.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visprompt.errors import UserError, unknown
from visprompt.models.contract import Flow, Geometry, Method
from visprompt.models.layers import drop, per_block
from visprompt.models.methods.checks import check_least, check_pool, check_probability
from visprompt.models.methods.locations import vpt_bound

KV_BLOCKS = ("all", "first_half", "last_half", "every_other")


class E2VPT(Method):
    """Prompt tokens before blocks and key-value prompts inside attentions.

    Args:
        backbone: The backbone whose width, patch size, heads and number of blocks shape the prompts.
        num_tokens: Input prompt tokens of a block (p); 0 for key-value prompts alone.
        depth: Number of blocks, counted from the first, that get input prompts; None means all.
        carry_over: Whether the prompt outputs of the last prompted block flow on; with depth 1 this is
            shallow.
        num_kv_tokens: Key-value prompts of an attention (T); 0 for input prompts alone.
        share_kv: Whether one tensor serves as keys and as values.
        kv_blocks: Blocks with key-value prompts: a word of `KV_BLOCKS`, or indices counted from 0.
        dropout: Dropout on the values of input prompts, drawn for every image anew.
        pool: Which outputs of the last block are pooled, one of `POOLS`; None for the backbone's pooling.
        num_segments: Contiguous segments of a token (S); must divide the width if anything is pruned.
        mask_per_layer: Whether each prompted layer has separate masks, all of which keep equally many values;
            no effect if only one layer has prompts.
        token_mask: 0 or 1 for every token, [p] or [layers, p]; None keeps all.
        segment_mask: 0 or 1 for every segment, [p, S] or [layers, p, S]; None keeps all.
        initial: Hash of the stored initial values that the run starts from (see
            `visprompt.tuning.pruning.rewind`); None draws them.
        prune: Whether the run searches the masks (`visprompt.tuning.pruning_chain`); this class ignores it.
        prune_tokens: Percentages of tokens that the search tries to prune.
        prune_segments: Percentages of each remaining token's segments that the search tries to prune.

    Attributes:
        prompts: [layers, p, width], U(-v, v) with v = sqrt(6 / (3 * patch^2 + width)); if anything is pruned,
            only the remaining values of each layer, [layers, n].
        kv_prompts: [kv layers, heads, T, width / heads], U(-v, v) with v = sqrt(6 / (T * width / heads)): the
            released code's Kaiming-uniform, which counts all dimensions but the first as the fan-in.
        k_prompts, v_prompts: In place of `kv_prompts` if keys and values have separate prompts. If the
            layers' widths differ, each is a list over the layers.
        token_mask: bool [p] or [layers, p]; None if nothing is pruned.
        segment_mask: bool [p, S] or [layers, p, S], false for all segments of pruned tokens; None likewise.
        gates: Factors on the segments of each image's prompts [B, layers, p, S]; set while the importance of
            segments is measured, else None.

    Raises:
        UserError: A number lies outside its range, a word is unknown or a mask does not fit.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"tokens", "keys_values"})
    kv_prompts: nn.Parameter | nn.ParameterList
    k_prompts: nn.Parameter | nn.ParameterList
    v_prompts: nn.Parameter | nn.ParameterList
    token_mask: Tensor | None
    segment_mask: Tensor | None

    def __init__(
        self,
        backbone: Geometry,
        num_tokens: int = 5,
        depth: int | None = None,
        carry_over: bool = False,
        num_kv_tokens: int = 5,
        share_kv: bool = True,
        kv_blocks: str | Sequence[int] = "all",
        dropout: float = 0.1,
        num_segments: int = 16,
        mask_per_layer: bool = False,
        token_mask: Sequence[Any] | None = None,
        segment_mask: Sequence[Any] | None = None,
        initial: str | None = None,
        prune: bool = False,
        prune_tokens: Sequence[int] | None = None,
        prune_segments: Sequence[int] | None = None,
        pool: str | None = None,
    ) -> None:
        super().__init__(backbone)
        if min(num_tokens, num_kv_tokens) < 0 or num_tokens + num_kv_tokens == 0:
            raise UserError(
                f"method.num_tokens={num_tokens} with method.num_kv_tokens={num_kv_tokens} leaves no prompt: "
                "give at least one of them 1 or more, or use method=linear"
            )
        depth = self.num_blocks if depth is None else depth
        if not 1 <= depth <= self.num_blocks:
            raise UserError(
                f"method.depth={depth} does not fit: give 1 to {self.num_blocks}, the backbone's blocks"
            )
        check_probability("dropout", dropout)
        pruned = token_mask is not None or segment_mask is not None
        widths = backbone.widths[:depth]
        _check_pruning(widths, num_tokens, num_segments, prune or pruned)
        self.prune_tokens = _percentages("prune_tokens", prune_tokens)
        self.prune_segments = _percentages("prune_segments", prune_segments)
        self.num_tokens, self.depth, self.carry_over = num_tokens, depth if num_tokens else 0, carry_over
        self.num_segments, self.initial = num_segments, initial
        self.mask_per_layer = mask_per_layer and self.depth > 1
        indices = _blocks(kv_blocks, self.num_blocks)  # checked even if there are no key-value prompts
        self.kv_blocks = indices if num_kv_tokens else ()
        self.pool = pool
        check_pool(self, backbone)
        self.dropout = nn.Dropout(dropout)
        self.gates: Tensor | None = None
        self._set_masks(token_mask, segment_mask)
        if num_tokens:
            # all prompts are drawn before some are pruned, so that the remaining values, and all values that
            # are drawn later, are the same as without pruning
            bound = vpt_bound(backbone.patch_size, backbone.widths[0])  # the same for all stages
            prompts = per_block(
                [(num_tokens, width) for width in widths], lambda values: values.uniform_(-bound, bound)
            )
            if pruned:
                stacked = isinstance(prompts, nn.Parameter)
                left = self.unpruned([layer.detach() for layer in prompts])
                prompts = nn.Parameter(torch.stack(left)) if stacked else nn.ParameterList(left)
            self.prompts = prompts
        if num_kv_tokens:
            sizes = [(backbone.heads[block], backbone.widths[block]) for block in self.kv_blocks]
            kv_shapes = [(heads, num_kv_tokens, width // heads) for heads, width in sizes]
            for name in ("kv_prompts",) if share_kv else ("k_prompts", "v_prompts"):
                setattr(self, name, per_block(kv_shapes, _draw_keys_values))

    @property
    def first_block(self) -> int:
        """The first block with prompts of either kind."""
        return 0 if self.depth else self.kv_blocks[0]

    @property
    def kept_tokens(self) -> int:
        """Number of input prompt tokens of a block that are left after pruning."""
        return self._left

    def token_flow(self) -> tuple[Flow, ...]:
        """Return `ENTER` for the first `depth` blocks; after them the prompts are dropped or kept."""
        flow = [Flow.ENTER] * self.depth + [Flow.KEEP] * (self.num_blocks - self.depth)
        if 0 < self.depth < self.num_blocks and not self.carry_over:
            flow[self.depth] = Flow.DROP
        return tuple(flow)

    def tokens(self, block: int, x: Tensor, last: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return a block's remaining input prompts, [1, p, width]; [B, p, width] while dropout is active."""
        prompts = self._scattered(block).unsqueeze(0)
        if self.gates is not None:
            parts = prompts.unflatten(-1, (self.num_segments, -1))
            prompts = (parts * self.gates[:, block].unsqueeze(-1)).flatten(-2)
        return drop(self.dropout, prompts, x.shape[0])

    def keys_values(self, block: int) -> tuple[Tensor, Tensor] | None:
        """Return the key-value prompts of a block, each [heads, T, width / heads]."""
        if block not in self.kv_blocks:
            return None
        layer = self.kv_blocks.index(block)
        if hasattr(self, "kv_prompts"):
            return self.kv_prompts[layer], self.kv_prompts[layer]
        return self.k_prompts[layer], self.v_prompts[layer]

    def unpruned(self, prompts: Iterable[Tensor]) -> list[Tensor]:
        """Return the values that the masks keep of each layer's prompts [p, width], each [n]."""
        assert self.segment_mask is not None
        parts = [layer.unflatten(-1, (self.num_segments, -1)) for layer in prompts]
        masks = self.segment_mask.expand(len(parts), -1, -1)
        return [layer[mask].flatten() for layer, mask in zip(parts, masks, strict=True)]

    def _set_masks(self, tokens: Sequence[Any] | None, segments: Sequence[Any] | None) -> None:
        """Register the masks as buffers, so that they are saved with the prompts."""
        token_mask, segment_mask = None, None
        if tokens is not None or segments is not None:
            shape = (self.depth,) * self.mask_per_layer + (self.num_tokens,)
            token_mask = _mask("token_mask", tokens, shape)
            segment_mask = _mask(
                "segment_mask", segments, (*shape, self.num_segments)
            ) & token_mask.unsqueeze(-1)
            _check_left(token_mask, segment_mask)
        self._left = self.num_tokens if token_mask is None else int(token_mask.sum(-1).max())
        # segments of a layer that are left
        self._segments_left = 0 if segment_mask is None else int(segment_mask.flatten(-2).sum(-1).max())
        self.register_buffer("token_mask", token_mask)
        self.register_buffer("segment_mask", segment_mask)

    def _scattered(self, layer: int) -> Tensor:
        """Return the remaining input prompts of a layer, [p, width], with zeros for pruned segments.

        The zeros take part: the layer norm that follows does not leave them zero.
        """
        values = self.prompts[layer]
        if self.token_mask is None or self.segment_mask is None:
            return values
        tokens, segments = self.token_mask, self.segment_mask
        if self.mask_per_layer:
            tokens, segments = tokens[layer], segments[layer]
        # indices by a stable sort, whose output length is known: `nonzero` would wait for the GPU
        values = values.unflatten(-1, (self._segments_left, -1))
        parts = values.new_zeros(segments.numel(), values.shape[-1])
        parts = parts.index_copy(0, _first(segments.flatten(), len(values)), values)
        return parts.view(self.num_tokens, -1).index_select(0, _first(tokens, self._left))


def _draw_keys_values(prompts: Tensor) -> None:
    """Draw key-value prompts [..., T, width / heads] in place by the released code's rule."""
    bound = math.sqrt(6 / math.prod(prompts.shape[-2:]))
    prompts.uniform_(-bound, bound)


def _first(mask: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` true entries of a flat mask, in order."""
    return mask.to(torch.uint8).argsort(descending=True, stable=True)[:count]


def _blocks(which: str | Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """Return the sorted indices of the blocks that a word of `KV_BLOCKS` or a list of indices names."""
    half = num_blocks // 2
    ranges = (range(num_blocks), range(half), range(half, num_blocks), range(0, num_blocks, 2))
    named = dict(zip(KV_BLOCKS, ranges, strict=True))
    if isinstance(which, str):
        if which not in named:
            raise unknown("method.kv_blocks", which, KV_BLOCKS)
        which = named[which]
    if not which or len(set(which)) < len(which) or not set(which) <= set(range(num_blocks)):
        raise UserError(
            f"method.kv_blocks={list(which)} does not fit: give a word ({', '.join(KV_BLOCKS)}) "
            f"or different indices from 0 to {num_blocks - 1}"
        )
    return tuple(sorted(which))


def _check_pruning(widths: Sequence[int], num_tokens: int, num_segments: int, wanted: bool) -> None:
    """Refuse pruning without prompts, and segments that do not divide the width."""
    check_least(1, num_segments=num_segments)
    if wanted and num_tokens == 0:
        raise UserError("method.num_tokens=0 leaves nothing to prune: give 1 or more, or method.prune=false")
    width = next((width for width in widths if width % num_segments), None)
    if wanted and width is not None:
        raise UserError(
            f"method.num_segments={num_segments} does not divide the backbone's width {width}: give a "
            "divisor of it"
        )


def _percentages(name: str, values: Sequence[int] | None) -> list[int]:
    """Return percentages as a list, empty for None; refuse any that is not a whole number from 0 to 99."""
    if values is not None and (not isinstance(values, Sequence) or isinstance(values, str)):
        raise UserError(f"method.{name}={values} is not a list: give [{values}], for example")
    for value in values or []:
        if not isinstance(value, int) or not 0 <= value < 100:
            raise UserError(
                f"method.{name}={list(values or [])} holds {value}: give whole percentages from 0 to 99"
            )
    return list(values or [])


def _mask(name: str, given: Sequence[Any] | None, shape: tuple[int, ...]) -> Tensor:
    """Return a mask as a bool tensor; all true for None."""
    if given is None:
        return torch.ones(shape, dtype=torch.bool)
    try:
        mask = torch.as_tensor(given)
    except (TypeError, ValueError):
        mask = torch.empty(0)
    if mask.shape != shape or not ((mask == 0) | (mask == 1)).all():
        raise UserError(f"method.{name} does not fit: give 0 or 1 for each of {' x '.join(map(str, shape))}")
    return mask.bool()


def _check_left(tokens: Tensor, segments: Tensor) -> None:
    """Refuse masks that leave a token or a layer empty, or that leave more in one layer than in another."""
    if not (segments.any(-1) == tokens).all() or not tokens.any(-1).all():
        raise UserError(
            "method.token_mask and method.segment_mask leave a token or a layer without values: keep a token "
            "in every layer, and a segment of every token that is kept"
        )
    counts = {
        (int(t.sum()), int(s.sum())) for t, s in zip(_layers(tokens, 1), _layers(segments, 2), strict=True)
    }
    if len(counts) > 1:
        raise UserError(
            "method.token_mask and method.segment_mask keep more in one layer than in another: keep equally "
            "many tokens and segments in every layer"
        )


def _layers(mask: Tensor, dims: int) -> Tensor:
    """Return a mask with a leading axis of layers; its length is 1 if all layers share the mask."""
    return mask.unsqueeze(0) if mask.ndim == dims else mask
