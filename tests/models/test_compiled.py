"""How many graphs `compile=true` makes: one for training and one for each kind of scoring, once for all runs."""

import gc
import weakref
from functools import partialmethod

import pytest
import torch
from torch import nn

from helpers.cli import frozen, tiny_run
from helpers.tiny import images, tiny_classifier
from visprompt.models.classifier import Classifier
from visprompt.models.compiled import with_any_batch
from visprompt.runs import run

pytestmark = frozen
SHORT = ("recipe.epochs=2", "callbacks=none", "compile=true")


def test_a_mark_is_for_compiled_classifiers_and_batches_alone():
    classifier = tiny_classifier()
    plain, single, several = images(3), images(1), images(3)
    assert with_any_batch(classifier, plain) is plain
    classifier.compile(backend="eager")
    with_any_batch(classifier, single)
    with_any_batch(classifier, several)
    assert [hasattr(x, "_dynamo_weak_dynamic_indices") for x in (plain, single, several)] == [
        False,
        False,
        True,
    ]


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs and their breaks since the start of the test; they are captured and not translated."""
    monkeypatch.setattr(Classifier, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()

    def count():
        assert not counters["graph_break"]
        return counters["stats"]["unique_graphs"]

    yield count
    torch.compiler.reset()


@pytest.mark.slow
def test_runs_of_a_grid_share_a_graph_of_training_and_one_of_scoring(tmp_path, graphs, monkeypatch):
    built = []
    original = Classifier.__init__

    def watched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        built.append(weakref.ref(self))

    monkeypatch.setattr(Classifier, "__init__", watched)
    # 800 images in batches of 64, the last of 32; scored on 200, the last batch of 8; the temperature on these
    for lr in (0.1, 0.2):
        run.run_job(tiny_run(tmp_path, *SHORT, "split=tune", f"recipe.lr={lr}"))
        assert graphs() == 2
    gc.collect()
    assert [ref() for ref in built] == [None, None], "a graph does not keep the classifier of a finished run"
    run.run_job(tiny_run(tmp_path, *SHORT, "method.num_tokens=5"))
    assert graphs() == 4, "another kind of classifier, validated and tested"


@pytest.mark.slow
def test_features_and_images_are_scored_by_a_graph_each(tmp_path, graphs):
    for lr in (0.1, 0.2):
        run.run_job(tiny_run(tmp_path, *SHORT, "method=linear", f"recipe.lr={lr}"))
        assert graphs() == 2, "features are trained on, images of test are scored"
