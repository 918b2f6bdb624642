"""Any change of a file that is read gives the very same content or one sentence, never a traceback."""

import json
import shutil
from dataclasses import asdict

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.cli import frozen, tiny_run
from helpers.tiny import RECORD
from visprompt.errors import UserError
from visprompt.models.tensors import hash_tensors
from visprompt.models.tuned_state import load_state
from visprompt.runs import run
from visprompt.runs.recorded import job_of
from visprompt.runs.result import load_result

pytestmark = frozen
bounded = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# where, how many bytes go, and what comes in their place
changes = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from([0, 1, 1, 1, 2, 8, 1000]), st.binary(max_size=8)),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    one = tiny_run(
        tmp_path_factory.mktemp("logs"), "recipe.epochs=1", "recipe.warmup_epochs=0", "method=linear"
    )
    run.run_job(one)
    return one.folder


def changed(content, edits):
    for where, gone, new in edits:
        place = int(where * len(content))
        content = content[:place] + new + content[place + gone :]
    return content


def sentence_or(read):
    """What a reader returns, or None where it refused in one sentence."""
    try:
        return read()
    except UserError as error:
        text = str(error)
        assert text, "it says nothing"
        assert "\n" not in text
        assert "\x1b" not in text
        return None


@bounded
@given(edits=changes)
def test_a_changed_state_is_the_same_or_refused(finished, tmp_path, edits):
    path = tmp_path / "tuned.safetensors"
    path.write_bytes(changed((finished / "tuned.safetensors").read_bytes(), edits))
    state = sentence_or(lambda: load_state(path))
    if state is not None:
        good = load_state(finished)
        assert hash_tensors(state.tensors) == hash_tensors(good.tensors)
        assert asdict(state) | {"tensors": {}} == asdict(good) | {"tensors": {}}


words = st.sampled_from(
    ["", "x", "${oc.env:HOME}", "os.system", "../x", "/etc", "\x1b[2J", "http://127.0.0.1:1/x", "null"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(words | st.just("_target_"), inner, max_size=3)
    ),
    max_leaves=5,
)


@bounded
@given(key=st.sampled_from([*RECORD, "more"]), value=values)
def test_a_state_with_any_metadata_and_a_right_checksum_is_read_or_refused(finished, tmp_path, key, value):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(finished / "tuned.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["visprompt"][64:])
    tensors = load_file(finished / "tuned.safetensors")
    text = json.dumps(meta | {key: value})
    save_file(tensors, tmp_path / "tuned.safetensors", {"visprompt": hash_tensors(tensors, also=text) + text})
    state = sentence_or(lambda: load_state(tmp_path))
    if state is not None:
        assert key in ("task", "class_names", "versions"), value


@bounded
@given(edits=changes)
def test_a_changed_result_is_the_same_or_refused(finished, tmp_path, edits):
    folder = tmp_path / "run"
    if not folder.exists():
        shutil.copytree(finished, folder)
    (folder / "result.json").write_bytes(changed((finished / "result.json").read_bytes(), edits))
    result = sentence_or(lambda: load_result(folder))
    if result is not None:
        assert result == load_result(finished)


@pytest.mark.slow
@bounded
@given(
    key=st.sampled_from(["data", "backbone", "task", "more"]),
    inner=st.none() | words,
    value=values,
    edits=changes,
)
def test_a_config_with_anything_in_it_is_data_or_refused(finished, tmp_path, key, inner, value, edits):
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    content = (finished / "config.yaml").read_bytes()
    config = yaml.safe_load(content)
    if inner is not None and isinstance(config.get(key), dict):
        config[key] |= {inner: value, "fraction": value}
    else:
        config[key] = value
    state, result = load_state(finished), load_result(finished)
    for text in (yaml.safe_dump(config).encode(errors="replace"), changed(content, edits)):
        (folder / "config.yaml").write_bytes(text)
        job = sentence_or(lambda: job_of(folder, state, result, data_dir=str(tmp_path), weights=None))
        if job is not None:
            assert job.data._target_ == "visprompt.data.digits_datamodule.DigitsDataModule"
            assert dict(job.method) == dict(state.method)
            assert job.trainer._target_ == "lightning.pytorch.Trainer"
            assert (job.callbacks, job.logger) == ({}, None)
