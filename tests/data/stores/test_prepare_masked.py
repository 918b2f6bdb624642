"""Preparing ADE20K with the settings of the command line, on a miniature of its archive."""

import json
from dataclasses import replace

import pytest

from helpers.cli import composed
from helpers.miniatures import miniature
from visprompt.data import catalog
from visprompt.data.sources import download
from visprompt.data.stores import masked
from visprompt.data.stores.plan import Plan
from visprompt.data.stores.prepare_all import prepare_all, verify_all
from visprompt.errors import UserError
from visprompt.runs.compose import plans


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, spec in miniature.write("ade20k", "raw", tmp_path).items():
        monkeypatch.setitem(catalog.TASKS, name, spec)
    return tmp_path


def planned(folder, *arguments):
    with composed("prepare", "tasks=segmentation", f"paths.data_dir={folder}", *arguments) as cfg:
        return plans(cfg)


def test_it_is_prepared_once_and_verified(folder, capsys, monkeypatch):
    prepare_all(planned(folder))
    out = capsys.readouterr().out
    assert "BSD 3-clause" in out
    assert "ade20k: ready after" in out
    assert "16 images" in out
    monkeypatch.setattr(masked, "_write", None)
    prepare_all(planned(folder, "image_size=512"))
    assert "ade20k: was there" in capsys.readouterr().out
    verify_all(planned(folder))
    out = capsys.readouterr().out
    assert "1 of 1 tasks are prepared" in out
    assert "FAIL" not in out
    assert out.count(" pass ") == 8
    assert out.count(" look ") == 3, "not all 150 classes occur in a miniature"


def test_verify_says_how_to_get_it(tmp_path, capsys):
    verify_all(planned(tmp_path))
    out = " ".join(capsys.readouterr().out.split())
    assert "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip" in out
    assert "sha1 219e1696abb36c8ba3a3afe7fb2f4b4606a897c7" in out
    assert "by hand: Its host is down at times" in out
    assert "then: python src/prepare.py tasks=ade20k" in out
    assert not list(tmp_path.iterdir())


def test_verify_finds_a_changed_byte(folder, capsys):
    prepare_all(planned(folder))
    (plan,) = planned(folder)
    content = bytearray((plan.folder / "pixels.bin").read_bytes())
    content[-1] ^= 1
    (plan.folder / "pixels.bin").write_bytes(content)
    with pytest.raises(UserError, match="1 checks failed: ade20k: pixels unchanged is 1 of 1 parts of"):
        verify_all([plan])


def test_the_store_has_the_fingerprint_of_the_files(folder):
    prepare_all(planned(folder))
    (plan,) = planned(folder)
    manifest = json.loads((plan.folder / "manifest.json").read_text())
    assert manifest["made_for"] == "ade20k/raw-files"
    assert [key for key, *_ in manifest["images"]] == sorted(key for key, *_ in manifest["images"])
    assert len(manifest["fingerprint"]) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("source=prepared",),
            r"ade20k has no source 'prepared': segmentation datasets are read with source=raw",
        ),
        (("source=hf",), r"ade20k has no source 'hf': segmentation datasets are read with source=raw"),
    ],
)
def test_other_sources_are_refused(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        planned(tmp_path, *arguments)


def test_a_missing_archive_that_may_not_be_downloaded_names_the_command(folder):
    (folder / "raw" / "ade20k" / "ADEChallengeData2016.zip").unlink()
    with pytest.raises(UserError, match=r"data.download=false: run `python src/prepare.py tasks=ade20k`"):
        prepare_all(planned(folder, "download=false"))


def test_a_host_that_is_down_says_how_to_get_the_file_by_hand(folder, monkeypatch):
    monkeypatch.setattr(download, "RETRY", download.RETRY.new(backoff_factor=0))
    (plan,) = planned(folder)
    (folder / "raw" / "ade20k" / "ADEChallengeData2016.zip").unlink()
    file = replace(plan.spec.files[0], urls=("http://127.0.0.1:1/ADEChallengeData2016.zip",))
    plan = Plan(spec=replace(plan.spec, files=(file,)), data_dir=folder, store_dir=plan.store_dir)
    with pytest.raises(
        UserError, match=r"cannot download ADEChallengeData2016.zip: .*\. Its host is down at"
    ):
        prepare_all([plan])


def test_a_damaged_archive_is_named(folder):
    archive = folder / "raw" / "ade20k" / "ADEChallengeData2016.zip"
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"ADEChallengeData2016.zip is truncated or damaged"):
        prepare_all(planned(folder))


def test_other_names_of_classes_are_warned_of(folder, monkeypatch, caplog):
    spec = catalog.TASKS["ade20k"]
    names = ("house", *spec.class_names[1:])
    monkeypatch.setitem(catalog.TASKS, "ade20k", replace(spec, class_names=names))
    prepare_all(planned(folder))
    assert any("has other names of classes than this project" in message for message in caplog.messages)
