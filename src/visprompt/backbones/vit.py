"""Plain vision transformers of timm, re-driven block by block so that prompts can enter.

Never compute what the loss cannot see. A block's output is read only for some of its tokens: where the next block
drops or replaces the prompts, their outputs are not read; where the pooling takes the class token, the last block's
outputs of all other tokens are not read. Tokens that are not read serve as keys and values only: K = LN(P) W_k + b_k,
V = LN(P) W_v + b_v. Their queries, attention, projection and MLP are left out, with the same logits and gradients.
Prompts that all images share ([1, p, width]) give their keys and values once per step, not once per image.

This holds for the block classes in `is_proven`, tested against timm's own forward. Other blocks carry the tokens.
"""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from timm.layers import Attention, GluMlp, LayerNorm, Mlp, RmsNorm, SwiGLU, global_pool_nlc
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.methods.base import Flow, Method

_TOKENWISE_NORMS = (nn.LayerNorm, LayerNorm, RmsNorm)
_TOKENWISE_MLPS = (Mlp, GluMlp, SwiGLU)


def is_proven(block: nn.Module) -> bool:
    """Whether `read_block` computes exactly what this block computes.

    Exact classes, not subclasses: a subclass may have changed its forward. Everything outside the attention must work
    token by token.
    """
    return (
        type(block) is Block
        and type(block.attn) is Attention
        and type(block.norm1) in _TOKENWISE_NORMS
        and type(block.norm2) in _TOKENWISE_NORMS
        and type(block.mlp) in _TOKENWISE_MLPS
        and (block.attn.attn_drop.p == 0 or not block.attn.training)
    )


def read_block(block: Block, read: Tensor, context: Sequence[Tensor]) -> Tensor:
    """Outputs of a block for some of its tokens; the others give keys and values only.

    Args:
        block: A block for which `is_proven` holds.
        read: Tokens whose outputs are read, [B, n, width].
        context: The other tokens of the sequence, in any number of parts [B or 1, m, width].

    Returns:
        The block's outputs for `read`, [B, n, width], equal to those of `block(cat([read, *context]))[:, :n]`.
    """
    attn = cast(Attention, block.attn)
    normed = block.norm1(read)
    q, k, v = _heads(attn, normed, attn.qkv.weight, attn.qkv.bias)
    # rows [width:] of the joint projection are those of the keys and the values
    weight = attn.qkv.weight[attn.attn_dim :]
    bias = None if attn.qkv.bias is None else attn.qkv.bias[attn.attn_dim :]
    keys, values = [attn.k_norm(k)], [v]
    for part in context:
        part_k, part_v = _heads(attn, block.norm1(part), weight, bias)
        keys.append(attn.k_norm(part_k).expand(len(read), -1, -1, -1))
        values.append(part_v.expand(len(read), -1, -1, -1))
    out = F.scaled_dot_product_attention(attn.q_norm(q), torch.cat(keys, 2), torch.cat(values, 2), scale=attn.scale)
    out = attn.norm(out.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        out = out * attn.gate(normed).sigmoid()
    out = attn.proj_drop(attn.proj(out))
    read = read + block.drop_path1(block.ls1(out))
    return read + block.drop_path2(block.ls2(block.mlp(block.norm2(read))))


def _heads(attn: Attention, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Projects tokens [B, n, width] and splits them into parts of [B, heads, n, head_dim]."""
    projected = F.linear(x, weight, bias).unflatten(-1, (-1, attn.num_heads, attn.head_dim))
    return projected.permute(2, 0, 3, 1, 4).unbind(0)


class ViT(nn.Module):
    """A timm `VisionTransformer` without its head.

    Args:
        model: Any `VisionTransformer`: class token or not, register tokens, any pooling, dynamic image size.
        exact: False carries the prompt tokens through every block, as the papers' codes do; for comparison.

    Raises:
        UserError: The model is of another class, or pools nothing.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"tokens", "weights"})

    def __init__(self, model: nn.Module, exact: bool = True) -> None:
        super().__init__()
        # exact class: a subclass may embed or pool in another way (timm's distilled one has two class tokens)
        if type(model) is not VisionTransformer:
            raise UserError(f"backbone class {type(model).__name__} is not a plain timm VisionTransformer: choose one")
        if model.attn_pool is None and not model.global_pool:
            raise UserError("the backbone pools nothing: set backbone.global_pool to token, avg, avgmax or max")
        model.reset_classifier(0)
        self.model = model
        self.exact = exact
        self.width: int = model.num_features
        self.num_blocks = len(model.blocks)
        self.patch_size: int = model.patch_embed.patch_size[0]

    def carried_blocks(self) -> list[int]:
        """Indices of the blocks that carry prompt tokens in full because their class is not proven."""
        return [i for i, block in enumerate(self.model.blocks) if not (self.exact and is_proven(block))]

    def forward(self, images: Tensor, method: Method) -> Tensor:
        """Pooled features of a batch.

        Args:
            images: Normalised images [B, 3, H, W].
            method: Lets tokens enter before blocks, as its `token_flow` says.

        Returns:
            Features [B, width] as the model's own head would get them.
        """
        model, flow = self.model, method.token_flow()
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        num_image = x.shape[1]  # class and register tokens included; prompts stand behind these
        pooled = self._pooled_rows(num_image)
        for i, block in enumerate(model.blocks):
            if flow[i] is not Flow.KEEP:
                x = x[:, :num_image]
            entering = method.tokens(i, len(x)) if flow[i] is Flow.ENTER else None
            if i + 1 == self.num_blocks:
                rows = pooled
            elif flow[i + 1] is Flow.KEEP:
                rows = slice(None)
            else:
                rows = slice(0, num_image)
            x = self._run_block(cast(Block, block), x, entering, rows)
        return self._pool(model.norm(x))

    def _run_block(self, block: Block, x: Tensor, entering: Tensor | None, rows: slice) -> Tensor:
        """Runs one block on the tokens x [B, n, width] and those entering; returns the outputs of `rows`."""
        start, stop, _ = rows.indices(x.shape[1])
        all_read = rows == slice(None) or (entering is None and (start, stop) == (0, x.shape[1]))
        if self.exact and not all_read and is_proven(block):
            parts = [x[:, :start], x[:, stop:], *([] if entering is None else [entering])]
            return read_block(block, x[:, start:stop], [part for part in parts if part.shape[1]])
        if entering is not None:
            x = torch.cat([x, entering.expand(len(x), -1, -1)], dim=1)
        return block(x)[:, rows]

    def _pooled_rows(self, num_image: int) -> slice:
        """Rows of the last block's output that the pooling reads."""
        model = self.model
        if model.attn_pool is None and model.global_pool == "token":
            return slice(0, 1)
        return slice(0 if model.pool_include_prefix else model.num_prefix_tokens, num_image)

    def _pool(self, x: Tensor) -> Tensor:
        """Pools the rows chosen by `_pooled_rows` and applies what timm applies before its classifier."""
        model = self.model
        if model.attn_pool is not None:
            x = model.attn_pool(x)
        else:
            x = global_pool_nlc(x, pool_type=model.global_pool, num_prefix_tokens=0)
        return model.head_drop(model.fc_norm(x))
