"""Backbones by name: the embedded demo ViT and timm's, with weights from a file, timm's cache or its hub."""

import os
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from torch import nn

from visprompt.backbones.vit import ViT
from visprompt.errors import UserError, unknown
from visprompt.state import hash_tensors

DEMO = "vit64_tiny_imagenet_100"
_DEMO_WEIGHTS = Path(__file__).parent / "weights" / f"{DEMO}.safetensors"
_DEMO_KWARGS = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}
_HUB = ("huggingface.co", 443)
_HUB_TIMEOUT = 3.0  # seconds; the hub's own client retries for a minute


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """Which backbone, and how it is built.

    Attributes:
        name: The embedded demo backbone's name or a timm model name, with or without a pre-training tag.
        weights: A file of weights (.safetensors, .pth, .npz); None takes timm's cache or hub.
        pretrained: False leaves random weights, for tests and for training from scratch.
        image_size: Side of the input in pixels; None is the model's own.
        global_pool: timm's pooling; None is the model's own.
        exact: False carries prompt tokens through every block, for comparison.
        kwargs: Further arguments of the timm model, such as depth and embed_dim of a tiny one.
    """

    name: str = DEMO
    weights: str | None = None
    pretrained: bool = True
    image_size: int | None = None
    global_pool: str | None = None
    exact: bool = True
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Backbone:
    """A built backbone with what has to be known of it.

    Attributes:
        module: The module that a `Classifier` drives.
        spec: How it was built.
        sha256: Hash of its weights as loaded.
        image_size: Side of its input in pixels.
        mean: Channel means its input is normalised with.
        std: Channel standard deviations.
    """

    module: nn.Module
    spec: BackboneSpec
    sha256: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def record(self) -> dict[str, Any]:
        """What a result and a tuned state keep: how to build it again, and the weights' hash."""
        # where the file of weights lay is no part of what it holds
        return {k: v for k, v in asdict(self.spec).items() if k != "weights"} | {"sha256": self.sha256}


def build_backbone(spec: BackboneSpec, seed: int = 0) -> Backbone:
    """Builds a backbone and loads its weights.

    Args:
        spec: Which one.
        seed: Seed of random weights, where `spec.pretrained` is false.

    Returns:
        The backbone, in evaluation mode.

    Raises:
        UserError: The name is unknown, or the weights cannot be had; says what to do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _demo_model(spec) if spec.name == DEMO else _timm_model(spec)
    module = ViT(model, exact=spec.exact).eval()
    config = model.pretrained_cfg if spec.name != DEMO else {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    image_size = int(model.patch_embed.img_size[0])
    digest = hash_tensors(model.state_dict())
    return Backbone(module, spec, digest, image_size, tuple(config["mean"]), tuple(config["std"]))


def _model_kwargs(spec: BackboneSpec) -> dict[str, Any]:
    given = {"img_size": spec.image_size, "global_pool": spec.global_pool}
    return {k: v for k, v in given.items() if v is not None} | dict(spec.kwargs)


def _demo_model(spec: BackboneSpec) -> Any:
    kwargs = _DEMO_KWARGS | _model_kwargs(spec)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs)
    if spec.pretrained:
        path = Path(spec.weights) if spec.weights else _DEMO_WEIGHTS
        tensors = {k: v.float() for k, v in load_file(_existing(path)).items() if not k.startswith("head.")}
        model.load_state_dict(tensors)
    return model


def _timm_model(spec: BackboneSpec) -> Any:
    architecture = spec.name.split(".")[0]
    if not timm.is_model(architecture):
        raise unknown("backbone", spec.name, [DEMO, *timm.list_models()])
    kwargs: dict[str, Any] = {"num_classes": 0} | _model_kwargs(spec)
    if spec.pretrained and spec.weights:
        file = str(_existing(Path(spec.weights)))
        kwargs |= {"pretrained": True, "pretrained_cfg_overlay": {"file": file, "custom_load": file.endswith(".npz")}}
    elif spec.pretrained:
        kwargs |= {"pretrained": True, "pretrained_cfg_overlay": _cached_or_reachable(spec)}
    try:
        return timm.create_model(spec.name, **kwargs)
    except (RuntimeError, TypeError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"backbone {spec.name} cannot be built or its weights do not fit: {reason}; "
            "check backbone.name, backbone.weights and backbone.kwargs"
        ) from error


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"there is no file of backbone weights at {path}: correct backbone.weights=...")
    return path


def _cached_or_reachable(spec: BackboneSpec) -> dict[str, Any]:
    """timm arguments that load from the local cache, without a look at the network; empty where the hub answers."""
    config = timm.get_pretrained_cfg(spec.name)
    if config is None or not config.has_weights:
        tags = timm.list_models(f"{spec.name.split('.')[0]}*", pretrained=True)
        raise UserError(
            f"timm has no pre-trained weights for backbone {spec.name}: "
            f"choose one of {', '.join(tags[:5]) or 'timm.list_models(pretrained=True)'}, or give backbone.weights=FILE"
        )
    if config.hf_hub_id:
        name = config.hf_hub_filename or "model.safetensors"
        cached = try_to_load_from_cache(config.hf_hub_id, name)
        if isinstance(cached, str):
            return {"file": cached}
    if os.environ.get("HF_HUB_OFFLINE") == "1" or not _hub_answers():
        raise UserError(
            f"the weights of backbone {spec.name} are not on this machine and the hub cannot be reached: download "
            f"https://huggingface.co/{config.hf_hub_id}/resolve/main/model.safetensors on another machine, "
            "copy it here and set backbone.weights=PATH"
        )
    return {}


def _hub_answers() -> bool:
    try:
        socket.create_connection(_HUB, timeout=_HUB_TIMEOUT).close()
    except OSError:
        return False
    return True


__all__ = ["DEMO", "Backbone", "BackboneSpec", "build_backbone"]
