"""Hash tensors, find tensors with NaN or infinity, and leave autocast."""

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def hash_tensors(tensors: Mapping[str, Tensor], also: str = "") -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of tensors, in the order of their names.

    Args:
        tensors: Tensors by name.
        also: A text that is hashed first.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(also.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the first tensor that holds NaN or infinity; "" if there is no such tensor."""
    floating = (name for name in sorted(tensors) if tensors[name].is_floating_point())
    return next((name for name in floating if not tensors[name].isfinite().all()), "")


def in_full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast on a device; entering autocast's own takes time in every step."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def wide(logits: Tensor) -> Tensor:
    """Return logits in float32, or as they are in float64."""
    return logits if logits.dtype == torch.float64 else logits.float()
