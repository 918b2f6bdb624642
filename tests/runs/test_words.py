"""Flags and settings in any order: what each command line becomes, and one sentence behind any flag."""

import sys

import pytest
import yaml
from test_compose import said

from helpers.cli import ROOT, composed
from helpers.wide import slow
from visprompt.runs import cli, compose
from visprompt.runs.cli.words import SCRIPTS


def became(monkeypatch, script, *arguments):
    """What Hydra is given in place of a command line."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    cli.check_words(script)
    return sys.argv[1:]


def shown(capsys, monkeypatch, script, *arguments):
    """What `--cfg job` prints, as YAML."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.check_words(script)
    assert end.value.code == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


NEEDED = {
    "eval": ("run=x",),
    "predict": ("state=x", "images=y"),
    "prepare": ("tasks=dtd",),
    "serve": ("states=x",),
    "export": ("run=x", "output=y"),
}
FLAGS = [
    (("-c", "hydra"), "--cfg=hydra"),
    (("--cfg=all",), "--cfg=all"),
    (("-m",), "--multirun"),
    (("--multirun",), "--multirun"),
    (("-r",), "--run"),
    (("--info", "defaults-tree"), "--info=defaults-tree"),
    (("-i", "all"), "--info=all"),
    (("-cn", "SCRIPT"), "--config-name=SCRIPT"),
    (("--config-dir", str(ROOT / "docs")), f"--config-dir={ROOT / 'docs'}"),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_before_and_behind_settings_are_the_same_for_every_entry_point(monkeypatch, script):
    needed = NEEDED.get(script, ())
    if script in NEEDED:
        with pytest.raises(SystemExit) as end:  # help may lack what a run needs
            became(monkeypatch, script, "-h")
        assert end.value.code == 0
    for typed, flag in FLAGS if script == "train" else FLAGS[2:3]:
        typed, flag = [word.replace("SCRIPT", script) for word in typed], flag.replace("SCRIPT", script)
        assert became(monkeypatch, script, *typed, *needed) == [flag, *needed]
        assert became(monkeypatch, script, *needed, *typed) == [flag, *needed]


def test_help_shows_the_options_of_every_group_and_the_config_that_is_chosen(capsys, monkeypatch):
    """As Hydra's own, which takes seconds: it copies all sources of configs for each group."""
    help_text = shown(capsys, monkeypatch, "train", "--help", "method=lora", "seed=3")
    assert help_text.startswith(
        "What each key means: the comments of configs/train.yaml, and of the files in "
    )
    assert "\ndata/demo: digits, digits_crowded, digits_loc, digits_masks\n" in help_text
    assert "\nmethod: adapter, adapter_plus, " in help_text
    assert "\nhydra" not in help_text
    config = yaml.safe_load(help_text.partition("(foo.bar=value)\n")[2].partition("\nPowered by")[0])
    assert (config["seed"], config["method"]["name"]) == (3, "lora")
    assert config["recipe"]["lr"] == "${row:lr}"
    resolved = shown(capsys, monkeypatch, "train", "--help", "--resolve")
    assert "paths:\n  root_dir: ${" not in resolved
    own = shown(capsys, monkeypatch, "report", "-h")
    assert "== Configuration groups ==" not in own
    assert "\ntop: null\n" in own


def test_flags_may_stand_between_settings_and_the_data_of_an_experiment_are_a_setting(monkeypatch):
    assert became(monkeypatch, "train", "seed=1", "-m", "experiment=vtab_natural_deep", "--package", "x") == [
        "--package=x",
        "--multirun",
        "seed=1",
        "experiment=vtab_natural_deep",
        "data='vtab/cifar'",
    ]
    assert became(monkeypatch, "train", "-i", "seed=1") == ["--info=all", "seed=1"]


@pytest.mark.parametrize(
    ("typed", "given"),
    [
        (("--hydra-help",), ["--hydra-help"]),
        (("-sc", "install=bash"), ["--shell-completion", "install=bash"]),
        (("-sc", "bash"), ["--shell-completion", "install=bash"]),
        (("tasks=dtd", "-sc", "zsh"), ["--shell-completion", "install=zsh"]),
        (("tasks=dtd", "--hydra-help"), ["--hydra-help"]),
        (
            ("-cp", "/x", "-cn", "config", "method=nix"),
            ["--config-path=/x", "--config-name=config", "method=nix"],
        ),
        (("--experimental-rerun", "x.pickle"), ["--experimental-rerun=x.pickle"]),
    ],
)
def test_what_hydra_answers_without_a_config_of_this_project_is_left_to_it(monkeypatch, typed, given):
    assert sorted(became(monkeypatch, "train", *typed)) == sorted(given)


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("lr=0.1", "did you mean recipe.lr?"),
        ("optimizer.lr=0.1", "did you mean recipe.lr?"),
        ("model.optimizer.lr=0.1", "did you mean recipe.lr?"),
        ("weight_decay=0.1", "did you mean recipe.weight_decay?"),
        ("batch_size=8", "did you mean recipe.batch_size?"),
        ("data.batch_size=8", "did you mean recipe.batch_size?"),
        ("epochs=3", "did you mean recipe.epochs?"),
        ("num_tokens=3", "did you mean method.num_tokens?"),
        ("devices=2", "did you mean trainer.devices?"),
        ("trainer.max_epochs=3", "set by this project: give recipe.epochs=..."),
        ("trainer.precision=16", "set by this project: give precision=..."),
        ("ckpt_path=a.ckpt", "src/eval.py takes run=FOLDER"),
        ("train=false", "src/eval.py run=FOLDER scores a finished run"),
        ("test=false", "split=tune trains without reading the test set"),
        ("hparams_search=mnist_optuna", "wandb sweep configs/sweep/lr_wd.yaml"),
        ("task_name=mine", "tags=[NAME] marks it"),
    ],
)
def test_words_of_other_templates_are_answered(capsys, monkeypatch, typed, answer):
    text = said(capsys, monkeypatch, "train", typed)
    assert answer in text
    assert "_target_" not in text


def test_model_is_another_word_for_method(monkeypatch):
    typed = ("model=vpt_deep", "model.num_tokens=5", "+model.depth=2")
    assert became(monkeypatch, "train", *typed[:2]) == ["method=vpt_deep", "method.num_tokens=5"]
    with composed("train", *became(monkeypatch, "train", *typed[:2], "preprocessing=model")) as cfg:
        (job,) = compose.jobs(cfg)
    assert (job.method.name, job.method.num_tokens) == ("vpt_deep", 5)


def test_the_version_is_hydras(capsys, monkeypatch):
    assert shown(capsys, monkeypatch, "train", "seed=1", "--version").startswith("Hydra 1.3")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-m", "method=linear,vpt_depe"), "unknown method 'vpt_depe': did you mean vpt_deep or "),
        (
            ("-m", "method=linear,vpt_deep", "backbone=demo,dmeo"),
            "unknown backbone 'dmeo': did you mean demo?",
        ),
        (("-m", "experiment=vtab_deep"), "unknown experiment 'vtab_deep': did you mean vtab_all_deep or "),
        (
            ("-m", "recipe.learning_rate=0.1,0.2"),
            "unknown key 'recipe.learning_rate': did you mean recipe.head_init or ",
        ),
        (("-m", "seed=a,b"), "seed=a does not fit: give a whole number from 0 to 4294967295\n"),
        (("-m", "seed=choice(1,b)"), "seed=b does not fit: give a whole number from 0 to 4294967295\n"),
        (("-m", "seed=range(-1,2)"), "seed=-1 does not fit: give a whole number from 0 to 4294967295\n"),
        (
            ("hydra.mode=MULTIRUN", "seed=1,b"),
            "seed=b does not fit: give a whole number from 0 to 4294967295\n",
        ),
        (("-m", "recipe.lr=0.3,-1"), "recipe.lr=-1.0 does not fit: give a finite number, 0 or above\n"),
        (("-m", "seed=range(1,2,0)"), "seed=range(1,2,0) gives no value: a sweep needs at least one\n"),
        (("-m", "method=glob(nix*)"), "method=glob(nix*) gives no value: a sweep needs at least one\n"),
        (("-m", "backbone=[[]]"), "backbone=[[]] cannot be read: an option is a name, as in data=folder\n"),
        (("backbone={a:b}",), "Could not override 'backbone'."),
        (("~callbacks=/",), "Could not delete 'callbacks=/'."),
        (("-m", "tasks=digits,digits_lok"), "unknown task 'digits_lok': did you mean digits_loc or "),
        (
            ("-m", "method=linear,vpt_deep", "method.num_tokens=5"),
            "num_tokens is an option of cvpt, da_vpt, e2vpt, ",
        ),
        (("-m", "hydra/launcher=slurm"), "unknown hydra/launcher 'slurm': did you mean submitit_slurm"),
        (("--cfg", "job", "method=vpt_depe"), "unknown method 'vpt_depe': did you mean vpt_deep or "),
        (("--help", "splt=tune"), "unknown key 'splt': did you mean split or plan?"),
        (("--info", "splt=tune"), "unknown key 'splt': did you mean split or plan?"),
        (
            ("--cfg", "jub"),
            "Hydra's flags cannot be read: --cfg/-c: invalid choice: 'jub' (choose from 'job', ",
        ),
        (
            ("--cfg",),
            "Hydra's flags cannot be read: --cfg/-c: expected one argument; --hydra-help lists them\n",
        ),
        (("-m", "-c", "job"), "--multirun and --cfg ask for different things: give one of them\n"),
        (("--resolve",), "--resolve belongs to --cfg or --help: leave it out, or add --cfg job\n"),
        (
            ("--seed=3",),
            "--seed=3 is not a flag: settings have no dashes: type seed=3; --hydra-help lists the flags\n",
        ),
        (
            ("--fast",),
            "--fast is not a flag: settings have no dashes: type key=value, such as seed=1; --hydra-help ",
        ),
        (
            ("-sc", "seed=1"),
            "-sc takes one of install=bash, uninstall=bash and query=bash, or another shell's name\n",
        ),
        (
            ("-cn", "trian"),
            "unknown config 'trian': did you mean train? (all: eval, export, predict, prepare, ",
        ),
        (("-cd", "/nix"), "--config-dir=/nix is not a folder: give one with configs in it\n"),
        (
            ("--cfg", "job", "-p", "recip"),
            "unknown package 'recip': did you mean recipe or precision? (all: ",
        ),
        (
            ("method=linear,vpt_deep",),
            "method=linear,vpt_deep gives several values: type python src/train.py -m "
            "method=linear,vpt_deep for a run with each\n",
        ),
        (
            ("recipe.lr=choice(1,2)",),
            "recipe.lr=choice(1,2) gives several values: type python src/train.py -m "
            "'recipe.lr=choice(1,2)' for a run with each\n",
        ),
    ],
)
def test_a_wrong_word_behind_any_flag_is_the_same_one_sentence(capsys, monkeypatch, arguments, sentence):
    assert said(capsys, monkeypatch, "train", *arguments).startswith(f"error: {sentence}")


@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "seed=range(1,4)"),
        ("-m", "method=linear,vpt_deep", "recipe.lr=0.1,0.2"),
        ("-m", "recipe.lr=interval(0.1,1)"),  # of another sweeper
        ("-m", "method=glob(vpt_*)"),
        ("-m", "+trainer.limit_train_batches=2,3"),
        slow(("-m", "seed=range(0,100000)")),  # of which 200 are looked at
        ("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=1,2"),
    ],
)
def test_right_sweeps_pass_as_they_were_typed(capsys, monkeypatch, arguments):
    assert became(monkeypatch, "train", *arguments) == ["--multirun", *arguments[1:]]
    assert capsys.readouterr() == ("", "")


def test_sweeps_over_tasks_know_the_keys_of_the_first_one_s_data(monkeypatch):
    swept = ("-m", "tasks=choice(dtd,cifar)", "data.source=prepared,raw")
    assert became(monkeypatch, "train", *swept) == ["--multirun", *swept[1:], "data='vtab/dtd'"]
    swept = ("-m", "experiment=vtab_natural_deep,fgvc_deep")
    assert became(monkeypatch, "train", *swept) == ["--multirun", swept[1], "data='vtab/cifar'"]


def test_cfg_job_shows_what_will_run_with_the_values_of_its_task(capsys, monkeypatch):
    typed = ("experiment=vtab_natural_deep", "trainer=ddp", "tasks=[sun397,dtd]", "--cfg", "job")
    text = shown(capsys, monkeypatch, "train", *typed)
    assert text.startswith("# sun397, the first of 2 tasks\ntask: sun397\n")
    assert "${" not in text
    job = yaml.safe_load(text)
    assert (job["recipe"]["lr"], job["method"]["num_tokens"], job["trainer"]["strategy"]) == (25.0, 5, "ddp")
    assert "rows" not in job["recipe"]
    assert len(text.splitlines()) < 110


def test_cfg_job_honours_package_and_is_the_same_with_resolve(capsys, monkeypatch):
    given = ("method=linear", "recipe.lr=0.5", "-c", "job", "-p", "recipe")
    text = shown(capsys, monkeypatch, "train", *given)
    assert text.startswith("# @package recipe\noptimizer: adamw\nlr: 0.5\n")
    assert shown(capsys, monkeypatch, "train", "--resolve", *given) == text
    assert shown(capsys, monkeypatch, "train", *given[:-1], "recipe.epochs", "recipe.epochs=7") == "7\n"
    assert "# @package" not in shown(capsys, monkeypatch, "train", *given[:-1], "_global_")


@pytest.mark.parametrize("script", SCRIPTS)
def test_cfg_job_works_for_every_entry_point(capsys, monkeypatch, script):
    config = yaml.safe_load(shown(capsys, monkeypatch, script, "--cfg", "job", *NEEDED.get(script, ())))
    assert "hydra" not in config
    assert "${" not in str(config)
    if script == "tune":
        assert config["table"] == str(ROOT / "logs" / "table.md")
    if script == "predict":
        assert (config["state"], config["images"], config["batch_size"]) == ("x", "y", 64)


def test_configs_of_a_folder_of_ones_own_are_composed_too(capsys, monkeypatch, tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("name: linear\n")
    given = ("-cd", str(tmp_path), "method=mine", "recipe=linear")
    assert became(monkeypatch, "train", *given) == [f"--config-dir={tmp_path}", *given[2:]]
    assert "unknown method 'min': did you mean mine?" in said(
        capsys, monkeypatch, "train", *given[:2], "method=min"
    )
