"""Read and write resume states without pickle: a safetensors file with all other data in its metadata."""

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

OWNER_KEY = "ResumeCheckpoint"  # the key of this callback's state in Lightning's checkpoint
_KEY = "visprompt.resume"
_DIGITS = 64  # hexadecimal digits of a SHA-256


@dataclass(frozen=True)
class Owner:
    """The attempt of a run that a resume state belongs to.

    Attributes:
        run: sha256 (hex) of the run's identity; the folder's name is its first 12 digits.
        seed: Seed of the run, for messages.
        attempt: 0, plus 1 for each `rerun=true` that was completed before.
    """

    run: str
    seed: int
    attempt: int


def owner_of(path: Path) -> Owner | None:
    """Read the owner of a resume state from the file's header; return None if it cannot be read."""
    progress = progress_of(path)
    return progress and progress[0]


def progress_of(path: Path) -> tuple[Owner, int] | None:
    """Read a resume state's owner and number of optimiser steps from the file's header.

    Returns:
        Both, or None if they cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})[_KEY][_DIGITS:]
        checkpoint = _unpack(json.loads(text), defaultdict(lambda: torch.empty(0)))
        return Owner(**checkpoint["callbacks"][OWNER_KEY]["owner"]), int(checkpoint.get("global_step", 0))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Snapshot:
    """A copy of a checkpoint, which later changes of the model do not reach.

    Attributes:
        tensors: Copies of its tensors on the CPU, by number.
        text: All else, as JSON.
    """

    tensors: dict[str, torch.Tensor]
    text: str

    def write(self, path: Path) -> None:
        """Write the checkpoint atomically."""
        meta = {_KEY: hash_tensors(self.tensors, also=self.text) + self.text}
        write_atomically(path, lambda temporary: save_file(self.tensors, temporary, metadata=meta))


def snapshot(checkpoint: dict[str, Any]) -> Snapshot:
    """Copy a checkpoint of tensors and plain data.

    Raises:
        TypeError: The checkpoint holds something that is neither a tensor nor plain data.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_pack(checkpoint, tensors))
    return Snapshot(tensors or {"": torch.empty(0)}, text)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint with its tensors on the CPU.

    Raises:
        UserError: The file cannot be read or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            stored = (file.metadata() or {})[_KEY]
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a readable resume state: delete it to start over") from error
    checksum, text = stored[:_DIGITS], stored[_DIGITS:]
    if hash_tensors(tensors, also=text) != checksum:
        raise UserError(f"{path} is damaged, its checksum differs: delete it to start over")
    checkpoint: dict[str, Any] = _unpack(json.loads(text), tensors)
    return checkpoint


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Convert a value to JSON; `_unpack` restores it with the same types.

    Args:
        value: A tensor, or plain data with tensors in it: `{1: (tensor,)}` becomes
            `{"dict": [[1, {"tuple": [{"tensor": "0"}]}]]}`.
        tensors: Gets a copy of each tensor, by the number in its reference.
    """
    if isinstance(value, torch.Tensor):
        # a copy, because safetensors refuses tensors that share memory or are not contiguous
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
    """Restore what `_pack` converted."""
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((form, content),) = value.items()
    if form == "tensor":
        return tensors[content]
    if form == "tuple":
        return tuple(_unpack(v, tensors) for v in content)
    return {_unpack(k, tensors): _unpack(v, tensors) for k, v in content}
