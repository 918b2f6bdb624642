"""A stranger's file of weights: tensors alone are read of it; what would run code is refused and not run."""

import argparse
import os
import pickle

import pytest
import torch

from helpers.tiny import geometry, tiny_model
from visprompt.errors import UserError
from visprompt.models.backbones import BackboneSpec, build_backbone
from visprompt.models.backbones.weights.loading import load_file
from visprompt.models.methods.sidetune import SideTune


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


PAYLOADS = {
    "os.system": Payload(os.system, "touch owned"),
    "eval": Payload(eval, "open('owned', 'w')"),
    "exec": Payload(exec, "open('owned', 'w')"),
    "getattr": Payload(getattr, 1, "real"),
}


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "ckpt", "pth.tar", "npz", "safetensors"])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_pickle_with_a_payload_is_refused(tmp_path, name, suffix, new):
    path = tmp_path / f"evil.{suffix}"
    torch.save(
        {"state_dict": {"a": torch.zeros(1)}, "args": PAYLOADS[name]},
        path,
        _use_new_zipfile_serialization=new,
    )
    with pytest.raises(UserError) as caught:
        load_file(tiny_model(), path)
    assert "\n" not in str(caught.value)


def test_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(PAYLOADS["os.system"]))
    for read in (
        lambda: build_backbone(BackboneSpec(name="vit_tiny_patch16_224", weights=str(tmp_path / "evil.pth"))),
        lambda: SideTune(geometry(), str(tmp_path / "evil.pth")),
    ):
        with pytest.raises(UserError):
            read()


def test_the_options_of_a_training_beside_the_weights_are_values_alone(tmp_path):
    """`argparse.Namespace`, which old checkpoints hold: nothing is called of it, whatever it holds."""
    model = tiny_model()
    options = argparse.Namespace(**{"lr": 0.1, "__reduce__": "y"})
    torch.save({"state_dict": model.state_dict(), "args": options}, tmp_path / "a.pth")
    load_file(tiny_model(seed=1), tmp_path / "a.pth")
    evil = argparse.Namespace(hook=PAYLOADS["os.system"])
    torch.save({"state_dict": model.state_dict(), "args": evil}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="holds objects that could run code"):
        load_file(tiny_model(), tmp_path / "b.pth")
