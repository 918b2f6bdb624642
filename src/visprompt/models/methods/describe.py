"""Write docs/methods-by-backbones.md by trying every pair of method and backbone: `make docs`."""

from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch

from visprompt.errors import UserError
from visprompt.models.api import build
from visprompt.models.classifier import Classifier
from visprompt.models.methods import METHODS
from visprompt.models.methods.locations import LOCATIONS

_TINY_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
MEMBERS: Mapping[str, tuple[str, dict[str, Any]]] = {  # a small random member of each family
    "ViT": ("vit_tiny_patch16_224", _TINY_VIT),
    "DINOv3": ("vit_base_patch16_dinov3", {k: v for k, v in _TINY_VIT.items() if k != "patch_size"}),
    "EVA-02": ("eva02_base_patch14_224", _TINY_VIT | {"img_size": 28, "patch_size": 14}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4},
    ),
    "ConvNeXt": ("convnext_tiny", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}),
    "ResNet": ("resnet50", {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}),
}
_CLASSES = 3
_PIXELS = {"depth": 1, "dropout": 0.0}  # options that prompts of pixels need in a method with deep prompts
_HEAD = """# Methods by backbones

Written by `make docs`, which builds every pair with a small random backbone and takes a training step; a test
checks that this page is up to date. A number refers to the sentence that the pair is refused with. Words say
which `method.location` works instead of the default, and with which other options. The configs of
vpt_shallow_bias and vpt_deep_bias do not name location and depth: a `+` adds them, as in
`+method.location=pad`.

- ViT: timm's `VisionTransformer`: supervised ViT, DeiT III, MAE, MoCo v3, DINO, DINOv2, CLIP, SigLIP
- DINOv3, EVA-02: two members of timm's `Eva`, with rotary positions
- Swin: `SwinTransformer`. ConvNeXt: `ConvNeXt`. ResNet: `ResNet`

Blocks are residual blocks, counted through all stages; `depth` and partial's `num_blocks` count them. A
method enters at sites (`src/visprompt/models/contract.py`): `weights`, parameters of the backbone that may be
tuned; `modules`, layers that may be wrapped; `pixels`, the input images; `tokens`, prompts before a block;
`keys_values`, prompts in an attention; `branches`, terms added in a block; `stream`, one sequence of one
width that every attention sees whole, which neither windows nor convolutions have.
"""


def member(family: str) -> torch.nn.Module:
    """Build a small random model of a family of `MEMBERS`, with seed 0."""
    name, options = MEMBERS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=0, **options).eval()


def attempt(method: str, family: str, **options: Any) -> Classifier:
    """Build a pair and compute the gradients of one training step.

    Args:
        method: A name of `METHODS`.
        family: A name of `MEMBERS`.
        **options: Options of the method.

    Returns:
        The classifier, with gradients.

    Raises:
        UserError: The pair cannot work.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = build(member(family), method, _CLASSES, **options)
        side = int(classifier.backbone.image_size)  # type: ignore[arg-type]  # an int
        images = torch.randn(2, 3, side, side)
        weights = torch.full((2,), 0.5)
        classifier.losses(classifier(images), torch.tensor([0, 1]), weights).mean().backward()
    return classifier


def refusal(method: str, family: str, **options: Any) -> str | None:
    """Return the sentence that a pair is refused with; None if the pair works."""
    try:
        attempt(method, family, **options)
    except UserError as error:
        return str(error)
    return None


def markdown() -> str:
    """Return the page as Markdown."""
    reasons: list[str] = []
    lines = [_HEAD, *_table("method", [(name, name, {}) for name in METHODS], reasons), ""]
    lines += [
        "Where the prompts of `vpt_shallow` enter (`method.location`; see `models/methods/locations.py`):",
        "",
    ]
    places = [(place, "vpt_shallow", {"location": place}) for place in LOCATIONS]
    lines += [*_table("location", places, reasons), "", "Refused with:", ""]
    lines += [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    return "\n".join(lines) + "\n"


def _table(title: str, rows: list[tuple[str, str, dict[str, Any]]], reasons: list[str]) -> Iterator[str]:
    yield f"| {title} | {' | '.join(MEMBERS)} |"
    yield f"|---|{':-:|' * len(MEMBERS)}"
    for name, method, options in rows:
        cells = [_cell(method, family, options, reasons) for family in MEMBERS]
        yield f"| {name} | {' | '.join(cells)} |"


def _cell(method: str, family: str, options: dict[str, Any], reasons: list[str]) -> str:
    """Return a cell of the table: "yes", the locations that work with options, or a reason's number."""
    reason = refusal(method, family, **options)
    if reason is None:
        return "yes"
    if method.startswith("vpt_") and not options and "method.location" in reason:
        deep = {} if "shallow" in method else _PIXELS
        places = [place for place in LOCATIONS if refusal(method, family, location=place, **deep) is None]
        needed = ", ".join(f"{option}={value:g}" for option, value in deep.items())
        return ", ".join(places) + (f" with {needed}" if needed else "")
    if reason not in reasons:
        reasons.append(reason)
    return f"[{reasons.index(reason) + 1}]"


if __name__ == "__main__":
    print(markdown(), end="")
