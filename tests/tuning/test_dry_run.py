"""dry_run=true: what is counted, measured, added up and asked for, and that nothing is trained or written."""

import math
import re
import time
from functools import partial

import pytest
import torch
from huggingface_hub import constants

from helpers.cli import call, composed, content, frozen, tiny, tiny_job
from visprompt.data.catalog import SUITES, TASKS
from visprompt.errors import UserError
from visprompt.models.methods import METHODS
from visprompt.runs import run, run_all
from visprompt.tuning import dry_run, protocol
from visprompt.tuning.dry_run import needs, pace
from visprompt.tuning.dry_run.pace import Pace

pytestmark = [
    frozen,
    pytest.mark.filterwarnings("ignore:The number of training batches .* smaller than the logging"),
]
SHORT = ("callbacks=none", "+trainer.limit_train_batches=1", "+trainer.limit_test_batches=1")
PACE = Pace(device="a machine", step=1.0, image=0.01, kept=0.01)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(dry_run.console, "_width", 300)


@pytest.fixture
def measured(monkeypatch):
    """Stands for the measurement, and keeps the jobs that it was asked about."""
    asked = []

    def measure(job, *others):
        asked.append((job, *others))
        return PACE

    monkeypatch.setattr(dry_run, "measure_pace", measure)
    return asked


def go(script, logs, *arguments, dry=True):
    given = tiny(logs, *SHORT, *arguments, f"dry_run={dry}".lower())
    with composed(script, *given) as cfg:
        return getattr(dry_run if dry else {"train": run_all, "tune": protocol}[script], script)(cfg)


train, tune = partial(go, "train"), partial(go, "tune")


def lines(text):
    """The table's cells by task and method, and the sentences below it."""
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in text.splitlines()
        if line.startswith("│")
    ]
    return {tuple(row[:2]): row[2:] for row in rows}, [
        s for s in text.splitlines() if re.match(r"\w+( left)?: ", s)
    ]


@pytest.mark.slow
def test_a_command_that_is_not_run_says_what_it_would_do(tmp_path):
    arguments = tiny(tmp_path / "logs", "dry_run=true", "data=demo/digits_loc")
    before = content(tmp_path)
    done = call("train", *arguments, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    table, sentences = lines(done.stdout)
    (cells,) = table.values()
    assert table.keys() == {("digits_loc", "vpt_deep")}
    assert cells[:4] == ["-", "0", "1, 0 done", "48"]
    assert re.fullmatch(r"\d+ s", cells[4])
    assert re.match(
        r"time left: about \d+ s, .*random images measured now on the CPU \(threads: 1\)", sentences[0]
    )
    assert sentences[1].startswith("disk: about ")
    assert {name: digest for name, digest in content(tmp_path).items() if "/hydra/" not in name} == before


@pytest.mark.parametrize(
    ("has", "sentence"),
    [
        (
            {"amx_bf16", "avx512_bf16"},
            "precision=bf16-mixed, another run, is usually faster on this CPU, which has AMX",
        ),
        (
            {"avx512_bf16"},
            "precision=bf16-mixed, another run, is usually faster on this CPU, which has AVX512-BF16",
        ),
        ({"avx512_f", "amx_int8"}, ""),
    ],
)
def test_a_cpu_that_multiplies_bfloat16_is_named(has, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True))
    train(tmp_path)
    left, _ = lines(capsys.readouterr().out)[1]
    assert left.rpartition("; ")[2] == sentence if sentence else "precision=" not in left
    train(tmp_path, "precision=bf16-mixed")
    assert "precision=" not in lines(capsys.readouterr().out)[1][0]


def test_steps_time_and_disk_are_added_up(tmp_path, measured, capsys):
    assert math.isnan(train(tmp_path, "tasks=demo"))
    table, (left, disk) = lines(capsys.readouterr().out)
    assert [key[0] for key in table] == ["digits", "digits_crowded", "digits_loc"]
    # 3 epochs of 16 batches from 1,000 images, one second each, and 797 test images
    assert table["digits", "vpt_deep"] == ["-", "0", "1, 0 done", "48", "56 s"]
    assert left.startswith("time left: about 3 min, one run after the other, ")
    assert left.endswith(
        " are not included; trainer.limit_test_batches, trainer.limit_train_batches would make it less"
    )
    assert len(measured) == 1, "tasks that differ in their number of classes alone take as long"
    states = [4 * (2 * 4 * 24 + 25 * TASKS[task].num_classes) for task in SUITES["demo"]]
    size = sum(states) + 3 * 20_000 + 3 * max(states)
    assert disk == f"disk: about {size:,} B more: {size:,} B of results"


def test_validation_images_count_in_every_epoch_and_frozen_parts_once(tmp_path, monkeypatch, capsys):
    kept = Pace(device="a machine", step=1.0, image=5.0, kept=0.001, frozen=0.02)
    monkeypatch.setattr(dry_run, "measure_pace", lambda *_: kept)
    train(tmp_path, "method=linear", "split=tune")
    table, _ = lines(capsys.readouterr().out)
    # 3 epochs of 13 batches; 800 + 200 images once, and these 200 three times: 39 + 20 + 0.6
    assert table["digits", "linear"] == ["-", "0", "1, 0 done", "39", "60 s"]
    train(tmp_path, "method=linear", "split=tune", "recipe.max_steps=20")  # ends within the second epoch
    table, _ = lines(capsys.readouterr().out)
    assert table["digits", "linear"][-1] == dry_run.in_time(20 + 1000 * 0.02 + 2 * 200 * 0.001)
    tune(tmp_path, "methods=[linear]", "seeds=[1,2]", "recipe.grid={recipe.lr:[0.1,0.2]}")
    table, _ = lines(capsys.readouterr().out)
    # two points; two runs of 3 epochs of 16 batches, and 797 test images; 2,000 images once over all of these
    # runs
    assert table["digits", "linear"][-1] == dry_run.in_time(2 * 39.6 + 2 * (48 + 797 * 5) + 2000 * 0.02)


def test_finished_and_diverged_runs_are_done_and_rerun_does_them_again(tmp_path, measured, capsys):
    train(tmp_path, dry=False)
    with pytest.raises(UserError):
        train(tmp_path, "recipe.optimizer=sgd", "recipe.lr=1e30", "recipe.head_lr=null", dry=False)
    capsys.readouterr()
    for more in ((), ("recipe.optimizer=sgd", "recipe.lr=1e30", "recipe.head_lr=null")):
        train(tmp_path, *more)
        table, sentences = lines(capsys.readouterr().out)
        assert table["digits", "vpt_deep"] == ["-", "0", "1, 1 done", "48", "0 s"]
        assert sentences == ["disk: nothing more"]
    assert not measured
    train(tmp_path, "rerun=true")
    assert lines(capsys.readouterr().out)[0]["digits", "vpt_deep"][2] == "1, 0 done"


GRID = ("seeds=[1,2]", "++recipe.grid={recipe.lr:[0.2,0.4]}")


@pytest.mark.slow
def test_the_protocol_is_counted_as_it_would_run(tmp_path, measured, capsys):
    def counted(*more):
        capsys.readouterr()
        tune(tmp_path, *GRID, f"table={tmp_path}/table.md", *more)
        return lines(capsys.readouterr().out)[0]["digits", "vpt_deep"]

    assert counted() == ["2", "1, 2", "4, 0 done", "39 to 48", "3 min"]
    train(tmp_path, "split=tune", "seed=42", "recipe.lr=0.2", dry=False)
    assert counted()[2] == "4, 1 done"
    train(tmp_path, "seed=1", "recipe.lr=0.2", dry=False)
    assert counted()[2] == "4, 1 done", "which point is chosen is not known yet"
    tune(tmp_path, *GRID, f"table={tmp_path}/table.md", dry=False)
    assert counted() == ["2", "1, 2", "4, 4 done", "39 to 48", "0 s"]
    assert counted("recipe.epochs=4")[2] == "4, 0 done"
    assert counted("points=[1]") == ["1", "42", "1, 1 done", "39", "0 s"], "this point alone"
    with pytest.raises(UserError, match=r"points=\[2\] does not fit: give a list of numbers from 0 to 1"):
        counted("points=[2]")


def test_after_a_grid_that_diverged_nothing_follows(tmp_path, measured, capsys):
    wild = ("recipe.optimizer=sgd", "++recipe.grid={recipe.lr:[1e30]}", "recipe.head_lr=null")
    with pytest.raises(UserError):
        tune(tmp_path, *wild, dry=False)
    capsys.readouterr()
    tune(tmp_path, *wild)
    assert lines(capsys.readouterr().out)[0]["digits", "vpt_deep"][2] == "1, 1 done"


PRUNE = (
    *(
        "method=e2vpt",
        "recipe.epochs=1",
        "recipe.warmup_epochs=0",
        "method.num_tokens=4",
        "method.num_segments=8",
    ),
    *("method.num_kv_tokens=2", "method.prune_tokens=[50]", "method.prune_segments=[25,50]"),
)


@pytest.mark.slow
def test_a_chain_of_pruning_is_as_many_runs_as_it_makes(tmp_path, measured, monkeypatch, capsys):
    def counted(*more):
        capsys.readouterr()
        train(tmp_path, *PRUNE, *more)
        (cells,) = lines(capsys.readouterr().out)[0].values()
        return cells[:3]

    assert counted() == ["-, 3 of pruning", "0", "4, 0 done"]
    assert measured[0][0].method.prune is False
    stop, real = [], run._train

    def one_only(*given):
        if stop:
            raise UserError("stopped")
        stop.append(True)
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_train", one_only)
        with pytest.raises(UserError):
            train(tmp_path, *PRUNE, "split=tune", dry=False)
    assert counted("split=tune")[2] == "3, 1 done"
    train(tmp_path, *PRUNE, "split=tune", dry=False)
    assert counted("split=tune")[2] == "3, 3 done"
    assert counted()[2] == "4, 3 done"
    train(tmp_path, *PRUNE, dry=False)
    assert counted()[2] == "4, 4 done"


def test_data_that_is_not_prepared_is_named_with_its_command(tmp_path, measured, capsys):
    train(
        tmp_path / "logs", "tasks=vtab_natural", "backbone.image_size=224", f"paths.data_dir={tmp_path}/data"
    )
    table, (_, disk, missing) = lines(capsys.readouterr().out)
    assert [key[0] for key in table] == list(SUITES["vtab_natural"])
    # 3 epochs of 8 batches of 128
    assert {tuple(cells[2:4]) for cells in table.values()} == {("1, 0 done", "24")}
    specs = [TASKS[task] for task in SUITES["vtab_natural"]]
    stores = sum(3 * sum(spec.split_sizes.values()) * (spec.native or 224) ** 2 for spec in specs)
    files = {(spec.dataset, file.name): file for spec in specs for file in spec.files}
    originals = sum(file.size or file.roughly or 0 for file in files.values())
    assert f": {stores / 1e9:.1f} GB of stored images, {originals / 1e9:.1f} GB of original files, " in disk
    command = f"python src/prepare.py tasks=vtab_natural paths.data_dir={tmp_path}/data"
    by_hand = "(sun397: by hand, verify=true says how)"
    assert missing == f"missing: the data of {', '.join(SUITES['vtab_natural'])}: {command} {by_hand}"
    assert not (tmp_path / "data").exists()


def test_photographs_have_as_many_steps_as_their_catalog_says(tmp_path, measured, capsys):
    train(tmp_path, "tasks=[cub200,nabirds]", "data.fraction=0.5", f"paths.data_dir={tmp_path}/data")
    table, (_, disk, missing) = lines(capsys.readouterr().out)
    assert table["cub200", "vpt_deep"][3] == f"{3 * math.ceil(2697 / 128)}"
    count = sum(n for task in ("cub200", "nabirds") for n in TASKS[task].split_sizes.values())
    assert f"{3 * count * 73 * 73 * 4 / 3 / 1e9:.1f} GB of stored images" in disk
    assert "tasks='[cub200,nabirds]'" in missing
    assert missing.endswith(" (nabirds: by hand, verify=true says how)")
    train(tmp_path, "data=vtab/sun397", "data.source=prepared", f"paths.data_dir={tmp_path}/data")
    *_, missing, _ = capsys.readouterr().out.splitlines()
    place = f"image_size=64 paths.data_dir={tmp_path}/data"
    assert (
        missing == f"missing: the data of sun397: python src/prepare.py tasks=sun397 source=prepared {place}"
    )


ADE20K = ("backbone=demo", "backbone.image_size=64", "method.num_tokens=10", "recipe.warmup_epochs=0")


def test_a_segmentation_run_ends_after_its_steps_and_scores_images_in_windows(tmp_path, measured, capsys):
    train(tmp_path, "experiment=ade20k_deep", *ADE20K, f"paths.data_dir={tmp_path}", "recipe.epochs=134")
    table, sentences = lines(capsys.readouterr().out)
    seconds = 160_000 * PACE.step + 2 * 2000 * PACE.image  # a photograph of 4:3 is two windows
    assert table["ade20k", "vpt_deep"] == ["-", "0", "1, 0 done", "160,000", pace.in_time(seconds)]
    ((job, _, classes, _, augments, kind),) = measured
    assert (job.recipe.head, classes, augments, kind) == ("setr_pup", 150, True, "segmentation")
    assert any("967.0 MB of stored images, 967.0 MB of original files" in sentence for sentence in sentences)
    command = f"python src/prepare.py tasks=ade20k paths.data_dir={tmp_path}"
    assert f"missing: the data of ade20k: {command}" in sentences


def test_own_images_are_counted_and_stay_undecoded(tmp_path, measured, capsys):
    from PIL import Image

    for name in ("cat", "dog"):
        for i in range(20):
            path = tmp_path / "pets" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (70, 70), (i, 9, 9 * (name == "cat"))).save(path)
    given = ("data=folder", f"data.root={tmp_path}/pets", f"paths.data_dir={tmp_path}/data")
    train(tmp_path / "logs", *given)
    table, (said, _, disk) = lines(capsys.readouterr().out)
    assert said == (
        f"data: pets in {tmp_path}/pets: 2 classes (cat, dog); images: train 32, val 4, test 4 (no splits "
        "were given: every class was cut 80/10/10); smallest class: cat with 16 training images"
    )
    assert table["pets", "vpt_deep"][3] == "3"
    assert f"{40 * 73 * 73 * 4 / 1e6:.1f} MB of stored images" in disk
    assert not (tmp_path / "data").exists()
    train(tmp_path / "logs", *given, dry=False)
    capsys.readouterr()
    train(tmp_path / "logs", *given)
    assert lines(capsys.readouterr().out)[1] == [said, "disk: nothing more"]


def test_missing_weights_are_named_and_random_ones_measured(tmp_path, measured, capsys):
    given = [
        a
        for a in tiny(tmp_path, "dry_run=true")
        if not a.startswith(("backbone.weights", "++backbone.kwargs"))
    ]
    with composed("train", *given, "backbone=timm", "backbone.name=vit_tiny_patch16_224.augreg_in21k") as cfg:
        dry_run.train(cfg)
    _, (_, disk, missing) = lines(capsys.readouterr().out)
    url = r"https://huggingface\.co/timm/vit_tiny_patch16_224\.augreg_in21k/resolve/main/\S+"
    start = (
        rf"missing: the weights of backbone vit_tiny_patch16_224\.augreg_in21k: the first run fetches {url}; "
    )
    assert re.match(
        start + "where it cannot be reached, copy that file here and give backbone.weights=FILE", missing
    )
    assert " MB of weights" in disk
    ((_, backbone, classes, devices, augments, _),) = measured
    assert (backbone.image_size, classes, devices, augments) == (224, 10, 1, False)


def test_weights_without_an_address_are_named_all_the_same():
    assert (
        needs._how_to_get("no address: the hub cannot be reached", "tiny")
        == "no address: the hub cannot be reached"
    )


def test_a_file_of_weights_that_is_not_there_is_named(tmp_path, measured, capsys):
    train(tmp_path, "backbone.weights=/nowhere/w.safetensors")
    _, (*_, missing) = lines(text := capsys.readouterr().out)
    sentence = "there is no file of backbone weights at /nowhere/w.safetensors: correct backbone.weights=..."
    assert missing == f"missing: {sentence}"
    assert text.endswith("\nruns that lack data or weights are counted as not done\n")


def test_the_hub_is_asked_again_after_a_dry_run(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with needs.offline():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


def test_without_the_device_there_is_no_time_and_the_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train(tmp_path, "trainer=ddp")
    table, _ = lines(text := capsys.readouterr().out)
    assert table["digits", "vpt_deep"][4] == "unknown"
    assert "\nno time for some: trainer.accelerator=gpu has no device on this machine\n" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("trainer=ddp_sim", "recipe.batch_size=63"),
            "recipe.batch_size=63 cannot be dealt to 2 device(s) x 1 ",
        ),
        (("method.location=everywhere",), "unknown method.location 'everywhere'"),
        (("backbone.name=vit_tiny_patch16_225",), "unknown backbone 'vit_tiny_patch16_225': did you mean"),
    ],
)
def test_what_cannot_run_is_one_sentence_behind_the_table(tmp_path, arguments, sentence):
    with pytest.raises(UserError) as error:
        train(tmp_path, *arguments)
    assert str(error.value).startswith("digits/vpt_deep: ")
    assert str(error.value).endswith(" (1 of 1 would fail)")
    assert sentence in str(error.value)


def test_a_grid_that_is_none_is_said_as_ever(tmp_path):
    with pytest.raises(UserError, match=r"digits/vpt_deep: recipe\.grid\.seed is set by the protocol itself"):
        tune(tmp_path, "+recipe.grid={seed:[1,2]}")


@pytest.fixture
def timed(monkeypatch):
    """One second for every call, which is made once; keeps the shapes that the classifier sees."""
    seen = []

    def seconds(self, work):
        work()
        return 1.0

    monkeypatch.setattr(pace.Bench, "_seconds", seconds)
    monkeypatch.setattr(
        pace.Classifier, "forward", lambda self, x: seen.append(tuple(x.shape)) or self.head(self.features(x))
    )
    return seen


def paced(tmp_path, *arguments, devices=1, augments=False):
    job = tiny_job(tmp_path, *arguments)
    backbone = run.prepare(job).backbone
    return pace.measure_pace(job, backbone, 10, devices, augments)


def test_steps_are_of_the_true_shape_where_that_is_not_too_slow(tmp_path, timed, monkeypatch):
    monkeypatch.setattr(pace, "PATIENCE", 16.0)
    found = paced(tmp_path)
    assert timed == [(4, 3, 64, 64), (64, 3, 64, 64), (64, 3, 64, 64)]
    assert (found.step, found.image, found.kept, found.frozen, found.whole) == (1, 1 / 64, 1 / 64, 0, True)
    monkeypatch.setattr(pace, "PATIENCE", 15.0)
    del timed[:]
    found = paced(tmp_path)
    assert timed == [(4, 3, 64, 64)] * 2
    assert (found.step, found.image, found.whole) == (16, 1 / 4, False)


def test_devices_and_accumulation_share_a_batch(tmp_path, timed):
    found = paced(tmp_path, "trainer.accumulate_grad_batches=4", devices=2)
    assert timed == [(4, 3, 64, 64), (8, 3, 64, 64), (8, 3, 64, 64)]
    assert found.step == 4


def test_what_is_frozen_is_run_once_unless_images_are_augmented(tmp_path, timed, monkeypatch):
    monkeypatch.setattr(pace, "PATIENCE", 100.0)
    found = paced(tmp_path, "method=linear")
    assert timed == [(4, 24), (64, 24), (64, 3, 64, 64), (64, 24)]
    assert (found.image, found.kept, found.frozen) == (1 / 64, 1 / 64, 0)
    del timed[:]
    paced(tmp_path, "method=linear", augments=True)
    assert timed == [(4, 3, 64, 64), (64, 3, 64, 64), (64, 3, 64, 64)]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true", "32"])
def test_precisions_are_those_of_the_trainer(tmp_path, precision):
    found = paced(tmp_path, f"precision={precision}", "recipe.batch_size=4")
    assert found.step > 0
    assert found.device == "the CPU (threads: 1)"


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_can_be_measured(tmp_path, timed, method):
    fits = {"e2vpt": ["method.num_segments=8"], "vpt_low_rank": ["method.rank=2"]}.get(method, [])
    found = paced(tmp_path, f"method={method}", "recipe.batch_size=4", *fits)
    assert (found.step, found.whole) == (1, True)
    assert found.image == found.kept == 0.25


def test_a_batch_without_room_is_a_reason(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(pace.Bench, "figures", full)
    found = paced(tmp_path)
    many = "recipe.batch_size=64 on 1 device(s) does not fit into the memory of the CPU (threads: 1)"
    assert (found.device, found.why) == ("", f"{many}: raise trainer.accumulate_grad_batches")


def test_a_measured_time_is_that_of_the_work(tmp_path):
    bench = pace.Bench.__new__(pace.Bench)
    bench.like = torch.zeros(1)
    slow = iter([0.2, *[0.02] * 10])
    calls = []

    def work():
        time.sleep(pause := next(slow))
        calls.append(pause)

    assert 0.02 <= bench._seconds(work) < 0.1, "the first call warms up"
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (99.4, "99 s"),
        (100, "2 min"),
        (5900, "98 min"),
        (6000, "2 h"),
        (352_800, "98 h"),
        (864_000, "10 days"),
    ],
)
def test_times_in_words(seconds, words):
    assert dry_run.in_time(seconds) == words
