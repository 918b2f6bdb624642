"""The forward of backbones made of tokens: the one page from images to logits.

From images to logits (here, in `models/classifier.py` and in `block.py`; the backbone calls the method):

    x = embed(method.pixels(images))                     # [B, n, width]: class token, patches
    for i, block in enumerate(blocks):                   # from_block
        x = method.shift(i, x)
        if flow[i] is ENTER or MIX:                      # method.token_flow()
            entering = method.tokens(i, x)               # [1 or B, p, width], replaces the last block's
        read = rows of x whose outputs are read          # not prompts that the next block drops, for example
        queries = LN(x[read]);  context = LN(other rows), LN(entering)                        # run_block
        keys, values = those of queries, context and method.keys_values(i)                    # attend
        x = x[read] + Attention(queries, keys, values) + method.branch(ATTENTION) [+ ...]
        x = x + MLP(LN(x)) + method.branch(MLP) [+ ...]
    features = method.features(pool(norm(x)))            # [B, width]
    logits = head(features)                              # [B, C]
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visprompt.models.backbones.block import Attend, Rows, run_block
from visprompt.models.backbones.family import Family
from visprompt.models.contract import Flow, Method


class TokenFamily(Family):
    """A family whose blocks take tokens: image tokens first, then prompts.

    Attributes:
        plain_step: `run_block`, or a compiled form of it for blocks without branches.
    """

    plain_step: Callable[..., Tensor] = staticmethod(run_block)

    def carried_blocks(self) -> list[int]:
        """Return the indices of blocks that compute the outputs of all prompt tokens.

        These are blocks of a class that is not proven, or all blocks if `exact` is off.
        """
        return [i for i, block in enumerate(self.blocks) if not (self.exact and self.is_proven(block))]

    def is_proven(self, block: nn.Module) -> bool:
        """Return whether `drive` computes exactly what this block computes."""
        raise NotImplementedError

    def drive(
        self, index: int, x: Tensor, num_image: int, rows: slice, entering: Tensor | None, method: Method
    ) -> Tensor:
        """Run a proven block, with the method in it, and compute only the outputs that are read.

        Tokens that are not read give keys and values only.

        Args:
            index: Index of the block.
            x: Image tokens, then the prompts that flowed on, [B, n, width].
            num_image: Number of image tokens.
            rows: The rows of x whose outputs are read, 0 <= start < stop <= n.
            entering: Prompts whose outputs are not read, [B or 1, p, width].
            method: Gives keys, values and branches.

        Returns:
            The block's outputs for `rows`.
        """
        parts = [x[:, : rows.start], x[:, rows.stop :], *([] if entering is None else [entering])]
        context = [part for part in parts if part.shape[1]]
        mask = self.mask(index, x, num_image, rows, entering, method)
        return self.step(index, x[:, rows], context, self.attend, mask, method)

    def step(
        self,
        index: int,
        read: Tensor,
        context: Sequence[Tensor],
        attend: Attend,
        mask: Tensor | None,
        method: Method,
    ) -> Tensor:
        """Run a proven block, see `run_block`; the compiled function, if there is one and no branch."""
        block, rows = self._block(index), method.keys_values(index)
        if method.places:
            return run_block(block, read, context, attend, rows, mask, method, index)
        return self.plain_step(block, read, context, attend, rows, mask)

    def mask(
        self, index: int, x: Tensor, num_image: int, rows: slice, entering: Tensor | None, method: Method
    ) -> Tensor | None:
        """Return which keys each image has in a block, bool [B, keys]; None if each has all.

        The arguments are those of `drive`; the keys are in the order of `run_block`.
        """
        has = method.present(index)
        if has is None:
            return None
        prompts, own_rows = has
        tokens = torch.cat([prompts.new_ones(x.shape[0], num_image), prompts], dim=1)[:, : x.shape[1]]
        parts = [tokens[:, rows], tokens[:, : rows.start], tokens[:, rows.stop :]]
        return torch.cat([*parts, *([] if entering is None else [prompts]), own_rows], dim=1)

    def attend(
        self, attn: Any, read: Tensor, context: Sequence[Tensor], rows: Rows | None, mask: Tensor | None
    ) -> Tensor:
        """Return the attention [B, n, width] of a proven block, see `block.run_block`."""
        raise NotImplementedError

    def keys_values(self, index: int, prompts: Tensor) -> Rows:
        """Return what prompts [B, p, width] give to a proven block if their outputs are not read.

        Returns:
            Keys and values, each [B, heads, p, head_dim].
        """
        raise NotImplementedError

    def _block(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.block_names[index])

    def carry(self, index: int, x: Tensor, num_image: int) -> Tensor:
        """Run timm's own block on all tokens x [B, n, width], prompts among them."""
        raise NotImplementedError

    def between(self, index: int, x: Tensor, num_image: int) -> tuple[Tensor, int]:
        """Apply what is between block `index - 1` and block `index`, such as a patch merging.

        Args:
            index: Index of the block that comes next.
            x: Image tokens, then prompts that flow on, [B, n, width].
            num_image: Number of image tokens.

        Returns:
            The tokens, and the new number of image tokens.
        """
        return x, num_image

    def pooled_rows(self, num_image: int, pool: str | None) -> tuple[slice, bool]:
        """Return the rows of the last block's output that are pooled, and whether they include prompts."""
        raise NotImplementedError

    def pool(self, x: Tensor, pool: str | None) -> Tensor:
        """Apply the final norm to the rows chosen by `pooled_rows`, and pool them, as timm does."""
        raise NotImplementedError

    def states(self, images: Tensor) -> list[Tensor]:
        """Return the tokens [B, n, width] before each block and after the last, without any method."""
        like, no_method = next(self.parameters()), Method(self)
        states = [self.embed(images.to(like.device, like.dtype), no_method)]
        for i in range(self.num_blocks):
            states.append(self._plain(i, states[-1]))
        return states

    def to_block(self, stop: int, images: Tensor, method: Method) -> Tensor:
        """Return image tokens [B, n, width] before block `stop`; see `Family.to_block`."""
        x = self.embed(images, method)
        for i in range(stop):
            x = self._plain(i, x)
        return x

    def _plain(self, index: int, x: Tensor) -> Tensor:
        """Run a block on image tokens, and what is between it and the next block."""
        x = self.carry(index, x, x.shape[1])
        return self.between(index + 1, x, x.shape[1])[0] if index + 1 < self.num_blocks else x

    def from_block(self, start: int, x: Tensor, method: Method) -> Tensor:
        """Return pooled features [B, width] of image tokens [B, n, width] before block `start`."""
        pooled = partial(self.pooled_rows, pool=method.pool)
        return self.pool(self.through(start, x, method, pooled), method.pool)

    def maps_from(
        self, start: int, x: Tensor, method: Method, blocks: Sequence[int], normed: bool
    ) -> list[Tensor]:
        """Return the maps of blocks from image tokens [B, n, width] before block `start`; see `maps`."""
        outputs: dict[int, Tensor] = {}
        self.through(start, x, method, partial(self.pooled_rows, pool="image"), blocks, outputs)
        if normed:
            outputs[blocks[-1]] = self.norm(outputs[blocks[-1]])
        return [outputs[i].transpose(1, 2).unflatten(2, self.grids[i]) for i in blocks]

    def norm(self, x: Tensor) -> Tensor:
        """Apply the norm after the last block, before or after the pooling, to each token [B, n, width]."""
        raise NotImplementedError

    def run(self, images: Tensor, method: Method, pooled: Callable[[int], tuple[slice, bool]]) -> Tensor:
        """Run all blocks on normalised images [B, 3, H, W]; see `through`."""
        return self.through(0, self.embed(images, method), method, pooled)

    def through(
        self,
        start: int,
        x: Tensor,
        method: Method,
        pooled: Callable[[int], tuple[slice, bool]],
        blocks: Sequence[int] = (),
        outputs: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Run all blocks from `start` on.

        Args:
            start: Index of the first block.
            x: Image tokens before it, [B, n, width].
            method: The method.
            pooled: Number of image tokens after the last block -> `pooled_rows`.
            blocks: Indices of blocks whose patches are read too; blocks after the last of them are not run.
            outputs: Gets the patches [B, n, width] of these blocks.

        Returns:
            The rows of the last block's output that are pooled, [B, rows, width].
        """
        end = blocks[-1] + 1 if blocks else self.num_blocks
        flow, num_image = method.token_flow(), x.shape[1]
        entered = x[:, num_image:]  # prompts that last entered a block
        for i in range(start, end):
            prompt_outputs = x[:, num_image:]
            if flow[i] is not Flow.KEEP:
                x = x[:, :num_image]
            if flow[i] is Flow.KEEP and prompt_outputs.shape[1]:
                x = torch.cat([method.shift(i, x[:, :num_image]), prompt_outputs], dim=1)
            else:
                x = method.shift(i, x)
            entering = None
            if flow[i] in (Flow.ENTER, Flow.MIX):
                last = (entered, prompt_outputs) if flow[i] is Flow.MIX else None
                # cast: the whole backbone may be in a 16-bit dtype
                entering = entered = method.tokens(i, x, last).to(x.dtype)
            if i + 1 == end:
                rows, with_prompts = pooled(num_image)
            else:
                with_prompts = flow[i + 1] in (Flow.KEEP, Flow.MIX)
                rows = slice(0, None if with_prompts else num_image)
            if entering is not None and with_prompts:
                x, entering = torch.cat([x, entering.expand(x.shape[0], -1, -1)], dim=1), None
            x = self._run_block(i, x, num_image, rows, entering, method)
            if outputs is not None and i in blocks:
                outputs[i] = x if i + 1 == end else x[:, self.num_prefix : num_image]
            if i + 1 < end:
                x, num_image = self.between(i + 1, x, num_image)
        return x

    def _run_block(
        self, index: int, x: Tensor, num_image: int, rows: slice, entering: Tensor | None, method: Method
    ) -> Tensor:
        """Run one block on the tokens x [B, n, width] and those entering, and return the outputs of `rows`.

        The block is driven (`drive`) if the method enters it, or if outputs can be left out; else carried.
        """
        start, stop, _ = rows.indices(x.shape[1])
        enters = method.keys_values(index) is not None or method.present(index) is not None
        enters = enters or bool(method.places)
        all_read = entering is None and (start, stop) == (0, x.shape[1])
        driven = enters or (self.exact and not all_read and self.is_proven(self._block(index)))
        if entering is not None and not (driven and self.exact):
            x, entering = torch.cat([x, entering.expand(x.shape[0], -1, -1)], dim=1), None
        if not driven:
            return self.carry(index, x, num_image)[:, start:stop]
        # all outputs are computed if `exact` is off, and if patches are read and a branch needs all of them
        if not self.exact or (not method.tokenwise and stop > self.num_prefix):
            return self.drive(index, x, num_image, slice(0, x.shape[1]), entering, method)[:, start:stop]
        return self.drive(index, x, num_image, slice(start, stop), entering, method)
