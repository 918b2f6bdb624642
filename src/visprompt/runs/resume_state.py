"""The file of a resume state, without pickle.

Tensors as safetensors, everything else as JSON in the same file.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from visprompt.errors import UserError
from visprompt.files import write_atomically
from visprompt.models.tensors import hash_tensors

OWNER_KEY = "ResumeCheckpoint"  # under which Lightning keeps that callback's state
_KEY = "visprompt.resume"
_DIGITS = 64  # of a SHA-256 in hexadecimal


@dataclass(frozen=True)
class Owner:
    """The attempt of a run that a resume state belongs to.

    Attributes:
        run: sha256 (hex) of the run's whole identity, of which the folder's name is the beginning.
        seed: Seed of the run; part of the identity, kept for messages.
        attempt: 0, and one more for each `rerun=true` that was completed before.
    """

    run: str
    seed: int
    attempt: int


def owner_of(path: Path) -> Owner | None:
    """Return whose resume state a file is, by its header alone; None where that cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})[_KEY][_DIGITS:]
        checkpoint = _unpack(json.loads(text), defaultdict(lambda: torch.empty(0)))
        return Owner(**checkpoint["callbacks"][OWNER_KEY]["owner"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint of tensors and plain data atomically.

    Raises:
        TypeError: It holds something that is neither a tensor nor plain data.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_pack(checkpoint, tensors))
    tensors |= {"": torch.empty(0)} if not tensors else {}
    meta = {_KEY: hash_tensors(tensors, also=text) + text}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=meta))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, its tensors on the CPU.

    Raises:
        UserError: The file is not readable, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            stored = (file.metadata() or {})[_KEY]
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a readable resume state: delete it to start over") from error
    checksum, text = stored[:_DIGITS], stored[_DIGITS:]
    if hash_tensors(tensors, also=text) != checksum:
        raise UserError(f"{path} is damaged, its checksum differs: delete it to start over")
    checkpoint: dict[str, Any] = _unpack(json.loads(text), tensors)
    return checkpoint


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Replace tensors by references, and dicts and tuples by forms that JSON gives back unchanged."""
    if isinstance(value, torch.Tensor):
        # a copy, because two entries may share memory; safetensors takes contiguous ones only
        tensors[str(len(tensors))] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, dict):
        return {"dict": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_pack(v, tensors) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"resume state holds a {type(value).__name__}, which is neither a tensor nor plain data")


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Undo `_pack`."""
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpack(v, tensors) for v in content)
    return {_unpack(k, tensors): _unpack(v, tensors) for k, v in content}
