"""Small ViTs whose every part matters to the output, and prompt tuning as the paper's equations read."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.methods import Method, build_method

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
NUM_CLASSES = 5
NUM_IMAGE = 17  # class token and 16 patches


def geometry(
    width: int = 32,
    num_blocks: int = 4,
    heads: int = 2,
    patch_size: int = 8,
    image_size: int = 32,
    **others: Any,
) -> Any:
    """What a method may ask of a plain ViT with a class token; no model is built."""
    side = image_size // patch_size
    facts = {
        "width": width,
        "widths": (width,) * num_blocks,
        "num_blocks": num_blocks,
        "heads": (heads,) * num_blocks,
        "grids": ((side, side),) * num_blocks,
        "block_names": tuple(f"blocks.{i}" for i in range(num_blocks)),
        "between_names": (None,) * num_blocks,
        "final_names": ("norm", "fc_norm"),
        "stem": "patch_embed.proj",
        "model": nn.ModuleDict(
            {"patch_embed": nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, patch_size)})}
        ),
        "patch_size": patch_size,
        "image_size": image_size,
        "any_size": False,
        "num_prefix": 1,
        "has_class_token": True,
        "sites": frozenset({"tokens", "weights", "pixels", "stream", "modules", "keys_values", "branches"}),
    }
    return SimpleNamespace(**facts | others)


RECORD: dict[str, Any] = {  # what a tuned state says beside its tensors
    "method": {"name": "linear"},
    "task": "digits",
    "class_names": tuple("abcde"),
    "preprocessing": {
        "size": 32, "resize": "squash", "short_side": None, "decode": "upright", "native": None,
        "interpolation": "bilinear", "resampling": "pillow", "crop": None, "flip": 0.0,
        "mean": [0.5] * 3, "std": [0.5] * 3,
    },
    "backbone": {
        "name": "vit_tiny_patch16_224", "pretrained": False, "image_size": None, "global_pool": None, "exact": True,
        "kwargs": {}, "sha256": "0123456789abcdef" * 4,
    },
    "versions": {},
}  # fmt: skip


VIT_B_SIZE = {"width": 768, "num_blocks": 12, "heads": 12, "patch_size": 16, "image_size": 224}


def tiny_model(seed: int = 0, **options: Any) -> VisionTransformer:
    """A timm ViT with large random weights.

    Under timm's own small ones, attention is flat and hides mistakes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionTransformer(**{"num_classes": 0} | SIZE | options).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                start = parameter if parameter.ndim == 1 else 0
                parameter.copy_(start + 0.2 * torch.randn_like(parameter))
    return model


def tiny_classifier(
    method: str = "vpt_deep", exact: bool = True, model: Any = None, **options: Any
) -> Classifier:
    """A classifier on a tiny ViT, with prompts large enough to be seen, and branches that no longer start at zero."""
    backbone = ViT(tiny_model() if model is None else model, exact=exact)
    torch.manual_seed(1)
    classifier = Classifier(backbone, build_method(method, backbone, **options), NUM_CLASSES)
    with torch.no_grad():
        for name, parameter in classifier.method.named_parameters():
            if name == "prompts":
                parameter.normal_()
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return classifier


def built(method_class: type[Method], model: Any = None, **options: Any) -> Classifier:
    """A classifier on a tiny ViT whose tuned numbers are all large enough to be seen."""
    backbone = ViT(tiny_model() if model is None else model)
    torch.manual_seed(1)
    classifier = Classifier(backbone, method_class(backbone, **options), NUM_CLASSES)
    with torch.no_grad():
        for _, parameter in classifier.tuned_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return classifier


def timm_logits(classifier: Classifier, x: Tensor) -> Tensor:
    """The head on what timm's own forward makes of the images."""
    model: Any = classifier.backbone.model
    return classifier.head(model.forward_head(model.forward_features(x), pre_logits=True))


def images(batch: int = 2, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


def naive_features(
    model: Any, x: Tensor, prompts: Tensor, first: int, carry_over: bool, masks: Any = None
) -> Tensor:
    """Features as the equations of VPT read.

    Prompts behind the class token, through timm's whole block, cut off.
    """
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    place, count = int(model.has_class_token), 0
    for i, block in enumerate(model.blocks):
        own = first <= i < first + len(prompts)
        if own or (i == first + len(prompts) and not carry_over):
            x = torch.cat([x[:, :place], x[:, place + count :]], dim=1)
            count = 0
        if own:
            p = prompts[i - first].expand(len(x), -1, -1)
            x = torch.cat([x[:, :place], p if masks is None else p * masks[i - first], x[:, place:]], dim=1)
            count = p.shape[1]
        x = block(x)
    x = torch.cat([x[:, :place], x[:, place + count :]], dim=1)
    return model.forward_head(model.norm(x), pre_logits=True)


def naive_logits(classifier: Classifier, x: Tensor, masks: Any = None) -> Tensor:
    """Logits of a prompt-tuned classifier by way of `naive_features`."""
    method = classifier.method
    features = naive_features(
        classifier.backbone.model, x, method.prompts, method.first_block, method.carry_over, masks
    )
    return classifier.head(features)


def measured(classifier: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """The logits, and the gradient of every tuned parameter under cross-entropy and what the method adds to it."""
    labels = torch.arange(len(logits)) % NUM_CLASSES
    names, parameters = zip(
        *((n, p) for n, p in classifier.named_parameters() if p.requires_grad), strict=True
    )
    gradients = torch.autograd.grad(mean_loss(classifier, logits, labels), parameters)
    return {"logits": logits.detach(), **dict(zip(names, gradients, strict=True))}


def mean_loss(classifier: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """What training minimises; of a reference that is no `Classifier`, the cross-entropy."""
    if not isinstance(classifier, Classifier):
        return F.cross_entropy(logits.float(), labels)
    return classifier.losses(logits, labels, torch.full((len(labels),), 1 / len(labels))).mean()


def relative_error(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).abs().max() / b.abs().max())


def worst_error(a: dict[str, Tensor], b: dict[str, Tensor], names: Sequence[str] | None = None) -> float:
    """The largest relative error over named tensors."""
    assert a.keys() == b.keys()
    return max(relative_error(a[name], b[name]) for name in names or b)
