"""A stranger's archive: nothing is written outside its folder, no link is made, and no bomb fills memory or disk."""

import io
import stat
import tarfile
import zipfile

import pytest

from visprompt.data.sources import archive
from visprompt.errors import UserError

NAMES = [
    "/etc/x",
    "../x",
    "a/../../x",
    "..\\x",
    "C:\\x",
    "a/b/../../../x",
    "\\\\host\\x",
    "a\x1b[2J",
    "a\x00b",
    "a\nb",
]


def tar_of(path, *members):
    with tarfile.open(path, "w:gz") as file:
        for info, data in members:
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def one(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_that_climb_or_cannot_be_shown_are_refused(tmp_path, name, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "tar":
        tar_of(path, (one(name), b"owned"))
    else:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(zipfile.ZipInfo(name), b"owned")
    before = {p for p in tmp_path.rglob("*") if p != tmp_path / "out"}
    if "\x00" in name:  # whoever writes or reads an archive ends a name there
        archive.unpack(path, tmp_path / "out")
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["a"]
    else:
        with pytest.raises(
            UserError, match=r"points outside its folder or cannot be shown: do not use this"
        ) as caught:
            archive.unpack(path, tmp_path / "out")
        assert not {"\x1b", "\n"} & set(str(caught.value))
    assert {p for p in tmp_path.rglob("*") if not p.is_relative_to(tmp_path / "out")} == before


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_left_out_and_nothing_is_written_through_them(tmp_path, kind):
    victim = tmp_path / "victim"
    victim.mkdir()
    path = tar_of(tmp_path / "a.tar", (one("d", kind, str(victim)), b""), (one("d/x"), b"owned"))
    archive.unpack(path, tmp_path / "out")
    assert list(victim.iterdir()) == []
    assert not (tmp_path / "out" / "d").is_symlink()
    assert (tmp_path / "out" / "d" / "x").read_bytes() == b"owned"


def test_a_link_in_a_zip_is_left_out(tmp_path):
    info = zipfile.ZipInfo("d")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(info, "/etc")
        file.writestr("e", b"x")
    archive.unpack(tmp_path / "a.zip", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["e"]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_bomb_is_refused_before_it_fills_the_disk(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(archive, "_SPACE", (2**20, 100))
    monkeypatch.setattr(archive, "_LARGEST", 2**20)
    path, zeros = tmp_path / f"a.{kind}", bytes(2**24)
    if kind == "tar":
        tar_of(path, (one("x"), zeros))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("x", zeros)
    sentence = (
        "unpacks to far more than such a file holds: do not use it, get it again from its official source$"
    )
    with pytest.raises(UserError, match=sentence):
        archive.unpack(path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(UserError, match=sentence):
        [member.read() for member in archive.members(path)]


def test_a_size_that_is_a_lie_is_damage(tmp_path):
    content = bytearray(tar_of(tmp_path / "a.tar", (one("x"), b"short")).read_bytes())
    with tarfile.open(tmp_path / "b.tar", "w") as file:
        info = one("x")
        info.size = 2**40
        file.fileobj.write(info.tobuf())
        file.fileobj.write(b"short")
    with pytest.raises(UserError, match="is truncated or damaged"):
        archive.unpack(tmp_path / "b.tar", tmp_path / "out")
    assert content
