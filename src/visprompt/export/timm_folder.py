"""Write a merged classifier as a folder that timm reads, and read it again."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import save_for_hf
from torch import nn

from visprompt.errors import UserError, in_one_line
from visprompt.export.check import Runner


def write(
    model: nn.Module, folder: Path, preprocessing: Mapping[str, Any], class_names: tuple[str, ...]
) -> None:
    """Write `config.json` and `model.safetensors`, as `timm.create_model("local-dir:FOLDER")` reads them.

    Args:
        model: A result of `visprompt.merge`.
        folder: An existing folder.
        preprocessing: The tuned state's `preprocessing`.
        class_names: Names of the classes.

    Raises:
        UserError: timm cannot describe the model.
    """
    labels = list(class_names) if len(set(class_names)) == len(class_names) else None
    try:
        save_for_hf(
            model,
            str(folder),
            model_config={"label_names": labels} if labels else None,
            safe_serialization=True,
            data_config=data_config(preprocessing),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"timm cannot describe this backbone ({in_one_line(error)[:200]}): take to=onnx or to=torch"
        ) from error


def data_config(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessing in timm's words, as `timm.data.create_transform` takes them.

    Args:
        preprocessing: A tuned state's `preprocessing`.

    Raises:
        UserError: timm has no words for it: it resizes as Pillow does.
    """
    if preprocessing["resampling"] != "pillow":
        raise UserError(
            f"timm has no word for preprocessing.resampling={preprocessing['resampling']}, it resizes as "
            "Pillow does, and the model would answer differently: take to=onnx include_preprocessing=true"
        )
    size = preprocessing["size"]
    cropped = preprocessing["resize"] == "short_side"
    share = size / preprocessing["short_side"] if cropped else 1.0
    if cropped and math.floor(size / share) != preprocessing["short_side"]:
        share = math.nextafter(share, 0)  # timm rounds size / share down
    return {
        "input_size": (3, size, size),
        "interpolation": preprocessing["interpolation"],
        "crop_pct": share,
        "crop_mode": "center" if cropped else "squash",
        "mean": tuple(preprocessing["mean"]),
        "std": tuple(preprocessing["std"]),
    }


def runner(folder: Path) -> Runner:
    """Return a function that computes with the folder's model, as timm builds it.

    Raises:
        UserError: timm builds another model, because the backbone was changed after timm had built it.
    """
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"timm cannot build this backbone again ({in_one_line(error)[:200]}): take to=onnx or to=torch"
        ) from error

    return lambda inputs: (model(inputs), None)
