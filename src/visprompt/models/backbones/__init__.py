"""Backbones by name: the demo ViT and timm's models, with weights from a file, a local cache or the hub."""

import hashlib
import json
import textwrap
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from visprompt.errors import UserError, reason, unknown
from visprompt.models.backbones.families import family
from visprompt.models.backbones.family import Family
from visprompt.models.backbones.options import check_kwargs
from visprompt.models.backbones.weights.hub import hub_file
from visprompt.models.backbones.weights.loading import find_file, load_file
from visprompt.models.digests import digest_once, state_of
from visprompt.models.tensors import hash_tensors

DEMO = "vit64_tiny_imagenet_100"
FINAL_NORMS = ("trained", "fresh")
_DEMO_WEIGHTS = Path(__file__).parent / "weights" / f"{DEMO}.safetensors"
_DEMO_MODEL = "vit_tiny_patch16_224"
_DEMO_KWARGS: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """Which backbone, and how it is built.

    Attributes:
        name: The embedded demo backbone's name or a timm model name, with or without a pre-training tag, such
            as vit_base_patch16_224.orig_in21k.
        weights: A file of weights (.safetensors, .pth, .npz) or a folder that holds one; None takes the ones
            that timm names, from a local cache or the hub.
        pretrained: False leaves random weights, for tests and for training from scratch.
        image_size: Side of the input in pixels; None is the model's default.
        global_pool: A pooling of timm that replaces the model's, after its weights are loaded; None keeps the
            model's.
        final_norm: "trained" keeps the norm after the last block; "fresh" replaces it by a norm of weight 1
            and bias 0 after the mean over patches, as the codes of MAE, VPT and E2VPT do for MAE's features.
        exact: False computes the prompt tokens' outputs in every block, for comparison.
        kwargs: Further arguments of the timm model, such as depth and embed_dim of a tiny one; see `options`.

    Raises:
        UserError: `final_norm` is unknown, or both random weights and a file of weights are asked for.
    """

    name: str = DEMO
    weights: str | None = None
    pretrained: bool = True
    image_size: int | None = None
    global_pool: str | None = None
    final_norm: str = "trained"
    exact: bool = True
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.final_norm not in FINAL_NORMS:
            raise unknown("backbone.final_norm", self.final_norm, FINAL_NORMS)
        if not self.pretrained and self.weights is not None:
            raise UserError(
                f"backbone.pretrained=false asks for random weights, and backbone.weights={self.weights} "
                "for those of a file: give only one of them, or backbone.weights=null"
            )


@dataclass(frozen=True)
class Backbone:
    """A built backbone and its properties.

    Attributes:
        module: The module that a `Classifier` drives.
        spec: How it was built.
        sha256: Hash of its weights after loading.
        image_size: Side of its input in pixels.
        mean: Channel means that its input is normalised with.
        std: Channel standard deviations that its input is normalised with.
    """

    module: Family
    spec: BackboneSpec
    sha256: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def record(self) -> dict[str, Any]:
        """Return the record that results and tuned states keep: how to build the backbone, and its hash."""
        # without the path of the weights: the hash identifies them
        return {k: v for k, v in asdict(self.spec).items() if k != "weights"} | {"sha256": self.sha256}


def build_backbone(spec: BackboneSpec, seed: int = 0) -> Backbone:
    """Build a backbone and load its weights.

    Args:
        spec: Which backbone.
        seed: Seed of random weights, used if `spec.pretrained` is false.

    Returns:
        The backbone, in evaluation mode.

    Raises:
        UserError: The name is unknown, or the weights are missing or do not fit; the message says what to do.
    """
    check_name(spec.name)
    check_kwargs(spec.kwargs)
    file = _weights_file(spec)  # first: a large model takes a minute to build
    state = "" if file is None else state_of(file)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _create(spec)
        if file:
            load_file(model, file)
        if spec.global_pool is not None:
            model.reset_classifier(0, spec.global_pool)
        if spec.final_norm == "fresh":
            _replace_final_norm(model)
        module = family(model, spec.exact)
    except UserError:
        raise
    except Exception as error:  # timm raises many kinds of exceptions
        cause = textwrap.shorten(reason(error), 300, placeholder=" ...")
        raise UserError(
            f"backbone {spec.name} cannot be built: "
            f"{cause or 'one of its settings is unknown or of a wrong kind'}; "
            "check backbone.name, backbone.image_size, backbone.global_pool and backbone.kwargs"
        ) from error
    if spec.image_size not in (None, module.image_size):
        raise UserError(
            f"backbone.image_size={spec.image_size} has no effect, because {spec.name} is built for "
            f"{module.image_size}: give only one size, as +backbone.kwargs.img_size=... if the model needs it"
        )
    config = model.pretrained_cfg if spec.name != DEMO else {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    module.mean, module.std = tuple(config["mean"]), tuple(config["std"])
    digest = hash_tensors(model.state_dict()) if file is None else _digest(file, state, spec, model)
    return Backbone(module, spec, digest, module.image_size, module.mean, module.std)


def _digest(file: Path, state: str, spec: BackboneSpec, model: nn.Module) -> str:
    """Return the hash of a model that was loaded from a file, which then was in the given state."""
    built = {name: value for name, value in asdict(spec).items() if name != "weights"}
    versions = [timm.__version__, torch.__version__, _code()]
    what = json.dumps([built, *versions], sort_keys=True, default=str)
    return digest_once(file, what, lambda: hash_tensors(model.state_dict()), state)


@lru_cache
def _code() -> str:
    """Return the sha256 (hex) of the code that turns a file of weights into a model."""
    here = Path(__file__).parent
    sources = [Path(__file__), *sorted((here / "weights").glob("*.py"))]
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()


def _replace_final_norm(model: Any) -> None:
    """Remove the trained norm after the last block, and add one of weight 1 and bias 0 after the mean."""
    norm = getattr(model, "norm", None)
    if (
        not isinstance(model, VisionTransformer)
        or not isinstance(norm, nn.LayerNorm)
        or model.global_pool != "avg"
    ):
        raise UserError(
            "backbone.final_norm=fresh needs a ViT with a layer norm after its last block, whose features "
            "are the mean of the patches: give backbone.global_pool=avg too, or backbone.final_norm=trained"
        )
    model.fc_norm = nn.LayerNorm(norm.normalized_shape, eps=norm.eps)
    model.norm = nn.Identity()


def check_name(name: str) -> None:
    """Refuse a name, such as a URL or a folder, that is neither the demo backbone's nor in timm's registry.

    Raises:
        UserError: The name is unknown; the message has the nearest ones.
    """
    architecture, _, tag = name.partition(".")
    if name == DEMO:
        return
    if not timm.is_model(architecture):
        raise unknown("backbone", name, [DEMO, *timm.list_models()])
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and name not in tagged:
        raise unknown("backbone", name, tagged or [architecture])


def _weights_file(spec: BackboneSpec) -> Path | None:
    """Return the file of weights to load; None for random weights."""
    if not spec.pretrained:
        return None
    if spec.weights is not None:
        return find_file(spec.weights)
    return _DEMO_WEIGHTS if spec.name == DEMO else hub_file(spec.name)


def _create(spec: BackboneSpec) -> Any:
    """Create the timm model, with random weights and without a classifier."""
    name, kwargs = spec.name, dict(spec.kwargs)
    if spec.name == DEMO:
        name, kwargs = _DEMO_MODEL, _DEMO_KWARGS | spec.kwargs
    side, config = spec.image_size, timm.get_pretrained_cfg(name)
    if side is not None and (config is None or config.fixed_input_size):
        kwargs = kwargs | {"img_size": spec.kwargs.get("img_size", side)}
    elif side is not None:  # a convolutional network takes any size: only its record of the size changes
        overlay = {"input_size": (3, side, side)} | kwargs.pop("pretrained_cfg_overlay", {})
        kwargs["pretrained_cfg_overlay"] = overlay
    return timm.create_model(name, num_classes=0, **kwargs)


__all__ = ["DEMO", "Backbone", "BackboneSpec", "build_backbone", "check_name"]
