"""Backbones by name: what is loaded is what the file holds, and what cannot be had is said at once."""

import pickle
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import SIZE, images, relative_error, tiny_model
from visprompt import backbones
from visprompt.backbones import DEMO, BackboneSpec, build_backbone
from visprompt.errors import UserError
from visprompt.methods import build_method
from visprompt.state import hash_tensors

NAME = "vit_tiny_patch16_224"
HUB = "vit_base_patch16_224.augreg_in21k"
DEMO_FILE = Path(backbones.__file__).parent / "weights" / f"{DEMO}.safetensors"


def build(name=NAME, **options):
    return build_backbone(BackboneSpec(name=name, **({"kwargs": SIZE} | options)))


def state(backbone):
    return backbone.module.model.state_dict()


def linear_features(backbone, x):
    return backbone.module(x, build_method("linear", backbone.module))


def test_the_demo_backbone_is_the_embedded_file():
    backbone = build_backbone(BackboneSpec())
    held = load_file(DEMO_FILE)
    tensors = state(backbone)
    assert {"head." in name for name in held.keys() - tensors.keys()} <= {True}
    assert all(torch.equal(tensor, held[name].float()) for name, tensor in tensors.items())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    module = backbone.module
    assert (module.width, module.num_blocks, module.patch_size, backbone.image_size) == (192, 6, 8, 64)
    assert (backbone.mean, backbone.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert sum(tensor.numel() for tensor in tensors.values()) == 2_719_296
    assert not module.training
    assert backbone.sha256 == hash_tensors(tensors)


def test_a_record_says_how_to_build_it_again_and_nothing_of_this_machine(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(tiny_model().state_dict(), file)
    backbone = build(weights=str(file))
    assert backbone.record() == {
        "name": NAME,
        "pretrained": True,
        "image_size": None,
        "global_pool": None,
        "exact": True,
        "kwargs": SIZE,
        "sha256": hash_tensors(tiny_model().state_dict()),
    }


def test_random_weights_follow_the_seed_and_leave_the_generator_alone():
    spec = BackboneSpec(name=NAME, pretrained=False, kwargs=SIZE)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, again, other = (build_backbone(spec, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert first.sha256 == again.sha256 != other.sha256
    assert not torch.equal(state(first)["blocks.0.attn.qkv.weight"], state(other)["blocks.0.attn.qkv.weight"])


def test_the_channel_means_are_the_models_own():
    clip = build("vit_base_patch16_clip_224.openai", pretrained=False)
    assert clip.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert clip.image_size == 32


def jax_arrays(model):
    """A ViT in the layout of the official .npz files (Dosovitskiy et al.'s release)."""

    def projection(weight, bias):
        return {"kernel": weight.T.reshape(32, 2, 16), "bias": bias.reshape(2, 16)}

    def norm(layer):
        return {"scale": layer.weight, "bias": layer.bias}

    parts = {
        "embedding": {"kernel": model.patch_embed.proj.weight.permute(2, 3, 1, 0), "bias": model.patch_embed.proj.bias},
        "": {"cls": model.cls_token},
        "Transformer/posembed_input": {"pos_embedding": model.pos_embed},
        "Transformer/encoder_norm": norm(model.norm),
    }
    for i, block in enumerate(model.blocks):
        start = f"Transformer/encoderblock_{i}"
        weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            parts[f"{start}/MultiHeadDotProductAttention_1/{name}"] = projection(weight, bias)
        kernel = block.attn.proj.weight.T.reshape(2, 16, 32)
        parts[f"{start}/MultiHeadDotProductAttention_1/out"] = {"kernel": kernel, "bias": block.attn.proj.bias}
        parts |= {f"{start}/LayerNorm_0": norm(block.norm1), f"{start}/LayerNorm_2": norm(block.norm2)}
        for r, dense in enumerate((block.mlp.fc1, block.mlp.fc2)):
            parts[f"{start}/MlpBlock_3/Dense_{r}"] = {"kernel": dense.weight.T, "bias": dense.bias}
    return {f"{part}/{name}".lstrip("/"): t.detach().numpy() for part, ts in parts.items() for name, t in ts.items()}


WRITERS = {
    "safetensors": lambda model, path: save_file(model.state_dict(), path),
    "pth": lambda model, path: torch.save(model.state_dict(), path),
    "pth.tar": lambda model, path: torch.save({"state_dict": model.state_dict(), "epoch": 3}, path),
    "npz": lambda model, path: np.savez(path, **jax_arrays(model)),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_of_weights_is_loaded_whole_but_for_its_classifier(tmp_path, suffix):
    model = tiny_model(num_classes=7)
    file = tmp_path / f"weights.{suffix}"
    WRITERS[suffix](model, file)
    backbone = build(weights=str(file))
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    assert state(backbone).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state(backbone).items())
    assert backbone.sha256 == hash_tensors(expected)


def test_another_input_size_resamples_the_positions_alone():
    backbone, own = build_backbone(BackboneSpec(image_size=96)), build_backbone(BackboneSpec())
    assert backbone.image_size == 96
    changed = {name for name, tensor in state(backbone).items() if not torch.equal(tensor, state(own)[name])}
    assert changed == {"pos_embed"}
    assert state(backbone)["pos_embed"].shape == (1, 1 + 12 * 12, 192)


def test_another_pooling_keeps_the_trained_norm():
    """timm's own `create_model(global_pool="avg")` puts a fresh norm behind the pooling and drops the trained one."""
    backbone, x = build_backbone(BackboneSpec(global_pool="avg")), images(2, 64)
    assert backbone.sha256 == build_backbone(BackboneSpec()).sha256
    model = backbone.module.model
    assert relative_error(linear_features(backbone, x), model.forward_features(x)[:, 1:].mean(1)) < 1e-5


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [NAME, DEMO])
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("other.safetensors", {"foo": torch.zeros(2)}, r"Missing key\(s\) in state_dict: \"cls_token\""),
        ("deep.safetensors", {"depth": 6}, r"Unexpected key\(s\) in state_dict: \"blocks.4"),
        ("wide.pth", {"embed_dim": 64}, "size mismatch for cls_token"),
        ("garbage.safetensors", b"x" * 99, "header"),
        ("garbage.pth", b"x" * 99, "weights_only=True blocked"),
        ("empty.pth", b"", "EOFError"),
        ("garbage.npz", b"x" * 99, "expected an original JAX/Flax NumPy .npz"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, name, file, content, message):
    """timm alone would log what is missing and go on with random weights."""
    path = tmp_path / file
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        tensors = content if "foo" in content else tiny_model(**content).state_dict()
        (torch.save if file.endswith("pth") else save_file)(tensors, path)
    with pytest.raises(UserError, match=f"backbone {name} cannot be built or its weights do not fit: .*{message}") as e:
        build(name, weights=str(path))
    assert len(str(e.value)) < 500


def test_code_in_a_pickle_does_not_run(tmp_path):
    file, mark = tmp_path / "weights.pth", tmp_path / "ran"
    file.write_bytes(pickle.dumps({"pos_embed": Payload(mark)}, protocol=2))
    with pytest.raises(UserError, match="weights_only=True blocked"):
        build(weights=str(file))
    torch.save({"pos_embed": Payload(mark)}, file)
    with pytest.raises(UserError, match="weights_only=True blocked"):
        build(weights=str(file))
    assert not mark.exists()


@pytest.mark.parametrize("name", [NAME, DEMO])
def test_a_missing_file_is_named(name):
    with pytest.raises(UserError, match=r"there is no file of backbone weights at none\.pth: correct backbone"):
        build(name, weights="none.pth")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_bse_patch16_224", {}, "unknown backbone 'vit_bse_patch16_224': did you mean vit_base_patch16_224 or"),
        ("vit64_tiny_imagenet", {}, f"unknown backbone 'vit64_tiny_imagenet': did you mean {DEMO}"),
        (f"{HUB}k", {}, f"unknown backbone '{HUB}k': did you mean {HUB} or"),
        (f"{HUB}k", {"pretrained": False}, f"unknown backbone '{HUB}k': did you mean {HUB} or"),
        ("test_efficientnet", {"pretrained": False, "kwargs": {}}, "backbone class EfficientNet is not a plain timm"),
        ("deit_tiny_distilled_patch16_224", {"pretrained": False}, "class VisionTransformerDistilled is not a plain"),
        (NAME, {"pretrained": False, "global_pool": "mean"}, "Only avg, avgmax, max, token, map or prr pooling"),
        (NAME, {"pretrained": False, "global_pool": ""}, "the backbone pools nothing: set backbone.global_pool"),
        (DEMO, {"global_pool": "map", "kwargs": {}}, "Cannot currently add attention pooling"),
        (DEMO, {"kwargs": {"depth": 4}}, r"Unexpected key\(s\) in state_dict: \"blocks.4.attn"),
        (NAME, {"pretrained": False, "kwargs": {"dept": 2}}, "unexpected keyword argument 'dept'; check backbone.name"),
        (NAME, {"pretrained": False, "kwargs": {"num_heads": 5}}, "dim should be divisible by num_heads"),
        ("vit_base_patch16_18x2_224", {}, "timm has no pre-trained weights for backbone vit_base_patch16_18x2_224"),
    ],
)
def test_wrong_words_and_models_are_one_sentence(name, options, message):
    with pytest.raises(UserError, match=message) as error:
        build(name, **options)
    assert len(str(error.value)) < 700


MISSING = (
    f"the weights of backbone {HUB} are not on this machine and the hub cannot be reached: download "
    f"https://huggingface.co/timm/{HUB}/resolve/main/model.safetensors on another machine, "
    "copy it here and set backbone.weights=PATH"
)


@pytest.fixture
def empty_cache(monkeypatch):
    monkeypatch.setattr(backbones, "try_to_load_from_cache", lambda *_: None)


@pytest.fixture
def online(monkeypatch, empty_cache):
    monkeypatch.setattr(backbones.constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("empty_cache")
def test_missing_weights_fail_at_once_offline():
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        build_backbone(BackboneSpec(name=HUB))
    assert str(error.value) == MISSING
    assert time.monotonic() - start < 5


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("failure", [socket.gaierror("no such host"), TimeoutError(), ConnectionRefusedError()])
def test_missing_weights_fail_when_the_hub_cannot_be_reached(monkeypatch, failure):
    asked = []

    def refuse(address, timeout, *_):
        asked.append((address, timeout))
        raise failure

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(UserError) as error:
        build_backbone(BackboneSpec(name=HUB))
    assert str(error.value) == MISSING
    assert len(asked) == 1
    assert asked[0][1] <= 5


def test_weights_that_lie_outside_the_hub_are_named_by_their_url():
    with pytest.raises(UserError, match=r"download https://dl\.fbaipublicfiles\.com/ijepa/IN22K-vit\.g\S+ on another"):
        build_backbone(BackboneSpec(name="vit_giant_patch16_gap_224.in22k_ijepa"))


@pytest.fixture
def mirror(monkeypatch):
    """A hub on this machine that answers every question with 403."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(403)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(backbones.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("online", "mirror")
def test_a_mirror_that_answers_but_cannot_give_the_file_is_one_sentence(monkeypatch):
    def download(*_, **__):
        raise OSError("403 Client Error: Forbidden")

    monkeypatch.setattr(backbones.timm, "create_model", download)
    assert backbones._hub_answers()
    with pytest.raises(UserError, match=f"backbone {HUB} cannot be built .*: 403 Client Error: Forbidden; check"):
        build_backbone(BackboneSpec(name=HUB))


# timm reads the second one's original weights as .npz, but what the hub keeps is safetensors
@pytest.mark.parametrize(("name", "num_classes"), [("vit_base_patch16_224.mae", 0), (HUB, 21843)])
def test_a_cached_file_is_used_without_a_look_at_the_network(tmp_path, monkeypatch, name, num_classes):
    model, file, asked = tiny_model(num_classes=num_classes), tmp_path / "blob.safetensors", []
    save_file(model.state_dict(), file)
    monkeypatch.setattr(backbones, "try_to_load_from_cache", lambda *names: asked.append(names) or str(file))
    monkeypatch.setattr(socket, "create_connection", None)
    backbone = build(name)
    assert asked == [(f"timm/{name}", "model.safetensors")]
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    assert backbone.sha256 == hash_tensors(expected)
    with pytest.raises(UserError, match=r"Missing key\(s\) in state_dict: \"blocks.0.ls1.gamma"):
        build(name, kwargs=SIZE | {"init_values": 0.5})
