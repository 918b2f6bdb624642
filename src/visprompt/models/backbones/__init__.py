"""Backbones by name: the embedded demo ViT and timm's, with weights from a file, timm's cache or its hub."""

import textwrap
from dataclasses import asdict, dataclass, field
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
        name: The embedded demo backbone's name or a timm model name, with or without a pre-training tag.
        weights: A file of weights (.safetensors, .pth, .npz) or a folder with one; None takes timm's cache or
            hub.
        pretrained: False leaves random weights, for tests and for training from scratch.
        image_size: Side of the input in pixels; None is the model's own.
        global_pool: Another of timm's poolings for the trained model, whose norms stay where they are; None
            is its own.
        final_norm: "trained" for the norm behind the last block as it was trained; "fresh" for one of weight
            1 and bias 0 behind the mean in its place, as the codes of MAE, VPT and E2VPT pool MAE's features.
        exact: False carries prompt tokens through every block, for comparison.
        kwargs: Further arguments of the timm model, such as depth and embed_dim of a tiny one; see `options`.

    Raises:
        UserError: Random weights and a file of weights are both asked for.
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
                "for those of a file: leave one of them out, or give backbone.weights=null"
            )


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

    module: Family
    spec: BackboneSpec
    sha256: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def record(self) -> dict[str, Any]:
        """Return what a result and a tuned state keep: how to build it again, and the weights' hash."""
        # where the file of weights lay is no part of what it holds
        return {k: v for k, v in asdict(self.spec).items() if k != "weights"} | {"sha256": self.sha256}


def build_backbone(spec: BackboneSpec, seed: int = 0) -> Backbone:
    """Build a backbone and loads its weights.

    Args:
        spec: Which one.
        seed: Seed of random weights, where `spec.pretrained` is false.

    Returns:
        The backbone, in evaluation mode.

    Raises:
        UserError: The name is unknown, the weights cannot be had, or they do not fit; says what to do.
    """
    check_name(spec.name)
    check_kwargs(spec.kwargs)
    file = _weights_file(spec)  # looked for first: a large model takes a minute to build
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _create(spec)
        if file:
            load_file(model, file)
        if spec.global_pool is not None:
            model.reset_classifier(0, spec.global_pool)
        if spec.final_norm == "fresh":
            _renew_norm(model)
        module = family(model, spec.exact)
    except UserError:
        raise
    except Exception as error:  # timm raises of every kind
        said = textwrap.shorten(reason(error), 300, placeholder=" ...")
        raise UserError(
            f"backbone {spec.name} cannot be built: "
            f"{said or 'one of its settings is unknown or of a wrong kind'}; "
            "check backbone.name, backbone.image_size, backbone.global_pool and backbone.kwargs"
        ) from error
    if spec.image_size not in (None, module.image_size):
        raise UserError(
            f"backbone.image_size={spec.image_size} was not taken, {spec.name} is built for "
            f"{module.image_size}: "
            "give one size alone, as +backbone.kwargs.img_size=... where the model needs it so"
        )
    config = model.pretrained_cfg if spec.name != DEMO else {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    module.mean, module.std = tuple(config["mean"]), tuple(config["std"])
    digest = hash_tensors(model.state_dict())
    return Backbone(module, spec, digest, module.image_size, module.mean, module.std)


def _renew_norm(model: Any) -> None:
    """Drop the trained norm behind the last block, and put one of weight 1 and bias 0 behind the mean."""
    norm = getattr(model, "norm", None)
    if (
        not isinstance(model, VisionTransformer)
        or not isinstance(norm, nn.LayerNorm)
        or model.global_pool != "avg"
    ):
        raise UserError(
            "backbone.final_norm=fresh is for a ViT with a layer norm behind its last block whose features "
            "are the "
            "mean of the patches: give backbone.global_pool=avg with it, or backbone.final_norm=trained"
        )
    model.fc_norm = nn.LayerNorm(norm.normalized_shape, eps=norm.eps)
    model.norm = nn.Identity()


def check_name(name: str) -> None:
    """Raise unless a name is the embedded backbone's or one of timm's registry.

    An address or a folder is neither.

    Raises:
        UserError: Names the nearest ones.
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
    """Return the file of weights to load; None where none are wanted."""
    if not spec.pretrained:
        return None
    if spec.weights is not None:
        return find_file(spec.weights)
    return _DEMO_WEIGHTS if spec.name == DEMO else hub_file(spec.name)


def _create(spec: BackboneSpec) -> Any:
    """Return the model with random weights and without a classifier."""
    name, kwargs = (
        (_DEMO_MODEL, _DEMO_KWARGS | spec.kwargs) if spec.name == DEMO else (spec.name, dict(spec.kwargs))
    )
    side, config = spec.image_size, timm.get_pretrained_cfg(name)
    if side is not None and (config is None or config.fixed_input_size):
        kwargs = kwargs | {"img_size": spec.kwargs.get("img_size", side)}
    elif (
        side is not None
    ):  # a convolutional network takes any size: what is changed is what it says of itself
        overlay = {"input_size": (3, side, side)} | kwargs.pop("pretrained_cfg_overlay", {})
        kwargs["pretrained_cfg_overlay"] = overlay
    return timm.create_model(name, num_classes=0, **kwargs)


__all__ = ["DEMO", "Backbone", "BackboneSpec", "build_backbone", "check_name"]
