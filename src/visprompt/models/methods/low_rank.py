"""Low-rank prompts ("BPT"). Wang et al., Attention to the Burstiness in Visual Prompt Tuning!, ICCV 2025.

P_i = A_i B_i with A_i [p, r] and B_i [r, d]; the product enters as in VPT. If both are learnt
("BPT-bilinear"), a block has r * (p + d) parameters instead of p * d. A ~ N(0, 0.02^2) and Xavier's rule for
B are those of the released code.

With whitening, B_i is computed from training images and then frozen ("BPT-fwhiten": r * p parameters) or
tuned ("BPT-twhiten"). Attention multiplies prompts and patches X [n, d] of a block as P W_q W_k^T X^T. With
M = W_q W_k^T X^T, where X is the mean over images, and S = M M^T / d, the matrix W = S^(-1/2) whitens M:
W S W is the identity on M's span. B_i is sampled from W as in the released code: each row a of W gives r of
its entries, at positions c_a drawn separately for each row, B_i[j, a] = W[a, c_a(j)]. So the rows of B_i are
not columns of W.

Different from the released code, as far as can be told (it reads W_q, W_k and X from files, and the scripts
that write them are not released):
- W_q and W_k are those of q = x W_q. That code multiplies its two files as q k^T; its notebook cuts them
  out of the joint projection as PyTorch stores it, transposed, which gives another product. Its shallow model
  for MAE reads the file of W_q twice.
- X are patch tokens before the block's norm, without class and register tokens, of up to `inits.MAX_IMAGES`
  images. Which images and tokens that code's files hold is not known; its notebook calls them patch
  embeddings.
- M has at most rank n, the number of patches (196 on ViT-B/16), and S is d x d (d = 768): here S^(-1/2) is
  computed on M's span and is 0 outside it. That code inverts all singular values, including rounding errors.
- Its deep prompts for MAE and MoCo v3 tune B in the last four of twelve blocks and freeze the others; its
  other models tune B in all blocks.
"""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visprompt.errors import UserError, unknown
from visprompt.models.contract import Geometry, TokenBackbone
from visprompt.models.layers import Buffers, drop, per_block
from visprompt.models.methods.checks import check_plain_blocks
from visprompt.models.methods.inits import Means
from visprompt.models.methods.vpt import VPT

WHITENINGS = ("none", "frozen", "tuned")


class LowRankVPT(VPT):
    """VPT whose prompts are a product of two matrices.

    Args:
        backbone: The backbone whose width and number of blocks shape the prompts.
        num_tokens: Prompt tokens of a block (p).
        rank: Columns of the left matrix and rows of the right matrix (r).
        depth: Number of blocks that get prompts; None means all.
        depth_from: "first" or "last": which blocks these are.
        carry_over: Whether the prompt outputs of the last prompted block flow on; with depth 1 this is
            shallow.
        dropout: Dropout on prompt values, drawn for every image anew.
        whitening: "none", or what becomes of a right matrix that `inits.initialise` samples from the
            whitening matrix: "frozen" or "tuned".

    Attributes:
        left: [depth, num_tokens, rank], N(0, 0.02^2).
        right: [depth, rank, width], U(-v, v) with v = sqrt(6 / (rank + width)), with whitening until
            `initialise` is called; a list over the layers if the widths differ. If frozen it is a buffer,
            which is saved too.

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
        self._register(
            "right", per_block([(rank, width) for width in widths], _draw_right), whitening != "frozen"
        )

    @property
    def needs_images(self) -> bool:
        """Whether the right matrices are computed from training images."""
        return self.whitening != "none"

    def attach(self, backbone: Geometry) -> None:
        """Check that the right matrices can be computed on this backbone."""
        super().attach(backbone)
        if self.needs_images:
            check_plain_blocks(backbone, self.prompted_blocks, f"method.whitening={self.whitening}")

    @torch.no_grad()
    def initialise(self, backbone: TokenBackbone, images: Iterable[Tensor], seed: int) -> None:
        """Sample the right matrices from the whitening matrices; see `Method.initialise`."""
        means, generator = Means(), torch.Generator().manual_seed(seed)
        for batch in images:
            states = backbone.states(batch)
            for block in self.prompted_blocks:
                means.add(block, states[block][:, backbone.num_prefix :])
        for layer, block in enumerate(self.prompted_blocks):
            attn: Any = backbone.blocks[block].attn
            whitening = _whitening(attn, means[block])
            rank = self.right[layer].shape[0]
            columns = torch.rand(whitening.shape, generator=generator).argsort(1)[:, :rank]
            self.right[layer].copy_(whitening.gather(1, columns).T)

    def tokens(self, block: int, x: Tensor, last: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return a block's prompts, [1, p, width], or [B, p, width] while dropout is active."""
        layer = block - self.first_block
        prompts = (self.left[layer] @ self.right[layer]).unsqueeze(0)
        return drop(self.dropout, prompts, x.shape[0])


def _draw_right(right: Tensor) -> None:
    """Draw [..., rank, width] in place by Xavier's rule for each matrix."""
    bound = math.sqrt(6 / sum(right.shape[-2:]))
    right.uniform_(-bound, bound)


def _whitening(attn: Any, patches: Tensor) -> Tensor:
    """Return the whitening matrix [d, d] of W_q W_k^T X^T, of an attention and mean patches X [n, d]."""
    query, key = attn.qkv.weight[: 2 * attn.attn_dim].cpu().double().chunk(2)  # [out, in] in PyTorch
    product = query.T @ key @ patches.T  # M [d, n]
    # M = U s V^T gives S = U (s^2 / d) U^T, so S^(-1/2) = sqrt(d) U s^-1 U^T: S itself is not needed
    left, s, _ = torch.linalg.svd(product, full_matrices=False)
    spanned = s > s.max() * max(product.shape) * torch.finfo(torch.float32).eps
    left, s = left[:, spanned], s[spanned]
    return math.sqrt(len(product)) * (left / s) @ left.T
