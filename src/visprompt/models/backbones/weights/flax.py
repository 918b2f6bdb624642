"""Read Google's `.npz` files of vision transformers (JAX, Flax) as tensors under timm's names.

Two layouts are read: that of Dosovitskiy et al.'s release (`orig_in21k`, `augreg`), and that of its successor
big_vision, which numbers layers differently and may stack the layers of all blocks. Flax stores a linear
layer as [in, out], and the projections of an attention by head: query, key and value as [in, heads,
head_dim], the output as [heads, head_dim, out].

timm's reader (`load_pretrained`) is not used: it resizes position tables and patch embeddings without the
antialiasing of timm's filter for all other files, writes into the model before it knows that the file fits,
broadcasts arrays of a wrong shape, ignores stacked blocks beyond the model's depth, and stops at the first
name that is missing.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_PREFIXES = ("", "opt/target/", "params/", "params/img/")
_WHOLE = {
    "cls": "cls_token",
    "pos_embedding": "pos_embed",
    "Transformer/posembed_input/pos_embedding": "pos_embed",
    "MAPHead_0/probe": "attn_pool.latent",
}
_BLOCK = r"Transformer/encoderblock_(\d+)/"
_LAYERS = (
    (r"embedding", r"patch_embed.proj"),
    (r"Transformer/encoder_norm", r"norm"),
    (_BLOCK + r"LayerNorm_0", r"blocks.\1.norm1"),
    (_BLOCK + r"LayerNorm_[12]", r"blocks.\1.norm2"),
    (_BLOCK + r"MultiHeadDotProductAttention_[01]/(query|key|value)", r"blocks.\1.attn.\2"),
    (_BLOCK + r"MultiHeadDotProductAttention_[01]/out", r"blocks.\1.attn.proj"),
    (_BLOCK + r"MlpBlock_[03]/Dense_0", r"blocks.\1.mlp.fc1"),
    (_BLOCK + r"MlpBlock_[03]/Dense_1", r"blocks.\1.mlp.fc2"),
    (r"MAPHead_0/LayerNorm_0", r"attn_pool.norm"),
    (r"MAPHead_0/MultiHeadDotProductAttention_0/query", r"attn_pool.q"),
    (r"MAPHead_0/MultiHeadDotProductAttention_0/(key|value)", r"attn_pool.\1"),
    (r"MAPHead_0/MultiHeadDotProductAttention_0/out", r"attn_pool.proj"),
    (r"MAPHead_0/MlpBlock_0/Dense_0", r"attn_pool.mlp.fc1"),
    (r"MAPHead_0/MlpBlock_0/Dense_1", r"attn_pool.mlp.fc2"),
)
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_JOINT = {
    "attn.qkv.": ("attn.query.", "attn.key.", "attn.value."),
    "attn_pool.kv.": ("attn_pool.key.", "attn_pool.value."),
}


def read_npz(file: Path) -> dict[str, Tensor]:
    """Read a file of weights.

    Args:
        file: The `.npz`; pickled objects in it are refused.

    Returns:
        Its tensors under timm's names; those that a plain vision transformer does not have keep their names.

    Raises:
        ValueError: The file does not hold a vision transformer, or holds pickled objects.
        OSError: The file cannot be read.
    """
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    prefix = next((prefix for prefix in _PREFIXES if f"{prefix}embedding/kernel" in arrays), None)
    if prefix is None:
        raise ValueError(
            f"it holds {', '.join(sorted(arrays)[:3]) or 'nothing'}, but no embedding/kernel of a ViT"
        )
    model = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return _joined(dict(_renamed(name, array) for name, array in _unstacked(model)))


def _unstacked(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield names and arrays; split an array that big_vision stacked over all blocks into one per block."""
    for name, array in arrays.items():
        if "/encoderblock/" not in name:
            yield name, array
            continue
        for i, part in enumerate(array):
            yield name.replace("/encoderblock/", f"/encoderblock_{i}/"), part


def _renamed(name: str, array: np.ndarray) -> tuple[str, Tensor]:
    """Return an array's name in timm, and its tensor in PyTorch's layout."""
    tensor = torch.from_numpy(array)
    if name in _WHOLE:
        return _WHOLE[name], tensor
    layer, _, leaf = name.rpartition("/")
    for pattern, target in _LAYERS:
        if leaf in _LEAVES and (match := re.fullmatch(pattern, layer)):
            return f"{match.expand(target)}.{_LEAVES[leaf]}", _laid_out(layer, leaf, tensor)
    return name.replace("/", "."), tensor


def _laid_out(layer: str, leaf: str, tensor: Tensor) -> Tensor:
    if leaf != "kernel":
        return tensor.flatten()
    if tensor.ndim == 4:  # a convolution, [height, width, in, out]
        return tensor.permute(3, 2, 0, 1).contiguous()
    flat = tensor.flatten(0, 1) if layer.endswith("/out") else tensor.flatten(1)
    return flat.T.contiguous()


def _joined(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the projections of each attention as timm does, unless one of them is missing."""
    for joint, (first, *others) in _JOINT.items():
        for name in [name for name in tensors if first in name]:
            names = [name, *(name.replace(first, other) for other in others)]
            if all(part in tensors for part in names):
                tensors[name.replace(first, joint)] = torch.cat([tensors.pop(part) for part in names])
    return tensors
