"""VIPAMIN's first prompts: patches near random prompts, and directions that attention lacks.

Park and Chung, VIPAMIN: Visual Prompt Initialization via Embedding Selection and Subspace Expansion,
NeurIPS 2025 (arXiv 2510.16446). VPT starts as P = (1 - lambda) * matched + lambda * orthogonal.

Matched: prompts drawn as VPT's enter the frozen backbone. In each prompted block the keys of prompts and
patches, means over heads and images, are compared by cosine; each prompt becomes the mean of its K nearest
patches, as tokens before the block (means over images).
Orthogonal: O [n, d] are the attention outputs of all image tokens of the bare backbone before the output
projection, means over images, and Q [d, n] is an orthonormal basis of their span. Random prompts r, drawn
as VPT's, get their values v = r W_V^T + b, lose what lies in the span, v' = v - v Q Q^T, and are mapped
back, (v' - b) pinv(W_V^T).

Different from the released code:
- It maps back by pinv(W_V), although v - b = p W_V^T is undone by pinv(W_V^T), which is pinv(W_V)^T. The
  two agree where W_V is symmetric; elsewhere the values of the code's prompts lie in the span as others do.
  Here they lie outside it, exactly so where W_V has full rank (its singular values are cut as in the code,
  relative to the precision of float32).
- Its means are over one shuffled batch of 256 training images. Here they are over up to `inits.MAX_IMAGES`,
  added batch by batch, so that the size of the batches does not matter.
- Its script for shallow prompts leaves the model in training mode.
As in the code, random prompts pass no norm before W_V, though a block's tokens do. The code has 100 prompts
(deep: 20) and chooses K of 2, 8, 32, 128 and lambda of 0 and 0.5 (with K = 2 also 1) by validation. It
knows plain ViTs alone, and so does this: in windows (Swin) a prompt has other neighbours in every window,
and rotary positions (EVA) turn the keys of patches but not those of prompts.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.models.contract import Geometry, Method, TokenBackbone, split_heads
from visprompt.models.methods.inits import Means, check_plain_attentions
from visprompt.models.methods.locations import vpt_bound

MATCHED_PATCHES, ORTHOGONAL_SHARE = 8, 0.5  # points of the grid that the released code chooses from


def check_options(init: str, matched_patches: int, orthogonal_share: float) -> None:
    """Refuse numbers that are out of range, and such that say nothing because `init` is another.

    Raises:
        UserError: It says what to give.
    """
    if matched_patches < 1:
        raise UserError(f"method.matched_patches={matched_patches} is too small: give at least 1")
    if not 0 <= orthogonal_share <= 1:
        raise UserError(
            f"method.orthogonal_share={orthogonal_share} is not a share: give a number from 0 to 1"
        )
    if init == "vipamin":
        return
    given = {
        "matched_patches": (matched_patches, MATCHED_PATCHES),
        "orthogonal_share": (orthogonal_share, ORTHOGONAL_SHARE),
    }
    for option, (value, default) in given.items():
        if value != default:
            raise UserError(
                f"method.{option}={value} is for method.init=vipamin, and says nothing with "
                f"method.init={init}: give method.init=vipamin, or method.{option}={default}"
            )


def check(backbone: Geometry, blocks: Sequence[int], matched_patches: int) -> None:
    """Refuse a backbone that this cannot be computed on.

    Raises:
        UserError: A prompted block is not a plain one, or has fewer patches than are to be matched.
    """
    check_plain_attentions(backbone, blocks, "method.init=vipamin")
    if not backbone.any_size:
        _check_count(matched_patches, math.prod(backbone.grids[blocks[0]]))


@torch.no_grad()
def prompts(
    backbone: TokenBackbone,
    blocks: Sequence[int],
    drawn: Sequence[Tensor],
    images: Iterable[Tensor],
    matched_patches: int,
    orthogonal_share: float,
    seed: int,
) -> list[Tensor]:
    """First prompts of each prompted block.

    Args:
        backbone: A plain ViT, in evaluation mode.
        blocks: Those with prompts, in a row.
        drawn: The random prompts of each, [p, width], that are matched.
        images: Batches of normalised training images [B, 3, H, W].
        matched_patches: Patches that each prompt is matched with (K).
        orthogonal_share: Share of the orthogonal part (lambda), 0 to 1; a part without a share is not
            computed.
        seed: Decides the random prompts of the orthogonal part.

    Returns:
        [p, width] of each block.

    Raises:
        UserError: There are fewer patches than K, or the attention outputs span the whole width.
    """
    like, nobody, means = next(backbone.model.parameters()), Method(backbone), Means()
    for batch in images:
        x = backbone.embed(batch.to(like.device, like.dtype), nobody)
        if orthogonal_share < 1:
            _read_keys(backbone, blocks, drawn, x, means)
        if orthogonal_share > 0:
            _read_outputs(backbone, blocks, x, means)
    generator = torch.Generator().manual_seed(seed)
    bound = vpt_bound(backbone.patch_size, backbone.widths[0])
    made = []
    for block, own in zip(blocks, drawn, strict=True):
        values = torch.zeros(own.shape, dtype=torch.float64)
        if orthogonal_share < 1:
            nearest = _nearest(means["prompt keys", block], means["patch keys", block], matched_patches)
            values += (1 - orthogonal_share) * means["patches", block][nearest].mean(1)
        if orthogonal_share > 0:
            random = torch.empty(own.shape).uniform_(-bound, bound, generator=generator).double()
            values += orthogonal_share * _orthogonal(backbone, block, means["outputs", block], random)
        made.append(values)
    return made


def _read_keys(
    backbone: TokenBackbone, blocks: Sequence[int], drawn: Sequence[Tensor], x: Tensor, means: Means
) -> None:
    """Add keys, means over heads, and patches before each prompted block, to which random prompts go."""
    num_image = x.shape[1]
    patches = slice(backbone.num_prefix, num_image)
    for index in range(blocks[-1] + 1):
        if index not in blocks:
            x = backbone.carry(index, x, num_image)
            continue
        own = drawn[index - blocks[0]].to(x.dtype).expand(len(x), -1, -1)
        means.add(("patches", index), x[:, patches])
        x = torch.cat([x, own], dim=1)
        block: Any = backbone.blocks[index]
        _, k, _ = split_heads(block.attn, block.attn.qkv(block.norm1(x)))
        keys = block.attn.k_norm(k).float().mean(1)
        means.add(("patch keys", index), keys[:, patches])
        means.add(("prompt keys", index), keys[:, num_image:])
        x = backbone.carry(index, x, num_image)[:, :num_image]


def _read_outputs(backbone: TokenBackbone, blocks: Sequence[int], x: Tensor, means: Means) -> None:
    """Add the attention outputs of all image tokens before the output projection, without prompts."""
    for index in range(blocks[-1] + 1):
        if index in blocks:
            block: Any = backbone.blocks[index]
            attn = block.attn
            q, k, v = split_heads(attn, attn.qkv(block.norm1(x)))
            out = F.scaled_dot_product_attention(
                attn.q_norm(q).to(v), attn.k_norm(k).to(v), v, scale=attn.scale
            )
            means.add(("outputs", index), out.transpose(1, 2).flatten(2))
        x = backbone.carry(index, x, x.shape[1])


def _nearest(of_prompts: Tensor, of_patches: Tensor, matched_patches: int) -> Tensor:
    """Return the patches [p, K] whose keys [n, head_dim] are nearest by cosine to those of prompts [p, head_dim]."""
    _check_count(matched_patches, len(of_patches))
    cosines = F.normalize(of_prompts, dim=-1) @ F.normalize(of_patches, dim=-1).T
    return cosines.topk(matched_patches, dim=1).indices


def _orthogonal(backbone: TokenBackbone, index: int, outputs: Tensor, random: Tensor) -> Tensor:
    """Return prompts [p, width] whose values lie outside the span of outputs [n, d]; made of random ones."""
    attn: Any = backbone.blocks[index].attn
    tokens, width = outputs.shape
    if tokens >= width:
        raise UserError(
            f"method.init=vipamin finds no direction outside the attention outputs of block {index}, whose "
            f"{tokens} tokens span all {width}: give method.orthogonal_share=0, or a wider backbone"
        )
    # rows [-d:] of the joint projection are those of the values
    weight = attn.qkv.weight[-width:].cpu().double()
    bias = 0.0 if attn.qkv.bias is None else attn.qkv.bias[-width:].cpu().double()
    basis = torch.linalg.qr(outputs.T).Q
    values = random @ weight.T + bias
    values = values - values @ basis @ basis.T
    smallest = max(weight.shape) * torch.finfo(torch.float32).eps
    return (values - bias) @ torch.linalg.pinv(weight, rtol=smallest).T


def _check_count(matched_patches: int, patches: int) -> None:
    if matched_patches > patches:
        raise UserError(
            f"method.matched_patches={matched_patches} is more than the {patches} patches of an image: give "
            "at most that many"
        )
