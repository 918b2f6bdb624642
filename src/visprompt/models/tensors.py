"""Hash tensors, and find those that hold a number that is not finite."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def hash_tensors(tensors: Mapping[str, Tensor], also: str = "") -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256(also.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the first tensor that holds NaN or infinity, "" where all numbers are finite."""
    floating = (name for name in sorted(tensors) if tensors[name].is_floating_point())
    return next((name for name in floating if not tensors[name].isfinite().all()), "")
