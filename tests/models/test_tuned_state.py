"""The tuned-state file: what it holds, how large it is, and that nothing damaged or foreign is taken for it."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.tiny import RECORD, tiny_classifier, tiny_model
from visprompt.errors import UserError
from visprompt.files import write_atomically
from visprompt.models.tensors import hash_tensors
from visprompt.models.tuned_state import TunedState, check_fits, load_state, save_state

BACKBONE = {
    "name": "vit_base_patch16_224.orig_in21k",
    "pretrained": True,
    "image_size": None,
    "global_pool": None,
    "exact": True,
    "kwargs": {"img_size": 32, "patch_size": 8},
    "sha256": "0123456789abcdef" * 4,
}
METHOD = {
    "name": "vpt_deep",
    "num_tokens": 10,
    "depth": None,
    "depth_from": "first",
    "carry_over": False,
    "dropout": 0.1,
}
PREPROCESSING = {
    "resize": "short_side", "short_side": 256, "size": 224, "flip": True, "interpolation": "bicubic",
    "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
LIBRARIES = ("python", "torch", "torchvision", "timm", "lightning", "safetensors", "visprompt")


def tuned(tensors=None, class_names=("cat", "dog"), **changes):
    small = {"prompts": torch.arange(6.0).reshape(1, 2, 3), "head.bias": torch.tensor([0.5, -0.0])}
    state = TunedState(
        tensors=small if tensors is None else tensors, method=METHOD, task="cifar", class_names=class_names,
        preprocessing=PREPROCESSING, backbone=BACKBONE, versions=dict.fromkeys(LIBRARIES, "12.34.56+cu128"),
    )  # fmt: skip
    return replace(state, **changes)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run" / "tuned.safetensors"


def test_what_is_saved_is_what_is_loaded(file):
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
    tensors = {f"t.{dtype}": torch.tensor([[0, 1, 1]]).to(dtype) for dtype in dtypes}
    tensors |= {
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }
    state = tuned(tensors)
    checksum = save_state(file, state)
    for path in (file, file.parent):
        loaded = load_state(path)
        assert replace(loaded, tensors={}) == replace(state, tensors={})
        assert loaded.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(loaded.tensors[name], tensor)
            assert loaded.tensors[name].dtype == tensor.dtype
    assert len(checksum) == 64


@pytest.mark.parametrize(
    "names",
    [
        ("cat",),
        ("",),
        ("été", "猫", "🐈"),
        ('"quoted"', "back\\slash", "a, b", "[v2]", "${x}", "=1"),
        ("¡", "¢£", "x"),
        (os.fsdecode(b"caf\xe9"), "cafe"),  # a folder whose name is no Unicode
        tuple(str(i) for i in range(1000)),
    ],
    ids=["one", "empty", "scripts", "escaped", "separators", "bytes", "thousand"],
)
def test_class_names_of_every_kind_come_back(file, names):
    save_state(file, tuned(class_names=names))
    assert load_state(file).class_names == names


def test_any_reader_of_safetensors_sees_the_tensors_and_one_key_of_metadata(file):
    checksum = save_state(file, tuned())
    assert load_file(file)["prompts"].tolist() == [[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]]
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert list(metadata) == ["visprompt"]
    assert metadata["visprompt"].startswith(checksum)
    held = json.loads(metadata["visprompt"][64:])
    assert {*held} == {"backbone", "class_names", "method", "preprocessing", "schema", "task", "versions"}
    assert (held["schema"], held["task"], held["method"]) == (1, "cifar", METHOD)


def test_the_same_content_gives_the_same_bytes(file, tmp_path):
    first = save_state(file, tuned())
    turned = {name: tuned().tensors[name] for name in reversed(tuned().tensors)}
    assert save_state(tmp_path / "b", tuned(turned)) == first
    assert (tmp_path / "b").read_bytes() == file.read_bytes()
    for other in (tuned(task="dtd"), tuned(class_names=("dog", "cat")), tuned({"prompts": torch.ones(1)})):
        assert save_state(tmp_path / "c", other) != first


def head(classes):
    return {
        "prompts": torch.zeros(12, 10, 64),
        "head.weight": torch.zeros(classes, 64),
        "head.bias": torch.zeros(classes),
    }


def full(**options):
    return tiny_classifier("full", model=tiny_model(embed_dim=8, **options)).tuned_state()


@pytest.mark.parametrize(
    ("tensors", "names"),
    [
        (head(2), ("cat", "dog")),
        (head(1000), tuple(f"{i:04} a rather long name of a class, as ImageNet has" for i in range(1000))),
        (head(1000), tuple(f"{i:04}" for i in range(1000))),
        (head(1000), tuple(f"类别{i}é" for i in range(1000))),
        (full(depth=24, init_values=1.0, qk_norm=True), ("a", "b")),
        ({}, ("a",)),
    ],
    ids=["small", "long names", "short names", "other scripts", "many tensors", "no tensor"],
)
def test_the_file_is_little_larger_than_its_tensors(file, tensors, names):
    save_state(file, tuned(tensors, names))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    allowed = size + 4096 + 192 * len(tensors) + sum(len(name.encode()) for name in names)
    assert file.stat().st_size <= allowed
    assert load_state(file).class_names == names


def flips(content):
    """Three bits of every byte: the lowest, the one that makes small letters capital ones, and another in turn."""
    for position in range(len(content)):
        for bit in {0, 5, position % 8}:
            yield (
                position,
                content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :],
            )


REFUSED = "is damaged: its checksum differs; copy it again or rerun its task|is not a readable tuned state .*: copy it again"


def minimal():
    """As small as a state can be, so that every byte of its file can be tried."""
    tensors = {"b": torch.tensor([1.0]), "p": torch.tensor([[0.0, -1.0]])}
    return TunedState(tensors=tensors, **RECORD | {"class_names": ("x", "y")})


def test_a_flipped_bit_is_refused_wherever_it_is(file):
    save_state(file, minimal())
    content = file.read_bytes()
    assert len(content) < 1000
    for position, damaged in flips(content):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=REFUSED):
            pytest.fail(f"byte {position} was changed, and it loads: {load_state(file)}")


def test_every_cut_and_every_longer_file_is_refused(file):
    save_state(file, minimal())
    content = file.read_bytes()
    for damaged in (
        *(content[:length] for length in range(len(content))),
        content + b"\0",
        content + content,
    ):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=REFUSED):
            load_state(file)
    file.write_bytes(content)
    assert load_state(file).task == "digits"


def test_tensors_under_exchanged_names_are_refused(file):
    """Same bytes, same shapes, same metadata: the names are of the checksum too."""
    save_state(file, tuned({"a": torch.zeros(2), "b": torch.ones(2)}))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({"a": torch.ones(2), "b": torch.zeros(2)}, file, metadata)
    with pytest.raises(UserError, match="is damaged: its checksum differs"):
        load_state(file)


def test_a_hash_tells_names_types_shapes_and_bytes_apart():
    base = {"a": torch.zeros(4), "b": torch.ones(2)}
    others = [
        {"a": torch.zeros(4), "c": torch.ones(2)},
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.ones(2)},
        {"a": torch.zeros(2, 2), "b": torch.ones(2)},
        {"a": torch.tensor([0.0, 0.0, -0.0, 0.0]), "b": torch.ones(2)},
        {"a": torch.zeros(4)},
    ]
    assert len({hash_tensors(tensors) for tensors in (base, *others)}) == 6
    assert hash_tensors(base) == hash_tensors(dict(reversed(base.items())))
    assert hash_tensors(base, also="x") != hash_tensors(base)
    assert hash_tensors({"t": torch.arange(6.0).reshape(2, 3).T}) == hash_tensors(
        {"t": torch.tensor([[0.0, 3], [1, 4], [2, 5]])}
    )


def test_a_file_that_is_no_tuned_state_is_named(file, tmp_path):
    with pytest.raises(
        UserError, match=f"there is no tuned state at {file}: give a finished run's folder or its tuned"
    ):
        load_state(file)
    with pytest.raises(UserError, match=f"there is no tuned state at {tmp_path}/tuned.safetensors"):
        load_state(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"weights.safetensors is not a readable tuned state \('visprompt'\)"):
        load_state(tmp_path / "weights.safetensors")
    (tmp_path / "note.txt").write_text("a text that is no tensor at all")
    with pytest.raises(UserError, match=r"note.txt is not a readable tuned state \(.*header"):
        load_state(tmp_path / "note.txt")


def test_a_newer_schema_is_refused(file, monkeypatch):
    monkeypatch.setattr("visprompt.models.tuned_state.SCHEMA", 2)
    save_state(file, tuned())
    monkeypatch.undo()
    with pytest.raises(
        UserError, match=r"tuned\.safetensors has schema 2, and this version reads 1: update visprompt"
    ):
        load_state(file)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (
            {"backbone": BACKBONE | {"name": "other", "sha256": "f" * 64}},
            r"was tuned on backbone vit_base_patch16_224\.orig_in21k \(weights 0123456789ab\), "
            r"not on other \(weights ffffffffffff\): load that backbone",
        ),
        (
            {"backbone": BACKBONE | {"name": "vit_base_patch16_clip_224.openai"}},  # of a file that two load
            "was tuned on architecture vit_base_patch16_224, not on vit_base_patch16_clip_224: load that "
            "backbone",
        ),
        (
            {"backbone": BACKBONE | {"global_pool": "avg"}},
            r"was tuned with backbone\.global_pool=None, not avg: set it",
        ),
        ({"backbone": BACKBONE | {"image_size": 96}}, r"was tuned with backbone\.image_size=None, not 96"),
        (
            {"backbone": BACKBONE | {"kwargs": {}}},
            r"was tuned with backbone\.kwargs={'img_size': 32, .*}, not {}",
        ),
        (
            {"method": METHOD | {"num_tokens": 50}},
            r"holds method {.*'num_tokens': 10.*}, not {.*'num_tokens': 50.*}",
        ),
        (
            {"method": {"name": "linear"}},
            r"holds method {'name': 'vpt_deep'.*}, not {'name': 'linear'}: build that",
        ),
        ({"class_names": ("cat", "dog", "owl")}, "has 2 classes, not 3: use data of the same classes"),
        (
            {"class_names": ("cat", "owl")},
            "has class 'dog' where this data has 'owl': use the state's classes in its order",
        ),
        ({"class_names": ("dog", "cat")}, "has class 'cat' where this data has 'dog'"),
    ],
)
def test_a_state_for_something_else_is_refused(expected, message):
    with pytest.raises(UserError, match=f"^runs/a {message}"):
        check_fits(tuned(), Path("runs/a"), **expected)


def test_a_state_for_the_same_is_taken():
    # the same weights, the same features
    elsewhere = BACKBONE | {
        "name": "vit_base_patch16_224",
        "exact": False,
    }
    check_fits(tuned(), Path("a"), backbone=elsewhere, method=dict(METHOD), class_names=["cat", "dog"])
    check_fits(tuned(), Path("a"))


def fail(*written, error):
    def write(path):
        for part in written:
            path.write_text(part)
        raise error

    return write


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            UserError,
            "cannot write .*: .*No space left on device; free",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (ValueError("a bug"), ValueError, "a bug"),
    ],
)
def test_what_cannot_be_written_whole_is_not_written_at_all(tmp_path, error, raised, message, old):
    path = tmp_path / "result.json"
    if old:
        path.write_text(old)
    with pytest.raises(raised, match=message):
        write_atomically(path, fail("half", error=error))
    assert [p.name for p in tmp_path.iterdir()] == (["result.json"] if old else [])
    assert not old or path.read_text() == old


def test_a_full_disk_leaves_the_old_state(file, monkeypatch):
    save_state(file, tuned())
    content = file.read_bytes()

    def refuse(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("visprompt.models.tuned_state.save_file", refuse)
    with pytest.raises(UserError, match=r"cannot write .*tuned\.safetensors: .*No space left"):
        save_state(file, tuned(task="dtd"))
    assert file.read_bytes() == content
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"cannot write .*file/a/b: .*; free some space or choose another folder"
    ):
        write_atomically(tmp_path / "file" / "a" / "b", lambda path: path.write_text("x"))


def test_a_file_replaces_the_old_one_and_can_be_read_by_others(tmp_path):
    path = tmp_path / "a" / "b.txt"
    for text in ("first", "second"):
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
        assert path.read_text() == text
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]
