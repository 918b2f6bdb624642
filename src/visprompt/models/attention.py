"""The attention weights of the pooled tokens in the last block of a ViT, recorded during a forward pass.

The queries and keys are those that the block passes to `scaled_dot_product_attention`, including prompts,
added keys, query-key norms and rotary embeddings. Called with the identity matrix I instead of the values,
the same function returns the weights:

    softmax(q k^T * scale) I = softmax(q k^T * scale)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from visprompt.errors import UserError
from visprompt.models.backbones.family import side_of
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.mixed import Mixed, features_of
from visprompt.models.prepared import Prepared
from visprompt.models.sharing import Batch

Call = tuple[Sequence[Any], Mapping[str, Any]]  # positional and named arguments


@dataclass(frozen=True)
class Weights:
    """Attention weights of a batch; the weights of an image and a head sum to 1 over all tokens.

    Attributes:
        asking: The query in words: the class token, or the pooled tokens whose weights were averaged.
        block: Index of the block.
        prefix: To class and register tokens, [B, heads, prefix].
        patches: To patches, [B, heads, height, width] of their grid.
        prompts: To prompt tokens of the sequence, [B, heads, p]; p is 0 if the block has no prompts.
        keys_values: To rows that a method added to the keys and values, [B, heads, t]; t is 0 if it added
            no rows.
        logits: The classifier's logits of the images, [B, C].
    """

    asking: str
    block: int
    prefix: Tensor
    patches: Tensor
    prompts: Tensor
    keys_values: Tensor
    logits: Tensor


@torch.no_grad()
def last_attention(classifier: Classifier, images: Tensor) -> Weights:
    """Return the class token's weights in the last block, or the mean over the pooled tokens if others are.

    Args:
        classifier: On a plain ViT or an EVA, in evaluation mode.
        images: Normalised images [B, 3, H, W].

    Raises:
        UserError: The backbone is neither a plain ViT nor an EVA, its attention is not the fused one, or the
            task is dense.
    """
    if classifier.kind.dense:
        raise UserError(
            "a segmentation task pools no token whose attention could be shown: look at its mask instead"
        )
    family, method = _vit(classifier.backbone), classifier.method
    added = method.keys_values(family.num_blocks - 1)
    return _attention(
        family,
        lambda: classifier(images),
        pool=method.pool,
        num_image=family.embed(images, method).shape[1],
        num_rows=0 if added is None else added[0].shape[-2],
    )


@torch.no_grad()
def task_attention(backbone: nn.Module, images: Tensor, prepared: Prepared, batch: Batch) -> Weights:
    """Return the same of a prepared task that shares the passes of a backbone; see `features_of`.

    Args:
        backbone: A plain ViT or an EVA that is not compiled.
        images: Normalised images [B, 3, H, W].
        prepared: The task.
        batch: Read by the backbone's `PerTaskLayer`s, if it has any.

    Raises:
        UserError: The backbone is neither a plain ViT nor an EVA, or its attention is not the fused one.
    """
    family, rows = _vit(backbone), prepared.rows[-1]
    parts = [((0, len(images)), prepared)]
    assert prepared.head is not None
    head = prepared.head
    return _attention(
        family,
        lambda: head(features_of(family, images, parts, batch)),
        pool=prepared.pool,
        num_image=family.embed(images, Mixed(family, parts)).shape[1],
        num_rows=0 if rows is None else len(rows),
    )


def _attention(
    family: ViT, logits: Callable[[], Tensor], *, pool: str | None, num_image: int, num_rows: int
) -> Weights:
    """Return the weights of the pooled tokens in the last block while logits are computed in one pass.

    Args:
        family: The backbone.
        logits: Computes logits [B, C].
        pool: Which outputs of the last block are pooled, see `Method.pool`.
        num_image: Number of image tokens, class and register tokens included.
        num_rows: Number of keys and values that are added in the last block.
    """
    with _recording(family.blocks[-1]) as calls:
        computed = logits()
    weights = _weights(calls[0])
    num_tokens = weights.shape[-1] - num_rows
    start, stop, _ = family.pooled_rows(num_image, pool)[0].indices(num_tokens)
    # only the pooled tokens are queries: their keys come first, then those of the others
    if weights.shape[-2] == stop - start:
        order = [
            *range(start, stop),
            *range(start),
            *range(stop, num_tokens),
            *range(num_tokens, weights.shape[-1]),
        ]
        weights = weights[..., torch.tensor(order).argsort()]
    else:
        weights = weights[..., start:stop, :]
    prefix, grid = family.num_prefix, side_of(num_image - family.num_prefix, family.grids[-1])
    parts = (prefix, num_image - prefix, num_tokens - num_image, weights.shape[-1] - num_tokens)
    of_prefix, of_patches, of_prompts, of_rows = weights.mean(-2).split(parts, dim=-1)
    alone = family.has_class_token and (start, stop) == (0, 1)
    return Weights(
        asking="the class token" if alone else f"the mean over the {stop - start} tokens that are pooled",
        block=family.num_blocks - 1,
        prefix=of_prefix,
        patches=of_patches.unflatten(-1, grid),
        prompts=of_prompts,
        keys_values=of_rows,
        logits=computed,
    )


def _vit(backbone: nn.Module) -> ViT:
    """Return a backbone as a plain ViT or an EVA, or refuse it."""
    if not isinstance(backbone, ViT):
        name = type(getattr(backbone, "model", backbone)).__name__
        raise UserError(
            "attention maps need a class token or pooled tokens that see the whole image, as in a plain ViT "
            f"or an EVA, and this backbone is a {name}: choose a run on one of those"
        )
    return backbone


class _Latest(TorchFunctionMode):
    """Keeps the arguments of the latest call of `scaled_dot_product_attention`, whoever makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.call: Call = ((), {})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.call = (args, kwargs or {})
        return func(*args, **(kwargs or {}))


@contextmanager
def _recording(block: nn.Module) -> Iterator[list[Call]]:
    """Collect the arguments of each attention whose output the block's `proj` gets; the block's own is first.

    Raises:
        UserError: The block has another kind of attention.
    """
    attn: Any = getattr(block, "attn", None)
    if not isinstance(getattr(attn, "proj", None), nn.Module) or not getattr(attn, "fused_attn", False):
        raise UserError(
            f"attention maps cannot be read off a {type(block).__name__} whose attention is not PyTorch's "
            "fused one: unset TIMM_FUSED_ATTN, or choose a run on another backbone"
        )
    calls: list[Call] = []
    with _Latest() as latest:
        hook = attn.proj.register_forward_pre_hook(lambda *_: calls.append(latest.call))
        try:
            yield calls
        finally:
            hook.remove()


def _weights(call: Call) -> Tensor:
    """Return the weights [B, heads, queries, keys] of an attention, computed in float32."""
    (query, key, *_), options = call
    one_hot = torch.eye(key.shape[-2], device=key.device, dtype=torch.float32).expand(*key.shape[:-2], -1, -1)
    with torch.autocast(key.device.type, enabled=False):
        return F.scaled_dot_product_attention(query.float(), key.float(), one_hot, **options)
