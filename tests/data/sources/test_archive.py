import gzip
import io
import stat
import tarfile
import zipfile

import pytest

from visprompt.data.sources.archive import damaged, inside, members, pick, readable, texts, unpack, unpacked
from visprompt.data.sources.content import Found
from visprompt.errors import UserError

FILES = {"top/a.txt": b"first", "top/deep/b.bin": bytes(range(256)) * 20, "c.txt": "grün".encode()}


def tar(files=FILES, mode="w", links=()):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        folder = tarfile.TarInfo("top")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, kind in links:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zipped(files=FILES, extra=()):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("top/", b"")
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
        for info, data in extra:
            archive.writestr(info, data, zipfile.ZIP_STORED)
    return file.getvalue()


def contents(path):
    return {member.name: member.read() for member in members(path)}


def write(tmp_path, data, name="some.tar.gz"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("data", [tar(), tar(mode="w:gz"), zipped()], ids=["tar", "tar.gz", "zip"])
def test_files_come_in_their_order_whatever_the_suffix_says(tmp_path, data):
    path = write(tmp_path, data)
    assert contents(path) == FILES
    assert [member.name for member in members(path)] == list(FILES)
    for member in members(path):
        with member.open() as file:
            assert file.read(3) == FILES[member.name][:3]


def test_a_folder_is_read_like_an_archive_of_it_in_sorted_order(tmp_path):
    unpack(write(tmp_path, zipped()), tmp_path / "out")
    (tmp_path / "out" / "link.txt").symlink_to(tmp_path / "some.tar.gz")
    assert contents(tmp_path / "out") == FILES
    assert [member.name for member in members(tmp_path / "out")] == ["c.txt", "top/a.txt", "top/deep/b.bin"]


def test_a_tar_inside_a_zip(tmp_path):
    path = write(tmp_path, zipped({"x/inner.tar.gz": tar(mode="w:gz"), "x/plain.tar": tar()}), "outer.zip")
    found = []
    for outer in members(path):
        with outer.open() as stream:
            found.append({member.name: member.read() for member in members(path, stream)})
    assert found == [FILES, FILES]


def test_a_damaged_tar_inside_a_whole_zip_names_the_zip(tmp_path):
    path = write(tmp_path, zipped({"inner.tar.gz": tar(mode="w:gz")[:-60]}), "outer.zip")
    with pytest.raises(UserError, match=r"outer\.zip is truncated or damaged"):
        [list(members(path, outer.open())) for outer in members(path)]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_a_tar_are_left_out(tmp_path, kind):
    assert contents(write(tmp_path, tar(links=[("evil", kind)]))) == FILES


def test_links_in_a_zip_are_left_out(tmp_path):
    link = zipfile.ZipInfo("evil")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    assert contents(write(tmp_path, zipped(extra=[(link, b"/etc/passwd")]))) == FILES


def test_backslashes_of_windows_and_leading_dots(tmp_path):
    files = {"./a\\b.txt": b"1", "d\\": b""}
    assert contents(write(tmp_path, zipped(files))) == {"a/b.txt": b"1"}
    assert contents(write(tmp_path, tar({"./a\\b.txt": b"1"}))) == {"a/b.txt": b"1"}


# in headers, contents, and between files
PLAIN_CUTS = [
    1,
    600,
    512 * 3,
    512 * 3 + 100,
    512 * 5 + 7,
    512 * 14,
]


@pytest.mark.parametrize("length", PLAIN_CUTS)
@pytest.mark.parametrize("read", [True, False])
def test_a_tar_cut_anywhere_is_damaged(tmp_path, length, read):
    path = write(tmp_path, tar()[:length], "cut.tar")
    with pytest.raises(
        UserError, match=r"cut\.tar is truncated or damaged \(.+\): delete it and run the same command"
    ):
        [member.read() for member in members(path) if read]


def test_a_tar_cut_behind_its_last_file_is_damaged(tmp_path):
    data = tar()
    while data.endswith(bytes(512)):
        data = data[:-512]
    assert len(data) % 512 == 0
    with pytest.raises(UserError, match="unexpected end of data"):
        contents(write(tmp_path, data))
    assert contents(write(tmp_path, data + bytes(512))) == FILES
    assert contents(write(tmp_path, data + bytes(40_960))) == FILES  # some writers fill a block of a tape


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.8])
def test_a_cut_gzip_is_damaged(tmp_path, share):
    data = tar({**FILES, "noise": bytes((i * i * 31 + i // 7) % 251 for i in range(60_000))}, "w:gz")
    path = write(tmp_path, data[: int(len(data) * share)], "cut.tar.gz")
    with pytest.raises(UserError, match=r"cut\.tar\.gz is truncated or damaged"):
        contents(path)


def test_a_garbled_gzip_is_damaged(tmp_path):
    data = bytearray(tar(mode="w:gz"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(UserError, match=r"some\.tar\.gz is truncated or damaged"):
        contents(write(tmp_path, bytes(data)))


@pytest.mark.parametrize("cut", [1, 30, 500])
def test_a_cut_zip_is_damaged(tmp_path, cut):
    with pytest.raises(UserError, match=r"cut\.zip is truncated or damaged \(File is not a zip file\)"):
        contents(write(tmp_path, zipped()[:-cut], "cut.zip"))


def test_a_zip_with_a_garbled_file_is_damaged_when_that_is_read(tmp_path):
    garbled = zipfile.ZipInfo("a")  # stored as it is
    data = zipped({}, extra=[(garbled, b"0123456789")]).replace(b"0123456789", b"0123456780")
    path = write(tmp_path, data, "bad.zip")
    assert [member.name for member in members(path)] == ["a"]
    with pytest.raises(UserError, match=r"bad\.zip is truncated or damaged \(Bad CRC-32"):
        contents(path)


@pytest.mark.parametrize(
    "data", [b"", b"<html>404 not found</html>", gzip.compress(b"<html>404</html>", mtime=0)]
)
def test_what_is_no_archive(tmp_path, data):
    with pytest.raises(UserError, match=r"some\.tar\.gz is truncated or damaged"):
        contents(write(tmp_path, data))


def test_a_missing_archive(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*gone\.zip: get it, or run prepare\.py again"):
        contents(tmp_path / "gone.zip")


def test_what_the_reader_of_a_member_raises_is_not_taken_for_damage(tmp_path):
    def consume():
        for _ in members(write(tmp_path, tar())):
            raise EOFError("mine")

    with pytest.raises(EOFError, match="mine"):
        consume()


def test_damage_without_words_is_named_by_its_kind(tmp_path):
    assert "x.gz is truncated or damaged (EOFError)" in str(damaged(tmp_path / "x.gz", EOFError()))
    with pytest.raises(UserError, match=r"\(EOFError\)"), readable(tmp_path):
        raise EOFError


@pytest.mark.parametrize(
    "name", ["../evil.txt", "a/../../evil.txt", "/evil.txt", "..\\evil.txt", "C:/evil.txt", ".", ""]
)
def test_a_member_outside_the_folder_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"some\.zip holds the member .* which points outside its folder"):
        inside(tmp_path / "some.zip", name)


def test_unpacking_writes_nothing_outside(tmp_path):
    path = write(tmp_path, zipped({"ok.txt": b"1", "../evil.txt": b"2"}))
    with pytest.raises(UserError, match=r"some\.tar\.gz holds the member '\.\./evil\.txt'"):
        unpack(path, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.rglob("*.txt")) == ["ok.txt"]


def test_unpacking_twice_replaces_and_leaves_no_parts(tmp_path):
    for content in (b"old", b"new"):
        unpack(write(tmp_path, tar({"a/b.txt": content})), tmp_path / "out")
    assert contents(tmp_path / "out") == {"a/b.txt": b"new"}


@pytest.mark.parametrize("name", ["data.tar.gz", "data.zip", "data.tar"])
def test_a_folder_stands_in_for_an_archive_that_is_not_there(tmp_path, name):
    path = tmp_path / name
    assert unpacked(path) == path
    (tmp_path / "data").mkdir()
    assert unpacked(path) == tmp_path / "data"
    path.touch()
    assert unpacked(path) == path


def test_picking_stops_behind_the_last_wanted_image(tmp_path):
    files = {"x/1.jpg": b"1", "x/2.jpg": b"2", "notes": b"", "x/3.jpg": b"3", "x/4.jpg": b"4"}
    path = write(tmp_path, tar(files))
    left = members(path)
    wanted = {"test": ["1", "gone"], "train": ["3"]}

    def key_of(name):
        return name[2:-4] if name.endswith(".jpg") else None

    assert list(pick(left, key_of, {"test": ["3"], "train": ["1"]})) == [
        Found("train", "1", b"1"),
        Found("test", "3", b"3"),
    ]
    assert next(left).name == "x/4.jpg"
    assert [found.key for found in pick(members(path), key_of, wanted)] == ["1", "3"]
    assert list(pick(members(tmp_path / "missing"), key_of, {"train": []})) == []


def test_a_member_that_is_there_twice_is_picked_once(tmp_path):
    first = tar({"a": b"1"})
    both = first[: first.rindex(b"1") + 512].rstrip(b"\0")
    path = write(tmp_path, both + bytes(-len(both) % 512) + tar({"a": b"2", "b": b"3"}))
    found = list(pick(members(path), str, {"train": ["a", "b"]}))
    assert found == [Found("train", "a", b"1"), Found("train", "b", b"3")]


def test_texts_of_an_archive(tmp_path):
    path = write(tmp_path, tar())
    assert texts(path, "c.txt", "top/a.txt") == ["grün", "first"]
    with pytest.raises(
        UserError, match=r"some\.tar\.gz holds no d\.txt: it is not the official file, get it again"
    ):
        texts(path, "c.txt", "d.txt")
    with pytest.raises(UserError, match=r"damaged \(top/deep/b\.bin is not a text file\)"):
        texts(path, "top/deep/b.bin")
