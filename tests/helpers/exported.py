"""A finished run of a tiny network that nobody trained, to be exported."""

from pathlib import Path
from typing import Any

import torch

from helpers.cli import NET
from helpers.written_runs import result
from visprompt.data.catalog import TASKS
from visprompt.models.backbones import DEMO, BackboneSpec, build_backbone
from visprompt.models.classifier import Classifier, Origin
from visprompt.models.methods import build_method, recorded_options
from visprompt.models.tuned_state import TunedState, save_state
from visprompt.runs.result import write_result

IMAGES: dict[str, Any] = {
    **{"size": 64, "resize": "squash", "short_side": None, "decode": "upright", "native": None},
    **{"interpolation": "bilinear", "resampling": "pillow", "crop": None, "flip": 0.0},
    **{"mean": [0.5] * 3, "std": [0.25] * 3},
}


def finished_run(
    folder: Path, method: str = "vpt_deep", seed: int = 0, score: float = 0.8, **options: Any
) -> Path:
    """Writes the folder of a run on the digits: a tuned state that can be built again, and its result."""
    backbone = build_backbone(BackboneSpec(name=DEMO, pretrained=False, kwargs=NET))
    record, digits = backbone.record(), TASKS["digits"]
    torch.manual_seed(seed)
    classifier = Classifier(
        backbone.module, build_method(method, backbone.module, **options), digits.num_classes
    )
    classifier.origin = Origin(recorded_options(method, options), record)
    names = digits.class_names or tuple("0123456789")
    state = TunedState(
        tensors=classifier.tuned_state(), method=classifier.origin.method, task="digits", class_names=names,
        preprocessing=IMAGES, backbone=record, versions={"torch": "2"},
    )  # fmt: skip
    folder.mkdir(parents=True)
    checksum = save_state(folder / "tuned.safetensors", state)
    tuned = {"bytes": (folder / "tuned.safetensors").stat().st_size, "sha256": checksum}
    values: dict[str, Any] = {
        "seed": seed,
        "backbone": record,
        "tuned": tuned,
        "data": {"preprocessing": IMAGES},
    }
    write_result(folder, result("digits", method, score, options=dict(state.method), **values))
    return folder
