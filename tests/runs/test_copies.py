"""Commands that read runs read them on object storage, through a copy that is brought up to date."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from helpers import s3_server
from helpers.damage import outcome
from helpers.finished_runs import finish
from visprompt.models.tuned_state import read_checksum
from visprompt.reports.load import survey
from visprompt.runs.copies import bring
from visprompt.runs.job import Paths
from visprompt.runs.object_store import ObjectStore
from visprompt.runs.paths import expand_paths
from visprompt.runs.result import open_result
from visprompt.runs.results_store import Results


@pytest.fixture(scope="module", autouse=True)
def _server():
    with s3_server.served():
        yield


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store with two runs; copies go into a folder of the test."""
    monkeypatch.setenv("VISPROMPT_CACHE", str(tmp_path / "cache"))
    url = f"{s3_server.URL}/{tmp_path.name}"
    found = Results.of(Paths(data_dir="", log_dir=str(tmp_path / "logs"), results=url))
    for letter, score in (("a", 0.5), ("b", 0.6)):
        put(found, letter, score)
    return found


def put(store, letter, score, attempt=0):
    run = store.run(store.log_dir / "cifar/linear" / (letter * 12))
    finish(run.folder, score, attempt, seed=ord(letter))
    assert run.push_finished()
    return run


def scores(store):
    found = survey([bring(store.objects.url, "runs", with_states=False)])
    assert found.left_out == ()
    return sorted(found.runs["result"].map(lambda result: result.score))


@pytest.fixture
def downloads(monkeypatch):
    asked = []
    download = ObjectStore.download

    def noted(store, key, file):
        asked.append(key.rpartition("/")[2])
        return download(store, key, file)

    monkeypatch.setattr(ObjectStore, "download", noted)
    return asked


def test_a_report_brings_what_it_reads_once_and_then_only_what_has_changed(store, downloads):
    assert scores(store) == [0.5, 0.6]
    assert sorted(downloads) == sorted(["result.json", "config.yaml", "metrics.csv"] * 2)
    downloads.clear()
    assert scores(store) == [0.5, 0.6]
    assert downloads == []
    put(store, "b", 0.7, attempt=1)
    put(store, "c", 0.8)
    assert scores(store) == [0.5, 0.7, 0.8]
    assert len(downloads) == 6


def test_a_run_that_is_gone_is_gone_from_the_copy(store):
    scores(store)
    gone = store.objects.below("cifar/linear/" + "a" * 12)
    gone.remove(*gone.etags())
    assert scores(store) == [0.6]


def test_a_damaged_run_is_left_out_of_a_report_with_a_warning(store, caplog):
    key = "cifar/linear/" + "a" * 12 + "/result.json"
    store.objects.write(key, store.objects.read(key)[:-9])
    assert scores(store) == [0.6]
    assert (
        f"{store.objects.url}/cifar/linear/{'a' * 12} holds a damaged run (result.json is damaged: it is cut "
        "off or not JSON): delete its objects, and run the same command again; it is left out"
    ) in caplog.text


def test_a_key_that_steps_out_of_the_copy_is_not_followed(store, tmp_path):
    store.objects.write("x/../../../../../../../outside/result.json", b"{}")
    assert scores(store) == [0.5, 0.6]
    assert not list(tmp_path.rglob("outside"))


def test_a_single_run_comes_with_its_tuned_state_where_that_is_read(store):
    scores(store)  # a copy without states is there
    url = f"{store.objects.url}/cifar/linear/{'b' * 12}/"
    cfg = OmegaConf.create({"run": [url], "inspect": None})
    expand_paths(cfg)
    folder = Path(cfg.run[0])
    assert open_result(folder).score == 0.6
    assert read_checksum(folder / "tuned.safetensors", hashed=True) is not None


def test_a_report_that_looks_into_runs_brings_their_states(store, downloads):
    cfg = OmegaConf.create({"runs": store.objects.url, "inspect": "auto"})
    expand_paths(cfg)
    assert downloads.count("tuned.safetensors") == 2
    cfg = OmegaConf.create({"runs": store.objects.url, "inspect": "auto"})
    expand_paths(cfg)
    assert downloads.count("tuned.safetensors") == 2


def test_a_prefix_without_runs_and_a_path_that_is_not_of_runs_are_one_sentence(store):
    url = f"{store.objects.url}/nothing"
    assert outcome(bring, url, "runs", False)[1] == (
        f"runs={url} holds no finished run: name a prefix that paths.results had, or a run's"
    )
    assert outcome(expand_paths, OmegaConf.create({"states": url}))[1] == (
        f"states={url} is on object storage: give a local path"
    )
    assert outcome(expand_paths, OmegaConf.create({"paths": {"log_dir": url}}))[1] == (
        f"paths.log_dir={url} is on object storage: give a local folder, and paths.results for the runs"
    )
    missing = OmegaConf.create({"run": "s3://nowhere/x"})
    assert outcome(expand_paths, missing)[1] == (
        "run=s3://nowhere/x cannot be used: there is no bucket nowhere; make it, or name another"
    )
