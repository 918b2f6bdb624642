"""The hashes that name runs' folders, which must not change.

A run finds its folder in every later version.
"""

import json

import pytest

from helpers.goldens import IDENTITIES, demo_run, identity
from helpers.wide import REPRESENTATIVES, case
from visprompt.data.fgvc_datamodule import FGVCDataModule
from visprompt.data.vtab_datamodule import VTABDataModule
from visprompt.models.methods import METHODS

DEMO = [demo_run(method) for method in METHODS]
VTAB = [
    (f"data=vtab/{task}", "backbone=vit_b16_in21k") for task in ("cifar", "dsprites_loc", "patch_camelyon")
]
FGVC = [
    ("data=fgvc/cub200", "backbone=swin_b"),
    ("data=fgvc/nabirds", "backbone=vit_b16_in21k", "method=e2vpt"),
]
OTHERS = [
    (),
    ("split=tune", "seed=7"),
    ("data=demo/digits_crowded", "precision=bf16-mixed"),
    ("data=vtab/dtd", "backbone=vit_b16_in21k", "method=full", "preprocessing=petl", "seed=44"),
    ("data=vtab/svhn", "backbone=vit_b16_in21k", "method=lora", "data.source=prepared"),
    (
        "data=fgvc/stanford_dogs",
        "backbone=vit_b16_in21k",
        "method=linear",
        "data.final=train+val",
        "data.flip=0",
    ),
    ("method=vpt_deep", "method.depth=3", "method.depth_from=last", "method.num_tokens=5"),
    ("method=vpt_shallow", "recipe.lr=1", "recipe.epochs=20", "recipe.warmup_epochs=2"),
    ("method=linear", "recipe.optimizer=sgd", "recipe.momentum=0.8", "recipe.weight_decay=0"),
    ("debug=limit",),
    ("debug=fdr", "method=linear"),
    ("experiment=vtab_natural_deep", "data=vtab/cifar", "tasks=null"),
]


# fast: of the methods on the demo one for each set of sites
SLOW = {demo_run(method) for method in METHODS if method not in REPRESENTATIVES}


@pytest.mark.parametrize(
    "words",
    [case(words, fast=words not in SLOW, id=" ".join(words)) for words in (*DEMO, *VTAB, *FGVC, *OTHERS)],
)
def test_a_run_keeps_its_hash(words, monkeypatch):
    for kind in (VTABDataModule, FGVCDataModule):
        monkeypatch.setattr(kind, "fingerprint", "1" * 64)
    monkeypatch.setattr(FGVCDataModule, "origin", "raw:json")
    golden = json.loads(IDENTITIES.read_text())
    assert " ".join(words) in golden, "run make docs"
    assert identity(words) == golden[" ".join(words)]


def test_which_blocks_have_prompts_is_nothing_to_tell_where_all_have(monkeypatch):
    deep = identity(["data=demo/digits", "method=vpt_deep", "method.depth=12"])
    for word in ("method.depth_from=last", "method.carry_over=true"):
        assert identity(["data=demo/digits", "method=vpt_deep", "method.depth=12", word]) == deep
        assert identity(["data=demo/digits", "method=vpt_deep", word]) == identity(DEMO[8])
        some = ["data=demo/digits", "method=vpt_deep", "method.depth=11"]
        assert identity([*some, word]) != identity(some)
