"""A model that is a part of what a file holds.

Checkpoints of Lightning, of wrappers, of a student and its teacher.
"""

import pytest
import torch
from safetensors.torch import save_file

from helpers.tiny import tiny_model
from visprompt.errors import UserError
from visprompt.models.backbones.weights.loading import load_file


def under(prefix, model):
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def assert_loaded(file, source=None):
    model, expected = tiny_model(seed=1), (source or tiny_model()).state_dict()
    load_file(model, file)
    assert [
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, expected[name])
    ] == []


PREFIXES = [
    "model.",
    "net.",
    "backbone.",
    "module.",
    "_orig_mod.",
    "model.net.",
    "model._orig_mod.module.",
    "a.b.c.d.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_all_names_is_dropped(tmp_path, prefix):
    torch.save({"state_dict": under(prefix, tiny_model()), "epoch": 3}, tmp_path / "last.ckpt")
    assert_loaded(tmp_path / "last.ckpt")
    save_file(under(prefix, tiny_model()), tmp_path / "model.safetensors")
    assert_loaded(tmp_path / "model.safetensors")


@pytest.mark.parametrize("prefix", ["model.", "module.backbone."])
def test_heads_and_criteria_next_to_the_model_are_left_out(tmp_path, prefix):
    others = {
        "loss.weight": torch.ones(5),
        "classifier.weight": torch.ones(5, 32),
        prefix + "head.bias": torch.ones(5),
    }
    torch.save({"state_dict": under(prefix, tiny_model()) | others}, tmp_path / "last.ckpt")
    assert_loaded(tmp_path / "last.ckpt")


@pytest.mark.parametrize("key", ["net", "weights", "network"])
def test_a_checkpoint_may_keep_the_model_under_any_key(tmp_path, key):
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save(
        {key: under("module.", tiny_model()), "optimizer": optimizer, "epoch": 3}, tmp_path / "best.pt"
    )
    assert_loaded(tmp_path / "best.pt")


def test_of_two_models_that_fit_none_is_guessed(tmp_path):
    file = tmp_path / "last.ckpt"
    tensors = under("student.", tiny_model()) | under("teacher.", tiny_model(seed=2))
    torch.save({"state_dict": tensors}, file)
    with pytest.raises(UserError) as error:
        load_file(tiny_model(), file)
    assert str(error.value) == (
        f"{file} holds several models that fit this VisionTransformer, under student., teacher.: save the "
        "state_dict() of the one that you mean, and set backbone.weights to that file"
    )


def test_one_model_under_two_names_and_a_teacher_of_another_size_are_no_guess(tmp_path):
    torch.save(under("net.", tiny_model()) | under("compiled.net.", tiny_model()), tmp_path / "twice.pth")
    assert_loaded(tmp_path / "twice.pth")
    torch.save(
        under("student.", tiny_model()) | under("teacher.", tiny_model(embed_dim=64)), tmp_path / "two.pth"
    )
    assert_loaded(tmp_path / "two.pth")


def test_what_does_not_fit_is_said_of_the_part_that_is_closest(tmp_path):
    torch.save(under("model.", tiny_model(depth=3)) | {"loss.weight": torch.ones(5)}, tmp_path / "last.ckpt")
    with pytest.raises(
        UserError, match=r"VisionTransformer: it lacks 12 of 54 weights: blocks\.3\.norm1\.weight, "
    ):
        load_file(tiny_model(), tmp_path / "last.ckpt")
