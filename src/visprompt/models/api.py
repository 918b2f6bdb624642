"""The library without Hydra and Lightning: build a classifier, save what was tuned, load it again."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visprompt.errors import UserError, unknown
from visprompt.models.backbones import Backbone, BackboneSpec, build_backbone
from visprompt.models.backbones.families import family
from visprompt.models.backbones.family import Family
from visprompt.models.classifier import Classifier, Origin
from visprompt.models.heads import head_name
from visprompt.models.hub_state import state_path
from visprompt.models.kind import KINDS, SINGLE_LABEL
from visprompt.models.layers import Wrapped
from visprompt.models.methods import build_method, recorded_options
from visprompt.models.methods.locations import MoreChannels
from visprompt.models.methods.sidetune import RANDOM
from visprompt.models.state_schema import check_record
from visprompt.models.tensors import hash_tensors
from visprompt.models.tuned_state import TunedState, check_fits, load_state, save_state


def build(
    backbone: str | nn.Module,
    method: str,
    num_classes: int,
    *,
    head_init: str = "vpt",
    kind: str = SINGLE_LABEL.name,
    head: str = "linear",
    **options: Any,
) -> Classifier:
    """Build a classifier whose method and head are drawn from torch's global generator.

    Args:
        backbone: A timm model, or the name of one (with its pre-trained weights) or of the embedded demo
            backbone. A model is copied, because methods wrap and freeze its layers, so it can be given again.
            The model inside a classifier cannot, if its method wrapped layers.
        method: A name of `visprompt.models.methods.METHODS`.
        num_classes: Number of classes, the width of the head (C).
        head_init: "vpt", as in the released VPT code, "zeros", or "normal", as in mmsegmentation.
        kind: "single_label"; "multi_label" if an image may have several classes: its labels are [B, C] of 0
            and 1; or "segmentation" if each pixel has a class: logits are [B, C, H, W], labels [B, H, W], 255
            where they are ignored.
        head: Of a segmentation task: "linear", or "setr_pup" (`visprompt.models.heads.setr_pup`).
        **options: Options of the method, such as num_tokens. If initial values are computed from training
            images (`init=...`, `whitening=...`), call `visprompt.models.methods.inits.initialise` before
            training.

    Returns:
        The classifier: `classifier(images) -> logits [B, C]` of normalised images, `tuned_state()`,
        `load_tuned_state(state)`, `summary()`. Images are normalised with `classifier.backbone.mean` and
        `.std`. Store the tuned state with `visprompt.save`, load it with `visprompt.load`, and convert the
        classifier to a plain timm model with `visprompt.merge`.

    Raises:
        UserError: A name or option is unknown, method and backbone do not fit, or the model holds layers of
            another method.
    """
    if isinstance(backbone, str):
        built = build_backbone(BackboneSpec(name=backbone))
        module, record = built.module, built.record()
    else:
        given = copied(backbone)
        module, record = given.module, given.record()
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    built_method = build_method(method, module, **options)
    classifier = Classifier(module, built_method, num_classes, head_init, KINDS[kind], head)
    classifier.origin = Origin(recorded_options(method, options), record)
    return classifier


def save(
    classifier: Classifier,
    path: str | PathLike[str],
    *,
    class_names: Sequence[str],
    task: str = "own",
    preprocessing: Mapping[str, Any] | None = None,
    temperature: float | None = None,
) -> None:
    """Write the tuned parameters of a classifier to one file, a few hundred kilobytes for prompts.

    Args:
        classifier: A classifier from `build` or `load`.
        path: The file, usually `*.safetensors`; replaced atomically.
        class_names: Names of the classes, in the order of the head's rows.
        task: Name of the state, for display.
        preprocessing: How images become the backbone's input, in the keys of a run's record; these replace
            the defaults: images are rotated by their EXIF orientation and resized to the backbone's size by
            Pillow's bilinear filter, without keeping the aspect ratio.
        temperature: What logits are divided by for probabilities, see
            `classifier.kind.fit_temperature(logits, labels)`; None for that of the classifier.

    Raises:
        UserError: There are more or fewer names than classes, or the file cannot be written.
    """
    if len(class_names) != classifier.num_classes:
        raise UserError(
            f"class_names has {len(class_names)} names, and the classifier {classifier.num_classes} "
            "classes: give one name for each"
        )
    if classifier.origin is None:
        raise UserError(
            "this classifier has no record of what it was built from: build it with visprompt.build"
        )
    if not classifier.origin.backbone["name"]:
        raise UserError(
            "this classifier's backbone has no name by which it could be built again: build from a model "
            "that timm.create_model returned"
        )
    backbone: Any = classifier.backbone
    images = {"size": backbone.image_size, "resize": "squash", "decode": "upright"}
    images |= {"interpolation": "bilinear", "resampling": "pillow", "native": None, "short_side": None}
    images |= {"crop": None, "flip": 0.0}
    images |= {"mean": list(backbone.mean), "std": list(backbone.std)}
    state = TunedState(
        tensors=classifier.tuned_state(),
        method=classifier.origin.method,
        task=task,
        class_names=tuple(class_names),
        preprocessing=images | dict(preprocessing or {}),
        backbone=classifier.origin.backbone,
        versions={name: version(name) for name in ("torch", "timm", "visprompt")},
        kind=classifier.kind.name,
        head=head_name(classifier.head),
        temperature=temperature or (None if classifier.temperature == 1 else classifier.temperature),
    )
    about = {f.name: getattr(state, f.name) for f in fields(state) if f.name != "tensors"}
    check_record(about, "this state", "it could not be read again")
    save_state(Path(path), state)


def load(
    path: str | PathLike[str], backbone: nn.Module | None = None, *, weights: str | None = None
) -> Classifier:
    """Build the classifier of a tuned state.

    Args:
        path: The file; a folder that holds it (of a finished run, or from the hub); or "hf-hub:user/name" for
            a repository of the Hugging Face hub, with "@revision" for another revision than `main`.
        backbone: A timm model with the weights that the state was tuned on; it is copied. Its name and its
            weights are compared with the state's, its options (heads, pooling) are not. None builds the
            backbone by its name.
        weights: A file of these weights; None for the embedded backbone or timm's weights.

    Returns:
        The classifier, in evaluation mode, with its `class_names`.

    Raises:
        UserError: The file is not a tuned state, was tuned on another backbone, or cannot be downloaded.
    """
    file = state_path(path)
    state = load_state(file)
    if backbone is None:
        return restore(state, file, backbone_of(state, weights))
    given = copied(backbone)
    return restore(state, file, replace(given, spec=settings_of(given.spec, state)))


def settings_of(spec: BackboneSpec, state: TunedState) -> BackboneSpec:
    """Return the spec of a model that a user gave, with the settings of a state's backbone.

    They are settings of a build, which a model that is given does not have.
    """
    names = ("image_size", "global_pool", "final_norm", "exact", "kwargs")
    return replace(spec, **{name: state.backbone[name] for name in names if name in state.backbone})


def restore(state: TunedState, path: Path, backbone: Backbone) -> Classifier:
    """Build the classifier of a tuned state on a backbone.

    Args:
        state: The tuned state.
        path: The state's file, for messages.
        backbone: The backbone to use; its module becomes part of the classifier.

    Returns:
        The classifier, in evaluation mode.

    Raises:
        UserError: The state was tuned on another backbone.
    """
    check_fits(state, path, backbone=backbone.record())
    classifier = untuned(state, backbone.module)
    classifier.load_tuned_state(state.tensors)
    return classifier.eval()


def untuned(state: TunedState, backbone: Family) -> Classifier:
    """Build the classifier of a tuned state without loading its tensors."""
    options = dict(state.method)
    if "weights" in options:  # the hash of the side network's initial weights; the state has the tuned ones
        options["weights"] = RANDOM
    with torch.random.fork_rng(devices=[]):  # the values that are drawn are replaced by the state's
        method = build_method(options.pop("name"), backbone, **options)
        kind = KINDS[state.kind]
        classifier = Classifier(backbone, method, len(state.class_names), kind=kind, head=state.head)
    classifier.origin = Origin(state.method, state.backbone)
    classifier.class_names = state.class_names
    classifier.temperature = state.temperature or 1.0
    return classifier


def backbone_of(state: TunedState, weights: str | None) -> Backbone:
    """Build the backbone that a tuned state names.

    Args:
        state: The state.
        weights: A file of its weights; None for the embedded backbone or timm's weights.
    """
    known = {field.name for field in fields(BackboneSpec)}
    spec = BackboneSpec(**{name: value for name, value in state.backbone.items() if name in known})
    try:
        return build_backbone(replace(spec, weights=weights))
    except UserError as error:
        if weights is not None:
            raise
        raise UserError(
            f"{error}; if the state was tuned on weights of a file, give that file: weights=FILE"
        ) from error


def copied(backbone: nn.Module) -> Backbone:
    """Return a copy of a user's timm model as a backbone."""
    _check_plain(backbone)
    model: Any = copy.deepcopy(backbone)
    module = model.eval() if isinstance(model, Family) else family(model)
    plain: Any = module.model
    config = getattr(plain, "pretrained_cfg", None) or {}  # set by timm's factory
    if "mean" in config and not hasattr(module, "mean"):
        module.mean, module.std = tuple(config["mean"]), tuple(config["std"])
    name = ".".join(filter(None, (config.get("architecture"), config.get("tag"))))
    head = {id(parameter) for parameter in plain.get_classifier().parameters()}
    tensors = {key: value for key, value in plain.state_dict(keep_vars=True).items() if id(value) not in head}
    spec = BackboneSpec(name=name)
    return Backbone(module, spec, hash_tensors(tensors), module.image_size, (), ())


def _check_plain(model: nn.Module) -> None:
    """Refuse a model with layers of an earlier method, whose values the new tuned state would not hold."""
    for name, module in model.named_modules():
        if isinstance(module, Wrapped | MoreChannels):
            raise UserError(
                f"this model still has a layer of another method, {name}: build from a new model, or from "
                "one that visprompt.merge returned"
            )
