import errno
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from visprompt import files
from visprompt.errors import UserError
from visprompt.files import claimed, explained, publish


def writer(text):
    def write(folder):
        (folder / "a.txt").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "b.txt").write_text(text)

    return write


def text(folder):
    assert (folder / "a.txt").read_text() == (folder / "deep" / "b.txt").read_text()
    return (folder / "a.txt").read_text()


def never():
    return False


def age(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_folder_appears_when_it_is_whole(tmp_path):
    folder = tmp_path / "new" / "stores" / "x"

    def write(temporary):
        assert temporary.parent == folder.parent
        assert list(temporary.iterdir()) == []
        writer("first")(temporary)
        assert not folder.exists()

    publish(folder, write, never)
    assert text(folder) == "first"
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error", [RuntimeError("no"), UserError("no"), KeyboardInterrupt("no")])
def test_what_goes_wrong_leaves_nothing(tmp_path, error):
    def write(folder):
        writer("half")(folder)
        raise error

    with pytest.raises(type(error), match="no"):
        publish(tmp_path / "x", write, never)
    assert list(tmp_path.iterdir()) == []
    publish(tmp_path / "x", writer("whole"), never)
    assert text(tmp_path / "x") == "whole"


def test_what_goes_wrong_leaves_the_old_folder(tmp_path):
    publish(tmp_path / "x", writer("old"), never)

    def write(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "x", write, never)
    assert text(tmp_path / "x") == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


OPTION = r"set store_dir \(data.store_dir in training\) to another"
MESSAGES = [
    (errno.ENOSPC, rf"^the disk of {{0}} is full: free space there, or {OPTION} disk$"),
    (errno.EDQUOT, rf"^the disk of {{0}} is full: free space there, or {OPTION} disk$"),
    (errno.EROFS, rf"^cannot write to {{0}} \(Read-only file system\): {OPTION} folder$"),
    (errno.EACCES, rf"^cannot write to {{0}} \(Permission denied\): {OPTION} folder$"),
]


@pytest.mark.parametrize(("number", "message"), MESSAGES)
def test_a_disk_that_refuses_while_it_is_written(tmp_path, number, message):
    def write(folder):
        writer("half")(folder)
        raise OSError(number, os.strerror(number), str(folder / "a.txt"))

    with pytest.raises(UserError, match=message.format(tmp_path)):
        publish(tmp_path / "x", write, never)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "message"), MESSAGES)
def test_a_disk_that_refuses_the_folder(tmp_path, monkeypatch, number, message):
    def mkdir(self, *args, **kwargs):
        if ".tmp-" in self.name:
            raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(UserError, match=message.format(tmp_path)):
        publish(tmp_path / "x", writer("x"), never)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_parent(tmp_path):
    (tmp_path / "stores").write_text("a file")
    with pytest.raises(UserError, match=rf"cannot write to .*stores \(File exists\): {OPTION} folder"):
        publish(tmp_path / "stores" / "x", writer("x"), never)


def test_a_file_that_lies_elsewhere_is_named():
    error = OSError(errno.EACCES, os.strerror(errno.EACCES), "/source/a.jpg")
    assert str(explained(error, Path("/stores"))) == (
        "cannot write to /stores (Permission denied, /source/a.jpg): "
        "set store_dir (data.store_dir in training) to another folder"
    )


def test_the_second_publisher_leaves_the_folder_of_the_first(tmp_path):
    folder = tmp_path / "x"

    def slow(temporary):
        writer("second")(temporary)
        publish(folder, writer("first"), never)

    publish(folder, slow, lambda: text(folder) == "first")
    assert text(folder) == "first"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_damaged_folder_is_replaced(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    writer("damaged")(folder)
    (folder / "more.txt").write_text("of the damaged one")
    publish(folder, writer("whole"), lambda: text(folder) != "damaged")
    assert text(folder) == "whole"
    assert sorted(path.name for path in folder.rglob("*")) == ["a.txt", "b.txt", "deep"]
    assert list(tmp_path.iterdir()) == [folder]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "x").mkdir()
    publish(tmp_path / "x", writer("whole"), never)
    assert text(tmp_path / "x") == "whole"


def test_many_publishers_at_once_leave_one_folder(tmp_path):
    folder, errors = tmp_path / "x", []
    barrier = threading.Barrier(6)

    def run(number):
        barrier.wait()
        try:
            publish(folder, writer(str(number)), lambda: (folder / "a.txt").is_file())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert text(folder) in set("012345")
    assert list(tmp_path.iterdir()) == [folder]


def left_behind(parent, name, seconds, file_seconds=None):
    rest = parent / name
    rest.mkdir()
    (rest / "pixels.bin").write_bytes(b"half")
    age(rest / "pixels.bin", seconds if file_seconds is None else file_seconds)
    age(rest, seconds)
    return rest


def test_what_killed_processes_left_is_swept(tmp_path):
    left_behind(tmp_path, "x.tmp-0123456789ab", 2 * 3600)
    empty = tmp_path / "x.tmp-1123456789ab"
    empty.mkdir()
    age(empty, 2 * 3600)
    publish(tmp_path / "x", writer("whole"), never)
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_what_others_are_writing_is_kept(tmp_path):
    """However long ago the folder itself was written: an archive is unpacked into folders of folders."""
    slow = left_behind(tmp_path, "x.tmp-0123456789ab", 2 * 3600)
    fresh = left_behind(tmp_path, "x.tmp-1123456789ab", 1)
    of_another_folder = left_behind(tmp_path, "x-large.tmp-0123456789ab", 2 * 3600)
    with claimed(slow):
        publish(tmp_path / "x", writer("whole"), never)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "x", slow, fresh, of_another_folder])


@pytest.mark.parametrize("ahead", [0, 2 * 3600])
def test_where_the_file_system_has_no_locks_the_age_by_its_own_clock_decides(tmp_path, monkeypatch, ahead):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    fresh = left_behind(tmp_path, "x.tmp-0123456789ab", 60)
    growing = left_behind(tmp_path, "x.tmp-1123456789ab", 2 * 3600, file_seconds=60)
    left_behind(tmp_path, "x.tmp-2123456789ab", 2 * 3600)
    now = time.time
    monkeypatch.setattr(files.time, "time", lambda: now() + ahead)
    publish(tmp_path / "x", writer("whole"), never)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "x", fresh, growing])


def test_another_publisher_may_finish_while_its_folder_is_looked_at(tmp_path, monkeypatch):
    rest = left_behind(tmp_path, "x.tmp-0123456789ab", 60)

    def vanishing(method):
        def listed(self, pattern, **options):
            found = list(method(self, pattern, **options))
            if self == rest:
                shutil.rmtree(rest)
            return iter(found)

        return listed

    for name in ("glob", "rglob"):
        monkeypatch.setattr(Path, name, vanishing(getattr(Path, name)))
    publish(tmp_path / "x", writer("whole"), never)
    assert text(tmp_path / "x") == "whole"
