"""Every documented key with values of wrong kinds.

It is accepted, or refused in one sentence that says what to give.

A job is composed once; each value is put into a copy, which is checked, prepared and built, and not trained.
"""

import copy
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hydra import compose as hydra_compose
from omegaconf import OmegaConf, open_dict
from PIL import Image

from helpers.cli import NET, call, leaves
from visprompt.errors import UserError
from visprompt.models.methods import METHODS
from visprompt.reports import report
from visprompt.runs import compose, evaluate, predict, run, run_all, settings
from visprompt.runs.compose import composing
from visprompt.runs.trainer import build_trainer
from visprompt.serving.run import serve
from visprompt.tuning import protocol

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # thousands of values
FEW = ["yes", math.nan, -1, 2.5, 10**20, None, [1, 2], {"a": 1}]  # one of each kind
MORE = ["", "None", "a\0b", math.inf, 0, -0.5, 1e-300, True, [], {}, [[1]], ["x", None]]
PYTHON = re.compile(
    r"object has no attribute|unsupported operand|not supported between|argument of type|invalid "
    r"literal|NoneType|"
    r"<class|Traceback|__init__|keyword argument|positional argument|could not convert|not iterable|not "
    r"subscriptable|"
    r"cannot be interpreted|'(int|str|list|dict|float|bool)'|DictConfig|ListConfig|full_key|object_type|[Uu]nhashable|"
    r"KeyError|OverflowError|too large to convert|must be (an? )?(str|int|float|bool|real|bytes)\b"
)
TINY = (
    *("trainer=cpu", "callbacks=none", "backbone.pretrained=false"),
    f"++backbone.kwargs={{{','.join(f'{key}:{value}' for key, value in NET.items())}}}",
)


def composed(program, *words):
    """A composed config with the task that its data is of."""
    with composing():
        cfg = hydra_compose(program, list(words), return_hydra_config=True)
    task = cfg.hydra.runtime.choices.get("data")
    with open_dict(cfg):
        del cfg.hydra
        if task:
            cfg.task = task.rpartition("/")[2]
    return cfg


@pytest.fixture(
    autouse=True, params=[FEW, pytest.param([*FEW, *MORE], marks=pytest.mark.endurance)], ids=["few", "all"]
)
def values(request, monkeypatch):
    """The values that `faults` tries."""
    monkeypatch.setattr(sys.modules[__name__], "VALUES", request.param)


VALUES = FEW


def faults(base, keys, go):
    """What is neither accepted nor one sentence, and the numbers of values that were tried and accepted."""
    found, counts = [], SimpleNamespace(tried=0, accepted=0)
    for key in keys:
        for value in VALUES:
            cfg = copy.deepcopy(base)
            parent, _, name = key.rpartition(".")
            with open_dict(cfg):
                (OmegaConf.select(cfg, parent) if parent else cfg)[name] = value
            counts.tried += 1
            try:
                go(cfg, key)
                counts.accepted += 1
            except UserError as error:
                text = str(error)
                if "\n" in text or PYTHON.search(text.replace(str(value), "")) or len(text) > 1200:
                    found.append((key, value, text))
            except Exception as error:
                found.append((key, value, f"{type(error).__name__}: {error}"))
    return found, counts


def job(cfg, key):
    """What `src/train.py` does before it trains."""
    if cfg.get("tasks") is not None:
        compose.check_values(cfg)
        compose.specs(cfg.tasks)
    made = compose.complete(cfg, {key}, {"data": str(cfg.task)})
    run_all.check_all([made])
    one = run.prepare(made)
    build_trainer(one.job)
    run.build_classifier(one.job, one.backbone, 3)


def points(cfg, key):
    """What `src/tune.py` does before it trains."""
    compose.check_values(cfg)
    for name in ("methods", "seeds"):
        if cfg[name] is not None:
            protocol._choices(cfg, name)
    made = compose.complete(cfg, {key}, {"data": str(cfg.task)})
    run_all.check_all([made])
    protocol.job_points(made)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder for what is taken for a path."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def places(tmp_path):
    return (*TINY, f"paths.log_dir={tmp_path}/logs", f"paths.data_dir={tmp_path}/data")


@pytest.fixture
def images(tmp_path):
    """Twenty images of two classes."""
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            pixels = draw.integers(0, 255, (70, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_every_key_of_training(places):
    cfg = composed("train", "data=demo/digits", "method=linear", *places)
    job(copy.deepcopy(cfg), "")
    keys = [key for key in leaves(cfg) if key not in settings._GROUPS and not key.startswith("recipe.rows")]
    found, counts = faults(cfg, keys, job)
    assert found == []
    assert counts.accepted < counts.tried / 5


def test_every_key_of_the_trainer_and_of_loggers(places):
    cfg = composed("train", "data=demo/digits", "method=linear", *places)
    assert (
        faults(
            cfg, [f"trainer.{name}" for name in [*settings._TRAINER, *settings._SET_BY_PROJECT, "other"]], job
        )[0]
        == []
    )
    for logger in ("wandb", "tensorboard"):
        cfg = composed("train", "data=demo/digits", "method=linear", "callbacks=default", f"logger={logger}")
        keys = [key for key in leaves(cfg) if key.startswith(("logger", "callbacks"))]
        assert (
            faults(cfg, keys, lambda cfg, key: compose.complete(cfg, {key}, {"data": str(cfg.task)}))[0] == []
        )


@pytest.mark.parametrize(
    "data", ["folder", "vtab/cifar", "fgvc/cub200", pytest.param("hf", marks=pytest.mark.endurance)]
)
def test_every_key_of_data(data, places, images):
    words = [f"data.root={images}"] if data == "folder" else ["data.download=false"]
    words += [f"data.dataset={images}"] if data == "hf" else []
    cfg = composed("train", f"data={data}", "method=linear", *words, *places)
    if data == "folder":
        job(copy.deepcopy(cfg), "")
    keys = [f"data.{name}" for name in cfg.data if name not in ("_target_", "download")]
    assert faults(cfg, keys, job)[0] == []


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_a_method(method, places):
    cfg = composed("train", "data=demo/digits", f"method={method}", *places)
    assert faults(cfg, [f"method.{name}" for name in cfg.method], job)[0] == []


def test_every_key_of_a_grid(places):
    cfg = composed("tune", "data=demo/digits", "method=linear", *places)
    points(copy.deepcopy(cfg), "")
    assert faults(cfg, ["methods", "seeds", "table", "recipe.grid"], points)[0] == []
    for tried in ("recipe.lr", "recipe.epochs", "recipe.optimizer", "method.name", "seed", "data.fraction"):

        def point(cfg, key, tried=tried):
            cfg.recipe.grid = {tried: [cfg.recipe.grid]}
            points(cfg, key)

        assert faults(cfg, ["recipe.grid"], point)[0] == []


def no_run(cfg, key):
    compose.check_values(cfg)
    evaluate.evaluate(cfg)


def no_state(cfg, key):
    compose.check_values(cfg)
    options = {name: cfg[name] for name in ("output", "batch_size", "device", "weights")}
    predict.predict(cfg.state, cfg.images, **options)


def no_states(cfg, key):
    compose.check_values(cfg)
    serve(**{name: value for name, value in compose.plain(cfg).items() if name != "paths"})


def no_runs(cfg, key):
    compose.check_values(cfg)
    report.report(cfg)


def prepared(cfg, key):
    compose.check_values(cfg)
    compose.plans(cfg)


@pytest.mark.parametrize(
    ("program", "words", "go"),
    [
        ("eval", ("run=none", "trainer=cpu", "callbacks=none"), no_run),
        ("predict", ("state=none", "images=none"), no_state),
        ("report", ("runs=none", "output=none"), no_runs),
        ("serve", ("states=none",), no_states),
        ("prepare", ("tasks=vtab_natural",), prepared),
    ],
)
def test_every_key_of_the_other_programs(program, words, go):
    cfg = composed(program, *words)
    assert faults(cfg, [key for key in leaves(cfg) if key not in settings._GROUPS], go)[0] == []


COMMANDS = [
    ("train", "data.fraction=yes"),
    ("train", "data.num_workers=nan"),
    ("train", "recipe.batch_size=2.5"),
    ("train", "recipe.lr=[1,2]"),
    ("train", "recipe.optimizer=null"),
    ("train", "recipe.grid={recipe.lr:[1]}"),
    ("train", "backbone.image_size=-1"),
    ("train", "backbone.kwargs=yes"),
    ("train", "+backbone.kwargs.a=1"),
    ("train", "method.num_tokens=yes"),
    ("train", "method.num_tokens=100000000000000000000"),
    ("train", "trainer.accumulate_grad_batches=0"),
    ("train", "trainer.check_val_every_n_epoch=0"),
    ("train", "+trainer.max_epochs=3"),
    ("train", "seed=[]"),
    ("train", "precision=null"),
    ("train", "tags={a:1}"),
    ("tune", "seeds=3"),
    ("predict", "batch_size=0"),
    ("prepare", "image_size=2.5"),
]


@pytest.mark.parametrize("values", [FEW], indirect=True, ids=["few"])
@pytest.mark.parametrize(("program", "word"), COMMANDS, ids=lambda word: word)
def test_twenty_through_the_real_command(program, word, tmp_path):
    needed = {"predict": ("state=none", "images=none"), "prepare": ("tasks=cifar",)}.get(
        program, ("data=demo/digits",)
    )
    done = call(program, *needed, word, f"paths.log_dir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not PYTHON.search(done.stderr)
