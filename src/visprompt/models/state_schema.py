"""What a file from elsewhere may say.

Closed schemas of plain values, checked before anything is built of them.

A file's checksum finds damage; it is no signature, since whoever changes the file can also write the
checksum.
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
_DEEPEST = 3  # lists in lists: masks of tokens by layer and segment
_Model = TypeVar("_Model", bound=BaseModel)


def _printable(text: Any) -> Any:
    if not isinstance(text, str):
        raise ValueError("should be a text")
    if has_control(text):
        raise ValueError("should hold no control characters")
    return text


def _plain_text(text: Any) -> Any:
    if "${" in _printable(text):
        raise ValueError("should be a plain text: ${...} is not looked up in a file from elsewhere")
    return text


def _word(text: str) -> str:
    if not re.fullmatch(_WORD, text):
        raise ValueError("should be a plain word of letters, digits and _ : + . -")
    return text


# of any value, since pydantic's own texts are Unicode, and a folder's name may hold other bytes
Name = Annotated[Any, AfterValidator(_printable)]
"""A text that can be printed: a class's name, for example."""
Text = Annotated[Any, AfterValidator(_plain_text)]
"""A text that can be printed and that OmegaConf takes as it is."""
Word = Annotated[str, AfterValidator(_word)]
"""A name of this project or a hash; never a path or an address."""
Side = Annotated[int, Field(ge=1, le=16384)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]


class Closed(BaseModel):
    """A record whose keys are all known, with values of exactly their types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Backbone(Closed):
    name: Word
    pretrained: bool
    image_size: Side | None
    global_pool: Literal["token", "avg", "avgmax", "max", "map"] | None
    final_norm: Literal["trained", "fresh"] = "trained"  # which states of earlier versions do not say
    exact: bool
    kwargs: dict[str, Any]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Preprocessing(Closed):
    """What `TaskDataModule.preprocessing` says.

    States of older versions lack keys, which their readers ask for.
    """

    size: Side
    resize: Literal["squash", "short_side"]
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


def read(model: type[_Model], values: Any, source: Path | str, mend: str) -> _Model:
    """Return values from elsewhere as a record, or refuses the first one that does not fit.

    Args:
        model: The record's schema.
        values: What was read, plain containers and values.
        source: Where from, for the message.
        mend: What to do, the end of the message.

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
    """Raise unless a record is what a tuned state may hold beside its tensors.

    Args:
        record: The fields of `state.TunedState` but for the tensors.
        source: Where from, for the message.
        mend: What to do, the end of the message.

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
            _check_visible(f"method.{name}", value)
    except UserError as error:
        raise UserError(f"{source} is refused: {error}; {mend}") from error


def _check_visible(where: str, value: Any, depth: int = 0) -> None:
    """Refuse an option of a method that is anything but a word or number of ordinary size, or lists of them."""
    if isinstance(value, list) and len(value) <= LARGEST and depth < _DEEPEST:
        for entry in value:
            _check_visible(where, entry, depth + 1)
    elif isinstance(value, str):
        if not re.fullmatch(_WORD, value):
            raise UserError(f"{where}={value!r:.60} is not a plain word")
    elif not (value is None or isinstance(value, bool) or (is_number(value) and abs(value) <= LARGEST)):
        raise UserError(f"{where} is not a number of ordinary size, or a list of some")


def check_tensors(tensors: Mapping[str, Tensor], source: Path | str, mend: str) -> None:
    """Raise unless tensors have printable names and finite numbers.

    Args:
        tensors: By name.
        source: Where from, for the message.
        mend: What to do, the end of the message.

    Raises:
        UserError: Names the tensor.
    """
    for name, tensor in tensors.items():
        if has_control(name):
            raise UserError(
                f"{source} is refused: a tensor's name, {visible(name)}, holds control characters; {mend}"
            )
        if tensor.dtype not in _DTYPES:
            raise UserError(f"{source} is refused: the tensor {name} is of {tensor.dtype}; {mend}")
        if not tensor.isfinite().all():
            raise UserError(f"{source} is refused: the tensor {name} has numbers that are not finite; {mend}")
