"""What a config names is made only where it is a class of the kind that belongs there.

Nothing else is called.
"""

import sys

import lightning.pytorch as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler, SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy, Strategy

from helpers.cli import frozen, tiny_job, tiny_run
from visprompt.data.datamodule import TaskDataModule
from visprompt.errors import UserError
from visprompt.runs import run
from visprompt.runs.instantiate import PLUGINS, instantiate
from visprompt.runs.trainer import build_trainer

pytestmark = frozen
FUNCTIONS = [
    "os.system", "subprocess.check_output", "builtins.eval", "builtins.exec", "builtins.print", "runpy.run_path",
    "hydra.utils.instantiate", "hydra.utils.get_method", "visprompt.runs.ranks.run_ranks", "shutil.rmtree",
    "torch.load",
    "lightning.pytorch.seed_everything", "lightning.pytorch.Trainer.fit", "torch.hub.load",
]  # fmt: skip
OTHERS = ["subprocess.Popen", "builtins.dict", "pathlib.Path", "torch.nn.Linear", "os.path"]
OTHERS += ["visprompt.models.optim.Recipe"]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of a user's own, which counts what is made of it."""
    (tmp_path / "mine_parts.py").write_text(
        "import lightning.pytorch as L\nfrom lightning.pytorch.loggers import CSVLogger\n"
        "from lightning.pytorch.profilers import SimpleProfiler\nfrom lightning.pytorch.strategies import "
        "DDPStrategy\nfrom visprompt.data.digits_datamodule import DigitsDataModule\n\n"
        "MADE = []\n\n\ndef function(**options):\n    MADE.append('function')\n\n\n"
        "class Other:\n    def __init__(self, **options):\n        MADE.append('Other')\n\n\n"
        "class MyCallback(L.Callback):\n    class Inner(L.Callback):\n        pass\n\n"
        "    def __init__(self, after=0):\n        self.after = after\n\n"
        "    def on_fit_end(self, *_):\n        MADE.append(self.after)\n\n\n"
        "class MyLogger(CSVLogger):\n    pass\n\n\nclass MyProfiler(SimpleProfiler):\n    pass\n\n\n"
        "class MyStrategy(DDPStrategy):\n    pass\n\n\nclass MyData(DigitsDataModule):\n    pass\n"
    )
    (tmp_path / "mine_broken.py").write_text("raise RuntimeError('no\\nway')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mine_parts", "mine_broken"):
        sys.modules.pop(name, None)
    import mine_parts

    return mine_parts


@pytest.mark.parametrize("target", FUNCTIONS + OTHERS)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (L.Callback, "Callback"),
        (Logger, "Logger"),
        (Strategy, "Strategy"),
        (Profiler, "Profiler"),
        (L.Trainer, "Trainer"),
        (TaskDataModule, "TaskDataModule"),
        (PLUGINS, "ClusterEnvironment or CheckpointIO or LayerSync or Precision"),
    ],
)
def test_anything_else_is_refused_before_it_is_called(target, kind, name):
    with pytest.raises(UserError) as caught:
        instantiate("callbacks.x", {"_target_": target, "_args_": ["touch owned"]}, kind)
    sentence = f"callbacks.x._target_={target} is not a class that belongs there: give a subclass of {name}"
    assert str(caught.value) == sentence


def test_a_nested_target_is_refused_too_at_any_depth():
    evil = {"_target_": "os.system", "_args_": ["touch owned"]}
    stopping = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "train/loss"}
    for config, where in [
        (stopping | {"mode": evil}, "c.mode"),
        (stopping | {"mode": [[evil]]}, "c.mode[0][0]"),
        (stopping | {"mode": {"a": evil}, "_recursive_": False}, "c.mode.a"),
        (stopping | {"_args_": [evil]}, "c._args_[0]"),
        (stopping | {"mode": stopping | {"mode": evil}}, "c.mode.mode"),
    ]:
        with pytest.raises(UserError) as caught:
            instantiate("c", config, L.Callback)
        assert str(caught.value).startswith(
            f"{where}._target_=os.system is not a class that belongs there: give a "
        )


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("os", "c._target_=os is not the dotted name of a class: give module.Class"),
        ("", "c._target_= is not the dotted name of a class: give module.Class"),
        ("os.system; x", "c._target_=os.system; x is not the dotted name of a class: give module.Class"),
        (
            {"_target_": "os.system"},
            "c._target_={'_target_': 'os.system'} is not the dotted name of a class: give module.",
        ),
        (7, "c._target_=7 is not the dotted name of a class: give module.Class"),
        (
            "no_such_module.X",
            "c._target_=no_such_module.X does not exist: there is no module no_such_module, correct it",
        ),
        (
            "mine_parts.X",
            "c._target_=mine_parts.X does not exist: there is no module mine_parts.X, correct it",
        ),
        ("mine_parts.MyCallback.x", "c._target_=mine_parts.MyCallback.x does not exist: correct it"),
        ("mine_parts.MADE.append", "c._target_=mine_parts.MADE.append does not exist: correct it"),
        ("mine_broken.X", "c._target_=mine_broken.X cannot be imported: no way; correct that module"),
        (
            "mine_parts.function",
            "c._target_=mine_parts.function is not a class that belongs there: give a subclass of ",
        ),
        (
            "mine_parts.Other",
            "c._target_=mine_parts.Other is not a class that belongs there: give a subclass of Callback",
        ),
    ],
)
def test_what_is_not_a_class_is_named(mine, target, sentence):
    with pytest.raises(UserError) as caught:
        instantiate("c", {"_target_": target}, L.Callback)
    assert str(caught.value).startswith(sentence)
    assert mine.MADE == []


def test_a_config_without_a_class_and_one_that_makes_none_are_named():
    with pytest.raises(
        UserError, match=r"^c names no class: give c\._target_=\.\.\., a subclass of Callback$"
    ):
        instantiate("c", {"monitor": "x"}, L.Callback)
    with pytest.raises(
        UserError, match=r"^c builds no object of Callback: leave _partial_ and the like out of it$"
    ):
        instantiate("c", {"_target_": "lightning.pytorch.callbacks.Timer", "_partial_": True}, L.Callback)
    known = r"\(all: c\.duration, c\.interval, c\.verbose\)"
    with pytest.raises(UserError, match=rf"^unknown key 'c\.nothing': did you mean c\.duration\? {known}$"):
        instantiate("c", {"_target_": "lightning.pytorch.callbacks.Timer", "nothing": 1}, L.Callback)


def test_lightnings_own_classes_are_made_with_their_arguments():
    made = instantiate(
        "c", {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "a"}, L.Callback
    )
    assert isinstance(made, EarlyStopping)
    theme = {
        "_target_": "lightning.pytorch.callbacks.progress.rich_progress.RichProgressBarTheme",
        "time": "red",
    }
    made = instantiate(
        "c", {"_target_": "lightning.pytorch.callbacks.RichProgressBar", "theme": theme}, L.Callback
    )
    assert isinstance(made, RichProgressBar)
    assert made.theme.time == "red"
    environment = {"_target_": "lightning.pytorch.plugins.environments.LightningEnvironment"}
    config = {"_target_": "lightning.pytorch.strategies.DDPStrategy", "cluster_environment": environment}
    assert isinstance(instantiate("trainer.strategy", config, Strategy), DDPStrategy)


def test_users_own_classes_work_from_the_command_line(mine, tmp_path):
    job = tiny_job(
        tmp_path, "+callbacks.mine={_target_: mine_parts.MyCallback, after: 3}", "+callbacks.gone=null",
        "+callbacks.inner={_target_: mine_parts.MyCallback.Inner}",
        "+trainer.profiler={_target_: mine_parts.MyProfiler}", "trainer.strategy={_target_: mine_parts.MyStrategy}",
    )  # fmt: skip
    trainer = build_trainer(job)
    assert [c.after for c in trainer.callbacks if isinstance(c, mine.MyCallback)] == [3]
    assert any(isinstance(c, mine.MyCallback.Inner) for c in trainer.callbacks)
    assert isinstance(trainer.profiler, mine.MyProfiler)
    assert isinstance(trainer.profiler, SimpleProfiler)
    assert isinstance(trainer.strategy, mine.MyStrategy)
    one = tiny_run(
        tmp_path, "recipe.epochs=1", "recipe.warmup_epochs=0", "+trainer.log_every_n_steps=1", "method=linear",
        "data._target_=mine_parts.MyData",
        "+logger.mine={_target_: mine_parts.MyLogger}", "+callbacks.mine={_target_: mine_parts.MyCallback, after: 5}",
    )  # fmt: skip
    assert type(one.datamodule) is mine.MyData
    run.run_job(one)
    assert mine.MADE == [5]


@pytest.mark.parametrize(
    ("option", "where"),
    [
        ("+callbacks.x={_target_: os.system, command: touch owned}", "callbacks.x"),
        ("+trainer.profiler={_target_: os.system, command: touch owned}", "trainer.profiler"),
        ("trainer.strategy={_target_: os.system, command: touch owned}", "trainer.strategy"),
        ("+trainer.plugins=[{_target_: os.system, command: touch owned}]", "trainer.plugins"),
        ("trainer._target_=os.system", "trainer"),
    ],
)
def test_a_function_is_refused_from_the_command_line_too(tmp_path, option, where):
    with pytest.raises(
        UserError, match=rf"^{where}\._target_=os\.system is not a class that belongs there: give a sub"
    ):
        build_trainer(tiny_job(tmp_path, option))


def test_data_of_another_class_are_refused_from_the_command_line_too(tmp_path):
    for target in ("os.system", "lightning.pytorch.LightningDataModule", "lightning.pytorch.Trainer"):
        with pytest.raises(
            UserError, match=rf"^data\._target_={target} is not a class .*: give a subclass of TaskData"
        ):
            tiny_run(tmp_path, f"data._target_={target}")


def test_nothing_else_instantiates():
    """One place, so that there is one check."""
    from helpers.cli import ROOT

    calls = [
        f"{path.name}: {line.strip()}"
        for path in (ROOT / "src").rglob("*.py")
        for line in path.read_text().splitlines()
        if "hydra.utils" in line or "get_class(" in line or "locate(" in line
    ]
    assert calls == [
        "instantiate.py: import hydra.utils",
        'instantiate.py: built: Any = hydra.utils.instantiate(plain, _convert_="all", **given)',
        "instantiate.py: parameters = inspect.signature(hydra.utils.get_class(target)).parameters.values()",
    ]
