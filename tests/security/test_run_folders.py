"""A stranger's run: its config.yaml and result.json are data.

They decide no code, no address and no place to write.
"""

import json
import shutil

import pytest
import yaml
from omegaconf import OmegaConf

from helpers import miniatures
from helpers.cli import ROOT, call, composed, content, frozen, tiny_run
from visprompt.errors import UserError
from visprompt.files import write_record
from visprompt.reports import inspection
from visprompt.runs import evaluate as inference
from visprompt.runs import run

pytestmark = frozen
MEND = "copy the whole folder of the run again, and do not use it if you do not know who made it$"
TOUCH = {"_target_": "os.system", "_args_": ["touch owned"]}
TARGETS = [
    TOUCH,
    {"_target_": "subprocess.Popen", "args": ["touch", "owned"]},
    {"_target_": "subprocess.check_output", "args": ["touch", "owned"]},
    {"_target_": "builtins.eval", "_args_": ["open('owned', 'w')"]},
    {"_target_": "builtins.exec", "_args_": ["open('owned', 'w')"]},
    {"_target_": "visprompt.runs.ranks.run_ranks", "command": ["touch", "owned"], "world": 1},
    {"_target_": "hydra.utils.get_method", "path": "os.system"},
    {"_target_": "hydra.utils.instantiate", "_args_": [TOUCH]},
    {"_target_": "torch.load", "f": "owned.pth", "weights_only": False},
    {"_target_": "runpy.run_path", "path_name": "owned.py"},
    {"_target_": "lightning.pytorch.callbacks.LambdaCallback", "on_test_start": TOUCH},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run on the demo backbone, and of one on own images."""
    logs = tmp_path_factory.mktemp("logs")
    one = tiny_run(logs, "recipe.epochs=2", "method=linear")
    run.run_job(one)
    root = miniatures.write_folder(logs / "images" / "pets", per_class=5, splits=("train", "test"))
    options = ("data=folder", f"data.root={root}", f"paths.data_dir={logs}/data", "recipe.batch_size=4")
    two = tiny_run(logs, *options, "recipe.epochs=2", "method=linear")
    run.run_job(two)
    return {"demo": one.folder, "own": two.folder}


@pytest.fixture
def stranger(trained, tmp_path):
    """Copies a run and changes what its config.yaml says; the whole of it where `text` is given."""

    def make(change=None, kind="demo", text=None):
        folder = shutil.copytree(trained[kind], tmp_path / "stranger")
        path = folder / "config.yaml"
        config = yaml.safe_load(path.read_text())
        if change:
            change(config)
        path.write_text(yaml.safe_dump(config) if text is None else text)
        return folder

    return make


def evaluate(folder, tmp_path, *arguments):
    where = (
        "trainer=cpu",
        "callbacks=none",
        f"paths.data_dir={tmp_path}/data",
        f"paths.log_dir={tmp_path}/logs",
    )
    with composed("eval", f"run={folder}", *where, *arguments) as cfg:
        return inference.evaluate(cfg)


def scored(folder):
    return json.loads((folder / "result.json").read_text())["metrics"]["test/acc"]


@pytest.mark.parametrize("target", TARGETS, ids=[str(target["_target_"]) for target in TARGETS])
def test_targets_out_of_a_folder_are_not_looked_at(stranger, tmp_path, target):
    def change(config):
        config["callbacks"] = {"evil": target}
        config["logger"] = {"evil": target}
        config["trainer"] = target | {"plugins": [target], "strategy": target, "profiler": target}
        config["hydra"] = {"launcher": target, "sweeper": target, "callbacks": {"evil": target}}
        config["paths"] = {"data_dir": target, "log_dir": "/nowhere/written"}
        config["recipe"] = target
        config["method"] = target
        config["backbone"] |= {"kwargs": target, "name": target}

    folder = stranger(change)
    before = content(folder)
    assert evaluate(folder, tmp_path) == scored(folder)
    assert inspection.open_run(folder, data_dir=f"{tmp_path}/data").classifier is not None
    assert content(folder) == before


@pytest.mark.parametrize("target", TARGETS, ids=[str(target["_target_"]) for target in TARGETS])
def test_a_data_module_is_not_named_by_a_folder(stranger, tmp_path, target):
    sentence = r"config\.yaml names the data module '.*', and a run's folder does not decide what code runs: give \+data"
    folder = stranger(lambda config: config["data"].update(target))
    with pytest.raises(UserError, match=sentence):
        evaluate(folder, tmp_path)
    with pytest.raises(UserError, match=sentence):
        inspection.open_run(folder)
    shutil.rmtree(folder)
    folder = stranger(lambda config: config["data"].update(fraction=target))
    with pytest.raises(
        UserError, match=rf"config\.yaml is refused: data\.fraction is not a plain value; {MEND}"
    ):
        evaluate(folder, tmp_path)


def test_a_module_of_this_project_by_another_name_is_not_taken_either(stranger, tmp_path):
    """The config of the run's task decides.

    A run of an older version may name a class that has moved since.
    """
    folder = stranger(lambda config: config["data"].update(_target_="visprompt.data.old.DigitsDataModule"))
    assert evaluate(folder, tmp_path) == scored(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda c: c["data"].update(normalisation="${oc.env:HOME}"),
            r"data\.normalisation is not a plain value",
        ),
        (
            lambda c: c["data"].update(normalisation="${project_root:}"),
            r"data\.normalisation is not a plain value",
        ),
        (lambda c: c["data"].update(fraction="${oc.create:1}"), r"data\.fraction is not a plain value"),
        (lambda c: c["data"].update({"x\x07": 1}), r"data\.x\\x07 is not a setting of its data"),
        (lambda c: c["data"].update(cache_dir="src"), r"data\.cache_dir is not a setting of its data"),
        (lambda c: c["data"].update(fraction=[[[1]]]), r"data\.fraction is not a plain value"),
        (lambda c: c["data"].update(fraction=list(range(2**14 + 1))), r"data\.fraction is not a plain value"),
        (lambda c: c["data"].update(fraction=float("nan")), r"data\.fraction is not a plain value"),
        (
            lambda c: c["data"].update(fraction=2),
            r"data\.fraction=2 does not fit: give a number above 0, 1 at most",
        ),
        (lambda c: c["data"].update(fraction=TOUCH), r"data\.fraction is not a plain value"),
        (lambda c: c.update(data=3), r"data should be a valid dictionary, and is 3"),
        (
            lambda c: c.update(task="../../x"),
            r"task should be a plain word of letters, digits and _ : \+ \. -, and is ",
        ),
        (lambda c: c.update(task="no_such_data"), r"its task 'no_such_data' has no config in "),
        (
            lambda c: c["backbone"].update(weights="${oc.env:HOME}"),
            r"backbone\.weights should be a plain text",
        ),
        (
            lambda c: c["backbone"].update(weights={"url": "http://127.0.0.1:1/"}),
            r"backbone\.weights should be a text",
        ),
        (lambda c: c.pop("data"), r"data is missing"),
    ],
)
def test_what_no_run_says_is_refused(stranger, tmp_path, change, sentence):
    with pytest.raises(UserError, match=rf"config\.yaml is refused: {sentence}") as caught:
        evaluate(stranger(change), tmp_path)
    assert not {"\n", "\x07"} & set(str(caught.value))


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join(f'*{a}' for _ in range(9))}]\n"
    for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"is refused: its content should be a valid dictionary"),
        ("- 1", r"is refused: its content should be a valid dictionary"),
        ("data: [", r"cannot be read \(it is cut off or not YAML\)"),
        ("\x00", r"cannot be read \(it is cut off or not YAML\)"),
        ("a: \x1b[2J", r"cannot be read \(it is cut off or not YAML\)"),
        ("!!python/object/apply:os.system ['touch owned']", r"cannot be read \(it is cut off or not YAML\)"),
        ("data: !!python/name:os.system", r"cannot be read \(it is cut off or not YAML\)"),
        ("[" * 3000, r"cannot be read \(it is cut off or not YAML\)"),
        ("x: " + "1" * 5000, r"cannot be read \(it is cut off or not YAML\)"),
        (
            BOMB + "task: digits\nbackbone: {}\ndata: {fraction: *j}",
            r"is refused: data\.fraction is not a plain value",
        ),
        (
            "task: digits\nbackbone: {}\ndata: &d\n  fraction: *d",
            r"is refused: data\.fraction is not a plain value",
        ),
        (" " * 2**23, r"is refused: it is larger than that of any run"),
    ],
    ids=range(12),
)
def test_a_file_that_is_no_runs_config_is_refused(stranger, tmp_path, text, sentence):
    with pytest.raises(UserError, match=rf"config\.yaml {sentence}") as caught:
        evaluate(stranger(text=text), tmp_path)
    assert not {"\n", "\x1b"} & set(str(caught.value))


def test_stored_places_are_never_written_to(stranger, tmp_path, capsys):
    victim = tmp_path / "victim"
    victim.mkdir()

    def change(config):
        config["data"] |= {"store_dir": str(victim), "num_workers": 7, "pin_memory": True}
        config["paths"] = {"data_dir": str(victim), "log_dir": str(victim), "root_dir": str(victim)}
        config["trainer"] |= {"default_root_dir": str(victim), "profiler": "simple"}

    folder = stranger(change, "own")
    root = yaml.safe_load((folder / "config.yaml").read_text())["data"]["root"]
    before = content(folder)
    assert evaluate(folder, tmp_path) == scored(folder)
    assert list(victim.iterdir()) == []
    assert content(folder) == before
    assert f"data.root is {root}, as the run recorded it" in capsys.readouterr().out
    assert list((tmp_path / "data" / "stores").iterdir()) != []


def test_another_folder_of_images_is_noticed_before_it_is_decoded(stranger, tmp_path):
    other = miniatures.write_folder(tmp_path / "other", per_class=4, splits=("train", "test"))
    folder = stranger(lambda config: config["data"].update(root=str(other)), "own")
    with pytest.raises(UserError, match=r"the data of .* have changed since it was trained"):
        evaluate(folder, tmp_path)
    assert not (tmp_path / "data").exists()


def test_a_stored_root_is_printed_without_control_characters(stranger, tmp_path):
    folder = stranger(lambda config: config["data"].update(root="/x\x1b[2J"), "own")
    with pytest.raises(UserError, match=r"config\.yaml is refused: data\.root is not a plain value"):
        evaluate(folder, tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"precision": "${oc.env:HOME}"}, r"precision should be a plain word"),
        ({"precision": "os.system"}, r"precision=os\.system does not fit|precision"),
        ({"seed": 2**70}, r"seed should be less than 4294967296"),
        ({"seed": -1}, r"seed should be greater than or equal to 0"),
        ({"recipe": {"_target_": "os.system"}}, r"its recipe is not of this version"),
        ({"recipe": {}}, r"recipe.optimizer has no value: give recipe.optimizer=..."),
    ],
)
def test_what_no_result_says_is_refused(stranger, tmp_path, change, sentence):
    folder = stranger()
    record = json.loads((folder / "result.json").read_text())
    record.pop("digest", None)
    write_record(folder / "result.json", record | change)
    with pytest.raises(UserError, match=rf"is refused: ({sentence})") as caught:
        evaluate(folder, tmp_path)
    assert "\n" not in str(caught.value)


def test_own_module_from_the_own_command_line_is_taken(stranger, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from visprompt.data.digits_datamodule import DigitsDataModule\n\n"
        "class Mine(DigitsDataModule):\n    used = []\n\n"
        "    def open_sets(self, sets):\n        self.used.append(sets)\n        return "
        "super().open_sets(sets)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = stranger(lambda config: config["data"].update(_target_="mine.Mine"))
    with pytest.raises(UserError, match=r"names the data module 'mine\.Mine'"):
        evaluate(folder, tmp_path)
    assert evaluate(folder, tmp_path, "+data._target_=mine.Mine") == scored(folder)
    from mine import Mine

    assert Mine.used == [("test",)]


def test_every_setting_of_this_projects_data_is_one_that_a_run_may_record(tmp_path):
    """So that what is trained can be scored: none of them is more than a plain value."""
    for file in (ROOT / "configs" / "data").rglob("*.yaml"):
        for name, value in OmegaConf.to_container(OmegaConf.load(file), resolve=False).items():
            assert value is None or isinstance(value, str | int | float | bool | list), (file, name)


@pytest.mark.slow
def test_the_attack_that_was_seen_through_the_real_commands(stranger, tmp_path, sealed):
    evil = {
        "_target_": "visprompt.runs.ranks.run_ranks",
        "command": ["touch", str(tmp_path / "owned")],
        "world": 1,
    }

    def change(config):
        config["callbacks"] = {"evil": evil}
        config["data"] = evil

    folder = stranger(change)
    hydra = f"hydra.run.dir={tmp_path}/hydra"
    done = call("eval", f"run={folder}", "trainer=cpu", hydra)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert (
        "names the data module 'visprompt.runs.ranks.run_ranks', and a run's folder does not decide"
        in done.stderr
    )
    done = call(
        "report",
        f"runs={tmp_path}",
        f"output={tmp_path}/report",
        f"inspect={folder}",
        hydra,
        "formats=[markdown]",
    )
    assert "names the data module" in done.stdout + done.stderr
    assert not (tmp_path / "owned").exists()
    sealed.clear()  # the commands themselves were started
