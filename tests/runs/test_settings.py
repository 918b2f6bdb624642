"""Settings: what each may be, and the one sentence for a value that is of another kind or out of range."""

import pytest

from helpers.cli import leaves
from visprompt.errors import UserError
from visprompt.runs import settings
from visprompt.runs.compose import composing, job

COUNT = "a whole number from 1 to 4294967295"
BATCHES = f"{COUNT} or a share above 0, 1.0 at most or null"
PRECISIONS = "one of 32-true, bf16-mixed, 16-mixed, bf16-true, 16-true, 64-true"
QUOTED = "text that reads as a number or a switch is quoted"
TARGET = "a mapping with _target_ or null to remove it"


def composed_job(*words):
    with composing():
        return job("train", ["data=demo/digits", *words])


def said(*words):
    with pytest.raises(UserError) as error:
        composed_job(*words)
    return str(error.value)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("data.fraction=0", "does not fit: give a number above 0, 1 at most"),
        ("data.fraction=yes", "does not fit: give a number above 0, 1 at most"),
        ("data.fraction=nan", "does not fit: give a number above 0, 1 at most"),
        ("data.fraction=true", "does not fit: give a number above 0, 1 at most"),
        ("data.num_workers=2.5", "does not fit: give a whole number from 0 to 1024"),
        ("data.pin_memory=null", "does not fit: give true or false"),
        ("backbone.image_size=64.0", "does not fit: give a whole number from 1 to 16384 or null"),
        ("backbone.kwargs=3", "does not fit: give a mapping"),
        ("backbone.weights=", "does not fit: give a path or null"),
        ("backbone.weights=2024", f"does not fit: give a path or null; {QUOTED}: \"backbone.weights='...'\""),
        ("tags=3", "does not fit: give a list of words"),
        ("precision=8", f"does not fit: give {PRECISIONS}"),
        ("precision=null", f"does not fit: give {PRECISIONS}"),
        ("trainer.accumulate_grad_batches=0", f"does not fit: give {COUNT}"),
        ("trainer.check_val_every_n_epoch=0", f"does not fit: give {COUNT}"),
        ("trainer.devices=0", "does not fit: give a number of devices, auto, or a list such as [0,1]"),
        ("+trainer.limit_train_batches=0", f"does not fit: give {BATCHES}"),
        ("+trainer.limit_test_batches=0.0", f"does not fit: give {BATCHES}"),
        ("+trainer.max_steps=0", f"does not fit: give {COUNT} or -1"),
        ("+callbacks.mine=3", f"does not fit: give {TARGET}"),
        ("+logger.mine=yes", f"does not fit: give {TARGET}"),
    ],
)
def test_a_value_of_another_kind_or_out_of_range_is_one_sentence(word, sentence):
    assert said(word) == f"{word.lstrip('+')} {sentence}"


@pytest.mark.parametrize(
    ("word", "instead"),
    [
        ("+trainer.max_epochs=3", "give recipe.epochs=..."),
        ("+trainer.precision=16-mixed", "give precision=..."),
        ("+trainer.logger=true", "choose logger=csv, tensorboard or wandb"),
        ("+trainer.callbacks=[]", "give +callbacks.NAME={_target_: ...}"),
        ("+trainer.default_root_dir=x", "give paths.log_dir=..."),
        ("+trainer.num_sanity_val_steps=2", "it would draw random numbers before the first epoch"),
    ],
)
def test_what_the_project_sets_is_no_key_of_the_trainer(word, instead):
    assert said(word) == f"{word[1:].partition('=')[0]} is set by this project: {instead}"


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("data.flip=nan", "data.flip=nan does not fit: give a number from 0 to 1"),
        ("data.flip=yes", "data.flip=yes does not fit: give a number from 0 to 1"),
        ("data.flip=1.5", "data.flip=1.5 does not fit: give a number from 0 to 1"),
        (
            "data.short_side=-3",
            "data.short_side=-3 does not fit: give a whole number from 1 to 16384 or null",
        ),
        (
            "data.short_side=300.5",
            "data.short_side=300.5 does not fit: give a whole number from 1 to 16384 or null",
        ),
        ("data.crop=maybe", "data.crop=maybe does not fit: give true or false"),
    ],
)
def test_own_images_have_settings_that_are_checked_without_an_image(word, sentence):
    assert said("data=folder", "data.root=/nowhere", word) == sentence


def test_an_unknown_key_of_the_trainer_names_the_nearest():
    assert said("+trainer.gradient_clip=1").startswith(
        "unknown key 'trainer.gradient_clip': did you mean trainer.gradient_clip_val"
    )


def test_every_parameter_of_the_trainer_is_known():
    import inspect

    from lightning.pytorch import Trainer

    assert settings._TRAINER.keys() | settings._SET_BY_PROJECT.keys() == inspect.signature(
        Trainer
    ).parameters.keys() | {"_target_"}


@pytest.mark.parametrize(
    ("word", "debugs"),
    [
        ("+trainer.limit_train_batches=2", True),
        ("+trainer.limit_test_batches=0.5", True),
        ("+trainer.fast_dev_run=true", True),
        ("+trainer.fast_dev_run=1", True),
        ("+trainer.overfit_batches=3", True),
        ("+trainer.max_steps=5", True),
        ("+trainer.max_time=00:00:01:00", True),
        ("debug=fdr", True),
        ("debug=profiler", True),
        ("+trainer.limit_train_batches=1.0", False),
        ("+trainer.limit_val_batches=null", False),
        ("+trainer.fast_dev_run=false", False),
        ("+trainer.max_steps=-1", False),
        ("+trainer.gradient_clip_val=1.0", False),
    ],
)
def test_what_cuts_a_run_short_makes_it_one_of_debugging(word, debugs):
    assert (list(composed_job(word, "tags=[mine]").tags) == ["mine", "debug"]) is debugs


def test_a_table_of_settings_needs_every_key_that_is_documented():
    """A new key of a config has a line in `settings._ALLOWED`."""
    from hydra import compose

    elsewhere = (
        "task",
        "method.",
        "recipe.",
        "trainer.",
        "callbacks",
        "logger",
        "lightning_module._",
        "hydra.",
    )
    with composing():
        for program in ("train", "tune", "eval", "predict", "report", "prepare", "export", "serve"):
            trains = program in ("train", "tune")
            for data in ("demo/digits", "vtab/cifar", "fgvc/cub200", "folder") if trains else ("",):
                cfg = compose(program, [f"data={data}"] if data else [])
                keys = {
                    key
                    for key in leaves(cfg)
                    if not key.startswith((*elsewhere, "data._target_")) and key not in settings._GROUPS
                }
                assert keys - settings._ALLOWED.keys() == set(), program


def test_no_more_epochs_than_the_warm_up_shorten_it_in_proportion(caplog):
    caplog.set_level("INFO")
    recipe = composed_job("method=mlp").recipe
    assert (recipe.epochs, recipe.warmup_epochs) == (60, 5)
    assert composed_job("method=mlp", "recipe.epochs=3").recipe.warmup_epochs == 0.25
    assert caplog.messages == [
        "recipe.warmup_epochs is 0.25 in a run of recipe.epochs=3, in proportion to the recipe's 5 of 60 "
        "epochs"
    ]
    assert composed_job("method=mlp", "recipe.epochs=6").recipe.warmup_epochs == 5, "it fits, and stays"
    sentence = "recipe.warmup_epochs=1 does not fit: give 0 to below recipe.epochs=1"
    assert said("method=mlp", "recipe.epochs=1", "recipe.warmup_epochs=1") == sentence, "what is said stands"
    assert len(caplog.messages) == 1


def test_momentum_is_refused_where_the_optimiser_has_none():
    sentence = (
        "recipe.momentum=0.5 has no effect on recipe.optimizer=adamw, which has no momentum: leave it out, "
        "or give recipe.optimizer=sgd"
    )
    assert said("method=linear", "recipe.momentum=0.5", "recipe.optimizer=adamw") == sentence
    assert composed_job("method=linear", "recipe.momentum=0.5", "recipe.optimizer=sgd").recipe.momentum == 0.5
