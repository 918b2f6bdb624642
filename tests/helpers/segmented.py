"""Segmentation states of a tiny network that nobody trained, on windows of 64 pixels, and pictures for them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from helpers.cli import NET
from helpers.exported import IMAGES
from visprompt.models.backbones import DEMO, BackboneSpec, build_backbone
from visprompt.models.classifier import Classifier, Origin
from visprompt.models.kind import KINDS
from visprompt.models.methods import build_method, recorded_options
from visprompt.models.tuned_state import TunedState, save_state

CLASSES = ("sky", "sea", "sand")
WINDOWS = IMAGES | {"resize": "windows", "short_side": 64}
"""Preprocessing under which images keep their ratio"""


def segmenter(
    method: str = "vpt_deep",
    head: str = "linear",
    seed: int = 0,
    kind: str = "segmentation",
    **options: Any,
) -> Classifier:
    """A classifier in evaluation mode whose random values give different answers everywhere."""
    backbone = build_backbone(BackboneSpec(name=DEMO, pretrained=False, kwargs=NET))
    record = backbone.record()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = build_method(method, backbone.module, **options)
        classifier = Classifier(backbone.module, built, len(CLASSES), kind=KINDS[kind], head=head)
        with torch.no_grad():
            for _, parameter in classifier.tuned_parameters():
                parameter.add_(torch.randn_like(parameter))
    classifier.origin = Origin(recorded_options(method, options), record)
    return classifier.eval()


def state_of(classifier: Classifier, head: str = "linear", **preprocessing: Any) -> TunedState:
    """The tuned state of a result of `segmenter`, of images that are covered by windows."""
    assert classifier.origin
    return TunedState(
        tensors=classifier.tuned_state(), method=classifier.origin.method, task="beach", class_names=CLASSES,
        preprocessing=(WINDOWS if classifier.kind.dense else IMAGES) | preprocessing, backbone=classifier.origin.backbone, versions={"torch": "2"},
        kind=classifier.kind.name, head=head,
    )  # fmt: skip


def write_state(path: Path, task: str = "beach", **options: Any) -> Path:
    """Writes the state of a segmenter, or with `kind=single_label` of a task on the same backbone."""
    classifier = segmenter(**options)
    save_state(path, replace(state_of(classifier, options.get("head", "linear")), task=task))
    return path


def picture(path: Path, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Writes a picture of large coloured squares as a PNG, and returns it."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    image = Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG")
    return np.asarray(image)
