"""One process at a time holds a run, on one machine and on several, whatever their clocks and locks do."""

import errno
import fcntl
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from helpers.leases import at_work, holder, write_lease
from visprompt.errors import UserError
from visprompt.runs import attempt_files, lease, run_lock
from visprompt.runs.board import FolderBoard
from visprompt.runs.run_lock import AtWork, is_free, locked


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "0123456789ab"


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets; what sleeps really sleeps."""
    now = [1000.0]
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))
    lease._seen.clear()
    return now


def says(folder, text="process 4711 on thor"):
    return pytest.raises(AtWork, match=f"^{text} is working on this run in {folder}: wait for it, or end it$")


def refused(folder):
    with pytest.raises(AtWork) as error, locked(folder):
        pass
    return error.value.who


def no_locks(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_held_run_is_refused_and_free_again_afterwards(folder):
    with locked(folder) as hold:
        assert hold.folder == folder
        assert holder(folder) == refused(folder) == lease.environment.this_process()
        assert not is_free(folder)
        hold.check()
    assert holder(folder) is None
    assert is_free(folder)
    with locked(folder):
        assert [path.name for path in folder.glob("lease-*")] == ["lease-2"], "older ones are removed"


def test_after_a_kill_on_this_machine_nobody_waits(folder):
    with at_work(folder) as lock:
        with says(folder), locked(folder):
            pass
        assert not is_free(folder)
        lock.release()
        assert is_free(folder)
        with locked(folder):
            assert holder(folder).endswith(f"process {os.getpid()} on {os.uname().nodename}")


@pytest.mark.parametrize("when", [0.0, 4e9])
def test_a_run_of_another_machine_is_free_after_its_life_without_a_sign(folder, clock, when, caplog):
    """Whatever the clocks of the two machines and of the file server say."""
    write_lease(folder, life=30.0)
    os.utime(folder / "lease-1", (when, when))
    assert refused(folder) == "process 4711 on thor"
    assert not is_free(folder)
    clock[0] += 30
    assert not is_free(folder)
    clock[0] += 0.1
    assert is_free(folder)
    assert caplog.messages == [f"{folder}: process 4711 on thor gave no sign of life for 30 s"]
    assert lease.newest(FolderBoard(folder))[1].state == "revoked"
    with locked(folder):
        assert holder(folder) != "process 4711 on thor"


def test_each_sign_of_life_of_another_machine_begins_a_new_life(folder, clock):
    write_lease(folder, life=30.0)
    board = FolderBoard(folder)
    for beat in range(1, 4):
        assert not is_free(folder)
        clock[0] += 29
        assert not is_free(folder)
        board.write_lease(1, lease.newest(board)[1].but(beat=beat).text())
        clock[0] += 29
    assert not is_free(folder)


def test_who_stood_still_for_too_long_puts_nothing_in_place(folder, clock, caplog):
    with says(folder, ".*"), locked(folder) as slept:
        (attempt,) = slept._leases
        lease._keeper.remove(attempt)  # no sign of life
        assert not is_free(folder)
        clock[0] += 61
        assert is_free(folder)
        caplog.clear()
        with locked(folder) as woken:
            with says(folder, lease.environment.this_process()):
                slept.check()
            assert caplog.messages == [
                f"this process gave no sign of life for 60 s: its run in {folder} is now that of "
                f"{lease.environment.this_process()}"
            ]
            attempt.beat()
            attempt.release()
            woken.check()
            assert holder(folder) is not None, "the release of a lost lease releases nothing"
            with pytest.raises(AtWork), attempt_files._new_attempt(slept) as files:
                (files / "result.json").write_text("{}")
        with locked(folder):  # neither needs the lock, which the first one still has
            pass
        assert not (folder / "result.json").exists()
        assert not (folder / ".complete").exists()
        raise FileNotFoundError("a file that the next holder has removed")


def test_a_process_that_computes_gives_signs_of_life(folder, monkeypatch):
    monkeypatch.setenv("VISPROMPT_LEASE_S", "1")
    monkeypatch.setattr(lease, "this_host", lambda: "thor")
    monkeypatch.setattr(lease, "_keeper", lease._Keeper())
    no_locks(monkeypatch)
    with locked(folder):
        limit = time.monotonic() + 2.5
        while time.monotonic() < limit:
            assert not is_free(folder)
            time.sleep(0.1)
        assert lease.newest(FolderBoard(folder))[1].beat > 5
    assert is_free(folder)


def test_of_many_that_want_a_run_at_once_one_gets_it(folder, monkeypatch):
    folder.mkdir()
    no_locks(monkeypatch)
    start, held = threading.Barrier(8), []

    def take(_):
        start.wait()
        try:
            with locked(folder):
                held.append(1)
                start.wait()
        except AtWork:
            start.wait()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, range(8)))
    assert len(held) == 1


def test_of_many_that_revoke_a_lease_one_gets_the_run(folder, clock):
    write_lease(folder)
    boards = [FolderBoard(folder) for _ in range(8)]
    is_free(folder)
    clock[0] += 61
    (seen,) = lease._seen.items()
    free = []
    for board in boards:  # all have seen the same
        lease._seen.update([seen])
        free.append(lease.is_free(board, ""))
    assert free == [True] * 8
    assert boards[0].lease_numbers() == [1, 2]


def test_without_locks_a_killed_process_is_waited_for(folder, clock, monkeypatch):
    no_locks(monkeypatch)
    write_lease(folder, host=lease.this_host(), who="process 7 on here")
    assert refused(folder) == "process 7 on here"
    assert not is_free(folder)
    clock[0] += 61
    assert is_free(folder)


def test_a_file_system_without_hard_links_will_do(folder, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with locked(folder):
        assert holder(folder) == lease.environment.this_process()
        assert not FolderBoard(folder).create_lease(1, "b")
    assert holder(folder) is None


def test_a_link_whose_answer_was_lost_is_this_process_s(folder, monkeypatch):
    link = os.link

    def repeated(*given):
        link(*given)
        link(*given)

    monkeypatch.setattr(os, "link", repeated)
    folder.mkdir()
    assert FolderBoard(folder).create_lease(1, "a")
    assert not FolderBoard(folder).create_lease(1, "b")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "sleeping"}', '{"state": "free", "life": -1}'])
def test_a_lease_that_cannot_be_read_is_that_of_an_unknown_process(folder, clock, text):
    folder.mkdir()
    (folder / "lease-3").write_text(text)
    assert refused(folder) == "another process"
    assert not is_free(folder)
    clock[0] += 61
    assert is_free(folder)


@pytest.mark.parametrize("value", ["", "soon", "0.5", "nan", "inf"])
def test_a_wrong_life_is_one_sentence(folder, monkeypatch, value):
    monkeypatch.setenv("VISPROMPT_LEASE_S", value)
    sentence = f"VISPROMPT_LEASE_S={value} is not a number of seconds: give one of at least 1, or unset it"
    with pytest.raises(UserError) as error, locked(folder):
        pass
    assert str(error.value) == sentence


def test_a_single_run_waits_for_a_sign_of_life_only(folder, clock, monkeypatch):
    with at_work(folder):
        assert not run_lock.is_given_up(folder), "it lives on this machine"
    folder = folder.with_name("elsewhere")
    write_lease(folder)
    board, naps = FolderBoard(folder), []

    def nap(seconds):
        naps.append(seconds)
        clock[0] += 15
        if len(naps) == 3:
            board.write_lease(1, lease.newest(board)[1].but(beat=1).text())

    monkeypatch.setattr(run_lock, "time", SimpleNamespace(monotonic=time.monotonic, sleep=nap))
    assert not run_lock.is_given_up(folder)
    assert len(naps) == 3
    assert run_lock.is_given_up(folder)
    assert len(naps) == 3 + 5
    assert lease.newest(board)[1].state == "revoked"


def test_a_folder_in_turn_is_held_after_the_others(folder):
    with at_work(folder) as lock:
        timer = threading.Timer(0.7, lock.release)
        timer.start()
        started = time.monotonic()
        with run_lock.locked_in_turn(folder) as hold:
            hold.check()
        timer.join()
    assert time.monotonic() - started > 0.6


def test_a_file_system_that_gives_no_answer_for_a_moment_ends_no_training(folder, monkeypatch, caplog):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    with locked(folder) as hold:
        with monkeypatch.context() as patch:
            patch.setattr(FolderBoard, "lease_numbers", fails)
            patch.setattr(FolderBoard, "write_lease", fails)
            hold.check()
            (mine,) = hold._leases
            mine.beat()
            mine.beat()
        assert caplog.messages == [
            f"whether this process still holds {folder} is not known: [Errno 5] Input/output error",
            f"no sign of life can be written to {folder}: [Errno 5] Input/output error",
        ]
        hold.check()


def test_a_lease_that_is_not_the_newest_holds_nothing(folder, monkeypatch):
    """Its number was free again when this process, which had stood still, created it."""
    for _ in range(7):
        with locked(folder):
            pass
    numbers, answers = FolderBoard.lease_numbers, [[5]]
    free = lease.Record().text()
    monkeypatch.setattr(
        FolderBoard, "lease_numbers", lambda board: answers.pop() if answers else numbers(board)
    )
    monkeypatch.setattr(FolderBoard, "read_lease", lambda *_: free)
    with pytest.raises(lease.Held), lease.taken(FolderBoard(folder), ""):
        pass
    assert numbers(FolderBoard(folder)) == [6, 7]


def test_the_same_path_on_the_same_machine_may_be_another_folder(tmp_path):
    """As a private /tmp of two containers."""
    first, second = tmp_path / "first", tmp_path / "second"
    with locked(first):
        second.mkdir()
        (second / "lease-1").write_text((first / "lease-1").read_text())
        with pytest.raises(AtWork), locked(second):
            pass
