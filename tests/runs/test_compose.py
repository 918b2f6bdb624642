"""Command lines: what they compose into, and the one sentence for one that is wrong."""

import re
import shutil
import sys

import pytest

from helpers.cli import composed
from visprompt.data import catalog
from visprompt.errors import UserError
from visprompt.runs import cli, compose
from visprompt.runs.paths import CONFIGS


def jobs(*arguments, config="train", extra=()):
    with composed(config, *arguments) as cfg:
        return compose.jobs(cfg, extra)


def said(capsys, monkeypatch, script, *arguments):
    """What is printed for a wrong command line: one line, and status 2."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.check_words(script)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        (
            "method=vpt_dep",
            "unknown method 'vpt_dep': did you mean vpt_deep or vpt_deep_bias or vpt_gated? (all: adapter, ",
        ),
        ("data=demo/digit", "unknown data 'demo/digit': did you mean demo/digits"),
        ("data=digits_loc", "unknown data 'digits_loc': did you mean demo/digits_loc"),
        ("data=demo/", "unknown data 'demo/': "),
        ("backbone=dmeo", "unknown backbone 'dmeo': did you mean demo?"),
        ("experiment=demo_tabel", "unknown experiment 'demo_tabel': did you mean demo_table"),
        ("trainer=cpuu", "unknown trainer 'cpuu': did you mean cpu"),
        ("callbacks=no", "unknown callbacks 'no': did you mean none"),
        ("logger=wandbb", "unknown logger 'wandbb': did you mean wandb?"),
        ("debug=fdrr", "unknown debug 'fdrr': did you mean fdr?"),
        ("recipe=vptdeep", "unknown recipe 'vptdeep': did you mean vpt_deep"),
        ("splt=tune", "unknown key 'splt': did you mean split or plan?"),
        ("recipe.lrr=1", "unknown key 'recipe.lrr': did you mean recipe.lr"),
        ("method.dropot=0.1", "unknown key 'method.dropot': did you mean method.dropout"),
        ("trainer.device=2", "unknown key 'trainer.device': did you mean trainer.devices"),
        (
            "data.root=x",
            "root is an option of fgvc/cub200, fgvc/nabirds, fgvc/oxford_flowers, fgvc/stanford_cars, ",
        ),
        ("lr=0.1", "unknown key 'lr': did you mean recipe.lr?\n"),
        ("+methd.num_tokens=3", "unknown key 'methd': did you mean method?"),
        ("++sed=3", "unknown key 'sed': did you mean seed?"),
        ("~callback", "Could not delete from config. 'callback' does not exist."),
        ("hydra.runs=x", "Could not override 'hydra.runs'."),
        ("recipe=[1", "recipe=[1 cannot be read: type \"recipe='[1'\"\n"),
        (
            "tasks=digits,digits_loc",
            "tasks=digits,digits_loc gives several values: type tasks=[digits,digits_loc] for one command "
            "with all of them, or python src/train.py -m tasks=digits,digits_loc for a run with each\n",
        ),
        ("logger=3", "Config group override must be a string or a list. Got int: logger=3"),
        ("logger=null", "logger=null names no option: give one of csv, tensorboard, wandb"),
        ("data=folder", "data.root has no default: give data.root=..."),
        (
            "recipe=linear",
            "the chosen recipe has no num_tokens: take the method's own recipe, or give ",
        ),
        ("recipe=base", "the chosen recipe has no num_tokens: take the method's own recipe"),
        ("rerun=flase", "rerun=flase does not fit: give true or false"),
        ("diagnostics.best_on_test='yes'", "diagnostics.best_on_test=yes does not fit: give true or false"),
        ("backbone.exact=1", "backbone.exact=1 does not fit: give true or false"),
        ("trainer.max_epochs=3", "trainer.max_epochs is set by this project: give recipe.epochs=..."),
        ("trainer.precision=16-mixed", "trainer.precision is set by this project: give precision=..."),
        (
            "trainer.gradient_clip_val=1",
            "trainer.gradient_clip_val is not in the chosen trainer's config: give "
            "+trainer.gradient_clip_val=...",
        ),
        ("seed=abc", "seed=abc does not fit: give a whole number from 0 to 4294967295"),
        ("seed=-1", "seed=-1 does not fit: give a whole number from 0"),
        ("seed=1.5", "seed=1.5 does not fit: give a whole number from 0"),
        ("resume_every_n_epochs=0", "resume_every_n_epochs=0 does not fit: give a whole number from 1"),
        ("task=cifar", "task is set for each run, not by hand: give tasks=..."),
        ("data.num_workers=-1", "data.num_workers=-1 does not fit: give a whole number from 0"),
    ],
)
def test_a_wrong_word_is_one_sentence_that_names_the_nearest(capsys, monkeypatch, argument, sentence):
    assert f"error: {sentence}" in said(capsys, monkeypatch, "train", argument)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("++task=cifar", "task is set for each run, not by hand: give tasks=..."),
        ("seed=3", "seed is set for each run, not by hand: give seeds=..."),
        ("split=tune", "split is set for each run, not by hand: src/train.py takes split=..."),
    ],
)
@pytest.mark.parametrize("more", [(), ("-m",)])
def test_what_the_protocol_sets_is_no_key_of_its_command_line(capsys, monkeypatch, argument, sentence, more):
    assert said(capsys, monkeypatch, "tune", argument, *more) == f"error: {sentence}\n"


def test_each_of_several_seeds_is_a_whole_number(capsys, monkeypatch):
    assert "error: seeds=[1, 'a'] does not fit" in said(capsys, monkeypatch, "tune", "seeds=[1,a]")


@pytest.mark.parametrize("more", [(), ("-m", "seed=1,2"), ("--cfg", "job")])
def test_an_option_of_another_method_says_whose_it_is(capsys, monkeypatch, more):
    assert re.fullmatch(
        r"error: num_tokens is an option of (\w+, ){7}\w+ and \d+ more: method linear has no options\n",
        said(capsys, monkeypatch, "train", "method=linear", "method.num_tokens=5", *more),
    )
    assert said(capsys, monkeypatch, "train", "method=vpt_deep_bias", "method.whitening=frozen", *more) == (
        "error: whitening is an option of vpt_low_rank: method vpt_deep_bias has dropout, num_tokens\n"
    )


@pytest.mark.parametrize(
    ("script", "argument", "owner"),
    [
        ("eval", "seed=1", "train"),
        ("predict", "split=tune", "train"),
        ("predict", "method=linear", "train"),
        ("predict", "+method.num_tokens=3", "train"),
        ("train", "seeds=[1,2]", "tune"),
        ("train", "grid=paper", "tune"),
        ("train", "images=x", "predict"),
        ("report", "run=x", "eval"),
    ],
)
def test_a_key_of_another_entry_point_says_whose_it_is(capsys, monkeypatch, script, argument, owner):
    key = argument.lstrip("+").partition("=")[0]
    sentence = f"error: {key} belongs to src/{owner}.py, not to src/{script}.py: leave it out\n"
    assert said(capsys, monkeypatch, script, argument) == sentence


@pytest.mark.parametrize(("script", "key"), [("eval", "run"), ("predict", "images"), ("predict", "state")])
def test_what_has_no_default_is_asked_for(capsys, monkeypatch, script, key):
    others = [f"{other}=x" for other in ("images", "state") if script == "predict" and other != key]
    assert said(capsys, monkeypatch, script, *others) == f"error: {key} has no default: give {key}=...\n"


@pytest.mark.parametrize("script", ["predict", "report"])
def test_a_machine_s_file_that_chooses_a_group_is_one_sentence(tmp_path, capsys, monkeypatch, script):
    shutil.copytree(CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(compose, "CONFIGS", tmp_path / "configs")
    file = tmp_path / "configs" / "local" / "default.yaml"
    file.write_text("# @package _global_\ndefaults: [override /trainer: gpu]\n")
    sentence = said(capsys, monkeypatch, script, "device=cpu")
    assert sentence.startswith(
        "error: the files in configs cannot be composed: In 'local/default': Could not override"
    )
    assert sentence.endswith(
        "; configs/local/default.yaml may set values, but cannot choose options of config groups\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("tasks=demo",),
        ("+tasks=demo",),
        ("tasks=[digits,demo]",),
        ("data=folder", "data.root='/a b/c=d'"),
        ("++backbone.kwargs={depth:2}",),
        ("+trainer.limit_train_batches=3",),
        ("~callbacks.progress_bar",),
        ("hydra.run.dir=x",),
        ("+hydra.job.env_set.A=1",),
        ("-m", "seed=1,2"),
    ],
)
def test_a_right_command_line_passes_in_silence(capsys, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    cli.check_words("train")
    assert capsys.readouterr() == ("", "")


def test_one_sentence_and_a_status_for_each_kind_of_end(capsys):
    def status(error):
        with pytest.raises(SystemExit) as end, cli.one_sentence_errors():
            raise error
        return end.value.code, capsys.readouterr().err

    assert status(UserError("too small: make it larger")) == (2, "error: too small: make it larger\n")
    code, text = status(KeyboardInterrupt())
    assert (code, text.strip()) == (130, "interrupted: run the same command again to go on where it stopped")
    code, text = status(ZeroDivisionError("a mistake of this program"))
    assert code == 1
    assert text.startswith("Traceback")
    assert text.endswith("ZeroDivisionError: a mistake of this program\n")


@pytest.mark.parametrize("error", [UserError, ZeroDivisionError])
def test_in_a_multirun_the_error_goes_on_to_hydra(error):
    def fails():
        with cli.one_sentence_errors():
            raise error("too small")

    with composed("train", "hydra.mode=MULTIRUN"), pytest.raises(error, match="too small"):
        fails()
    assert not compose.in_multirun()


def test_the_default_job():
    (job,) = jobs()
    assert (job.task, job.split, job.seed, job.precision) == ("digits_loc", "final", 42, "32-true")
    assert (job.method.name, job.data._target_) == (
        "vpt_deep",
        "visprompt.data.digits_datamodule.DigitsLocDataModule",
    )
    assert not {"hydra", "tasks"} & job.content().keys()
    assert "rows" not in job.content()["recipe"]
    assert "${" not in job.as_yaml()


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ("demo", ["digits", "digits_crowded", "digits_loc"]),
        ("digits_loc", ["digits_loc"]),
        ("[digits_loc,digits]", ["digits_loc", "digits"]),
        ("[digits_loc,demo]", ["digits_loc", "digits", "digits_crowded"]),
        ("'digits_loc,digits'", ["digits_loc", "digits"]),
        ("[places]", ["digits_loc"]),
    ],
)
def test_tasks_are_ids_suites_and_aliases_each_once(tasks, expected, monkeypatch):
    monkeypatch.setitem(catalog.ALIASES, "places", "digits_loc")
    found = jobs(f"tasks={tasks}", "method=linear", "seed=5")
    assert [job.task for job in found] == expected
    assert [job.data._target_.lower() for job in found] == [
        f"visprompt.data.digits_datamodule.{task.replace('_', '')}datamodule" for task in expected
    ]
    assert {(job.method.name, job.seed) for job in found} == {("linear", 5)}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("task=digits",), r"^task is set for each run, not by hand: give tasks=\.\.\.$"),
        (("tasks=[]",), "tasks= is empty: name a task or a suite"),
        (("tasks=''",), "tasks= is empty: name a task or a suite"),
        (("tasks=digit_loc",), "unknown task 'digit_loc': did you mean digits_loc"),
        (("tasks=[digits,dmo]",), "unknown task 'dmo': did you mean demo"),
        (
            ("tasks=demo", "data=demo/digits"),
            "data=demo/digits and tasks=demo both name the data: give one of them",
        ),
        (("data=folder", "data.root=x", "tasks=demo"), "data=folder and tasks=demo both name the data"),
        (
            ("tasks=demo", "method.num_tokens=${row:tokens}"),
            "the chosen recipe has no tokens: take the method's own",
        ),
    ],
)
def test_tasks_that_cannot_be_composed(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        jobs(*arguments)


def test_a_key_that_only_some_jobs_know_is_one_sentence():
    with pytest.raises(
        UserError, match=r"not every job can be composed .*method=linear.*Could not override 'method.num"
    ):
        jobs("method.num_tokens=3", config="tune", extra=["method=linear"])


ROWS = (
    "++recipe.rows={default:{lr:1.0,batch_size:64,epochs:9},digits:{lr:3.0},other:{lr:5.0}}",
    "++recipe.weight_decay=0",
    "++recipe.optimizer=sgd",
    "++recipe.head_lr=null",
    "++recipe.warmup_epochs=0",
    "++recipe.head_init=zeros",
    "method=linear",
    "~recipe.rows.demo",
)


def test_a_value_comes_from_the_row_of_the_task_then_the_default_and_the_command_line_wins():
    found = {job.task: job.recipe for job in jobs("tasks=demo", *ROWS)}
    assert {task: recipe.lr for task, recipe in found.items()} == {
        "digits": 3,
        "digits_crowded": 1,
        "digits_loc": 1,
    }
    assert {recipe.epochs for recipe in found.values()} == {9}
    assert {job.recipe.lr for job in jobs("tasks=demo", *ROWS, "recipe.lr=0.5")} == {0.5}


def test_between_task_and_default_stands_the_family_which_may_have_a_grid_of_its_own():
    rows = "{default:{lr:1.0,batch_size:64,epochs:9},vtab:{lr:2.5,epochs:100,grid:{recipe.lr:[2.0,3.0]}},dtd:{lr:7.0}}"
    found = {job.task: job for job in jobs("tasks=[dtd,cifar,digits]", f"++recipe.rows={rows}", *ROWS[1:])}
    assert {task: (job.recipe.lr, job.recipe.epochs) for task, job in found.items()} == {
        "dtd": (7, 100),
        "cifar": (2.5, 100),
        "digits": (1, 9),
    }
    assert found["dtd"].grid == found["cifar"].grid == {"recipe.lr": [2, 3]}
    assert found["digits"].grid == {"recipe.lr": [0.025, 0.1, 0.4, 1.6, 6.4]}  # its row's
    own = jobs("tasks=dtd", f"++recipe.rows={rows}", *ROWS[1:], "++recipe.grid={recipe.lr:[9.0]}")
    assert [job.grid for job in own] == [{"recipe.lr": [9]}]  # a user's own grid stands above a row's


def test_what_an_override_refers_to_is_looked_up_in_each_job():
    found = jobs("tasks=[digits,digits_loc]", "tags=['${task}-${method.name}']")
    assert [list(job.tags) for job in found] == [["digits-vpt_deep"], ["digits_loc-vpt_deep"]]


def test_own_images_are_a_task_of_that_name():
    (job,) = jobs("data=folder", "data.root=/x")
    assert (job.task, job.data.root) == ("folder", "/x")


@pytest.mark.parametrize("cut", ["debug=fdr", "+trainer.limit_train_batches=2"])
def test_a_debug_run_does_not_go_to_the_store_that_others_read(cut):
    store = "paths.results=s3://bucket/prefix"
    assert jobs(store)[0].paths.results == "s3://bucket/prefix"
    assert jobs(store, cut)[0].paths.results is None
