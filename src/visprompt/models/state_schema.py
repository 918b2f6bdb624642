"""Closed schemas for tuned states that come from elsewhere, checked before anything is built from them.

Only plain values of known keys are accepted. A file's checksum detects damage but is not a signature: whoever
changes the file can also write a new checksum.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from visprompt.errors import UserError
from visprompt.models.backbones import check_name
from visprompt.models.backbones.options import check_kwargs, is_number
from visprompt.models.methods import LARGEST, check_options
from visprompt.text import has_control, visible

_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool}
    | {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
)
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_:+.-]{0,79}"
_MAX_DEPTH = 3  # of nested lists: E2VPT's segment masks are [layers, tokens, segments]
_Model = TypeVar("_Model", bound=BaseModel)


def _printable(text: Any) -> Any:
    if not isinstance(text, str):
        raise ValueError("should be a text")
    if has_control(text):
        raise ValueError("should not have control characters")
    return text


def _plain_text(text: Any) -> Any:
    if "${" in _printable(text):
        raise ValueError("should be a plain text: ${...} is not resolved in a file from elsewhere")
    return text


def _word(text: str) -> str:
    if not re.fullmatch(_WORD, text):
        raise ValueError("should be a plain word of letters, digits and _ : + . -")
    return text


# `Any` and not `str`: pydantic accepts valid Unicode only, and a folder's name may have other bytes
Name = Annotated[Any, AfterValidator(_printable)]
"""A printable text, such as the name of a class."""
Text = Annotated[Any, AfterValidator(_plain_text)]
"""A printable text without an interpolation of OmegaConf."""
Word = Annotated[str, AfterValidator(_word)]
"""A name in this project or a hash; never a path or a URL."""
Side = Annotated[int, Field(ge=1, le=16384)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]


class Closed(BaseModel):
    """A record without unknown keys, whose values have exactly the declared types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Backbone(Closed):
    name: Word
    pretrained: bool
    image_size: Side | None
    global_pool: Literal["token", "avg", "avgmax", "max", "map"] | None
    final_norm: Literal["trained", "fresh"] = "trained"  # missing in states of earlier versions
    exact: bool
    kwargs: dict[str, Any]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Preprocessing(Closed):
    """The values of `TaskDataModule.preprocessing`; keys with defaults are missing in older states."""

    size: Side
    resize: Literal["squash", "short_side", "windows"]
    short_side: Side | None = None
    decode: Word = ""
    native: Side | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    resampling: Literal["pillow", "tf1", "tf2"] = "pillow"
    crop: Literal["random", "center"] | None = None
    flip: Annotated[float, Field(ge=0, le=1)] | bool = 0.0
    white_level: Annotated[int, Field(ge=1, lt=2**32)] | None = None
    max_pixels: Annotated[int, Field(ge=1, lt=2**48)] | None = None
    mean: Annotated[list[Number], Field(min_length=3, max_length=3)]
    std: Annotated[list[Annotated[Number, Field(gt=0)]], Field(min_length=3, max_length=3)]


class _State(Closed):
    method: dict[str, Any]
    task: Text
    class_names: Annotated[list[Name], Field(min_length=1)]
    preprocessing: _Preprocessing
    backbone: _Backbone
    versions: dict[Word, Text | None]
    kind: Literal["single_label", "multi_label", "segmentation"] = "single_label"
    head: Literal["linear", "setr_pup"] = "linear"
    temperature: Annotated[float, Field(gt=0, le=1e6)] | None = None  # missing in states of earlier versions


def read(model: type[_Model], values: Any, source: Path | str, mend: str) -> _Model:
    """Parse values from elsewhere into a record; refuse them with the first value that does not fit.

    Args:
        model: The record's schema.
        values: Plain containers and values.
        source: The file they come from, for the message.
        mend: What to do; the end of the message.

    Raises:
        UserError: A key is unknown or missing, or a value is not of its type or range.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source} is refused: {_first_problem(error)}; {mend}") from error


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    where, value = visible(".".join(str(part) for part in first["loc"])) or "its content", first["input"]
    if first["type"] == "extra_forbidden":
        return f"{where} is not a key of this version"
    if first["type"] == "missing":
        return f"{where} is missing"
    given = f", and is {value!r:.60}" if isinstance(value, str | int | float | None) else ""
    problem = re.sub(r"^(Value error,|Input|String|List|Dictionary) ", "", first["msg"])
    return f"{where} {problem}{given}"


def check_record(record: Mapping[str, Any], source: Path | str, mend: str) -> None:
    """Refuse a record that a tuned state may not hold next to its tensors.

    Args:
        record: The fields of `tuned_state.TunedState` except the tensors.
        source: The file it comes from, for the message.
        mend: What to do; the end of the message.

    Raises:
        UserError: A key is unknown or missing, or a value is not of its type or range.
    """
    state = read(_State, {**record, "class_names": list(record.get("class_names", ()))}, source, mend)
    options = dict(state.method)
    try:
        check_name(state.backbone.name)
        check_kwargs(state.backbone.kwargs)
        check_options(str(options.pop("name", None)), options)
        for name, value in options.items():
            _check_option(f"method.{name}", value)
    except UserError as error:
        raise UserError(f"{source} is refused: {error}; {mend}") from error


def _check_option(where: str, value: Any, depth: int = 0) -> None:
    """Refuse an option unless it is null, a flag, a word, a number up to `LARGEST`, or a list of these."""
    if isinstance(value, list) and len(value) <= LARGEST and depth < _MAX_DEPTH:
        for entry in value:
            _check_option(where, entry, depth + 1)
    elif isinstance(value, str):
        if not re.fullmatch(_WORD, value):
            raise UserError(f"{where}={value!r:.60} is not a plain word")
    elif not (value is None or isinstance(value, bool) or (is_number(value) and abs(value) <= LARGEST)):
        raise UserError(f"{where} is not a number up to {LARGEST}, a word, or a list of those")


def check_tensors(tensors: Mapping[str, Tensor], source: Path | str, mend: str) -> None:
    """Refuse tensors with names that are not printable, unusual dtypes, or NaN or infinity.

    Args:
        tensors: Tensors by name.
        source: The file they come from, for the message.
        mend: What to do; the end of the message.

    Raises:
        UserError: The message names the tensor.
    """
    for name, tensor in tensors.items():
        if has_control(name):
            raise UserError(
                f"{source} is refused: a tensor's name, {visible(name)}, has control characters; {mend}"
            )
        if tensor.dtype not in _DTYPES:
            raise UserError(f"{source} is refused: the tensor {name} has the dtype {tensor.dtype}; {mend}")
        if not tensor.isfinite().all():
            raise UserError(f"{source} is refused: the tensor {name} has numbers that are not finite; {mend}")
