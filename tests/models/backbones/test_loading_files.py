"""Files and folders of weights: which one is meant, and what is said of one that cannot be used."""

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_flax import release_arrays

from helpers.tiny import tiny_model
from visprompt.errors import UserError
from visprompt.models.backbones.weights.loading import PUBLISHED, find_file, load_file

REVISION = "5d8f2c0b"


@pytest.fixture
def cache(tmp_path):
    """A model's folder in the Hugging Face cache: blobs, and snapshots of links to them."""
    folder = tmp_path / "models--org--tiny"
    (folder / "blobs").mkdir(parents=True)
    snapshot = folder / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    save_file(tiny_model().state_dict(), folder / "blobs" / "a1b2")
    (snapshot / "model.safetensors").symlink_to("../../blobs/a1b2")
    (snapshot / "config.json").write_text("{}")
    return folder


def assert_loads(path):
    model, source = tiny_model(seed=1), tiny_model().state_dict()
    load_file(model, path)
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())


def test_a_folder_of_the_cache_and_its_snapshot_name_the_same_file(cache):
    snapshot = cache / "snapshots" / REVISION
    assert find_file(cache) == find_file(snapshot) == snapshot / "model.safetensors"
    assert_loads(cache)
    assert_loads(str(snapshot))


def test_of_several_snapshots_main_s_is_taken(cache):
    other = cache / "snapshots" / "0000"
    other.mkdir()
    with pytest.raises(
        UserError, match=rf"has several snapshots \(0000, {REVISION}\): give one of their folders as"
    ):
        find_file(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(f"{REVISION}\n")
    assert find_file(cache) == cache / "snapshots" / REVISION / "model.safetensors"


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "open_clip_pytorch_model.bin", "mae_base.pth", "encoder.pth.tar", "last.ckpt"],
)
def test_a_folder_s_only_file_of_weights_is_taken_whatever_its_name(tmp_path, name):
    torch.save(tiny_model().state_dict(), tmp_path / name)
    (tmp_path / "README.md").write_text("weights")
    assert_loads(tmp_path)
    (tmp_path / "a.npz").touch()
    if "pytorch_model" in name:  # a usual name stands before any other
        assert_loads(tmp_path)
        return
    with pytest.raises(
        UserError, match=f"should hold one file of backbone weights and holds a.npz, {name}: give"
    ):
        find_file(tmp_path)


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(tiny_model().state_dict(), tmp_path / "w.safetensors")
    assert_loads("~/w.safetensors")


def test_a_folder_without_weights_is_named(cache):
    (cache / "blobs" / "a1b2").unlink()  # the link in the snapshot leads nowhere
    with pytest.raises(UserError) as error:
        find_file(cache)
    assert str(error.value) == (
        f"the folder {cache}/snapshots/{REVISION} should hold one file of backbone weights and holds neither "
        "model.safetensors nor another one: give the file itself as backbone.weights=..."
    )


def test_a_missing_file_is_named_with_where_it_is_published(tmp_path):
    with pytest.raises(
        UserError, match=rf"no file of backbone weights at {tmp_path}/a\.pth: correct backbone.weights"
    ):
        find_file(tmp_path / "a.pth")
    with pytest.raises(UserError) as error:
        find_file(tmp_path / "vit-b-300ep.pth.tar")
    assert str(error.value) == (
        f"there is no file of backbone weights at {tmp_path}/vit-b-300ep.pth.tar: download "
        "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar to that place, "
        "or name another one by backbone.weights=FILE"
    )
    assert all(url.endswith(f"/{name}") for name, url in PUBLISHED.items())


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_pickle_does_not_run(tmp_path):
    file, mark = tmp_path / "weights.pth", tmp_path / "ran"
    for write in (
        lambda held: file.write_bytes(pickle.dumps(held, protocol=2)),
        lambda held: torch.save(held, file),
    ):
        write({"pos_embed": Payload(mark)})
        with pytest.raises(UserError, match="holds objects that could run code and are not read: get"):
            load_file(tiny_model(), file)
    assert not mark.exists()


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(tiny_model(), tmp_path / "model.pt")
    with pytest.raises(
        UserError, match=r"or save its state_dict\(\) alone and set backbone\.weights to that file"
    ):
        load_file(tiny_model(), tmp_path / "model.pt")


def test_a_lightning_checkpoint_of_more_than_tensors_is_refused_with_the_line_that_writes_them(tmp_path):
    file = tmp_path / "last.ckpt"
    torch.save(
        {"state_dict": state(), "hyper_parameters": {"optimizer": partial(torch.optim.Adam, lr=0.1)}}, file
    )
    with pytest.raises(UserError) as error:
        load_file(tiny_model(), file)
    assert str(error.value) == (
        f"{file} is not a file of weights, or holds objects that could run code and are not read: if you "
        "trust "
        f"it, write its tensors alone by torch.save(torch.load('{file}', weights_only=False)['state_dict'], "
        "'weights.pth') and set backbone.weights to that file"
    )


WRITERS = {
    "safetensors": save_file,
    "pth": torch.save,
    "npz": lambda arrays, path: np.savez(path, **arrays),
}


def state(changed=None, **options):
    return tiny_model(**options).state_dict() | (changed or {})


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_that_is_cut_short_is_refused(tmp_path, suffix):
    file = tmp_path / f"weights.{suffix}"
    WRITERS[suffix](release_arrays(tiny_model()) if suffix == "npz" else state(), file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(
        UserError, match=r"weights\.\w+ cannot be read as backbone weights \(.+\): it may be truncated"
    ):
        load_file(tiny_model(), file)


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        ("safetensors", b"x" * 99, "cannot be read as .*header.*: it may be truncated or of another kind"),
        ("pth", b"<html>" * 99, "is not a file of weights, or holds objects"),
        ("pth", b"", r"cannot be read as backbone weights \(.*EOF"),
        ("npz", b"x" * 99, "cannot be read as backbone weights .*allow_pickle"),
        ("npz", {"a": np.ones(3)}, "it holds a, but no embedding/kernel of a ViT"),
        ("pth", torch.ones(3), "holds an object of class Tensor, not weights by name"),
        ("pth", [torch.ones(3)], "holds an object of class list, not weights by name"),
        ("pth", {"net": state(depth=3), "epoch": 3}, r"it lacks 12 of 54 weights: blocks\.3\.norm1\.weight"),
        (
            "pth",
            {"epoch": 3},
            "it lacks 54 of 54 weights: .*; the model does not have 1 of the file's weights: epoch",
        ),
        ("pth", {}, "it lacks 54 of 54 weights: cls_token, pos_embed"),
        ("safetensors", state(depth=5), r"does not have 12 of the file's weights: blocks\.4\."),
        ("safetensors", state(depth=3), r"lacks 12 of 54 weights: blocks\.3\.norm1\.weight"),
        (
            "safetensors",
            state(embed_dim=64),
            r"other shapes: blocks.0.attn.proj.bias \[64\], which is \[32\] here",
        ),
        (
            "safetensors",
            state(reg_tokens=1),
            r"not have 1 of the file's weights: reg_token; .* \[1 x 18 x 32\]",
        ),
        ("safetensors", state({"norm.bias": torch.ones(31)}), r"norm\.bias \[31\], which is \[32\] here"),
        ("pth", state({"norm.bias": "text"}), r"does not have 1 of the file's weights: norm\.bias"),
        ("pth", state({"norm.bias": torch.full((32,), torch.nan)}), r"not finite: norm\.bias"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence_and_changes_nothing(tmp_path, suffix, content, message):
    file, model = tmp_path / f"weights.{suffix}", tiny_model(seed=1)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        WRITERS[suffix](content, file)
    with pytest.raises(UserError, match=message) as error:
        load_file(model, file)
    sentence = str(error.value)
    assert sentence.startswith(str(file))
    assert len(sentence) < len(str(file)) + 450
    assert "\n" not in sentence
    assert "backbone.weights" in sentence or "state_dict()" in sentence
    unchanged = tiny_model(seed=1).state_dict()
    assert all(torch.equal(tensor, unchanged[name]) for name, tensor in model.state_dict().items())
