"""Settings per task from the user's own CSV file, as the authors of VPT once shared them."""

import pytest
from omegaconf import OmegaConf

from helpers.cli import call, composed, tiny
from visprompt.errors import UserError
from visprompt.runs import compose
from visprompt.tuning.protocol import grid_points

TABLE = """\
task,method,num_tokens,lr,weight_decay,batch_size
dtd,vpt_deep,5,2.5,0.01,128
svhn_cropped,vpt_deep,50,2.5,0,
dtd,linear,,0.25,1e-4,
digits,,7,0.5,0.02,
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "release [2022].csv"
    path.write_text(TABLE, encoding="utf-8-sig")
    return path


def jobs(table, *arguments, script="train"):
    with composed(script, f"recipe.table='{table}'", *arguments) as cfg:
        return compose.jobs(cfg)


def settings(job):
    return {
        "num_tokens": job.method.get("num_tokens"),
        **{k: getattr(job.recipe, k) for k in ("lr", "weight_decay", "batch_size")},
    }


def test_a_table_gives_each_task_its_settings_and_leaves_the_rest_to_the_recipe(table):
    dtd, svhn = jobs(table, "tasks=[dtd,svhn]", "method=vpt_deep")
    assert settings(dtd) == {"num_tokens": 5, "lr": 2.5, "weight_decay": 0.01, "batch_size": 128}
    assert settings(svhn) == {"num_tokens": 50, "lr": 2.5, "weight_decay": 0, "batch_size": 128}
    assert (dtd.recipe.epochs, dtd.recipe.schedule, dtd.method.dropout) == (100, "per_epoch", 0.1)
    assert "table" not in dtd.content()["recipe"], (
        "the run is told by its values, not by where they came from"
    )
    (linear,) = jobs(table, "tasks=dtd", "method=linear")
    assert settings(linear) == {"num_tokens": None, "lr": 0.25, "weight_decay": 0.0001, "batch_size": 1024}


def test_the_command_line_wins_over_a_table_and_a_grid_stays(table):
    (job,) = jobs(
        table,
        "tasks=dtd",
        "method=vpt_deep",
        "recipe.lr=1.0",
        "method.num_tokens=3",
        "grid=paper",
        script="tune",
    )
    assert settings(job) == {"num_tokens": 3, "lr": 1.0, "weight_decay": 0.01, "batch_size": 128}
    assert len(grid_points(job.grid)) > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "task,lr\nsvhn,1\n",
            r"t\.csv has no row for task dtd and method vpt_deep: recipe\.table needs one$",
        ),
        (
            "task,lr\ndtd,1\ndtd,2\n",
            r"t\.csv has 2 rows for task dtd and method vpt_deep: recipe\.table needs one$",
        ),
        (
            "dataset,lr\ndtd,1\n",
            r"t\.csv has no column task: its first line names the columns, as in task,lr,weight_dec",
        ),
        ("", r"t\.csv has no column task"),
        ("task,learning_rate\ndtd,1\n", r"^unknown setting of method vpt_deep in .*t\.csv 'learning_rate'"),
        ("task,lr,lr\ndtd,1,2\n", r"t\.csv has two columns 'lr': leave one of them out$"),
        ("task,lr\ndtd,1,2\n", r"t\.csv has 3 cells in row 2 and 2 columns: correct that row$"),
        ("task,lr\ndtd,[1]\n", r"t\.csv has '\[1\]' for lr: give a number or a word$"),
        ("task,lr\ndtd,much\n", r"^recipe\.lr=much does not fit: give a finite number"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        jobs(path, "tasks=dtd", "method=vpt_deep")
    assert "\n" not in str(caught.value)


def test_a_table_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^recipe\.table=.*none\.csv cannot be read \(.*No such file"):
        jobs(tmp_path / "none.csv", "tasks=dtd")


@pytest.mark.slow
def test_the_real_command_takes_a_table(tmp_path, table):
    done = call("train", *tiny(tmp_path, f"recipe.table='{table}'", "recipe.epochs=2", "callbacks=none"))
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.rglob("result.json")
    stored = OmegaConf.load(result.with_name("config.yaml")).recipe
    assert (stored.lr, stored.weight_decay) == (0.5, 0.02)
