"""A folder for the hub loads with the same logits, says what it is, and goes to a hub and back."""

import json

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import visprompt
from helpers.exported import finished_run
from helpers.hub_server import COMMIT, hub_server
from visprompt.errors import UserError
from visprompt.export import hub_folder
from visprompt.export.push import check_repository, push
from visprompt.models.tuned_state import load_state
from visprompt.runs.result import open_result


@pytest.fixture
def shared(tmp_path):
    """A finished run, and the folder that is made of it."""
    run, folder = finished_run(tmp_path / "run", num_tokens=4), tmp_path / "shared"
    folder.mkdir()
    hub_folder.write(folder, load_state(run), [open_result(run)], licence="cc-by-4.0", repository="me/digits")
    return run, folder


def logits(source, **options):
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return visprompt.load(source, **options)(images)


def test_the_folder_loads_as_the_run_does(shared):
    run, folder = shared
    assert {path.name for path in folder.iterdir()} == {"tuned.safetensors", "config.json", "README.md"}
    assert torch.equal(logits(folder), logits(run))
    hub_folder.check(folder, visprompt.load(run))


def test_another_state_than_the_run_s_is_not_kept(shared, tmp_path):
    _, folder = shared
    other = visprompt.load(finished_run(tmp_path / "other", seed=1, num_tokens=4))
    with pytest.raises(UserError, match="answers differently from the run"):
        hub_folder.check(folder, other)


def test_the_card_says_what_the_hub_indexes_and_what_a_reader_asks(shared):
    run, folder = shared
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "visprompt",
        "image-classification",
        "cc-by-4.0",
    )
    (scored,) = data.eval_results
    assert (scored.dataset_name, scored.metric_type, scored.metric_value) == ("digits", "accuracy", 0.8)
    assert "base_model" not in data.to_dict(), "the demo's backbone is not on the hub"
    state = load_state(run)
    for words in (
        *(
            "80.0 % test accuracy (seed 0)",
            state.backbone["sha256"],
            "num_tokens=4",
            "9,216 parameters",
        ),
        *(
            "CC BY 4.0",
            "cc-by-4.0",
            'visprompt.load("hf-hub:me/digits")',
            "The backbone is a part of visprompt.",
        ),
    ):
        assert words in card.content, words
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in enumerate(state.class_names)}
    assert config["preprocessing"] == state.preprocessing


def test_the_card_has_the_mean_over_seeds_of_one_protocol(tmp_path):
    runs = [finished_run(tmp_path / str(s), seed=s, score=0.7 + s / 10, num_tokens=4) for s in range(3)]
    results = [open_result(run) for run in runs]
    hub_folder.write(tmp_path, load_state(runs[0]), results)
    text = (tmp_path / "README.md").read_text()
    assert (
        "80.0 ± 10.0 % test accuracy (mean ± standard deviation over seeds 0, 1, 2); this file is seed 0"
        in text
    )
    front = yaml.safe_load(text.split("---")[1])
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(0.8)
    assert front["license"] == "unknown"
    other = open_result(finished_run(tmp_path / "other", "linear"))
    with pytest.raises(UserError, match="runs that differ in more than the seed"):
        hub_folder.write(tmp_path, load_state(runs[0]), [results[0], other])


def test_names_of_a_stranger_are_text_on_the_card(tmp_path, shared):
    from dataclasses import replace

    run, _ = shared
    state = replace(load_state(run), task="---\nlicense: mit\n# | <script>`x`")
    folder = tmp_path / "named"
    folder.mkdir()
    hub_folder.write(folder, state, [open_result(run)])
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "unknown"
    assert "<script>" not in body.replace("\\<script>", "")
    assert "\nlicense: mit" not in text


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's own library
def test_to_a_hub_and_back(shared, tmp_path, monkeypatch):
    run, folder = shared
    with hub_server(monkeypatch, tmp_path / "cache") as hub:
        check_repository("me/digits")
        assert COMMIT in push(folder, "me/digits", private=True)
        assert hub.private == {"me/digits": True}
        assert hub.tokens == {"Bearer hf_of_a_test"}
        content = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert {name: hub.files["me/digits"][name] for name in content} == content
        assert torch.equal(logits("hf-hub:me/digits"), logits(run))
        asked = [request for request in hub.requests if "/resolve/" in request]
        assert asked
        assert all(request.endswith("/tuned.safetensors") for request in asked), "nothing else is read"
        with pytest.raises(
            UserError, match=r"hf-hub:me/none is not on this machine and could not be fetched"
        ):
            visprompt.load("hf-hub:me/none")
        hub.refuse = True
        with pytest.raises(UserError, match=r"could not be pushed to me/digits \(.*403.*\): log in with"):
            push(folder, "me/digits", private=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(logits("hf-hub:me/digits"), logits(run)), "from the cache"
    with pytest.raises(
        UserError, match=r"hf-hub:me/new is not on this machine and the hub cannot be reached: download"
    ):
        visprompt.load("hf-hub:me/new")
    with pytest.raises(UserError, match="needs the hub, and HF_HUB_OFFLINE is set"):
        check_repository("me/digits")


@pytest.mark.parametrize("name", ["digits", "../../etc/x", "me/..", "me/a b", "me/x@", "http://x/y/z", ""])
def test_a_name_that_is_not_a_repository_is_refused(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="does not name a repository: give hf-hub:USER/NAME"):
        visprompt.load(f"hf-hub:{name}")
    with pytest.raises(UserError, match="is not the name of a repository: give USER/NAME"):
        check_repository(name)


def test_a_stranger_s_folder_is_data(shared):
    """Only the tuned state is read, and by its closed schema."""
    _, folder = shared
    expected = logits(folder)
    (folder / "config.json").write_text(
        '{"method": {"name": "no such"}, "auto_map": {"AutoModel": "evil.Model"}}'
    )
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n(S'true'\ntR.")
    assert torch.equal(logits(folder), expected)
    file = folder / "tuned.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="is damaged: its checksum differs"):
        logits(folder)
