"""A run on a real S3 server: every reader sees a whole run, whatever process is killed, late or first."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from itertools import count

import pytest
import torch

from helpers import s3_server
from helpers.damage import outcome
from helpers.finished_runs import finish
from helpers.written_runs import changed
from visprompt.runs import object_store, run_lock
from visprompt.runs.checkpoint import Owner, ResumeCheckpoint, SafetensorsIO
from visprompt.runs.job import Paths
from visprompt.runs.object_store import ObjectStore
from visprompt.runs.result import read_result, write_result
from visprompt.runs.results_store import Results
from visprompt.runs.resume_state import progress_of

HASH = "a" * 12
RUN = f"cifar/linear/{HASH}"
NUMBER = count()
OBJECTS = ("upload", "write_if", "write", "download", "remove")
DISK = ("replace", "rename", "rmdir")


@pytest.fixture(scope="module", autouse=True)
def _server():
    with s3_server.served():
        yield


@pytest.fixture
def machines(tmp_path):
    """The same run as three machines see it, in its own store."""
    url = f"{s3_server.URL}/{next(NUMBER)}"
    stores = [Results.of(Paths(data_dir="", log_dir=str(tmp_path / name), results=url)) for name in "abc"]
    return [store.run(store.log_dir / RUN) for store in stores]


def store_of(run):
    """The store that a machine's run is in."""
    return Results(ObjectStore(run.objects.url.removesuffix(f"/{RUN}")), run.folder.parents[2])


def suspend(run, steps, attempt=0, owner="a" * 64):
    """Puts a resume state into a machine's folder."""
    resume = ResumeCheckpoint(run.folder / "resume")
    resume.owner = Owner(owner, 0, attempt)
    tree = {
        "state_dict": {"w": torch.tensor([float(steps)])},
        "global_step": steps,
        "callbacks": {resume.state_key: resume.state_dict()},
    }
    SafetensorsIO().save_checkpoint(tree, resume.path)


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock" and not path.name.startswith("lease-")
    }


def progress(run):
    found = progress_of(run.folder / "resume/state.safetensors")
    return found and (found[0].attempt, found[1])


class Killed(BaseException):
    """Stands for SIGKILL: nothing that comes after it reaches the disk or the store."""


@contextmanager
def killed_at(step, *disk):
    """Lets so many writes reach the store, and the disk if it is named, and none after them."""
    done = []

    def counted(original):
        def call(*given, **options):
            done.append(original)
            if len(done) > step:
                raise Killed
            return original(*given, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in OBJECTS:
            patch.setattr(ObjectStore, name, counted(getattr(ObjectStore, name)))
        for name in disk:
            patch.setattr(os, name, counted(getattr(os, name)))
        yield


def is_killed(call, step, *disk):
    with killed_at(step, *disk):
        try:
            call()
            return False
        except Killed:
            return True


def test_a_finished_run_comes_to_another_machine_bit_for_bit(machines):
    one, other, _ = machines
    finish(one.folder)
    suspend(other, steps=7)
    assert one.push_finished()
    other.pull()
    assert content(other.folder) == content(one.folder)
    assert read_result(other.folder).score == 0.5
    assert one.push_finished()
    assert other.push_finished()


def test_nothing_comes_from_an_empty_store_and_what_is_here_stays(machines):
    one = machines[0]
    one.pull()
    assert content(one.folder) == {}
    finish(one.folder)
    before = content(one.folder)
    one.pull()
    assert content(one.folder) == before


def test_a_damaged_local_run_is_mended_by_that_of_the_store(machines):
    one = machines[0]
    finish(one.folder)
    before = content(one.folder)
    one.push_finished()
    (one.folder / "tuned.safetensors").write_bytes(b"0")
    one.pull()
    assert content(one.folder) == before


def test_a_later_attempt_replaces_the_run_and_its_files(machines):
    one, other, third = machines
    finish(one.folder)
    finish(other.folder, 0.7, attempt=1)
    assert one.push_finished()
    other.pull()  # the local attempt is later
    assert read_result(other.folder).attempt == 1
    assert other.push_finished()
    assert not one.push_finished()
    for run in (one, third):
        run.pull()
        assert content(run.folder) == content(other.folder)
    assert len(other.objects.etags()) == 4  # those of the first attempt are gone


def test_of_two_that_finish_an_attempt_the_first_stands_for_both(machines, monkeypatch):
    one, other, third = machines
    finish(one.folder, 0.5)
    finish(other.folder, 0.6)
    uploaded = []
    upload = ObjectStore.upload

    def late(store, key, file, **facts):
        upload(store, key, file, **facts)
        uploaded.append(key)
        if len(uploaded) == 3:  # all files of the other are there, and its result is not
            with monkeypatch.context() as patch:
                patch.setattr(ObjectStore, "upload", upload)
                assert one.push_finished()

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "upload", late)
        assert not other.push_finished()
    for run in (other, third):
        run.pull()
        assert content(run.folder) == content(one.folder)
    assert len(one.objects.etags()) == 4  # the loser's files are gone


def test_an_answer_that_is_lost_does_not_lose_the_write(machines, monkeypatch):
    one = machines[0]
    finish(one.folder)
    files = object_store._file_system(os.getpid())
    pipe = files.pipe_file

    def twice(*given, **options):  # as botocore repeats a request whose answer was lost
        pipe(*given, **options)
        return pipe(*given, **options)

    monkeypatch.setattr(files, "pipe_file", twice)
    assert one.create_lease(0, "of one process")
    assert not one.create_lease(0, "of another")
    assert one.push_finished()


@pytest.mark.parametrize("attempt", [0, 1])
def test_a_push_that_is_killed_at_any_step_shows_the_old_or_the_new_run(machines, attempt):
    one, other, third = machines
    if attempt:
        finish(third.folder, 0.4)
        third.push_finished()
    old = content(third.folder)
    finish(one.folder, 0.6, attempt)
    suspend(other, 3, attempt)
    other.push_state()
    new = content(one.folder)
    seen = []
    for step in count():
        ended = not is_killed(one.push_finished, step)
        shutil.rmtree(other.folder)
        other.pull()
        shutil.rmtree(other.folder / "resume", ignore_errors=True)
        seen.append(content(other.folder))
        if ended:
            break
    assert seen[0] == old
    assert seen[-1] == new
    assert all(each in (old, new) for each in seen)
    assert step >= 4
    assert one.push_finished()
    assert len(one.objects.etags()) == 4 + 3 * attempt  # the files of the replaced run may be left


@pytest.mark.parametrize("local", ["nothing", "state", "run"])
def test_a_pull_that_is_killed_at_any_step_leaves_the_old_or_the_new_run(machines, local):
    one, other, _ = machines
    finish(one.folder, 0.6, attempt=1)
    one.push_finished()
    new = content(one.folder)
    for step in count():
        shutil.rmtree(other.folder, ignore_errors=True)
        other.folder.mkdir(parents=True)
        if local == "state":
            suspend(other, 5)
        elif local == "run":
            finish(other.folder, 0.3)
        old = read_result(other.folder)
        ended = not is_killed(other.pull, step, *DISK)
        run_lock.tidy(other.folder)
        stored = read_result(other.folder)
        assert stored in (old, read_result(one.folder))
        if ended:
            break
        other.pull()
        assert content(other.folder) == new
    assert content(other.folder) == new
    assert step > 8


def test_of_resume_states_the_one_of_the_later_attempt_and_step_is_kept(machines):
    one, other, third = machines
    suspend(one, 5)
    one.push_state()
    suspend(other, 3)
    other.pull()
    assert progress(other) == (0, 5)
    assert (other.folder / "resume/state.safetensors").read_bytes() == (
        one.folder / "resume/state.safetensors"
    ).read_bytes()
    suspend(other, 9)
    other.pull()
    assert progress(other) == (0, 9)
    finish(third.folder)
    assert third.push_finished()
    assert list(third.objects.etags("resume")) == []
    other.pull()  # the attempt is over
    assert progress(other) is None
    assert content(other.folder) == content(third.folder)
    suspend(one, 2, attempt=1)
    one.push_state()
    assert third.push_finished()  # does not remove the state of a later attempt
    other.pull()
    assert progress(other) == (1, 2)
    assert read_result(other.folder).attempt == 0


def test_a_rerun_that_has_begun_here_is_not_thrown_away(machines):
    one, other, _ = machines
    finish(one.folder)
    one.push_finished()
    suspend(other, 4, attempt=1)
    other.pull()
    assert progress(other) == (1, 4)


@pytest.mark.parametrize("name", ["tuned.safetensors", "metrics.csv", "config.yaml", "result.json"])
@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_object_is_named_and_the_local_folder_is_unchanged(machines, name, damage):
    one, other, _ = machines
    finish(one.folder, 0.6, attempt=1)
    one.push_finished()
    (key,) = (key for key in one.objects.etags() if key.endswith(name))
    kept = one.objects.read(key)
    if damage == "gone":
        if name == "result.json":
            return
        one.objects.remove(key)
    elif name == "config.yaml":  # its checksum is the object's own
        bucket, path = one.objects._place(key)
        facts = one.objects.head(key).facts
        object_store._file_system(os.getpid()).pipe_file(f"{bucket}/{path}", b"x: 1", Metadata=dict(facts))
    else:
        one.objects.write(key, kept.replace(b"0", b"1"))
    finish(other.folder, 0.3)
    before = content(other.folder)
    sentence = outcome(other.pull)[1]
    assert sentence.startswith(f"{one.objects.url} holds a damaged run (")
    assert name in sentence
    assert sentence.endswith("): delete its objects, and run the same command again")
    assert content(other.folder) == before


def test_a_name_from_elsewhere_does_not_leave_the_folder(machines):
    one, other, _ = machines
    finish(one.folder)
    outside = {"../../outside": "0" * 64}
    write_result(one.folder, changed(read_result(one.folder), files=outside))
    one.push_finished()
    other.pull()
    assert sorted(content(other.folder)) == ["config.yaml", "result.json", "tuned.safetensors"]
    with pytest.raises(ValueError, match="is not below the run's folder"):
        other.pull_file("../outside")


def test_a_damaged_resume_state_and_that_of_another_run_are_named(machines):
    one, other, _ = machines
    suspend(one, 5)
    one.push_state()
    facts = one.objects.head("resume/state.safetensors").facts
    file = one.folder / "resume/state.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    one.objects.upload("resume/state.safetensors", file, attempt=facts["attempt"], steps=facts["steps"])
    url = f"{one.objects.url}/resume/state.safetensors"
    assert outcome(other.pull)[1] == f"{url} is damaged: delete this object to start over"
    suspend(one, 5, owner="b" * 64)
    one.push_state()
    assert outcome(other.pull)[1] == (
        f"{url} is the resume state of another run: delete this object to start over"
    )
    assert content(other.folder) == {}


def test_files_of_a_chain_are_single_objects(machines):
    one, other = (store.run(store.log_dir / "cifar/linear") for store in map(store_of, machines[:2]))
    (one.folder / "initial").mkdir(parents=True)
    (one.folder / "initial/x.safetensors").write_bytes(b"values")
    assert not other.pull_file("initial/x.safetensors")
    one.push_file("initial/x.safetensors")
    assert other.pull_file("initial/x.safetensors")
    assert content(other.folder) == {"initial/x.safetensors": b"values"}


def test_the_results_of_a_group_are_read_without_their_files(machines, monkeypatch):
    store, elsewhere = map(store_of, machines[:2])
    group, there = store.log_dir / "cifar/linear", elsewhere.log_dir / "cifar/linear"
    for number, letter in enumerate("abc"):
        run = store.run(group / (letter * 12))
        finish(run.folder, 0.1 * number)
        run.push_finished()
    store.run(group / ("c" * 12)).objects.write("result.json", b"{")
    suspend(store.run(group / ("d" * 12)), 3)
    store.run(group / ("d" * 12)).push_state()
    monkeypatch.setattr(ObjectStore, "download", None)  # no file is brought
    found = elsewhere.of_group(there)
    assert [(name[0], result.score) for name, result in found] == [("a", 0.0), ("b", 0.1)]
    assert not there.exists()
    monkeypatch.setattr(ObjectStore, "read", None)  # what is here is not asked for
    (group / ("c" * 12) / "result.json").write_bytes(b"{")
    assert [name[0] for name, _ in store.of_group(group)] == ["a", "b"]


def test_leases_are_created_once_listed_in_order_and_replaced_by_their_owner(machines):
    one, other, _ = machines
    assert one.lease_numbers() == []
    assert one.read_lease(1) is None
    assert one.create_lease(10, "a")
    assert one.create_lease(9, "a")
    assert not other.create_lease(10, "b")
    assert other.lease_numbers() == [9, 10]
    one.write_lease(10, "a, later")
    assert other.read_lease(10) == "a, later"
    other.remove_lease(9)
    other.remove_lease(9)
    assert one.lease_numbers() == [10]


def test_a_forked_process_has_its_own_connection(machines):
    one = machines[0]
    one.create_lease(0, "parent")
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if one.read_lease(0) == "parent" and not one.create_lease(0, "child") else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert one.read_lease(0) == "parent"


RACE = """
import sys
from visprompt.runs.object_store import ObjectStore
store, who = ObjectStore(sys.argv[1]), sys.argv[2]
store.write(f"here/{who}", b"")
while len(store.etags("here/")) < 2:
    pass
print(*(n for n in range(40) if store.write_if(f"lease-{n}", who.encode(), None)))
"""


@pytest.mark.slow  # two processes
def test_of_two_processes_exactly_one_creates_a_lease(machines):
    url = machines[0].objects.url
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE, url, who], stdout=subprocess.PIPE, text=True)
        for who in ("one", "other")
    ]
    won = [set(racer.communicate(timeout=120)[0].split()) for racer in racers]
    assert won[0] | won[1] == set(map(str, range(40)))
    assert not won[0] & won[1]
