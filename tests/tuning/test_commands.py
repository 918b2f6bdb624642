"""plan=json: the commands of a command line for other schedulers, and that they do all of it."""

import json
import shlex
import subprocess
import sys

import pytest

from helpers.cli import call_all, composed, frozen, tiny
from visprompt.errors import UserError
from visprompt.runs import run
from visprompt.runs.result import read_result
from visprompt.tuning import commands, protocol

pytestmark = frozen


def arguments(script, logs, *more):
    given = tiny(logs, "callbacks=none", "recipe.epochs=2", *more)
    return [word for word in given if script == "train" or not word.startswith("seed=")]


def planned(script, logs, capsys, *more, **hydra):
    """What is printed on stdout, line by line."""
    words = [*arguments(script, logs, *more), "plan=json", *(f"hydra.{k}={v}" for k, v in hydra.items())]
    capsys.readouterr()
    with composed(script, *words) as cfg:
        getattr(commands, script)(cfg)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def tune(logs, *more):
    with composed("tune", *arguments("tune", logs, *more)) as cfg:
        return protocol.tune(cfg)


def scripts(lines):
    """The lines' commands as `call_all` takes them."""
    for line in lines:
        python, script, *words = line["command"]
        assert python == sys.executable
        yield script.rpartition("/")[2].removesuffix(".py"), words


@pytest.fixture
def untimed(monkeypatch):
    monkeypatch.setattr(commands.DryRun, "seconds_alone", lambda self, job: 1.5)


def test_grids_come_before_seeds_and_these_before_the_table(tmp_path, capsys, untimed):
    given = ("tasks=[digits,digits_loc]", "methods=[linear]", "seeds=[1,2]")
    lines = planned("tune", tmp_path, capsys, *given, "++recipe.grid={recipe.lr:[0.2,0.4]}")
    by_id = {line["id"]: line for line in lines}
    assert [line["what"] for line in lines] == ["grid", "grid", "seed", "seed"] * 2 + ["table"]
    for task in ("digits", "digits_loc"):
        points = [f"{task}/linear/point-{number}" for number in (0, 1)]
        seeds = [f"{task}/linear/seed-{seed}" for seed in (1, 2)]
        assert [by_id[name]["after"] for name in points + seeds] == [[], [], points, points]
        assert {by_id[name]["command"][-1] for name in seeds} == {"table=null"}
        assert by_id[points[1]]["command"][-3:] == [f"tasks={task}", "methods=[linear]", "points=[1]"]
        assert by_id[seeds[1]]["folder"] is None
        assert by_id[points[0]]["folder"].startswith(f"{tmp_path}/{task}/linear/")
    assert lines[-1]["id"] == f"{tmp_path}/table.md"
    assert lines[-1]["after"] == [line["id"] for line in lines if line["what"] == "seed"]
    assert [line["seconds"] for line in lines] == [1.5] * 8 + [0]
    for line in lines:
        assert shlex.split(line["shell"]) == line["command"]
        assert not any(word.startswith(("plan=", "data=")) for word in line["command"])


def test_what_is_finished_is_left_out_and_the_choice_is_known_then(tmp_path, capsys, untimed):
    given = ("method=linear", "seeds=[1,2]", "++recipe.grid={recipe.lr:[0.2,0.2,0.4]}")
    assert 0 <= tune(tmp_path, *given, "points=[0]") <= 1
    lines = planned("tune", tmp_path, capsys, *given)
    assert [line["id"].rpartition("/")[2] for line in lines[:-1]] == ["point-2", "seed-1", "seed-2"]
    assert lines[1]["after"] == ["digits/linear/point-2"], "equal points are one run"
    tune(tmp_path, *given, "points=[2]")
    lines = planned("tune", tmp_path, capsys, *given)
    assert [line["what"] for line in lines] == ["seed", "seed", "table"]
    tune(tmp_path, *given, "seeds=[2]", "table=null")
    assert not (tmp_path / "table.md").exists()
    lines = planned("tune", tmp_path, capsys, *given)
    assert [line["id"].rpartition("/")[2] for line in lines] == ["seed-1", "table.md"]
    folder = lines[0]["folder"]
    tune(tmp_path, *given)
    assert read_result(
        next(path.parent for path in tmp_path.rglob(f"{folder.rpartition('/')[2]}/result.json"))
    )
    assert planned("tune", tmp_path, capsys, *given) == []
    (tmp_path / "table.md").write_text("of another command")
    assert [line["what"] for line in planned("tune", tmp_path, capsys, *given)] == ["table"]


def test_a_chain_of_pruning_is_one_command(tmp_path, capsys, untimed):
    given = ("method=e2vpt", "method.num_tokens=4", "method.num_segments=2", "method.prune=true", "seeds=[1]")
    grid = "++recipe.grid={recipe.lr:[0.2]}"
    lines = planned("tune", tmp_path, capsys, *given, grid)
    assert [line["what"] for line in lines] == ["grid", "chain", "table"]
    assert lines[1]["after"] == [lines[0]["id"]]
    assert lines[1]["seconds"] > 1.5 == lines[0]["seconds"], "that of all runs of the chain"


def test_every_task_of_train_is_a_command(tmp_path, capsys, untimed):
    lines = planned(
        "train", tmp_path, capsys, "tasks=demo", "method=linear", "engine=processes", "dry_run=true"
    )
    assert [line["id"] for line in lines] == [
        f"{task}/linear/seed-0" for task in ("digits", "digits_crowded", "digits_loc")
    ]
    assert {line["what"] for line in lines} == {"run"}
    assert lines[1]["command"][-1] == "tasks=digits_crowded"
    assert not any("engine" in word or "dry_run" in word for word in lines[0]["command"])


def test_a_segmentation_experiment_is_a_command_without_its_data(tmp_path, capsys, untimed):
    given = (
        "experiment=ade20k_deep",
        "backbone=demo",
        "backbone.image_size=64",
        f"paths.data_dir={tmp_path}",
    )
    (line,) = planned("train", tmp_path, capsys, *given, "method.num_tokens=10", "recipe.warmup_epochs=0")
    assert (line["id"], line["what"], line["seconds"]) == ("ade20k/vpt_deep/seed-0", "run", 1.5)
    assert line["command"][-1] == "tasks=ade20k"


def test_commands_run_from_any_folder(tmp_path, capsys, untimed, monkeypatch):
    (tmp_path / "my logs").mkdir()
    monkeypatch.chdir(tmp_path)
    given = ("method=linear", "seeds=[1]", "paths.log_dir='my logs'", "++recipe.grid={recipe.lr:[0.2]}")
    (line, *_) = planned("tune", tmp_path, capsys, *given)
    assert f"paths.log_dir='{tmp_path}/my logs'" in line["command"]
    assert line["folder"].startswith(f"{tmp_path}/my logs/digits/linear/")


def test_a_path_of_one_task_is_not_in_the_commands_of_others(tmp_path, capsys, untimed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ("method=linear", "tasks=[dtd,digits]", "paths.data_dir=mine", "seeds=[1]")
    lines = planned("tune", tmp_path, capsys, *given)
    assert len({line["id"].partition("/")[0] for line in lines[:-1]}) == 2
    for line in lines:
        assert [word for word in line["command"] if "data_dir" in word] == [
            f"paths.data_dir='{tmp_path}/mine'"
        ]
        assert not any(word.startswith("data.store_dir") for word in line["command"])


@pytest.mark.parametrize("there", [True, False])
def test_a_data_set_that_is_a_folder_here_is_absolute_and_one_of_the_hub_is_not(tmp_path, monkeypatch, there):
    if there:
        (tmp_path / "sets" / "birds").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    words = arguments("tune", tmp_path, "data=hf", "data.dataset=sets/birds")
    with composed("tune", *[word for word in words if not word.startswith("data=demo")]) as cfg:
        command = commands._Planner(cfg).command({})
    absolute = f"data.dataset='{tmp_path}/sets/birds'"
    assert (absolute if there else "data.dataset=sets/birds") in command


def test_a_time_that_cannot_be_measured_is_null(tmp_path, capsys):
    lines = planned("train", tmp_path, capsys, "method=linear", "trainer.accelerator=gpu")
    assert lines[0]["seconds"] is None


def test_plans_that_make_no_sense_are_one_sentence(tmp_path, capsys, untimed):
    with pytest.raises(UserError, match=r"^plan=json lists the runs of one command, and -m makes several"):
        planned("train", tmp_path, capsys, mode="MULTIRUN")
    with pytest.raises(UserError, match=r"^points=\.\.\. and plan=json ask for different things"):
        planned("tune", tmp_path, capsys, "points=[0]")
    with pytest.raises(UserError, match=r"^a trainer setting cuts every run short"):
        planned("tune", tmp_path, capsys, "+trainer.limit_train_batches=2")
    with pytest.raises(UserError, match=r"^digits_masks/e2vpt: .*prun.*segmentation"):
        planned("tune", tmp_path, capsys, "data=demo/digits_masks", "method=e2vpt")
    with pytest.raises(UserError, match=r"^digits/vpt_deep: unknown option of .* 'colour'"):
        planned("train", tmp_path, capsys, "+method.colour=red")


@pytest.mark.parametrize("points", ["[2]", "[]", "[0,7]"])
def test_points_that_the_grid_lacks_are_one_sentence(tmp_path, points):
    sentence = r"^points=\[.*\] does not fit: give a list of numbers from 0 to 1, the points of this grid$"
    with pytest.raises(UserError, match=sentence):
        tune(tmp_path, f"points={points}")


def test_points_train_only_these_and_choose_nothing(tmp_path, monkeypatch):
    trained, train = [], run._train
    monkeypatch.setattr(run, "_train", lambda one, *rest: trained.append(one.job) or train(one, *rest))
    score = tune(tmp_path, "points=[1]", "seeds=[1,2]")
    assert [(job.split, job.seed, job.recipe.lr) for job in trained] == [("tune", 42, 0.4)]
    (path,) = tmp_path.rglob("result.json")
    assert score == read_result(path.parent).score
    assert not (tmp_path / "table.md").exists()


@pytest.mark.slow
def test_the_commands_do_all_of_the_protocol(tmp_path, capsys, untimed):
    given = ("method=linear", "seeds=[1]", "++recipe.grid={recipe.lr:[0.2]}", "tags=['a b',\"it's\"]")
    lines = planned("tune", tmp_path, capsys, *given)
    # what a shell makes of the lines is what was meant
    echo = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "
    commands_text = "\n".join(echo + line["shell"] for line in lines)
    done = subprocess.run(
        ["xargs", "-d", "\n", "-n", "1", "sh", "-c"], input=commands_text, capture_output=True, text=True
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [line["command"] for line in lines]
    done = call_all(scripts(lines))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "table.md").is_file()
    assert planned("tune", tmp_path, capsys, *given) == []
