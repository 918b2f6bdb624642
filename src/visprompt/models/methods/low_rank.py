"""Low-rank prompts ("BPT"). Wang et al., Attention to the Burstiness in Visual Prompt Tuning!, ICCV 2025.

P_i = A_i B_i with A_i [p, r] and B_i [r, d], whose product enters as in VPT. Where both are learnt
("BPT-bilinear") that is r * (p + d) numbers for a block instead of p * d. A ~ N(0, 0.02^2) and B by Xavier
are the released code's.

With whitening, B_i is made of training images and then frozen ("BPT-fwhiten": r * p numbers are tuned) or
tuned ("BPT-twhiten"). Prompts meet the patches X [n, d] before a block as P W_q W_k^T X^T. With M = W_q
W_k^T X^T, X being the mean over images, and S = M M^T / d, W = S^(-1/2) whitens M: W S W is the identity on
M's span. Every row of W gives r of its numbers, drawn at random for every row anew: B_i[j, a] = W[a,
c_a(j)]. That is the released code's choice; these are no columns of W.

Different from the released code, as far as it tells (it reads files of W_q, W_k and X, and what makes them
is not released):
- W_q and W_k are those of q = x W_q. The code multiplies its two files as q k^T; its notebook cuts them
  from the joint projection as PyTorch stores it, transposed, which gives another product. Its shallow model
  for MAE reads the file of W_q twice.
- X are patch tokens before the block's norm, without class and register tokens, of up to `inits.MAX_IMAGES`
  images. Which images and tokens the code's files hold is not known; its notebook calls them patch
  embeddings.
- M has at most the rank of n patches (196 on ViT-B/16), and S is d wide (768): here S^(-1/2) is taken on
  M's span and is 0 outside it. The code inverts all singular values, those that are rounding errors too.
- Its deep prompts for MAE and MoCo v3 tune B in the last four of twelve blocks and freeze the others; its
  other models tune all.
"""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visprompt.errors import UserError, unknown
from visprompt.models.contract import Geometry, TokenBackbone, drop, per_block
from visprompt.models.methods.inits import Means, check_plain_attentions
from visprompt.models.methods.vpt import VPT, Buffers

WHITENINGS = ("none", "frozen", "tuned")


class LowRankVPT(VPT):
    """VPT whose prompts are a product of two matrices.

    Args:
        backbone: The backbone whose width and number of blocks shape the prompts.
        num_tokens: Prompt tokens of a block (p).
        rank: Columns of the left, rows of the right matrix (r).
        depth: Number of blocks that get prompts of their own; None means all.
        depth_from: "first" or "last": which blocks these are.
        carry_over: Whether the prompt outputs of the last prompted block flow on; with depth 1 this is
            shallow.
        dropout: Dropout on prompt values, drawn for every image anew.
        whitening: "none"; or "frozen" or "tuned", whichever a right matrix is that `inits.initialise` takes
            from the whitening matrix.

    Attributes:
        left: [depth, num_tokens, rank], N(0, 0.02^2).
        right: [depth, rank, width], U(-v, v) with v = sqrt(6 / (rank + width)); a list where the widths
            differ. With whitening this until `initialise`; a buffer, saved all the same, where it is frozen.

    Raises:
        UserError: A number lies outside its range, or a word is unknown.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"tokens"})
    right: Tensor | nn.ParameterList | Buffers

    def __init__(
        self,
        backbone: Geometry,
        num_tokens: int = 10,
        rank: int = 4,
        depth: int | None = None,
        depth_from: str = "first",
        carry_over: bool = False,
        dropout: float = 0.1,
        whitening: str = "none",
    ) -> None:
        super().__init__(
            backbone,
            num_tokens=num_tokens,
            depth=depth,
            depth_from=depth_from,
            carry_over=carry_over,
            dropout=dropout,
        )
        if whitening not in WHITENINGS:
            raise unknown("method.whitening", whitening, WHITENINGS)
        self.whitening = whitening
        widths = [backbone.widths[block] for block in self.prompted_blocks]
        largest = min(num_tokens, *widths)
        if not 1 <= rank <= largest:
            raise UserError(
                f"method.rank={rank} does not fit: give 1 to {largest}, the smaller of num_tokens and the "
                "width"
            )
        del self.prompts  # they are the product, never stored
        self.left = per_block([(num_tokens, rank)] * self.depth, lambda left: left.normal_(0, 0.02))
        self._own("right", per_block([(rank, width) for width in widths], _draw_right), whitening != "frozen")

    @property
    def needs_images(self) -> bool:
        """Whether the right matrices are made of training images."""
        return self.whitening != "none"

    def attach(self, backbone: Geometry) -> None:
        """Check that the right matrices can be made on this backbone."""
        super().attach(backbone)
        if self.needs_images:
            check_plain_attentions(backbone, self.prompted_blocks, f"method.whitening={self.whitening}")

    @torch.no_grad()
    def initialise(self, backbone: TokenBackbone, images: Iterable[Tensor], seed: int) -> None:
        """Put numbers of the whitening matrices into the right ones, see `Method.initialise`."""
        means, generator = Means(), torch.Generator().manual_seed(seed)
        for batch in images:
            states = backbone.states(batch)
            for block in self.prompted_blocks:
                means.add(block, states[block][:, backbone.num_prefix :])
        for own, block in enumerate(self.prompted_blocks):
            attn: Any = backbone.blocks[block].attn
            whitening = _whitening(attn, means[block])
            chosen = torch.rand(whitening.shape, generator=generator).argsort(1)[
                :, : self.right[own].shape[0]
            ]
            self.right[own].copy_(whitening.gather(1, chosen).T)

    def tokens(self, block: int, x: Tensor, last: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return prompts of a block, [1, p, width], or [B, p, width] while dropout is active."""
        own = block - self.first_block
        prompts = (self.left[own] @ self.right[own]).unsqueeze(0)
        return drop(self.dropout, prompts, len(x))


def _draw_right(right: Tensor) -> None:
    """Xavier's rule for each matrix [rank, width]."""
    bound = math.sqrt(6 / sum(right.shape[-2:]))
    right.uniform_(-bound, bound)


def _whitening(attn: Any, patches: Tensor) -> Tensor:
    """Return the whitening matrix [d, d] of W_q W_k^T X^T, of an attention and mean patches X [n, d]."""
    # as PyTorch has them: [out, in]
    query, key = attn.qkv.weight[: 2 * attn.attn_dim].cpu().double().chunk(2)
    met = query.T @ key @ patches.T
    # its singular values s are those of S^(1/2) but for a factor: no square has to be taken and undone
    left, s, _ = torch.linalg.svd(met, full_matrices=False)
    spanned = s > s.max() * max(met.shape) * torch.finfo(torch.float32).eps
    left, s = left[:, spanned], s[spanned]
    return math.sqrt(len(met)) * (left / s) @ left.T
