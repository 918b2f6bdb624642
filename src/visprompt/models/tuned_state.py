"""Read and write the tuned-state file: safetensors with checked metadata. Nothing else reads or writes it.

All metadata are one string under one key, because safetensors writes several keys in random order. The string
is a SHA-256 (64 hexadecimal digits) over the metadata and every tensor's name, dtype, shape and bytes, then
the metadata as JSON. The checksum detects damage and is not a signature, so `state_schema` checks a file
before anything is built from it. The class names are one string that begins with their separator, such as
"|cat|dog": as a JSON list, with quotes escaped twice, they would take ten more bytes each.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from visprompt.data.transforms import in_present_words
from visprompt.errors import UserError
from visprompt.files import write_atomically
from visprompt.models.kind import SINGLE_LABEL
from visprompt.models.tensors import hash_tensors

SCHEMA = 1
_KEY = "visprompt"
_DIGITS = 64  # length of a SHA-256 in hexadecimal
_MEND = "do not use this file, get it again from whoever tuned it"
_SHAPING = ("image_size", "global_pool", "kwargs")


@dataclass(frozen=True, kw_only=True)
class TunedState:
    """Everything that one task adds to a frozen backbone.

    Attributes:
        tensors: The tuned tensors by name.
        method: The method's name and options.
        task: Task id.
        class_names: Names of the classes, in the order of the head's rows.
        preprocessing: How images become the backbone's input.
        backbone: The backbone's id, weights' hash and options.
        versions: Versions of the libraries that wrote it.
        kind: The kind of the task's labels, a name of `models.kind.KINDS`.
        head: The head of a dense kind, one of `recipe.HEADS`.
        temperature: What logits are divided by before they become probabilities; None, as in states of
            earlier versions, for logits as they are.
    """

    tensors: Mapping[str, Tensor]
    method: Mapping[str, Any]
    task: str
    class_names: tuple[str, ...]
    preprocessing: Mapping[str, Any]
    backbone: Mapping[str, Any]
    versions: Mapping[str, str]
    kind: str = SINGLE_LABEL.name
    head: str = "linear"
    temperature: float | None = None


def save_state(path: Path, state: TunedState) -> str:
    """Write a tuned state atomically.

    Args:
        path: The file, usually `tuned.safetensors`.
        state: The tuned state.

    Returns:
        The checksum that the file holds.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    meta = {f.name: getattr(state, f.name) for f in fields(state) if f.name != "tensors"}
    meta |= {"schema": SCHEMA, "class_names": _join(state.class_names)}
    if state.kind == SINGLE_LABEL.name:
        del meta["kind"]  # as in states of earlier versions
    if state.head == "linear":
        del meta["head"]
    if state.temperature is None:  # so that the file is that of an earlier version
        del meta["temperature"]
    # a folder's name may have bytes that are not Unicode; Python escapes them as JSON does
    text = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode(errors="backslashreplace").decode()
    checksum = hash_tensors(tensors, also=text)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={_KEY: checksum + text}))
    return checksum


def _join(names: Sequence[str]) -> str:
    """Join class names into one string that begins with their separator, a character in none of them."""
    used = set("".join(names))
    separator = next(c for c in map(chr, range(0x7F, 0xD800)) if c not in used)
    return "".join(separator + name for name in names)


def _split(joined: str) -> tuple[str, ...]:
    return tuple(joined[1:].split(joined[0])) if joined else ()


def load_state(path: Path) -> TunedState:
    """Read and verify a tuned state.

    Args:
        path: The file, or the run's folder that holds `tuned.safetensors`.

    Returns:
        The state, its tensors on the CPU.

    Raises:
        UserError: There is no such file, or it is not a tuned state, has a newer schema, is damaged, or has
            metadata or tensors that a tuned state may not have.
    """
    from visprompt.models import state_schema  # imported here: it imports timm, which reports do not need

    path = path / "tuned.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"there is no tuned state at {path}: give a finished run's folder or its tuned.safetensors"
        )
    try:
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {})[_KEY]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is not a mapping
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a readable tuned state ({error}): copy it again or rerun its task"
        ) from error
    checksum, text = stored[:_DIGITS], stored[_DIGITS:]
    if hash_tensors(tensors, also=text) != checksum:
        raise UserError(f"{path} is damaged: its checksum differs; copy it again or rerun its task")
    try:
        meta: Any = json.loads(text)
        version = meta.pop("schema")
        record = meta | {"class_names": _split(meta["class_names"])}
        if isinstance(how := meta.get("preprocessing"), dict):
            record["preprocessing"] = in_present_words(how)
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"{path} is refused: its metadata are not those of a tuned state; {_MEND}") from error
    if version != SCHEMA:
        raise UserError(
            f"{path} has schema {version!r:.60}, and this version reads {SCHEMA}: update visprompt to read it"
        )
    state_schema.check_record(record, path, _MEND)
    state_schema.check_tensors(tensors, path, _MEND)
    return TunedState(tensors=tensors, **record)


def read_checksum(path: Path, *, hashed: bool) -> str | None:
    """Read the checksum in a tuned state's header.

    Args:
        path: The file.
        hashed: Whether to read the tensors too and compare their checksum with it.

    Returns:
        The SHA-256 in hexadecimal; None if the file cannot be read or its tensors have another checksum.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {})[_KEY]
            tensors = {name: file.get_tensor(name) for name in file.keys()} if hashed else {}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
    checksum = str(stored[:_DIGITS])
    return checksum if not hashed or hash_tensors(tensors, also=stored[_DIGITS:]) == checksum else None


def check_fits(state: TunedState, path: Path, **expected: Any) -> None:
    """Refuse a state that was tuned for another backbone, method or set of classes.

    Args:
        state: The state to be loaded.
        path: The state's file, for the message.
        **expected: Any of backbone (its record), method (a mapping) and class_names. Each must equal the
            state's; of the backbone only what decides its features is compared.

    Raises:
        UserError: The message says what differs.
    """
    for key, value in expected.items():
        stored = getattr(state, key)
        if key == "backbone" and stored["sha256"] != value["sha256"]:
            raise UserError(
                f"{path} was tuned on backbone {stored['name']} (weights {stored['sha256'][:12]}), "
                f"not on {value['name']} (weights {value['sha256'][:12]}): load that backbone, "
                "with weights=FILE if it came from a file"
            )
        # the same weights give other features in another architecture or with other options
        if key == "backbone":
            architecture, other = (record["name"].partition(".")[0] for record in (stored, value))
            if architecture != other:
                raise UserError(
                    f"{path} was tuned on architecture {architecture}, not on {other}: load that backbone"
                )
        for option in _SHAPING if key == "backbone" else ():
            if stored.get(option) != value.get(option):
                raise UserError(
                    f"{path} was tuned with backbone.{option}={stored.get(option)}, not "
                    f"{value.get(option)}: set it to {stored.get(option)}"
                )
        if key == "method" and dict(stored) != dict(value):
            raise UserError(f"{path} holds method {dict(stored)}, not {dict(value)}: build that method")
        if key == "class_names" and len(stored) != len(value):
            raise UserError(
                f"{path} has {len(stored)} classes, not {len(value)}: use data of the same classes"
            )
        if key == "class_names" and tuple(stored) != tuple(value):
            old, new = next(pair for pair in zip(stored, value, strict=True) if pair[0] != pair[1])
            raise UserError(
                f"{path} has class {old!r} where this data has {new!r}: use the state's classes in its order"
            )
