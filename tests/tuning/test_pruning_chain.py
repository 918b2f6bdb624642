"""The chain of runs that prunes.

What starts from what, who chooses by which figure, and that the whole resumes.
"""

import json
import shutil

import pytest
import torch
import wandb
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers.cli import composed, equal, frozen, tensors, tiny_job
from helpers.damage import bounded, damages, rewrite, spoil
from helpers.wide import slow
from visprompt.errors import UserError
from visprompt.models.tuning_module import TuningModule
from visprompt.runs import evaluate as inference
from visprompt.runs import run, run_all
from visprompt.runs.result import read_result
from visprompt.runs.trainer import without_wandb
from visprompt.tuning import protocol, pruning, pruning_chain

pytestmark = [
    frozen,
    pytest.mark.filterwarnings("ignore:The number of training batches .* smaller than the logging"),
]
NAMES = {"prompts", "kv_prompts", "head.weight", "head.bias"}
SHORT = (
    *("+trainer.limit_train_batches=2", "+trainer.limit_val_batches=2", "+trainer.limit_test_batches=1"),
    *(
        "method=e2vpt",
        "recipe.epochs=1",
        "recipe.warmup_epochs=0",
        "method.num_tokens=4",
        "method.num_segments=8",
    ),
    *("method.num_kv_tokens=2", "method.prune_tokens=[50]", "method.prune_segments=[25,50]"),
)


def job(logs, *arguments):
    return tiny_job(logs, *SHORT, *arguments)


def once(cfg):
    """One run in this process, without what the loop prints."""
    return run.run_job(run.prepare(cfg))


def go(logs, *arguments, run_one=once):
    return pruning_chain.run(job(logs, *arguments), run_one)


def test_a_segmentation_task_refuses_to_prune_before_anything_is_trained(tmp_path):
    masks = ("data=demo/digits_masks", "split=final")
    with pytest.raises(UserError) as error:
        go(tmp_path, *masks)
    assert str(error.value) == (
        "pruning needs one loss for each image, and a segmentation task has one for each pixel: give "
        "method.prune=false"
    )
    pruning_chain.check(job(tmp_path, *masks, "method.prune=false"))
    steps = protocol.tune_one(job(tmp_path, *masks), [1])
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert [outcome.reason for outcome in end.value.value] == [str(error.value)]


def folders(logs):
    return sorted(path.parent for path in logs.rglob("result.json"))


def links(logs, split):
    found = [(folder, read_result(folder)) for folder in folders(logs)]
    return [(folder, result) for folder, result in found if result.split == split]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def starts():
    """The tuned state that every run started with, by the run's method options as JSON."""
    return {}


@pytest.fixture(scope="module")
def final(logs, starts):
    """A final run asked for alone: the tune chain comes first."""
    original = TuningModule.on_fit_start

    def note(self):
        method = self.classifier.method
        masks = None if method.token_mask is None else method.segment_mask.tolist()
        state = {name: tensor.clone() for name, tensor in self.classifier.tuned_state().items()}
        starts[json.dumps([method.initial, masks, self._datamodule.split])] = state
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TuningModule, "on_fit_start", note)
        return go(logs, "split=final")


def record(logs):
    (path,) = logs.rglob("masks.json")
    return path.parent, json.loads(path.read_text())


def test_a_final_run_makes_the_tune_chain_first_and_reads_test_once(logs, final):
    assert final.split == "final"
    assert [result.split for _, result in links(logs, "final")] == ["final"]
    tune = links(logs, "tune")
    assert len(tune) == 3  # two points that prune, and nothing
    assert not any("test/acc" in result.metrics for _, result in tune)
    assert {result.seed for _, result in tune} == {0}


def test_every_link_starts_from_the_stored_initial_values(logs, final, starts):
    folder, found = record(logs)
    (path,) = logs.rglob("initial/*.safetensors")
    assert path.stem == found["initial"]
    assert path.parents[1] == folder.parent
    whole = tensors(path)
    assert set(whole) == NAMES
    assert whole["prompts"].shape == (2, 4, 24)
    assert len(starts) == 4
    for key, state in starts.items():
        initial, masks, _ = json.loads(key)
        assert initial == found["initial"]
        kept = whole["prompts"]
        if masks:
            kept = torch.stack([p.unflatten(-1, (8, 3))[torch.tensor(masks)].flatten() for p in kept])
        assert equal({name: state[name] for name in NAMES}, whole | {"prompts": kept})


def test_the_stored_values_and_not_a_new_draw_are_where_a_run_starts(logs, final, tmp_path, monkeypatch):
    """As on a machine whose generator draws other numbers."""
    _, found = record(logs)
    link = pruning_chain.link_of(job(logs, "split=tune"), found["initial"])
    (path,) = logs.rglob("initial/*.safetensors")
    (tmp_path / "digits" / "e2vpt" / "initial").mkdir(parents=True)
    (tmp_path / "digits" / "e2vpt" / "initial" / path.name).write_bytes(path.read_bytes())
    link = link.vary({"paths.log_dir": str(tmp_path)})
    original, seen = run.build_classifier, []

    def other(cfg, *rest):
        classifier = original(cfg, *rest)
        with torch.no_grad():
            classifier.method.prompts.zero_()
        return classifier

    monkeypatch.setattr(run, "build_classifier", other)
    monkeypatch.setattr(
        TuningModule, "on_fit_start", lambda self: seen.append(self.classifier.method.prompts.clone())
    )
    once(link)
    assert torch.equal(seen[0].detach(), tensors(path)["prompts"])


def test_validation_chooses_and_ties_go_to_what_keeps_least(logs, final):
    _, found = record(logs)
    kept = [(point["kept_tokens"], point["kept_segments"]) for point in found["points"]]
    assert kept == [(2, 4), (2, 6), (4, 8)]  # nothing pruned is among the choices
    scores = [point["score"] for point in found["points"]]
    assert found["chosen"] == scores.index(max(scores))
    assert sorted(scores) == sorted(result.metrics["val/acc"] for _, result in links(logs, "tune"))
    assert final.method["token_mask"] == found["options"].get("token_mask")
    assert final.method["segment_mask"] == found["options"].get("segment_mask")


def test_masks_are_those_of_the_trained_prompts_importance_over_all_training_images(logs, final, monkeypatch):
    _, found = record(logs)
    bare = job(logs, "split=tune", "method.prune_tokens=null", "method.prune_segments=null")
    one, seen, original = run.prepare(pruning_chain.link_of(bare, found["initial"])), [], pruning.importance

    def note(classifier, batches):
        batches = list(batches)
        seen.append((classifier, torch.cat([labels for _, labels in batches])))
        return original(classifier, batches)

    monkeypatch.setattr(pruning, "importance", note)
    assert pruning_chain._measure(one).lists() == found["importance"]
    ((classifier, labels),) = seen
    assert torch.equal(classifier.method.prompts.detach(), tensors(one.folder)["prompts"].double())
    assert torch.equal(labels, one.datamodule.train_dataset.labels)
    scores = pruning.Importance.of(found["importance"])
    pruned = [result.method for _, result in links(logs, "tune") if result.method["token_mask"]]
    assert len(pruned) == 2
    for method in pruned:
        masks = pruning.masks_of(method)
        point = pruning.Point(int(masks.tokens.sum()), int(masks.segments.sum() / masks.tokens.sum()))
        assert pruning.prune(scores, point).options() == {
            n: method[n] for n in ("token_mask", "segment_mask")
        }


def test_pruned_is_gone_from_file_and_count(logs, final):
    for folder, result in links(logs, "tune"):
        state = tensors(folder)
        masks = pruning.masks_of(result.method)
        assert state["prompts"].numel() == 2 * int(masks.segments.sum()) * 3
        assert result.tuned["parameters"] == state["prompts"].numel() + state["kv_prompts"].numel()
        assert ("token_mask" in state) == (result.method["token_mask"] is not None)


def test_it_ends_with_a_table_and_a_picture_beside_the_results(logs, final):
    folder, found = record(logs)
    ((last, result),) = links(logs, "final")
    assert result == final
    for place, split in ((folder, "tune"), (last, "final")):
        lines = (place / "pruning.md").read_text().splitlines()
        assert lines[0] == f"# digits, e2vpt, split={split}, seed=0"
        point = found["points"][found["chosen"]]
        share = point["kept_tokens"] * point["kept_segments"] / 32
        assert lines[2] == (
            f"{point['kept_tokens']} of 4 tokens and {point['kept_segments']} of 8 segments of each are "
            f"left, {100 * share:.1f} % of the input prompts."
        )
        assert lines[4] == "| tuned without the head | unpruned | left | share left |"
        parameters, unpruned = result.tuned["parameters"], found["unpruned"]["parameters"]
        assert lines[6] == f"| parameters | {unpruned} | {parameters} | {100 * parameters / unpruned:.1f} % |"
        assert sum("| chosen |" in line for line in lines) == 1
        assert len([line for line in lines if line.startswith("| all |")]) == 4
        with Image.open(place / "pruning.png") as image:
            assert image.format == "PNG"


def evaluate(*folders):
    given = (
        f"run=[{','.join(map(str, folders))}]",
        "trainer=cpu",
        "callbacks=none",
        "+trainer.limit_test_batches=1",
    )
    with composed("eval", *given) as cfg:
        return inference.evaluate(cfg)


def test_a_state_of_a_chain_is_no_member_of_an_ensemble(logs, final):
    ((last, _),) = links(logs, "final")
    assert evaluate(last) == final.score
    with pytest.raises(UserError) as refused:
        evaluate(last, last)
    assert str(refused.value) == (
        f"the prompts in {last} were pruned for one seed, and an ensemble needs prompts of one shape: "
        "give runs with method.prune=false"
    )


def importances(folder):
    """The first three columns of the table of what is left: layer, token, importance."""
    rows = [line.strip("| ").split(" | ") for line in (folder / "pruning.md").read_text().splitlines()]
    start = next(i for i, row in enumerate(rows) if row[0] == "layer")
    return [tuple(row[:3]) for row in rows[start + 2 :]]


def test_layers_have_masks_of_their_own_and_eval_repeats_the_score(tmp_path, monkeypatch):
    """What prunes is chosen here, whatever validation says."""
    monkeypatch.setattr(pruning_chain, "choose", lambda results, indices: 0)
    last = go(tmp_path, "split=final", "method.mask_per_layer=true", "method.prune_segments=[50]")
    _, found = record(tmp_path)
    scores = pruning.Importance.of(found["importance"])
    assert scores.tokens.shape == (2, 4)
    assert pruning.prune(scores, pruning.Point(2, 4)).options() == {
        name: last.method[name] for name in ("token_mask", "segment_mask")
    }
    ((folder, result),) = links(tmp_path, "final")
    assert tensors(folder)["prompts"].shape == (2, 2 * 4 * 3)
    assert evaluate(folder) == last.score == result.score
    rows = [
        (str(layer + 1), str(token + 1), f"{score:.3g}")
        for layer, tokens in enumerate(scores.tokens.tolist())
        for token, score in enumerate(tokens)
    ]
    assert importances(folder) == rows
    (plain,) = (one for _, one in links(tmp_path, "tune") if one.method["token_mask"] is None)
    (tmp_path / "plain").mkdir()
    pruning_chain._report(tmp_path / "plain", plain, found | {"chosen": 1})
    assert importances(tmp_path / "plain") == rows, "nothing pruned, and each layer's own importance"


@pytest.mark.slow
def test_masks_per_layer_of_one_prompted_layer_go_through_the_chain(tmp_path):
    last = go(
        tmp_path, "split=final", "method.depth=1", "method.mask_per_layer=true", "method.prune_segments=[50]"
    )
    assert [(result.status, result.tuned["depth"]) for _, result in links(tmp_path, "tune")] == [
        ("finished", 1)
    ] * 2
    ((folder, _),) = links(tmp_path, "final")
    assert evaluate(folder) == last.score


def test_a_switch_that_is_none_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(UserError, match=r"^method\.prune=no is of the wrong kind: give true or false$"):
        go(tmp_path, "split=final", "method.prune=no")
    assert not [*tmp_path.rglob("metrics.csv"), *tmp_path.rglob("result.json")]


def test_the_same_call_again_trains_nothing(logs, final, monkeypatch):
    monkeypatch.setattr(run, "_train", lambda *_: pytest.fail("a finished run was trained again"))
    monkeypatch.setattr(pruning_chain, "_measure", lambda *_: pytest.fail("importance was measured again"))
    assert go(logs, "split=final") == final
    chosen = go(logs, "split=tune")
    _, found = record(logs)
    assert chosen.score == found["points"][found["chosen"]]["score"]


class Stopped(Exception):
    pass


def stops_after(count):
    """Runs that many jobs, then fails as a full disk would."""
    done = []

    def run_one(cfg):
        if len(done) == count:
            raise Stopped
        done.append(once(cfg))
        return done[-1]

    return run_one


@pytest.mark.parametrize("count", [1, slow(3)])
def test_an_interrupted_chain_goes_on_where_it_stopped(logs, final, tmp_path, monkeypatch, count):
    with pytest.raises(Stopped):
        go(tmp_path, "split=final", run_one=stops_after(count))
    assert len(folders(tmp_path)) == count
    trained, original = [], run._train
    monkeypatch.setattr(run, "_train", lambda *given: trained.append(1) or original(*given))
    again = go(tmp_path, "split=final")
    assert len(trained) == 4 - count
    assert again.method == final.method
    assert again.metrics["test/acc"] == final.metrics["test/acc"]
    for one, other in zip(folders(tmp_path), folders(logs), strict=True):
        assert (one.name, equal(tensors(one), tensors(other))) == (other.name, True)


@pytest.mark.parametrize(("split", "count"), [("final", 1), ("tune", 3)])
def test_a_rerun_is_of_what_was_asked_for(logs, final, tmp_path, monkeypatch, split, count):
    shutil.copytree(logs, tmp_path, dirs_exist_ok=True)
    trained, original = [], run._train
    monkeypatch.setattr(run, "_train", lambda *given: trained.append(1) or original(*given))
    again = go(tmp_path, f"split={split}", "rerun=true")
    assert len(trained) == count
    assert again.attempt == 1
    assert split == "tune" or again.metrics["test/acc"] == final.metrics["test/acc"]


def test_without_pruning_it_is_one_plain_run(tmp_path):
    calls = []
    cfg = job(tmp_path, "method.prune=false")
    assert not pruning_chain.prunes(cfg)
    assert pruning_chain.unpruned(cfg) == {}
    assert pruning_chain.run(cfg, lambda given: calls.append(given) or "done") == "done"
    assert calls == [cfg]
    other = tiny_job(tmp_path)
    assert not pruning_chain.prunes(other)
    plain = {"method.prune": False, "method.prune_tokens": None, "method.prune_segments": None}
    assert pruning_chain.unpruned(job(tmp_path)) == plain, (
        "a run that prunes nothing is the same for every grid"
    )


CONTENTS = {
    "initial.json": {"initial": "0f"},
    "importance.json": {"of": "a" * 64, "tokens": [[0.5]], "segments": [[[0.25, 0.125]]]},
    "masks.json": {
        "initial": "0f",
        "options": {},
        "chosen": 0,
        "points": [],
        "importance": {},
        "unpruned": {},
    },
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_record_is_its_chain_s_alone_and_a_damaged_one_is_taken_again(tmp_path, name, caplog):
    path, other = tmp_path / "0123" / name, tmp_path / "4567" / name
    assert pruning_chain.stored(path) is None, "that step has not been taken"
    for each in (path, other):
        pruning_chain._write(each, CONTENTS[name])
    assert pruning_chain.stored(path) == CONTENTS[name]
    whole = path.read_bytes()
    path.write_bytes(other.read_bytes())
    assert pruning_chain.stored(path) is None
    path.write_bytes(whole[:-9])
    assert pruning_chain.stored(path) is None
    path.write_bytes(whole.replace(b"0", b"1", 1))
    assert pruning_chain.stored(path) is None
    path.write_bytes(whole)
    rewrite(path, more=1)
    assert pruning_chain.stored(path) is None
    assert caplog.messages == [
        f"{path} {why}: this step is taken again"
        for why in (
            "belongs to another chain, 4567",
            "is damaged: it is cut off or not JSON",
            "is damaged: it does not match its digest",
            "is damaged or of another version of visprompt",
        )
    ]


def test_a_record_of_an_older_version_is_read(tmp_path):
    path = tmp_path / "masks.json"
    path.write_text(json.dumps(CONTENTS["masks.json"]))
    assert pruning_chain.stored(path) == CONTENTS["masks.json"]


@bounded
@given(damage=damages(), name=st.sampled_from(sorted(CONTENTS)))
def test_a_flipped_bit_or_a_cut_is_never_another_record(tmp_path, damage, name):
    path = tmp_path / name
    pruning_chain._write(path, CONTENTS[name])
    spoil(path, damage, path.read_bytes())
    assert pruning_chain.stored(path) in (None, CONTENTS[name])


def test_damaged_masks_are_found_again_without_a_training(logs, final, tmp_path, monkeypatch, caplog):
    shutil.copytree(logs, tmp_path / "logs")
    (path,) = (tmp_path / "logs").rglob("masks.json")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"chosen": ', b'"chosen": 1', 1))
    monkeypatch.setattr(TuningModule, "training_step", lambda *_: pytest.fail("trains again"))
    assert go(tmp_path / "logs", "split=final") == final
    assert path.read_bytes() == whole
    assert caplog.messages[0] == f"{path} is damaged: it does not match its digest: this step is taken again"


WILD = ("recipe.optimizer=sgd", "recipe.lr=1e30", "recipe.head_lr=null")


def test_where_the_unpruned_run_diverges_nothing_is_pruned(tmp_path):
    result = go(tmp_path, "split=final", *WILD)
    assert (result.status, result.split) == ("diverged", "tune")
    assert len(folders(tmp_path)) == 1


def test_masks_of_an_older_result_do_not_outlive_it(logs, final, tmp_path):
    _, found = record(logs)
    old = run.prepare(job(tmp_path, "split=tune", *WILD)).folder / "masks.json"
    old.parent.mkdir(parents=True)
    old.write_text(json.dumps(found))
    assert go(tmp_path, "split=tune", *WILD).status == "diverged"
    assert not old.exists()


@pytest.mark.parametrize(
    ("options", "points"),
    [
        (("method.prune_segments=null",), [(2, 8), (4, 8)]),
        (("method.prune_tokens=[]",), [(4, 4), (4, 6), (4, 8)]),
        (("method.prune_tokens=null", "method.prune_segments=[]"), [(4, 8)]),
    ],
)
def test_tokens_or_segments_can_be_pruned_alone(tmp_path, options, points):
    assert pruning_chain.prune_points(job(tmp_path, *options)) == [pruning.Point(*one) for one in points]


def test_a_varied_job_is_a_copy_with_values_replaced_as_a_whole(tmp_path):
    cfg = job(tmp_path)
    before = cfg.content()
    varied = cfg.vary(
        {"seed": 5, "backbone.kwargs": {"depth": 3}, "method.prune_tokens": [], "method.depth": 1}
    )
    assert (varied.seed, varied.backbone.kwargs, varied.method.prune_tokens) == (5, {"depth": 3}, [])
    assert (varied.method.depth, varied.method.num_tokens) == (1, 4)
    assert cfg.content() == before
    for key in ("recip", "recipe.lrr", "recip.lr", "recipe.lr.x", "method.prune_tokens.0"):
        with pytest.raises(UserError, match=rf"^unknown key of recipe\.grid '{key}': "):
            cfg.vary({key: 1})


WANDB = ("logger=wandb", "logger.wandb.offline=true")


@pytest.fixture
def begun(monkeypatch):
    """The W&B runs that were begun: the id asked for (None: the agent's), the config, and what was logged."""
    runs, original = [], wandb.init

    def init(**given):
        one = original(**given)
        log, found = one.log, {"id": given.get("id"), "config": one.config, "logged": {}}
        one.log = lambda metrics: found["logged"].update(metrics) or log(metrics)
        runs.append(found)
        return one

    monkeypatch.setattr(wandb, "init", init)
    return runs


@pytest.mark.slow
def test_every_link_is_a_wandb_run_of_its_own(logs, final, tmp_path, begun):
    shutil.copytree(logs, tmp_path, dirs_exist_ok=True)
    go(tmp_path, "split=tune", *WANDB)
    assert sorted(one["id"] for one in begun) == [folder.name for folder, _ in links(tmp_path, "tune")]


def test_under_an_agent_the_final_run_alone_reports(final, tmp_path, begun, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "agent-7")
    result = go(tmp_path, "split=final", *WANDB)
    assert len(folders(tmp_path)) == 4
    (one,) = begun
    assert (one["id"], one["config"]["split"]) == (None, "final")
    assert one["config"]["method.token_mask"] == result.method["token_mask"]
    assert one["logged"]["test/acc"] == result.metrics["test/acc"] == final.metrics["test/acc"]
    assert "val/acc" not in one["logged"]


def test_under_an_agent_the_chosen_point_alone_reports_and_is_not_trained_for_it(
    logs, final, tmp_path, begun, monkeypatch
):
    shutil.copytree(logs, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("WANDB_RUN_ID", "agent-7")
    trained, original = [], run._train
    monkeypatch.setattr(run, "_train", lambda *given: trained.append(1) or original(*given))
    result = go(tmp_path, "split=tune", "rerun=true", *WANDB)
    assert (len(trained), result.attempt) == (3, 1)
    (one,) = begun
    assert (one["id"], one["config"]["split"]) == (None, "tune")
    assert one["config"]["method.token_mask"] == result.method["token_mask"]
    assert one["logged"] == result.metrics


def test_under_an_agent_a_chain_that_diverged_reports_too(tmp_path, begun, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "agent-7")
    assert go(tmp_path, "split=final", *WANDB, *WILD).status == "diverged"
    assert [one["id"] for one in begun] == [None]


def test_under_an_agent_other_loggers_go_on(tmp_path):
    cfg = job(tmp_path, *WANDB, "+logger.tensorboard={_target_:lightning.pytorch.loggers.TensorBoardLogger}")
    assert list(without_wandb(cfg).logger) == ["tensorboard"]
    assert list(cfg.logger) == ["wandb", "tensorboard"]


def test_seeds_have_initial_values_and_masks_of_their_own(logs, final, tmp_path):
    _, found = record(logs)
    other = pruning_chain._initial(
        job(tmp_path, "split=tune", "seed=1"), tmp_path / "digits" / "e2vpt" / "one"
    )
    same = pruning_chain._initial(job(tmp_path, "split=tune"), tmp_path / "digits" / "e2vpt" / "two")
    assert same == found["initial"] != other


def test_the_loop_runs_a_chain_as_one_job(logs, final, tmp_path):
    (outcome,) = run_all.run_all([job(tmp_path, "split=final")])
    assert outcome.reason == ""
    assert outcome.result.metrics["test/acc"] == final.metrics["test/acc"]
