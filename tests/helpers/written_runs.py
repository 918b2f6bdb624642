"""Writes folders of finished runs that nobody trained, as runs write them."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from visprompt.reports.load import frame
from visprompt.runs.result import Result, write_result

VIT_B = "vit_base_patch16_224.orig_in21k"
VIT_B_SIZE = 85_798_656  # parameters without a head
PREPROCESSING = {
    "size": 224,
    "resize": "squash",
    "short_side": None,
    "decode": "rgb",
    "native": None,
    "interpolation": "bilinear",
    "resampling": "tf1",
    "crop": None,
    "flip": 0.0,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
CROPPED = PREPROCESSING | {
    "resize": "short_side",
    "short_side": 256,
    "resampling": "pillow",
    "crop": "random",
    "flip": 0.5,
}
RECIPE = {"optimizer": "sgd", "lr": 1.0, "weight_decay": 0.001, "epochs": 100, "batch_size": 64}


def result(task: str = "cifar", method: str = "linear", score: float = 0.5, **changes: Any) -> Result:
    """A finished run's record. A mapping among the changes changes its own keys only.

    `options` are the method's.
    """
    values: dict[str, Any] = {
        "status": "finished",
        "task": task,
        "method": {"name": method} | changes.pop("options", {}),
        "recipe": RECIPE,
        "split": "final",
        "seed": 42,
        "attempt": 0,
        "precision": "32-true",
        "data": {"source": "raw", "fingerprint": sha256(task.encode()).hexdigest(), "fraction": 1.0}
        | {"preprocessing": PREPROCESSING, "form": "lossless", "sizes": {"test": 1000}},
        "backbone": {
            "name": VIT_B,
            "pretrained": True,
            "image_size": None,
            "sha256": "a" * 64,
            "carried_blocks": [],
        },
        "metrics": {"train/loss": 0.5},
        "per_class": {},
        "tuned": {"parameters": 9216, "head_parameters": 7690, "share": 9216 / VIT_B_SIZE, "macs": 17_000_000}
        | {"bytes": 24},
        "time": {"train_s": 100.0, "last_process_s": 110.0},
        "peak_memory": {"bytes": 2**30, "of": "GPU allocations"},
        "machine": {"device": "NVIDIA H200", "devices": 1, "accumulation": 1, "threads": 8},
        "versions": {"git_commit": "0123456789ab"},
        "trainer": {},
    }
    for name, change in changes.items():
        values[name] = values[name] | change if isinstance(change, dict) else change
    values["metrics"] = values["metrics"] | {"val/acc" if values["split"] == "tune" else "test/acc": score}
    return Result(**values)


def deep(score: float, tokens: int = 10, split: str = "final", **changes: Any) -> Result:
    """A finished run of VPT-deep on CIFAR-100, with the sizes of its split sets."""
    options = {"num_tokens": tokens} | changes.pop("options", {})
    data = {"sizes": {"train800": 800, "val200": 200, "test": 1000}} | changes.pop("data", {})
    return result("cifar", "vpt_deep", score, options=options, split=split, data=data, **changes)


def points(line: Any) -> list[tuple[Any, Any, Any]]:
    """A chart's line as it compares with numbers."""
    return [(p.x, pytest.approx(p.y), p.spread and pytest.approx(p.spread)) for p in line.points]


def write(root: Path, record: Result, name: str | None = None) -> Path:
    """Writes a run's folder below a folder of logs, as `run.py` lays them out, and returns it."""
    content = json.dumps(
        [record.method, record.recipe, record.data, record.backbone, record.precision, record.split]
    )
    digest = sha256(f"{content}{record.seed}".encode()).hexdigest()[:12]
    folder = root / record.task / str(record.method["name"]) / (name or digest)
    folder.mkdir(parents=True)
    if record.status == "finished":
        (folder / "tuned.safetensors").write_bytes(b"\0" * record.tuned["bytes"])
    write_result(folder, record)
    return folder


def changed(record: Result, **values: Any) -> Result:
    """A record with other values in place of its own, checked like a new one."""
    return Result(**vars(record) | values)


def table(*records: Result) -> pd.DataFrame:
    """The table of runs that lie in folders run0, run1 and so on."""
    return frame((Path(f"run{i}"), record) for i, record in enumerate(records))
