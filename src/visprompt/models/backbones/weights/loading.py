"""Load the weights of backbones from files in the layouts they are published in, completely or not at all.

Layouts: files saved by timm and torchvision; MoCo v3, MAE, DINO, DINOv2, Swin and ConvNeXt as published by
their authors; ViT, DINOv2, CLIP and SigLIP of transformers; Google's `.npz`; and each of them as a part of
a training checkpoint. timm's `checkpoint_filter_fn` of the architecture renames tensors and resizes position
tables and patch embeddings, as for timm's weights. Then every tensor of the model must be in the file and
every tensor of the file in the model, except classifiers and parts that only pre-training used.
"""

import argparse
import pickle
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import load_file as read_safetensors
from timm.models import clean_state_dict, vision_transformer
from torch import Tensor, nn

from visprompt.errors import UserError
from visprompt.models.backbones.weights.flax import read_npz
from visprompt.models.backbones.weights.transformers_layouts import check_activation, to_timm
from visprompt.models.tensors import hash_tensors

# files that timm cannot download, by the names they are published under
PUBLISHED = {
    "vit-b-300ep.pth.tar": "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar",
    "linear-vit-b-300ep.pth.tar": "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/linear-vit-b-300ep.pth.tar",
    "vit-s-300ep.pth.tar": "https://dl.fbaipublicfiles.com/moco-v3/vit-s-300ep/vit-s-300ep.pth.tar",
}
# in a folder the first of these names that exists is loaded, else the only file with one of the suffixes
_USUAL = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".ckpt", ".bin", ".tar")
# keys under which training checkpoints store the model; the first that exists is read
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")
_ENCODER = "base_encoder."  # MoCo v3's trained encoder, next to its momentum encoder
# the attention pooling is among them because a model may be built without it
_HEADS = ("head.", "head_dist.", "fc.", "pre_logits.", "attn_pool.")
_PRETRAINING = ("decoder_", "mask_token")  # only used by the pre-training of MAE and DINOv2


def find_file(weights: str | Path) -> Path:
    """Find the file of weights that `backbone.weights` names.

    Args:
        weights: The file; or a folder that holds one, such as a snapshot of the Hugging Face cache or its
            `models--...` folder.

    Raises:
        UserError: There is no such file, or the folder holds several; the message says what to do.
    """
    path = Path(weights).expanduser()
    if path.is_dir():
        return _file_in(_snapshot(path))
    if not path.is_file():
        remedy = "correct backbone.weights=..."
        if path.name in PUBLISHED:
            remedy = (
                f"download {PUBLISHED[path.name]} to that place, or name another one by backbone.weights=FILE"
            )
        raise UserError(f"there is no file of backbone weights at {path}: {remedy}")
    return path


def _snapshot(folder: Path) -> Path:
    """Return the snapshot that `main` refers to in a folder `models--...` of the cache, else the folder."""
    main = folder / "refs" / "main"
    snapshots = sorted(path for path in (folder / "snapshots").glob("*") if path.is_dir())
    if main.is_file() and (named := folder / "snapshots" / main.read_text().strip()) in snapshots:
        return named
    if len(snapshots) > 1:
        names = ", ".join(path.name for path in snapshots)
        raise UserError(
            f"{folder} has several snapshots ({names}): give one of their folders as backbone.weights=..."
        )
    return snapshots[0] if snapshots else folder


def _file_in(folder: Path) -> Path:
    for name in _USUAL:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    if len(files) != 1:
        content = ", ".join(path.name for path in files[:5]) or f"neither {_USUAL[0]} nor another one"
        raise UserError(
            f"the folder {folder} should hold one file of backbone weights and holds {content}: "
            "give the file itself as backbone.weights=..."
        )
    return files[0]


def load_file(model: nn.Module, path: str | Path) -> None:
    """Load a file of weights into a timm model; load nothing unless the file holds every weight of the model.

    Position tables and patch embeddings of another size are resized. Left out are classifiers that the model
    does not have, and parts that only pre-training used: MAE's decoder, MoCo v3's projector, predictor and
    momentum encoder. The model may be a part of the file, such as `model.*` of a Lightning checkpoint, if
    only one part fits.

    Args:
        model: The model, usually without a classifier.
        path: A file (.safetensors, Google's .npz; all others are read by `torch.load(weights_only=True)`) or
            a folder, see `find_file`.

    Raises:
        UserError: The file is missing or cannot be read, its names or shapes do not match the model, or
            several parts of it fit.
    """
    file = find_file(path)
    tensors = _read(file)
    check_activation(file, tensors, model)
    parts = {"": _converted(model, tensors)}
    if parts[""].problems:
        prefixes = _part_prefixes(tensors, model)
        parts |= {prefix: _converted(model, _below(tensors, prefix)) for prefix in prefixes}
    fitting = {prefix: part for prefix, part in parts.items() if not part.problems}
    _check_one(file, model, fitting)
    if not fitting:
        nearest = min(parts.values(), key=lambda part: _num_missing(part.tensors, model))
        raise _unfit(file, model, nearest.problems)
    part = next(iter(fitting.values()))
    model.load_state_dict(part.tensors, strict=False)  # only `num_batches_tracked` may be missing


class _Part(NamedTuple):
    """Tensors of a file under timm's names and in the model's sizes, and reasons why they do not fit it."""

    tensors: dict[str, Any]
    problems: list[str]


def _converted(model: nn.Module, tensors: Mapping[str, Any]) -> _Part:
    expected, renamed = model.state_dict(), to_timm(tensors)
    try:
        with redirect_stdout(None):  # EVA's filter prints the names that it skips
            converted = dict(_filter(model)(dict(renamed), model))
    except Exception as error:  # timm's filters assume a layout and a number of tokens
        problems = _problems(renamed, expected) if expected.keys() & renamed.keys() else []
        return _Part(renamed, [f"timm cannot convert its weights ({_in_short(error)})", *problems])
    ignored = _ignored_prefixes(model)
    converted = {
        name: tensor for name, tensor in converted.items() if name in expected or not name.startswith(ignored)
    }
    return _Part(converted, _problems(converted, expected))


def _part_prefixes(tensors: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Return name prefixes, such as `student.`, of parts with at least half as many tensors as the model."""
    counts = Counter(name[: dot.end()] for name in tensors for dot in re.finditer(r"\.", name))
    return [prefix for prefix, count in counts.items() if 2 * count >= len(model.state_dict())]


def _below(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_one(file: Path, model: nn.Module, fitting: Mapping[str, _Part]) -> None:
    """Raise if several parts with different weights fit, such as a student and its teacher."""
    if len(fitting) > 1 and len({hash_tensors(part.tensors) for part in fitting.values()}) > 1:
        raise UserError(
            f"{file} holds several models that fit this {type(model).__name__}, under "
            f"{', '.join(sorted(fitting))}: "
            "save the state_dict() of the one that you mean, and set backbone.weights to that file"
        )


def _num_missing(tensors: Mapping[str, Any], model: nn.Module) -> int:
    return sum(name not in tensors for name in model.state_dict())


def _read(file: Path) -> Mapping[str, Any]:
    """Return the tensors of a file by name; of a training checkpoint only those of the model."""
    try:
        content = _READERS.get(file.suffix, _read_pickle)(file)
    except pickle.UnpicklingError as error:
        remedy = "get it again, or save its state_dict() alone"
        if file.suffix == ".ckpt":  # of Lightning, whose hyper-parameters may be objects
            load = f"torch.load({str(file)!r}, weights_only=False)['state_dict']"
            remedy = f"if you trust it, write its tensors alone by torch.save({load}, 'weights.pth')"
        raise UserError(
            f"{file} is not a file of weights, or holds objects that could run code and are not read: "
            f"{remedy} and set backbone.weights to that file"
        ) from error
    except Exception as error:  # each reader raises different exceptions
        raise UserError(
            f"{file} cannot be read as backbone weights ({_in_short(error)}): it may be truncated or of "
            "another kind, get it again or correct backbone.weights=..."
        ) from error
    for name in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise UserError(
            f"{file} holds an object of class {type(content).__name__}, not weights by name: give its "
            "state_dict() instead"
        )
    tensors = clean_state_dict(_flat(content))
    return _below(tensors, _ENCODER) or tensors


def _flat(values: Mapping[str, Any], depth: int = 3) -> dict[str, Any]:
    """Flatten nested mappings to dotted names: {"net": {"norm": 1}} becomes {"net.norm": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if depth and isinstance(value, Mapping) and value and all(isinstance(key, str) for key in value):
            flat |= {f"{name}.{key}": inner for key, inner in _flat(value, depth - 1).items()}
        else:
            flat[name] = value
    return flat


def _read_pickle(file: Path) -> Any:
    # training scripts often save their options, a Namespace, next to the weights
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, map_location="cpu", weights_only=True)


_READERS: dict[str, Callable[[Path], Any]] = {".npz": read_npz, ".safetensors": read_safetensors}


def _filter(model: nn.Module) -> Callable[[dict[str, Any], nn.Module], Mapping[str, Any]]:
    """Return the filter that timm applies to its weights of the model's architecture."""
    name = str(_config(model).get("architecture"))
    module = timm.model_entrypoint(name).__module__ if timm.is_model(name) else type(model).__module__
    filter_fn: Any = getattr(sys.modules[module], "checkpoint_filter_fn", None)
    if filter_fn is None:  # ResNet: timm uses torchvision's names
        return lambda tensors, _: tensors
    if filter_fn is not vision_transformer.checkpoint_filter_fn:
        return filter_fn
    options: dict[str, Any] = {"adapt_layer_scale": True}  # for DeiT III; no effect on other files
    if "flexi" in name or "radio" in name:
        options |= {"interpolation": "bilinear", "antialias": False}
    if "radio" in name:
        options["align_corners"] = name in ("vit_base_patch16_radio_v3", "vit_huge_patch16_radio_v3")
    return partial(filter_fn, **options)


def _config(model: nn.Module) -> Mapping[str, Any]:
    """Return timm's pre-training config of a model; empty if the model was not built by timm's factory."""
    return getattr(model, "pretrained_cfg", None) or {}


def _ignored_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return the name prefixes of tensors that a file may hold although the model does not have them."""
    classifiers = _config(model).get("classifier") or ()
    named = (classifiers,) if isinstance(classifiers, str) else classifiers
    return (*(f"{name}." for name in named), *_HEADS, *_PRETRAINING)


def _problems(tensors: Mapping[str, Any], expected: Mapping[str, Tensor]) -> list[str]:
    """Return reasons why tensors do not fit a model's state_dict; empty if they fit."""
    # old files lack batch norm's counters of batches, which evaluation does not read
    missing = [name for name in expected if name not in tensors and not name.endswith("num_batches_tracked")]
    extra = [name for name, tensor in tensors.items() if name not in expected or not _is_plain(tensor)]
    both = {name: tensor for name, tensor in tensors.items() if name not in extra}
    misfits = [
        f"{name} [{_size(tensor)}], which is [{_size(expected[name])}] here"
        for name, tensor in both.items()
        if tensor.shape != expected[name].shape
    ]
    broken = [name for name, tensor in both.items() if not tensor.isfinite().all()]
    return [
        *([f"it lacks {len(missing)} of {len(expected)} weights: {_some(missing)}"] if missing else []),
        *([f"the model does not have {len(extra)} of the file's weights: {_some(extra)}"] if extra else []),
        *([f"it has other shapes: {_some(misfits)}"] if misfits else []),
        *([f"it has values that are not finite: {_some(broken)}"] if broken else []),
    ]


def _is_plain(value: Any) -> bool:
    """Return whether a value is a dense tensor of real numbers on the CPU; not sparse, quantized or meta."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return not (value.is_quantized or value.is_complex())


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _in_short(error: Exception) -> str:
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__


def _unfit(file: Path, model: nn.Module, problems: Iterable[str]) -> UserError:
    return UserError(
        f"{file} does not fit this {type(model).__name__}: {'; '.join(problems)}; "
        "check backbone.name, backbone.weights and backbone.kwargs"
    )
