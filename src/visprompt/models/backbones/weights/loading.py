"""Weights of backbones: found on disk, read in the layouts they are published in, loaded whole or not at all.

Layouts: what timm and torchvision save; MoCo v3, MAE, DINO, DINOv2, Swin and ConvNeXt as their authors
published them; transformers' ViT, DINOv2 and CLIP; Google's `.npz`; and each of them as a part of a
checkpoint of training. timm's own filter of an architecture renames and resizes (position tables, patch
embeddings) as for timm's own weights. Then every tensor of the model must be in the file and every tensor of
the file in the model, apart from classifiers and what served the pre-training alone.
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

# files that are in no hub of timm's, by the names they are published under
PUBLISHED = {
    "vit-b-300ep.pth.tar": "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar",
    "linear-vit-b-300ep.pth.tar": "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/linear-vit-b-300ep.pth.tar",
    "vit-s-300ep.pth.tar": "https://dl.fbaipublicfiles.com/moco-v3/vit-s-300ep/vit-s-300ep.pth.tar",
}
# a folder's weights are the first of these that it holds; else its only file with one of the suffixes
_USUAL = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".ckpt", ".bin", ".tar")
# where a checkpoint of training keeps the model, best first; and MoCo v3 the encoder that its momentum
# encoder follows
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")
_ENCODER = "base_encoder."
_HEADS = (
    "head.",
    "head_dist.",
    "fc.",
    "pre_logits.",
    "attn_pool.",
)  # a model may be built without its pooling too
_PRETRAINING = ("decoder_", "mask_token")  # MAE, DINOv2


def find_file(weights: str | Path) -> Path:
    """Find the file of weights that a setting names.

    Args:
        weights: The file; or a folder that holds one: a snapshot of the Hugging Face cache, or its
            `models--...`.

    Raises:
        UserError: There is none, or several; says what to do.
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
    """Return the snapshot that `main` names in a folder `models--...` of the cache.

    Any other folder is itself the one.
    """
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
        found = ", ".join(path.name for path in files[:5]) or f"neither {_USUAL[0]} nor another one"
        raise UserError(
            f"the folder {folder} holds not one file of backbone weights but {found}: "
            "give the file itself as backbone.weights=..."
        )
    return files[0]


def load_file(model: nn.Module, path: str | Path) -> None:
    """Load a file of weights into a model of timm.

    Every weight of the model is in the file, or nothing is loaded.

    Position tables and patch embeddings of another size are resized. Classifiers that the model does not have
    are left out, and what served the pre-training alone: MAE's decoder, MoCo v3's projector, predictor and
    momentum encoder. The model may be a part of what the file holds, as `model.*` of a Lightning checkpoint,
    if only one part fits.

    Args:
        model: The model, by custom without a classifier.
        path: A file (.safetensors, Google's .npz; all others are read by `torch.load(weights_only=True)`) or
            a folder, see `find_file`.

    Raises:
        UserError: There is no such file, it cannot be read, lacks weights, has others or has them in other
            shapes, or several parts of it fit.
    """
    file = find_file(path)
    tensors = _read(file)
    check_activation(file, tensors, model)
    parts = {"": _converted(model, tensors)}
    if parts[""].problems:
        parts |= {start: _converted(model, _below(tensors, start)) for start in _starts(tensors, model)}
    fitting = {start: part for start, part in parts.items() if not part.problems}
    _check_one(file, model, fitting)
    part = next(iter(fitting.values()), None) or min(
        parts.values(), key=lambda part: _lacking(part.tensors, model)
    )
    if part.problems:
        raise _unfit(file, model, part.problems)
    model.load_state_dict(part.tensors, strict=False)  # counters of batches apart, nothing is missing


class _Part(NamedTuple):
    """Tensors of a file under timm's names and in the model's sizes, and why they do not fill the model."""

    tensors: dict[str, Any]
    problems: list[str]


def _converted(model: nn.Module, tensors: Mapping[str, Any]) -> _Part:
    own, renamed = model.state_dict(), to_timm(tensors)
    try:
        with redirect_stdout(None):  # the one of EVA prints what it passes over
            converted = dict(_filter(model)(dict(renamed), model))
    except Exception as error:  # timm's filters take the layout and the number of tokens for granted
        problems = _problems(renamed, own) if own.keys() & renamed.keys() else []
        return _Part(renamed, [f"timm cannot convert its weights ({_in_short(error)})", *problems])
    converted = {
        name: t for name, t in converted.items() if name in own or not name.startswith(_left_out(model))
    }
    return _Part(converted, _problems(converted, own))


def _starts(tensors: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Return how the names begin of each part that is large enough to be the model, `student.` or `model.net.` for example."""
    counts = Counter(name[: dot.end()] for name in tensors for dot in re.finditer(r"\.", name))
    return [start for start, count in counts.items() if 2 * count >= len(model.state_dict())]


def _below(tensors: Mapping[str, Any], start: str) -> dict[str, Any]:
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _check_one(file: Path, model: nn.Module, fitting: Mapping[str, _Part]) -> None:
    """Raise where parts with different weights fit.

    A student and its teacher, a model and its running mean.
    """
    if len(fitting) > 1 and len({hash_tensors(part.tensors) for part in fitting.values()}) > 1:
        raise UserError(
            f"{file} holds several models that fit this {type(model).__name__}, under "
            f"{', '.join(sorted(fitting))}: "
            "save the state_dict() of the one that you mean alone and set backbone.weights to that file"
        )


def _lacking(tensors: Mapping[str, Any], model: nn.Module) -> int:
    return sum(name not in tensors for name in model.state_dict())


def _read(file: Path) -> Mapping[str, Any]:
    """Return what a file holds, by name; of a checkpoint of training the model alone."""
    try:
        held = _READERS.get(file.suffix, _read_pickle)(file)
    except pickle.UnpicklingError as error:
        remedy = "get it again, or save its state_dict() alone"
        if file.suffix == ".ckpt":  # Lightning keeps hyper-parameters in it, which may be objects
            load = f"torch.load({str(file)!r}, weights_only=False)['state_dict']"
            remedy = f"if you trust it, write its tensors alone by torch.save({load}, 'weights.pth')"
        raise UserError(
            f"{file} is no file of weights or holds more than tensors, which could run code and is not read: "
            f"{remedy} and set backbone.weights to that file"
        ) from error
    except Exception as error:  # each reader has exceptions of its own
        raise UserError(
            f"{file} cannot be read as backbone weights ({_in_short(error)}): it may be cut short or of "
            "another kind, get it again or correct backbone.weights=..."
        ) from error
    for name in _CONTAINERS:
        if isinstance(held, Mapping) and isinstance(held.get(name), Mapping):
            held = held[name]
            break
    if not isinstance(held, Mapping) or not all(isinstance(name, str) for name in held):
        raise UserError(
            f"{file} holds no weights by name but {type(held).__name__}: give its state_dict() instead"
        )
    tensors = clean_state_dict(_flat(held))
    return _below(tensors, _ENCODER) or tensors


def _flat(values: Mapping[str, Any], depth: int = 3) -> dict[str, Any]:
    """Return values by their dotted names: {"net": {"norm": 1}} as {"net.norm".

    1}, for mappings whose keys are names.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if depth and isinstance(value, Mapping) and value and all(isinstance(key, str) for key in value):
            flat |= {f"{name}.{key}": inner for key, inner in _flat(value, depth - 1).items()}
        else:
            flat[name] = value
    return flat


def _read_pickle(file: Path) -> Any:
    with torch.serialization.safe_globals(
        [argparse.Namespace]
    ):  # the options of a training, beside its weights
        return torch.load(file, map_location="cpu", weights_only=True)


_READERS: dict[str, Callable[[Path], Any]] = {".npz": read_npz, ".safetensors": read_safetensors}


def _filter(model: nn.Module) -> Callable[[dict[str, Any], nn.Module], Mapping[str, Any]]:
    """Return the filter that timm puts its own weights of a model's architecture through."""
    name = str(_config(model).get("architecture"))
    module = timm.model_entrypoint(name).__module__ if timm.is_model(name) else type(model).__module__
    found: Any = getattr(sys.modules[module], "checkpoint_filter_fn", None)
    if found is None:  # ResNet: timm has torchvision's names
        return lambda tensors, _: tensors
    if found is not vision_transformer.checkpoint_filter_fn:
        return found
    options: dict[str, Any] = {"adapt_layer_scale": True}  # DeiT III; files of others have no such names
    if "flexi" in name or "radio" in name:
        options |= {"interpolation": "bilinear", "antialias": False}
    if "radio" in name:
        options["align_corners"] = name in ("vit_base_patch16_radio_v3", "vit_huge_patch16_radio_v3")
    return partial(found, **options)


def _config(model: nn.Module) -> Mapping[str, Any]:
    """Return what timm knows of a model; nothing of one that was made by its class alone."""
    return getattr(model, "pretrained_cfg", None) or {}


def _left_out(model: nn.Module) -> tuple[str, ...]:
    """Return how the names of tensors begin that a file may hold and a model may lack."""
    classifiers = _config(model).get("classifier") or ()
    named = (classifiers,) if isinstance(classifiers, str) else classifiers
    return (*(f"{name}." for name in named), *_HEADS, *_PRETRAINING)


def _problems(tensors: Mapping[str, Any], own: Mapping[str, Tensor]) -> list[str]:
    """Why tensors do not fill a model, each in a few words; nothing where they do."""
    # files from before batch norm counted its batches lack the counters, which nothing reads in evaluation
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    extra = [name for name, tensor in tensors.items() if name not in own or not _is_plain(tensor)]
    both = {name: tensor for name, tensor in tensors.items() if name not in extra}
    misfits = [
        f"{n} [{_size(t)}], which is [{_size(own[n])}] here"
        for n, t in both.items()
        if t.shape != own[n].shape
    ]
    broken = [name for name, tensor in both.items() if not tensor.isfinite().all()]
    return [
        *([f"it lacks {len(missing)} of {len(own)} weights: {_some(missing)}"] if missing else []),
        *([f"there is no place for {len(extra)} of its weights: {_some(extra)}"] if extra else []),
        *([f"it has other shapes: {_some(misfits)}"] if misfits else []),
        *([f"it has values that are not finite: {_some(broken)}"] if broken else []),
    ]


def _is_plain(value: Any) -> bool:
    """Return whether a value is a tensor of real numbers that are all there.

    Not sparse, not quantized, not meta.
    """
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
