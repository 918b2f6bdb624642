"""Every config of a backbone names weights that timm knows, and says of them what timm says."""

import re
from pathlib import Path

import pytest
import timm

from helpers.cli import ROOT, composed
from visprompt.errors import UserError
from visprompt.models.backbones import BackboneSpec, build_backbone
from visprompt.runs import compose

FOLDER = ROOT / "configs" / "backbone"
NAMED = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in ("timm", "demo"))
OF_TIMM = [name for name in NAMED if name != "moco_v3_b16"]
TINY = {"embed_dim": 32, "depth": 1, "num_heads": 2}


def spec(name, *arguments):
    with composed("train", f"backbone={name}", *arguments) as cfg:
        (job,) = compose.jobs(cfg)
    return BackboneSpec(**dict(job.backbone))


def header(name):
    return [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]


def test_the_backbones_are_these():
    self_supervised = {"mae_b16", "moco_v3_b16", "dino_b16", "dinov2_b14", "dinov3_b16", "eva02_b14"}
    supervised = {
        "vit_b16_in21k",
        "vit_l16_in21k",
        "vit_h14_in21k",
        "vit_b16_augreg",
        "convnext_b_in21k",
        "resnet50",
    }
    assert set(NAMED) == self_supervised | supervised | {
        "clip_b16",
        "siglip_b16",
        "swin_t",
        "swin_s",
        "swin_b",
        "swin_l",
    }


@pytest.mark.parametrize("name", OF_TIMM)
def test_timm_has_the_weights_under_the_licence_that_the_header_names(name):
    found = spec(name)
    assert found.weights is None
    assert found.name in timm.list_models(pretrained=True)
    config = timm.get_pretrained_cfg(found.name)
    assert config.hf_hub_id == f"timm/{found.name.replace('_quickgelu', '')}"
    assert f"# licence: {config.license}" in header(name)


@pytest.mark.parametrize("name", NAMED)
def test_a_header_names_the_paper(name):
    first, paper, licence, *_ = header(name)
    assert re.match(r"# (ViT|Swin|ConvNeXt|ResNet|EVA)\S*", first)
    assert re.fullmatch(r"# paper: .+ et al\., .+\((\w+ )?20\d\d\)", paper)
    assert licence.startswith("# licence: ")


@pytest.mark.parametrize(("name", "side"), [("dinov2_b14", 224), ("dinov3_b16", 256), ("vit_b16_in21k", 224)])
def test_sizes_are_those_of_the_header(name, side):
    found = spec(name)
    assert (found.image_size or timm.get_pretrained_cfg(found.name).input_size[1]) == side


def test_mae_pools_the_patches_by_default_and_takes_the_papers_pooling():
    assert spec("mae_b16").global_pool == "avg"
    assert spec("mae_b16", "backbone.global_pool=token").global_pool == "token"
    with composed("train", "backbone=mae_b16", "method.pool=image_prompt") as cfg:
        assert cfg.method.pool == "image_prompt"


def test_moco_v3_asks_for_its_file_and_never_takes_timm_s_weights(tmp_path):
    found = spec("moco_v3_b16", f"paths.data_dir={tmp_path}")
    file = tmp_path / "backbones" / "vit-b-300ep.pth.tar"
    assert Path(found.weights) == file
    with pytest.raises(UserError) as error:
        build_backbone(found)
    url = "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar"
    assert str(error.value) == (
        f"there is no file of backbone weights at {file}: download {url} to that place, "
        "or name another one by backbone.weights=FILE"
    )
    assert any(url in line for line in header("moco_v3_b16"))


def test_moco_v3_is_normalised_with_its_own_means_and_reads_the_class_token():
    found = spec("moco_v3_b16")
    backbone = build_backbone(BackboneSpec(name=found.name, pretrained=False, kwargs=found.kwargs | TINY))
    dino = timm.get_pretrained_cfg("vit_base_patch16_224.dino")  # of the same laboratory and images
    assert (backbone.mean, backbone.std) == (dino.mean, dino.std)
    assert backbone.module.model.global_pool == "token"
    assert found.global_pool is None
