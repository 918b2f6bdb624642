"""The hashes that name runs' folders, which must not change: a run finds its folder in every later version."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from visprompt.data.fgvc_datamodule import FGVCDataModule
from visprompt.data.vtab_datamodule import VTABDataModule
from visprompt.models.methods import METHODS
from visprompt.runs import run
from visprompt.runs.compose import composing, job
from visprompt.runs.identity import digest, identity_of
from visprompt.runs.job import Job

GOLDEN = Path(__file__).parents[1] / "golden" / "identities.json"
DEMO = [("data=demo/digits", f"method={method}") for method in METHODS]
VTAB = [(f"data=vtab/{task}", "backbone=vit_b16_in21k") for task in ("cifar", "dsprites_loc", "patch_camelyon")]
FGVC = [("data=fgvc/cub200", "backbone=swin_b"), ("data=fgvc/nabirds", "backbone=vit_b16_in21k", "method=e2vpt")]
OTHERS = [
    (),
    ("split=tune", "seed=7"),
    ("data=demo/digits_crowded", "precision=bf16-mixed"),
    ("data=vtab/dtd", "backbone=vit_b16_in21k", "method=full", "preprocessing=petl", "seed=44"),
    ("data=vtab/svhn", "backbone=vit_b16_in21k", "method=lora", "data.source=prepared"),
    ("data=fgvc/stanford_dogs", "backbone=vit_b16_in21k", "method=linear", "data.final=train+val", "data.flip=0"),
    ("method=vpt_deep", "method.depth=3", "method.depth_from=last", "method.num_tokens=5"),
    ("method=vpt_shallow", "recipe.lr=1", "recipe.epochs=20", "recipe.warmup_epochs=2"),
    ("method=linear", "recipe.optimizer=sgd", "recipe.momentum=0.8", "recipe.weight_decay=0"),
    ("debug=limit",),
    ("debug=fdr", "method=linear"),
    ("experiment=vtab_natural_deep", "data=vtab/cifar", "tasks=null"),
]


def identity(words):
    """The hash of a job on a backbone, and on data where they are not the demo's, that are not there."""
    with composing():
        cfg = job("train", words)
    assert Job.from_yaml(cfg.as_yaml()) == cfg, "what a rank reads is the same job"
    spec = {"name": cfg.backbone.name, "sha256": "0" * 64}
    blocks = SimpleNamespace(num_blocks=12)
    backbone = SimpleNamespace(image_size=224, mean=(0.5,) * 3, std=(0.5,) * 3, record=lambda: spec, module=blocks)
    return digest(identity_of(cfg, backbone, run.build_data(cfg, backbone)))


@pytest.mark.parametrize("words", [*DEMO, *VTAB, *FGVC, *OTHERS], ids=" ".join)
def test_a_run_keeps_its_hash(words, monkeypatch):
    for kind in (VTABDataModule, FGVCDataModule):
        monkeypatch.setattr(kind, "fingerprint", "1" * 64)
    monkeypatch.setattr(FGVCDataModule, "origin", "raw:json")
    assert identity(words) == json.loads(GOLDEN.read_text())[" ".join(words)]


def test_which_blocks_have_prompts_is_nothing_to_tell_where_all_have(monkeypatch):
    deep = identity(["data=demo/digits", "method=vpt_deep", "method.depth=12"])
    for word in ("method.depth_from=last", "method.carry_over=true"):
        assert identity(["data=demo/digits", "method=vpt_deep", "method.depth=12", word]) == deep
        assert identity(["data=demo/digits", "method=vpt_deep", word]) == identity(DEMO[8])
        some = ["data=demo/digits", "method=vpt_deep", "method.depth=11"]
        assert identity([*some, word]) != identity(some)
