"""A stranger's tuned.safetensors.

Its metadata are data, whatever they say, and its checksum is no signature.
"""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from helpers import miniatures
from helpers.cli import call
from helpers.tiny import RECORD
from visprompt.errors import UserError
from visprompt.models.tensors import hash_tensors
from visprompt.models.tuned_state import TunedState, load_state, save_state
from visprompt.runs import predict

TENSORS = {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}
MEND = "do not use this file, get it again from whoever tuned it$"


def write(folder, text, tensors=TENSORS):
    """A file with any metadata, and a checksum that is right."""
    path = folder / "tuned.safetensors"
    save_file(dict(tensors), path, {"visprompt": hash_tensors(tensors, also=text) + text})
    return path


def changed(*keys, to):
    """The metadata of a good state with one value changed."""
    meta = copy.deepcopy(RECORD) | {"schema": 1, "class_names": "|a|b|c|d|e"}
    place = meta
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    return meta


def refused(path, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        predict.predict(str(path), ".", output="out.csv", batch_size=1, device="cpu", weights=None)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_the_state_that_these_are_made_of_is_good(tmp_path):
    assert load_state(write(tmp_path, json.dumps(changed("task", to="dtd")))).task == "dtd"


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"cache_dir": "src"}, r"unknown option in backbone\.kwargs 'cache_dir'"),
        ({"pretrained": True}, r"unknown option in backbone\.kwargs 'pretrained'"),
        ({"checkpoint_path": "/etc/passwd"}, r"unknown option in backbone\.kwargs 'checkpoint_path'"),
        ({"pretrained_cfg": {"url": "http://127.0.0.1:1/x.pth"}}, r"unknown option in .* 'pretrained_cfg'"),
        (
            {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:1/x"}},
            r"unknown option in .*overlay 'url': choose one of",
        ),
        (
            {"pretrained_cfg_overlay": {"file": [1, 2, 3]}},
            r"unknown option in .*overlay 'file': choose one of mean, std",
        ),
        (
            {"pretrained_cfg_overlay": {"mean": [1]}},
            r"backbone\.kwargs\.pretrained_cfg_overlay does not fit: give mean",
        ),
        (
            {"pretrained_cfg_overlay": "http://127.0.0.1:1/"},
            r"backbone\.kwargs\.pretrained_cfg_overlay does not fit: ",
        ),
        ({"features_only": True}, r"unknown option in backbone\.kwargs 'features_only'"),
        ({"scriptable": True}, r"unknown option in backbone\.kwargs 'scriptable'"),
        ({"block_fn": "os.system"}, r"unknown option in backbone\.kwargs 'block_fn'"),
        (
            {"act_layer": "os.system"},
            r"backbone\.kwargs\.act_layer='os\.system' does not fit: give one of gelu, ",
        ),
        (
            {"depth": 10**9},
            r"backbone\.kwargs\.depth=1000000000 does not fit: give a whole number from 0 to 16384",
        ),
        ({"depth": -1}, r"backbone\.kwargs\.depth=-1 does not fit"),
        ({"depth": True}, r"backbone\.kwargs\.depth=True does not fit"),
        ({"depths": [1] * 1000}, r"backbone\.kwargs\.depths=\[1, 1, .* does not fit"),
        ({"mlp_ratio": math.inf}, r"backbone\.kwargs\.mlp_ratio=inf does not fit: give a number"),
        ({"qk_norm": "yes"}, r"backbone\.kwargs\.qk_norm='yes' does not fit: give true or false"),
        ({"_target_": "os.system"}, r"unknown option in backbone\.kwargs '_target_'"),
    ],
)
def test_options_of_a_backbone_are_an_allow_list_of_plain_values(tmp_path, kwargs, sentence):
    refused(
        write(tmp_path, json.dumps(changed("backbone", "kwargs", to=kwargs))),
        f"is refused: {sentence}.*; {MEND}",
    )


@pytest.mark.parametrize(
    ("keys", "value", "sentence"),
    [
        (("backbone", "name"), "hf-hub:evil/model", r"unknown backbone 'hf-hub:evil/model'|backbone\.name"),
        (("backbone", "name"), "local-dir:/tmp/x", r"backbone\.name"),
        (("backbone", "name"), "timm/vit_tiny_patch16_224", r"backbone\.name"),
        (("backbone", "name"), "../../vit", r"backbone\.name"),
        (
            ("backbone", "name"),
            "vit_tiny_patch16_224.evil",
            r"unknown backbone 'vit_tiny_patch16_224\.evil': did you",
        ),
        (("backbone", "name"), 7, r"backbone\.name should be a valid string, and is 7"),
        (("backbone", "weights"), "/etc/passwd", r"backbone\.weights is not a key of this version"),
        (("backbone", "sha256"), "x", r"backbone\.sha256 "),
        (("backbone", "image_size"), 10**12, r"backbone\.image_size should be less than or equal to 16384"),
        (("backbone", "image_size"), 224.0, r"backbone\.image_size should be a valid integer, and is 224\.0"),
        (("backbone", "pretrained"), 1, r"backbone\.pretrained should be a valid boolean, and is 1"),
        (("backbone", "exact"), None, r"backbone\.exact should be a valid boolean, and is None"),
        (("backbone", "global_pool"), "os.system", r"backbone\.global_pool should be 'token', 'avg'"),
        (("backbone",), ["vit"], r"backbone should be a valid dictionary"),
        (("method", "name"), "os.system", r"unknown method 'os\.system': "),
        (("method", "name"), ["linear"], r"unknown method \"\['linear'\]\": "),
        (("method", "weights"), "/etc/passwd", r"unknown option of method linear 'weights'"),
        (
            ("method",),
            {"name": "sidetune", "weights": "/etc/passwd"},
            r"method\.weights='/etc/passwd' is not a plain",
        ),
        (
            ("method",),
            {"name": "e2vpt", "initial": "../../x"},
            r"method\.initial='\.\./\.\./x' is not a plain word",
        ),
        (
            ("method",),
            {"name": "vpt_deep", "num_tokens": "4"},
            r"method\.num_tokens=4 is of the wrong kind: give a whole",
        ),
        (
            ("method",),
            {"name": "vpt_deep", "num_tokens": 10**15},
            r"method\.num_tokens=1000000000000000 is out of range: give a number up to 65536",
        ),
        (
            ("method",),
            {"name": "vpt_deep", "dropout": math.nan},
            r"method\.dropout=nan is out of range: give a number up to 65536",
        ),
        (("method",), {}, r"unknown method 'None': choose one of"),
        (
            ("task",),
            "a\x1b]0;owned\x07",
            r"task should not have control characters, and is 'a\\x1b\]0;owned\\x07'",
        ),
        (("task",), "${oc.env:HOME}", r"task should be a plain text: \$\{\.\.\.\} is not resolved"),
        (("task",), 5, r"task should be a text, and is 5"),
        (("class_names",), "|a|b\x1b[2J|c|d|e", r"class_names\.1 should not have control characters"),
        (("class_names",), "|a|b\u202ec|c|d|e", r"class_names\.1 should not have control characters"),
        (("class_names",), "", r"class_names should have at least 1 item"),
        (("class_names",), 5, r"its metadata are not those of a tuned state"),
        (("class_names",), ["a", "b"], r"class_names\.0 should be a text|its metadata are not"),
        (("preprocessing", "size"), 0, r"preprocessing\.size should be greater than or equal to 1, and is 0"),
        (("preprocessing", "decode"), "../x", r"preprocessing\.decode "),
        (
            ("preprocessing", "std"),
            [0.0, 1.0, 1.0],
            r"preprocessing\.std\.0 should be greater than 0, and is 0\.0",
        ),
        (
            ("preprocessing", "mean"),
            [math.nan] * 3,
            r"preprocessing\.mean\.0 should be a finite number, and is nan",
        ),
        (("preprocessing", "mean"), [1.0], r"preprocessing\.mean should have at least 3 items"),
        (("preprocessing", "_target_"), "os.system", r"preprocessing\._target_ is not a key of this version"),
        (("preprocessing", "crop"), "os.system", r"preprocessing\.crop should be 'random' or 'center'"),
        (("versions",), {"torch": {"a": 1}}, r"versions\.torch should be a text"),
        (("versions",), {"a\x00b": "1"}, r"versions\.a\\x00b\.\[key\] should be a plain word"),
        (("_target_",), "os.system", r"_target_ is not a key of this version"),
        (("tensors",), {}, r"tensors is not a key of this version"),
    ],
)
def test_a_value_that_does_not_belong_there_is_refused(tmp_path, keys, value, sentence):
    refused(write(tmp_path, json.dumps(changed(*keys, to=value))), rf"is refused: ({sentence}).*; {MEND}")


@pytest.mark.parametrize("key", ["method", "task", "class_names", "preprocessing", "backbone", "versions"])
def test_a_key_that_lacks_is_named(tmp_path, key):
    meta = changed("task", to="dtd")
    del meta[key]
    sentence = "its metadata are not those of a tuned state" if key == "class_names" else f"{key} is missing"
    refused(write(tmp_path, json.dumps(meta)), f"is refused: {sentence}; {MEND}")


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{", "[" * 100_000, '{"schema": 1}', "9" * 5000])
def test_metadata_that_are_no_record_are_refused(tmp_path, text):
    refused(write(tmp_path, text), f"is refused: its metadata are not those of a tuned state; {MEND}")


def test_another_schema_is_named_without_its_control_characters(tmp_path):
    refused(
        write(tmp_path, json.dumps(changed("schema", to="2\x1b[2J"))),
        r"has schema '2\\x1b\[2J', and this version",
    )
    refused(
        write(tmp_path, json.dumps(changed("schema", to={"a": 1}))),
        r"has schema \{'a': 1\}, and this version",
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value, dtype):
    tensors = TENSORS | {"head.bias": torch.tensor([0, 0, value, 0, 0], dtype=dtype)}
    save_state(tmp_path / "tuned.safetensors", TunedState(tensors=tensors, **RECORD))
    refused(tmp_path, rf"is refused: the tensor head\.bias has numbers that are not finite; {MEND}")


def test_names_and_kinds_of_tensors_are_refused_too(tmp_path):
    tensors = {"a\x1b[2J": torch.zeros(1)}
    refused(
        write(tmp_path, json.dumps(changed("task", to="dtd")), tensors), r"name, a\\x1b\[2J, has control char"
    )
    tensors = {"a": torch.zeros(4).to(torch.float8_e4m3fn)}
    refused(
        write(tmp_path, json.dumps(changed("task", to="dtd")), tensors),
        r"a has the dtype torch\.float8_e4m3fn; ",
    )


def test_a_lone_surrogate_in_a_class_name_is_a_byte_of_a_folders_name(tmp_path):
    path = write(tmp_path, json.dumps(changed("class_names", to="|a|b\udce9|c|d|e")))
    assert load_state(path).class_names[1] == "b\udce9"


@pytest.mark.slow
def test_the_attack_that_was_seen_through_the_real_command(tmp_path, sealed):
    kwargs = {
        "pretrained": True,
        "cache_dir": "src",
        "pretrained_cfg_overlay": {"url": "http://127.0.0.1:1/evil.py"},
    }
    path = write(tmp_path, json.dumps(changed("backbone", "kwargs", to=kwargs)))
    images = miniatures.write_folder(tmp_path / "images")
    done = call(
        "predict",
        f"state={path}",
        f"images={images}",
        f"output={tmp_path}/out.csv",
        "hydra.run.dir=" + str(tmp_path),
    )
    sealed.clear()  # the command itself was started
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"error: {path} is refused: unknown option in backbone.kwargs 'pretrained'"
    )
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out.csv").exists()
