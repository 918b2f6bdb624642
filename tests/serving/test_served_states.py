"""The states of a folder or a list, and the tasks of the bank that are kept equal to them."""

import os
import shutil
from pathlib import Path

import pytest

import visprompt
from helpers.service import until, write_state
from visprompt.errors import UserError
from visprompt.models.backbones import DEMO
from visprompt.serving.refused import Refused
from visprompt.serving.states import States, source_of


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    return [write_state(folder / f"{name}.safetensors", number, 3) for number, name in enumerate("abc")]


@pytest.fixture
def folder(tmp_path, written):
    folder = tmp_path / "states"
    (folder / "run").mkdir(parents=True)
    shutil.copy(written[0], folder / "birds.safetensors")
    shutil.copy(written[1], folder / "run" / "tuned.safetensors")
    return folder


@pytest.fixture
def states(folder):
    states = States(visprompt.Bank(DEMO), source_of(str(folder)))
    states.refresh()
    yield states
    states.close()


def ready(states):
    return [entry.name for entry in states.entries if entry.ready]


def test_a_folder_holds_files_and_runs_by_their_names(folder, written):
    for name in (".hidden.safetensors", "two words.safetensors", "notes.txt", "-x.safetensors"):
        shutil.copy(written[2], folder / name)
    (folder / "empty").mkdir()
    shutil.copytree(folder / "run", folder / "birds")  # the file of the same name counts
    found = source_of(str(folder))()
    assert found == {"birds": folder / "birds.safetensors", "run": folder / "run" / "tuned.safetensors"}


def test_of_a_task_s_runs_in_a_folder_of_logs_the_newest_is_served(folder, written):
    runs = [
        folder / "digits" / method / name for method, name in (("linear", "a" * 12), ("vpt_deep", "b" * 12))
    ]
    for number, run in enumerate([*runs, runs[0].with_name("c" * 12 + ".tmp-1")]):
        run.mkdir(parents=True)
        shutil.copy(written[number], run / "tuned.safetensors")
        os.utime(run / "tuned.safetensors", (number, number))
    assert source_of(str(folder))()["digits"] == runs[1] / "tuned.safetensors"
    os.utime(runs[0] / "tuned.safetensors", (9, 9))
    assert source_of(str(folder))()["digits"] == runs[0] / "tuned.safetensors"
    shutil.rmtree(folder / "digits")
    assert set(source_of(str(folder))()) == {"birds", "run"}


def test_a_list_is_named_by_files_or_by_what_runs_were_tuned_for(folder, written, tmp_path):
    found = source_of([str(written[2]), str(folder / "run")])()
    assert found == {"c": written[2], "b": folder / "run" / "tuned.safetensors"}
    assert source_of(str(folder / "run"))() == {"b": folder / "run" / "tuned.safetensors"}
    with pytest.raises(UserError, match=r"would both be task b: put them into a folder under two names"):
        source_of([str(written[1]), str(folder / "run")])
    for nothing in (str(tmp_path / "none"), [str(tmp_path / "none")]):
        with pytest.raises(
            UserError, match=r"there is no tuned state at states=.*none: give a folder of states"
        ):
            source_of(nothing)


def test_a_folder_that_may_not_be_read_is_left_out_alone(states, folder, monkeypatch, caplog):
    (folder / "lost+found").mkdir()
    is_file = Path.is_file

    def refuses(path):
        if path.parent.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuses)
    for _ in range(2):
        states.refresh()
    assert ready(states) == ["birds", "run"]
    assert (
        caplog.messages.count(f"{folder}/lost+found cannot be read (Permission denied): it is left out") == 1
    )


def test_while_the_folder_is_away_an_unknown_name_is_unknown_and_loading_says_why(states, folder):
    folder.rename(folder.with_name("away"))
    with pytest.raises(Refused, match=r"^unknown task 'none'") as error:
        states.entry("none")
    assert error.value.status == 404
    with pytest.raises(Refused, match=r"states=.* cannot be read \(No such file or directory\)") as error:
        states.load("birds")
    assert error.value.status == 503
    assert states.entry("birds").ready


def test_files_that_come_change_and_go(states, folder, written):
    assert ready(states) == ["birds", "run"]
    before = states.task("birds")
    states.refresh()
    assert states.task("birds") is before, "an unchanged file is not loaded again"
    shutil.copy(written[2], folder / "new.safetensors")
    assert states.task("new").class_names == ("c_0", "c_1", "c_2"), "found on demand"
    shutil.copy(written[2], folder / "birds.safetensors")
    states.refresh()
    assert states.task("birds").class_names[0] == "c_0"
    (folder / "birds.safetensors").unlink()
    states.refresh()
    with pytest.raises(Refused, match="unknown task 'birds'") as refused:
        states.task("birds")
    assert refused.value.status == 404
    assert ready(states) == ["new", "run"]


def test_a_damaged_file_leaves_what_was_loaded_and_is_read_again_when_it_changes(states, folder, written):
    before = states.task("birds")
    (folder / "birds.safetensors").write_bytes(written[0].read_bytes()[:4000])  # half a copy
    states.refresh()
    assert ready(states) == ["run"]
    assert "not a readable tuned state" in states.entry("birds").reason
    assert states.task("birds") is before
    with pytest.raises(Refused) as refused:
        states.load("birds")
    assert refused.value.status == 422
    shutil.copy(written[1], folder / "birds.safetensors")
    states.refresh()
    assert states.task("birds").class_names[0] == "b_0"
    (folder / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(
        Refused, match="task broken cannot be loaded: the log of the service says why"
    ) as refused:
        states.task("broken")
    assert refused.value.status == 503
    assert str(folder) not in str(refused.value), "a client does not learn paths"


def test_what_is_unloaded_stays_so_until_it_is_loaded(states, folder, written):
    states.unload("birds")
    shutil.copy(written[2], folder / "birds.safetensors")
    states.refresh()
    with pytest.raises(Refused, match="task birds is unloaded: load it with POST /v1/tasks/birds/load"):
        states.task("birds")
    assert states.load("birds").class_names[0] == "c_0"
    assert states.task("birds").class_names[0] == "c_0"


def test_a_task_that_was_evicted_returns_and_one_whose_file_has_gone_does_not(folder):
    bank = visprompt.Bank(DEMO, budget=60_000)  # room for one
    states = States(bank, source_of(str(folder)))
    states.refresh()
    assert bank.loaded == ["run"]
    assert states.task("birds").name == "birds"
    assert bank.loaded == ["birds"]
    (folder / "run" / "tuned.safetensors").unlink()
    with pytest.raises(Refused, match="unknown task 'run'"):
        states.task("run")


def test_the_thread_follows_the_folder_also_after_it_was_away(states, folder, written):
    states.watch(0.02)
    shutil.copy(written[2], folder / "new.safetensors")
    until(lambda: ready(states) == ["birds", "new", "run"])
    os.rename(folder, folder.with_name("away"))  # noqa: PTH104  # a disk that is gone for a while
    until(lambda: states._source.__name__ and not folder.exists())
    assert states.task("new").name == "new"
    os.rename(folder.with_name("away"), folder)  # noqa: PTH104
    (folder / "new.safetensors").unlink()
    until(lambda: ready(states) == ["birds", "run"])


@pytest.mark.parametrize("name", ["../birds", "/etc/passwd", "birds/../run", "", ".", "run/tuned", "birds\0"])
def test_a_name_is_not_a_path(states, name):
    for ask in (states.task, states.load, states.unload):
        with pytest.raises(Refused) as refused:
            ask(name)
        assert refused.value.status == 404
