"""Weights that timm names: from a cache without a look at the network, fetched, or said at once to be missing."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
import urllib3
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from test_flax import release_arrays

from helpers.tiny import SIZE, tiny_model
from visprompt.errors import UserError
from visprompt.models.backbones import BackboneSpec, build_backbone
from visprompt.models.backbones.weights import hub
from visprompt.models.backbones.weights.hub import hub_file
from visprompt.models.tensors import hash_tensors

HUB = "vit_base_patch16_224.augreg_in21k"
IJEPA = "vit_giant_patch16_gap_224.in22k_ijepa"
WHERE = (
    f"download https://huggingface.co/timm/{HUB}/resolve/main/model.safetensors on another machine, "
    f"copy it here to data/backbones/{HUB}.safetensors and set "
    f"backbone.weights=data/backbones/{HUB}.safetensors"
)
MISSING = f"the weights of backbone {HUB} are not on this machine and the hub cannot be reached: {WHERE}"


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))


@pytest.fixture
def online(monkeypatch, empty_cache):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("empty_cache")
def test_missing_weights_fail_at_once_offline():
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        build_backbone(BackboneSpec(name=HUB))
    assert str(error.value) == MISSING
    assert time.monotonic() - start < 5


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    "failure", [socket.gaierror("no such host"), TimeoutError(), ConnectionRefusedError()]
)
def test_missing_weights_fail_when_the_hub_cannot_be_reached(monkeypatch, failure):
    asked = []

    def refuse(address, timeout, **_):
        asked.append((address, timeout))
        raise failure

    monkeypatch.setattr(urllib3.util.connection, "create_connection", refuse)
    with pytest.raises(UserError) as error:
        build_backbone(BackboneSpec(name=HUB))
    assert str(error.value) == MISSING
    assert len(asked) == 1
    assert asked[0][1] <= 5


@pytest.mark.usefixtures("empty_cache")
def test_weights_that_lie_outside_the_hub_are_named_by_their_url():
    with pytest.raises(
        UserError, match=rf"download https://dl\.fbaipublicfiles\.com/ijepa/IN22K\S+ .*{IJEPA}\.tar$"
    ):
        hub_file(IJEPA)


@pytest.mark.usefixtures("online")
def test_weights_that_lie_outside_the_hub_are_fetched_once(monkeypatch, tmp_path):
    fetched = []

    def download(url, file):
        fetched.append(url)
        tmp_path.joinpath(file).write_bytes(b"weights")

    monkeypatch.setattr(hub, "answers", lambda address: address.startswith("https://dl.fbaipublicfiles.com"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    file = tmp_path / "torch" / "checkpoints" / "IN22K-vit.g.16-600e.pth.tar"
    assert [hub_file(IJEPA), hub_file(IJEPA)] == [file, file]
    assert fetched == [f"https://dl.fbaipublicfiles.com/ijepa/{file.name}"]


@pytest.fixture
def mirror(monkeypatch):
    """A hub on this machine that answers every question with 403."""

    class Refusing(BaseHTTPRequestHandler):
        wait = 0.0

        def do_HEAD(self):
            time.sleep(self.wait)
            self.send_error(403)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Refusing
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("online", "mirror")
def test_a_mirror_that_answers_but_cannot_give_the_file_is_one_sentence(monkeypatch):
    def download(*_):
        raise OSError("403 Client Error:\nForbidden")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert hub.answers(hub.constants.ENDPOINT)
    with pytest.raises(UserError) as error:
        build_backbone(BackboneSpec(name=HUB))
    expected = MISSING.replace(
        "the hub cannot be reached", "could not be fetched (403 Client Error: Forbidden)"
    )
    assert str(error.value) == expected.replace("https://huggingface.co", hub.constants.ENDPOINT)


@pytest.mark.usefixtures("online")
def test_a_slow_mirror_is_waited_for_longer_than_a_connection(monkeypatch, mirror):
    assert hub._TIMEOUT == (5.0, 30.0)
    mirror.wait = 0.3
    monkeypatch.setattr(hub, "_TIMEOUT", (0.1, 5.0))
    assert hub.answers(hub.constants.ENDPOINT)
    monkeypatch.setattr(hub, "_TIMEOUT", (5.0, 0.1))
    assert not hub.answers(hub.constants.ENDPOINT)
    assert not hub.answers("no address")


@pytest.mark.usefixtures("online", "mirror")
def test_a_hub_without_safetensors_gives_its_other_file(monkeypatch, tmp_path):
    asked = []

    def download(where, name):
        asked.append((where, name))
        if name == "model.safetensors":
            raise EntryNotFoundError("404")
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert hub_file(HUB) == tmp_path / "pytorch_model.bin"
    assert asked == [(f"timm/{HUB}", "model.safetensors"), (f"timm/{HUB}", "pytorch_model.bin")]


# timm reads the second one's original weights as .npz, but what the hub keeps is safetensors
@pytest.mark.parametrize(("name", "num_classes"), [("vit_base_patch16_224.mae", 0), (HUB, 21843)])
def test_a_cached_file_is_used_without_a_look_at_the_network(tmp_path, monkeypatch, name, num_classes):
    model, file, asked = tiny_model(num_classes=num_classes), tmp_path / "blob.safetensors", []
    save_file(model.state_dict(), file)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *names: asked.append(names) or str(file))
    monkeypatch.setattr(socket, "create_connection", None)
    backbone = build_backbone(BackboneSpec(name=name, kwargs=SIZE))
    assert asked == [(f"timm/{name}", "model.safetensors")]
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    assert backbone.sha256 == hash_tensors(expected)
    with pytest.raises(UserError, match=r"it lacks 8 of 62 weights: blocks\.0\.ls1\.gamma"):
        build_backbone(BackboneSpec(name=name, kwargs=SIZE | {"init_values": 0.5}))


@pytest.mark.parametrize("size", [None, 48])
def test_the_hub_a_file_and_google_s_file_are_the_same_backbone(tmp_path, monkeypatch, size):
    """At another size too: all resize the positions alike."""

    save_file(tiny_model().state_dict(), tmp_path / "model.safetensors")
    np.savez(tmp_path / "google.npz", **release_arrays(tiny_model()))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "model.safetensors"))
    kwargs = {name: value for name, value in SIZE.items() if name != "img_size"}
    sides = [None, *(str(tmp_path / name) for name in ("model.safetensors", "google.npz"))]
    built = [
        build_backbone(BackboneSpec(name=HUB, weights=w, image_size=size or 32, kwargs=kwargs)) for w in sides
    ]
    assert len({backbone.sha256 for backbone in built}) == 1
    assert (built[0].sha256 == hash_tensors(tiny_model().state_dict())) == (size is None)
    assert built[0].module.model.pos_embed.shape[1] == 1 + (built[0].image_size // 8) ** 2
