import io
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from pretrain import (
    METADATA_KEY,
    PhotoDataModule,
    PretrainRecipe,
    augment,
    build_network,
    decay_groups,
    pretrain,
    read_photos,
    to_unit,
)
from visprompt.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "src/visprompt/models/backbones/weights/vit64_tiny_imagenet_100.safetensors"
CLASSES = 8
TINY = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 2, "heads": 2, "precision": "32-true"}


def write_archive(path, per_class, size=16, classes=CLASSES):
    """One class for each corner of the colour cube, with noise."""
    rng = np.random.default_rng(per_class)
    files, labels = [], np.repeat(np.arange(classes), per_class).astype(np.int16)
    for label in labels:
        colour = np.array([label & 1, label >> 1 & 1, label >> 2 & 1]) * 180 + 20
        pixels = (colour + rng.integers(0, 30, (size, size, 3))).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    offsets = np.cumsum([0, *map(len, files)])
    names = np.array([f"colour {c}" for c in range(classes)])
    np.savez(path, jpeg=np.concatenate(files), offsets=offsets, labels=labels, class_names=names)
    return str(path)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    train = [write_archive(folder / "train_a.npz", 5), write_archive(folder / "train_b.npz", 3)]
    val = write_archive(folder / "val.npz", 2)
    return PretrainRecipe(
        train=train, val=val, epochs=1, full_epochs=1, batch_size=16, warmup_steps=2, **TINY
    )


def test_training_learns_and_stores_half_precision_weights_with_their_accuracy(recipe, tmp_path):
    output = tmp_path / "weights" / "tiny.safetensors"
    options = {"mixup": 0.2, "drop_path": 0.05, "brightness": 0.1, "contrast": 0.1, "crop_aspect": 0.1}
    run = replace(recipe, output=str(output), epochs=12, lr=5e-3, precision="bf16-mixed", **options)

    accuracy = pretrain(run, progress=False)

    assert accuracy >= 0.5  # chance is 0.125
    tensors = load_file(output)
    assert set(tensors) == set(build_network(run, CLASSES).state_dict())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    with safe_open(output, "pt") as file:
        text = file.metadata()[METADATA_KEY]
        assert list(file.metadata()) == [METADATA_KEY]
    record = json.loads(text)
    assert record["val_accuracy"] == accuracy
    assert record["val_images"] == 16
    assert record["class_names"] == [f"colour {c}" for c in range(CLASSES)]
    assert record["recipe"]["lr"] == 5e-3
    assert record["recipe"]["train"] == ["train_a.npz", "train_b.npz"]
    assert str(tmp_path) not in text
    assert [path.name for path in output.parent.iterdir()] == ["tiny.safetensors"]

    # 0 epochs evaluate what was stored, and need no training images
    again = replace(run, init=str(output), output=None, epochs=0, train=["nowhere.npz"])
    assert pretrain(again, progress=False) == accuracy


def test_patches_are_dropped_until_the_last_full_epochs(recipe, monkeypatch):
    seen = []
    forward = VisionTransformer.forward_head

    def spy(self, x, *args, **kwargs):
        seen.append((self.training, x.shape[1]))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(VisionTransformer, "forward_head", spy)
    pretrain(replace(recipe, epochs=3, full_epochs=1), progress=False)

    steps = [tokens for training, tokens in seen if training]
    # 64 images in batches of 16; 16 patches, 8 of them kept, and the class token
    assert steps == [9] * 8 + [17] * 4
    assert {tokens for training, tokens in seen if not training} == {17}


def test_a_loss_that_is_not_finite_stores_nothing(recipe, tmp_path):
    output = tmp_path / "never.safetensors"
    with pytest.raises(
        UserError, match=r"^the loss is not finite in epoch 1: lower lr=1e\+30, or warm up longer$"
    ):
        pretrain(replace(recipe, lr=1e30, warmup_steps=0, output=str(output)), progress=False)
    assert not output.exists()


def test_archives_are_joined_in_order_and_decoded_as_the_files_say(recipe):
    photos = read_photos(recipe.train, 16, "train")
    assert photos.images.shape == (64, 3, 16, 16)
    assert photos.labels.tolist() == np.repeat(np.arange(8), 5).tolist() + np.repeat(np.arange(8), 3).tolist()
    means = photos.images.float().mean((2, 3))
    for label, mean in zip(photos.labels.tolist(), means, strict=True):
        assert [value > 128 for value in mean.tolist()] == [bool(label & 1), bool(label & 2), bool(label & 4)]


def test_bytes_become_minus_one_to_one():
    scaled = to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1))
    assert scaled.flatten().tolist() == pytest.approx([-1, -0.6, 1])


def neutral(recipe, **changes):
    return replace(recipe, **({"crop_area": (1.0, 1.0), "crop_aspect": 0.0, "flip": 0.0} | changes))


def test_augmentation_without_strength_changes_nothing_and_a_sure_flip_mirrors(recipe):
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(augment(images, neutral(recipe)), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(augment(images, neutral(recipe, flip=1.0)), images.flip(3), atol=1e-5, rtol=0)


def test_a_crop_shows_the_stated_share_of_the_image(recipe):
    across = torch.linspace(-1, 1, 64).expand(32, 3, 64, 64)
    cropped = augment(across, neutral(recipe, crop_area=(0.25, 0.25)))
    width = (cropped[:, 0, 0, -1] - cropped[:, 0, 0, 0]) / 2
    assert width.tolist() == pytest.approx([0.5] * 32, abs=0.02)
    assert cropped[:, 0, 0, 0].std() > 0.1  # every image has a place of its own


def test_augmentation_stays_in_range_and_draws_for_each_image(recipe):
    images = (torch.rand(1, 3, 16, 16) * 2 - 1).expand(32, -1, -1, -1)
    strong = replace(recipe, crop_area=(0.4, 1.0), crop_aspect=0.15, brightness=0.9, contrast=0.9)
    augmented = augment(images, strong)
    assert augmented.shape == images.shape
    assert augmented.min() >= -1
    assert augmented.max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in augmented}) == 32


def test_only_matrices_decay(recipe):
    net = build_network(recipe, CLASSES)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = {group["weight_decay"]: group for group in decay_groups(net.named_parameters(), 1e-3, 0.05)}
    matrices = {
        name for name in names.values() if name.endswith(("qkv.weight", "proj.weight", "head.weight"))
    }
    matrices |= {name for name in names.values() if "mlp" in name and name.endswith("weight")}
    assert {names[id(p)] for p in groups[0.05]["params"]} == matrices
    assert {names[id(p)] for p in groups[0.0]["params"]} == set(names.values()) - matrices
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias"} <= set(names.values()) - matrices
    assert {group["lr"] for group in groups.values()} == {1e-3}


@pytest.mark.parametrize("setting", ["train", "val"])
def test_a_missing_archive_is_named_with_its_setting(recipe, setting):
    changed = replace(recipe, **{setting: ["lost.npz"] if setting == "train" else "lost.npz"})
    message = f"{setting}: there is no archive lost.npz; set {setting} to your .npz archive of photographs"
    with pytest.raises(UserError) as error:
        PhotoDataModule(changed)
    assert str(error.value) == message


def test_missing_and_foreign_starting_weights_are_one_sentence(recipe, tmp_path):
    with pytest.raises(UserError, match=r"^init: there is no file lost.safetensors; name a safetensors file"):
        build_network(replace(recipe, init="lost.safetensors"), CLASSES)
    with pytest.raises(UserError, match=r"^init: .* does not fit this network: .*pos_embed"):
        build_network(replace(recipe, init=str(WEIGHTS)), CLASSES)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(WEIGHTS.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"^init: .*cut.safetensors does not fit this network"):
        build_network(replace(recipe, init=str(cut)), CLASSES)


def test_archives_that_do_not_fit_are_named(recipe, tmp_path):
    with pytest.raises(UserError, match=r"^train is empty: name at least one .npz archive"):
        read_photos([], 16, "train")
    large = write_archive(tmp_path / "large.npz", 1, size=20)
    with pytest.raises(
        UserError, match=r"^val: .*large.npz is no archive of photographs of 16 x 16 .*one has 20 x 20"
    ):
        read_photos([large], 16, "val")
    text = tmp_path / "text.npz"
    text.write_text("not an archive")
    with pytest.raises(UserError, match=r"^train: .*text.npz is no archive of photographs"):
        read_photos([str(text)], 16, "train")
    fewer = write_archive(tmp_path / "fewer.npz", 1, classes=4)
    with pytest.raises(UserError, match=r"fewer.npz differ in their classes; join only like ones$"):
        read_photos([*recipe.train, fewer], 16, "train")
    with pytest.raises(UserError, match=r"^val: .*fewer.npz has other classes than the archives of train"):
        PhotoDataModule(replace(recipe, val=fewer))


def test_the_config_offers_every_setting_with_the_recipes_default():
    config = yaml.safe_load((ROOT / "benchmarks/pretrain.yaml").read_text())
    del config["progress"]
    defaults = {field.name: field.default for field in fields(PretrainRecipe)}
    assert set(config) == set(defaults)
    for name in set(defaults) - {"train", "val", "output"}:
        given = tuple(config[name]) if isinstance(config[name], list) else config[name]
        assert given == defaults[name], name


def test_the_embedded_weights_are_small_half_precision_and_fit_the_plain_vit():
    assert WEIGHTS.stat().st_size <= 5.6e6
    tensors = load_file(WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    net = VisionTransformer(img_size=64, patch_size=8, embed_dim=192, depth=6, num_heads=3, num_classes=100)
    net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
    assert sum(parameter.numel() for parameter in net.parameters()) == 2_738_596
