"""What is said of a store that cannot be used, and of an address that is not one."""

import os
import socket
import sys
import time

import pytest

from helpers import s3_server
from helpers.damage import outcome
from visprompt.runs import object_store
from visprompt.runs.job import Paths
from visprompt.runs.object_store import ObjectStore
from visprompt.runs.results_store import Results, checked_url


@pytest.fixture(scope="module", autouse=True)
def _server():
    with s3_server.served():
        yield


@pytest.fixture
def environment(monkeypatch):
    """Connects anew, with other variables."""

    def change(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
        object_store._file_system.cache_clear()

    yield change
    object_store._file_system.cache_clear()


def test_no_store_is_asked_for_unless_it_is_named():
    assert Results.of(Paths(data_dir="", log_dir="logs")) is None


@pytest.mark.parametrize(
    ("url", "is_read_as"),
    [("s3://b", "s3://b"), ("s3://b/", "s3://b"), ("s3://b//p/q/", "s3://b/p/q")],
)
def test_slashes_do_not_matter(url, is_read_as):
    assert checked_url(url) == is_read_as


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        (
            "/shared/logs",
            "paths.results=/shared/logs is not on object storage: give s3://BUCKET/PREFIX; for a folder that "
            "machines share give paths.log_dir=/shared/logs instead",
        ),
        (
            "gs://bucket/x",
            "paths.results=gs://bucket/x cannot be read: of stores only s3:// is known, not gs://",
        ),
        ("s3://", "paths.results=s3:// names no bucket: give s3://BUCKET/PREFIX"),
    ],
)
def test_an_address_that_is_not_a_store_s_is_one_sentence(url, sentence):
    assert outcome(checked_url, url)[1] == sentence


def test_a_store_that_can_be_used_is_left_as_it_was():
    store = ObjectStore(s3_server.URL)
    store.check()
    assert store.etags() == {}


def test_a_bucket_at_its_root():
    store = ObjectStore(f"s3://{s3_server.BUCKET}")
    assert store.write_if("root/a", b"1", None)
    assert list(store.etags()) == ["root/a"]
    assert list(store.etags("root/")) == ["root/a"]
    assert store.head("root/a").etag == store.etags()["root/a"]
    store.remove("root/a")


def test_a_missing_bucket_is_named():
    assert outcome(ObjectStore("s3://nowhere/x").check)[1] == (
        "paths.results=s3://nowhere/x cannot be used: there is no bucket nowhere; make it, or name another"
    )


def test_missing_credentials_are_named(environment, tmp_path):
    nowhere = str(tmp_path / "none")
    environment(
        AWS_ACCESS_KEY_ID="",
        AWS_SECRET_ACCESS_KEY="",
        AWS_SHARED_CREDENTIALS_FILE=nowhere,
        AWS_CONFIG_FILE=nowhere,
    )
    assert outcome(ObjectStore(s3_server.URL).check)[1] == (
        f"paths.results={s3_server.URL} cannot be used: no credentials were found; set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    )


def test_a_server_that_is_not_there_is_named(environment):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        environment(AWS_ENDPOINT_URL=f"http://127.0.0.1:{taken.getsockname()[1]}")
        start = time.monotonic()
        sentence = outcome(ObjectStore(s3_server.URL).check)[1]
    assert time.monotonic() - start < 15
    assert sentence.startswith(
        f"paths.results={s3_server.URL} cannot be used: the store gives no answer or a wrong one (Could not "
        "connect to the endpoint URL"
    )
    assert sentence.endswith("; check the network and AWS_ENDPOINT_URL, and run the same command again")


def test_a_server_that_never_answers_is_given_up(environment, monkeypatch):
    monkeypatch.setattr(object_store, "_CHECK", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment(AWS_ENDPOINT_URL=f"http://127.0.0.1:{silent.getsockname()[1]}")
        sentence = outcome(ObjectStore(s3_server.URL).check)[1]
    assert "gives no answer or a wrong one (FSTimeoutError)" in sentence


def test_a_refusal_is_named(monkeypatch):
    def refused(*_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(object_store._file_system(os.getpid()), "pipe_file", refused)
    assert outcome(ObjectStore(s3_server.URL).check)[1] == (
        f"paths.results={s3_server.URL} cannot be used: the store refuses access (Access Denied); give "
        "credentials that may read and write"
    )


def test_a_store_without_conditional_writes_is_refused(monkeypatch):
    files = object_store._file_system(os.getpid())
    pipe = files.pipe_file
    monkeypatch.setattr(files, "pipe_file", lambda path, data, mode: pipe(path, data))
    store = ObjectStore(s3_server.URL)
    assert outcome(store.check)[1] == (
        f"paths.results={s3_server.URL} cannot be used: the store replaces an object although the request "
        "forbids it (If-None-Match), so two machines could take the same run; choose a store with "
        "conditional writes"
    )
    assert store.etags() == {}


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch):
    object_store._file_system.cache_clear()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert outcome(ObjectStore(s3_server.URL).read, "x")[1] == (
        "runs on object storage need s3fs: pip install '.[s3]'"
    )
