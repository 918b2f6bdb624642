"""A file is hashed once, and again whenever anything about it has changed."""

import hashlib
import json
import os
import time

import pytest

from visprompt.models import digests
from visprompt.models.backbones import DEMO, BackboneSpec, build_backbone
from visprompt.models.digests import digest_once, file_digest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISPROMPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "digests.json"


@pytest.fixture
def reads(monkeypatch):
    """Contents that were hashed."""
    seen, original = [], hashlib.file_digest

    def note(file, kind):
        seen.append(file.name)
        return original(file, kind)

    monkeypatch.setattr(digests.hashlib, "file_digest", note)
    return seen


def settled(monkeypatch):
    """The clock of the cache is ten seconds ahead, so that no file is new to it."""
    monkeypatch.setattr(digests.time, "time", lambda now=time.time: now() + 10)


def test_a_file_is_hashed_once(tmp_path, monkeypatch, reads):
    settled(monkeypatch)
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    expected = hashlib.sha256(b"one").hexdigest()
    assert [file_digest(file) for _ in range(3)] == [expected] * 3
    assert len(reads) == 1


@pytest.mark.parametrize("change", ["content", "size", "another file", "restored time"])
def test_a_changed_file_is_hashed_again(tmp_path, monkeypatch, reads, change):
    settled(monkeypatch)
    file, new = tmp_path / "weights", b"longer" if change == "size" else b"two"
    file.write_bytes(b"one")
    file_digest(file)
    times = file.stat()
    if change == "another file":
        (tmp_path / "other").write_bytes(new)
        (tmp_path / "other").replace(file)
    else:
        file.write_bytes(new)
    if change == "restored time":
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_digest(file) == hashlib.sha256(new).hexdigest()
    assert len(reads) == 2


def test_a_file_that_has_just_been_written_is_not_kept(tmp_path, cache, reads):
    (tmp_path / "weights").write_bytes(b"one")
    assert file_digest(tmp_path / "weights") == file_digest(tmp_path / "weights")
    assert len(reads) == 2
    assert not cache.exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', "\x00"])
def test_a_damaged_cache_is_left_out(tmp_path, monkeypatch, cache, content):
    settled(monkeypatch)
    cache.parent.mkdir()
    cache.write_text(content)
    (tmp_path / "weights").write_bytes(b"one")
    assert file_digest(tmp_path / "weights") == hashlib.sha256(b"one").hexdigest()
    assert list(json.loads(cache.read_text()).values()) == [hashlib.sha256(b"one").hexdigest()]


def test_a_cache_that_cannot_be_written_is_left_out(tmp_path, monkeypatch, reads):
    settled(monkeypatch)
    (tmp_path / "weights").write_bytes(b"one")
    monkeypatch.setenv("VISPROMPT_CACHE", str(tmp_path / "weights" / "cache"))
    assert file_digest(tmp_path / "weights") == file_digest(tmp_path / "weights")
    assert len(reads) == 2


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch, cache):
    settled(monkeypatch)
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    digest_once(file, "what", lambda: (file.write_bytes(b"more"), "0" * 64)[1])
    assert not cache.exists()


def test_only_the_last_digests_are_kept(tmp_path, monkeypatch, cache):
    settled(monkeypatch)
    monkeypatch.setattr(digests, "_MOST", 2)
    (tmp_path / "weights").write_bytes(b"one")
    for number in "123":
        digest_once(tmp_path / "weights", number, lambda number=number: number * 64)
    assert list(json.loads(cache.read_text()).values()) == ["2" * 64, "3" * 64]


def test_a_backbone_is_hashed_once_for_each_way_it_is_built(monkeypatch):
    settled(monkeypatch)
    hashed, original = [], digests.digest_once

    def note(file, what, compute, before):
        return original(file, what, lambda: hashed.append(what) or compute(), before)

    monkeypatch.setattr("visprompt.models.backbones.digest_once", note)
    built = [build_backbone(BackboneSpec(name=DEMO, image_size=size)).sha256 for size in (64, 64, 32)]
    assert len(hashed) == 2
    assert built[0] == built[1] != built[2], "the table of positions is resized"
