"""VIPAMIN's initial prompts: patches near random prompts, and directions outside the attention outputs.

Park and Chung, VIPAMIN: Visual Prompt Initialization via Embedding Selection and Subspace Expansion,
NeurIPS 2025 (arXiv 2510.16446). VPT starts from P = (1 - lambda) * matched + lambda * orthogonal.

Matched: prompts drawn as VPT's enter the frozen backbone. In each prompted block the keys of prompts and
patches (means over heads and images) are compared by cosine similarity; each prompt is replaced by the mean
of its K nearest patches, taken as tokens before the block (means over images).
Orthogonal: O [n, d] are the attention outputs of all image tokens before the output projection (means over
images, backbone without prompts), and Q [d, n] is an orthonormal basis of their span. Random prompts r, drawn
as VPT's, have values v = r W_V^T + b. Their component in the span is removed, v' = v - v Q Q^T, and the
result is mapped back to a prompt, (v' - b) pinv(W_V^T).

Different from the released code:
- It maps back by pinv(W_V), although the inverse of v - b = p W_V^T is pinv(W_V^T), which is pinv(W_V)^T. The
  two are equal if W_V is symmetric; otherwise the values of its prompts are not orthogonal to the span. Here
  they are, exactly if W_V has full rank (singular values are cut off as in that code, relative to the
  precision of float32).
- Its means are over one shuffled batch of 256 training images. Here they are over up to `inits.MAX_IMAGES`,
  added batch by batch, so that the batch size does not matter.
- Its script for shallow prompts leaves the model in training mode.
As in that code, random prompts pass no norm before W_V, though a block's tokens do. That code has 100 prompts
(deep: 20) and chooses K from 2, 8, 32, 128 and lambda from 0 and 0.5 (with K = 2 also 1) by validation. It
supports plain ViTs only, and so does this one: in windows (Swin) a prompt has other neighbours in every
window, and rotary positions (EVA) rotate the keys of patches but not those of prompts.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.models.contract import Geometry, Method, TokenBackbone
from visprompt.models.layers import split_heads
from visprompt.models.methods.checks import check_least, check_plain_blocks, check_share
from visprompt.models.methods.inits import Means
from visprompt.models.methods.locations import vpt_bound

MATCHED_PATCHES, ORTHOGONAL_SHARE = 8, 0.5  # points of the grid that the released code chooses from


def check_options(init: str, matched_patches: int, orthogonal_share: float) -> None:
    """Refuse numbers that are out of range, and numbers that have no effect because `init` is not "vipamin".

    Raises:
        UserError: The message says what to give.
    """
    check_least(1, matched_patches=matched_patches)
    check_share("orthogonal_share", orthogonal_share)
    if init == "vipamin":
        return
    given = {
        "matched_patches": (matched_patches, MATCHED_PATCHES),
        "orthogonal_share": (orthogonal_share, ORTHOGONAL_SHARE),
    }
    for option, (value, default) in given.items():
        if value != default:
            raise UserError(
                f"method.{option}={value} is for method.init=vipamin, and has no effect with "
                f"method.init={init}: give method.init=vipamin, or method.{option}={default}"
            )


def check(backbone: Geometry, blocks: Sequence[int], matched_patches: int) -> None:
    """Refuse a backbone on which these prompts cannot be computed.

    Raises:
        UserError: A prompted block is not a plain one, or has fewer patches than `matched_patches`.
    """
    check_plain_blocks(backbone, blocks, "method.init=vipamin")
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
    """Compute the initial prompts of each prompted block.

    Args:
        backbone: A plain ViT, in evaluation mode.
        blocks: Indices of the blocks with prompts, consecutive.
        drawn: The random prompts of each of these blocks, [p, width], that are matched.
        images: Batches of normalised training images [B, 3, H, W].
        matched_patches: Number of patches that each prompt is matched with (K).
        orthogonal_share: Share of the orthogonal part (lambda), 0 to 1; a part whose share is 0 is not
            computed.
        seed: Seed of the random prompts of the orthogonal part.

    Returns:
        [p, width] for each block.

    Raises:
        UserError: There are fewer patches than K, or the attention outputs span the whole width.
    """
    like, no_method, means = next(backbone.model.parameters()), Method(backbone), Means()
    for batch in images:
        x = backbone.embed(batch.to(like.device, like.dtype), no_method)
        if orthogonal_share < 1:
            _read_keys(backbone, blocks, drawn, x, means)
        if orthogonal_share > 0:
            _read_outputs(backbone, blocks, x, means)
    generator = torch.Generator().manual_seed(seed)
    bound = vpt_bound(backbone.patch_size, backbone.widths[0])
    initial = []
    for block, matched in zip(blocks, drawn, strict=True):
        values = torch.zeros(matched.shape, dtype=torch.float64)
        if orthogonal_share < 1:
            nearest = _nearest(means["prompt keys", block], means["patch keys", block], matched_patches)
            values += (1 - orthogonal_share) * means["patches", block][nearest].mean(1)
        if orthogonal_share > 0:
            random = torch.empty(matched.shape).uniform_(-bound, bound, generator=generator).double()
            values += orthogonal_share * _orthogonal(backbone, block, means["outputs", block], random)
        initial.append(values)
    return initial


def _read_keys(
    backbone: TokenBackbone, blocks: Sequence[int], drawn: Sequence[Tensor], x: Tensor, means: Means
) -> None:
    """Add each prompted block's patches, and its keys of patches and random prompts, to the means."""
    num_image = x.shape[1]
    patches = slice(backbone.num_prefix, num_image)
    for index in range(blocks[-1] + 1):
        if index not in blocks:
            x = backbone.carry(index, x, num_image)
            continue
        random_prompts = drawn[index - blocks[0]].to(x.dtype).expand(x.shape[0], -1, -1)
        means.add(("patches", index), x[:, patches])
        x = torch.cat([x, random_prompts], dim=1)
        block: Any = backbone.blocks[index]
        _, k, _ = split_heads(block.attn, block.attn.qkv(block.norm1(x)))
        keys = block.attn.k_norm(k).float().mean(1)  # over heads
        means.add(("patch keys", index), keys[:, patches])
        means.add(("prompt keys", index), keys[:, num_image:])
        x = backbone.carry(index, x, num_image)[:, :num_image]


def _read_outputs(backbone: TokenBackbone, blocks: Sequence[int], x: Tensor, means: Means) -> None:
    """Add attention outputs of image tokens (before the projection, without prompts) to the means."""
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


def _nearest(prompt_keys: Tensor, patch_keys: Tensor, matched_patches: int) -> Tensor:
    """Return for each prompt the indices of the K patches with the most similar keys, [p, K].

    Args:
        prompt_keys: Keys of the prompts, [p, head_dim].
        patch_keys: Keys of the patches, [n, head_dim].
        matched_patches: K.
    """
    _check_count(matched_patches, len(patch_keys))
    cosines = F.normalize(prompt_keys, dim=-1) @ F.normalize(patch_keys, dim=-1).T
    return cosines.topk(matched_patches, dim=1).indices


def _orthogonal(backbone: TokenBackbone, index: int, outputs: Tensor, random: Tensor) -> Tensor:
    """Return random prompts [p, width], changed so that their values are orthogonal to outputs [n, d]."""
    attn: Any = backbone.blocks[index].attn
    tokens, width = outputs.shape
    if tokens >= width:
        raise UserError(
            f"method.init=vipamin finds no direction outside the attention outputs of block {index}, whose "
            f"{tokens} tokens span all {width}: give method.orthogonal_share=0, or a wider backbone"
        )
    # the last `width` rows of the joint projection are those of the values
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
