"""What each part of the work takes, on both sides of `official.py`: measured alone, or by leaving it out.

- The pass over the test set: the released code has a switch, DATA.NO_TEST, and one point of its grid runs
  with it. Of this code the pass is timed alone.
- Images: both train loaders are read without a model; of this code also the first decoding into its store.
- The start of a process: the released code's driver without a run; this code's command after all runs are
  finished, which reads their results and prints the table.
- Exact prompts: steps of this code with `backbone.exact=true` and `false` take turns.
"""

import os
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from measuring import milliseconds
from official_driver import cpu_seconds
from visprompt.runs import compose, run
from visprompt.runs.job import Job

if TYPE_CHECKING:
    from official import Comparison

ROUNDS = 9  # of the two kinds of steps


@dataclass(frozen=True)
class Part:
    """CPU seconds of a part of the whole work.

    Attributes:
        name: Its name in the table.
        official: Of the released code.
        ours: Of this one.
    """

    name: str
    official: float
    ours: float


def measure(comparison: "Comparison") -> dict[str, Any]:
    """Measure the parts, and return their figures."""
    step, official = comparison.step, comparison.official
    no_test = [*comparison.official_words("no_test"), "DATA.NO_TEST", "True"]
    one, words = comparison.points[:1], comparison.official_words("parts")
    return {
        "no_test": step("no_test", lambda: official("no_test", no_test, points=one)),
        "start": step("start", lambda: official("start", words)),
        "loads": step("loads", lambda: official("loads", words, loads=2)),
        "again": step("again", comparison.ours),
        "alone": step("alone", lambda: alone(comparison)),  # first: it measures the writing of the store
        "same": step("same", lambda: same(comparison)),
    }


def alone(comparison: "Comparison") -> dict[str, float]:
    """Return CPU seconds of parts of this code (store, image, test) and milliseconds of two steps."""
    os.environ |= comparison.env
    torch.set_num_threads(comparison.options.threads)
    jobs = [job_of(comparison, exact) for exact in (True, False)]
    began = cpu_seconds()
    run.prepare(jobs[0]).datamodule.prepare_data()
    written = cpu_seconds()
    prepared = run.prepare(jobs[0])
    prepared.datamodule.prepare_data()
    opened = cpu_seconds()
    data, classes = prepared.datamodule, prepared.datamodule.num_classes
    for _ in range(2):  # the first pass loads libraries
        loading = cpu_seconds()
        images = sum(len(data.on_after_batch_transfer(batch, 0).labels) for batch in data.train_dataloader())
        loaded = cpu_seconds()
    classifier = run.build_classifier(jobs[0], prepared.backbone, classes).eval()
    tested = cpu_seconds()
    with torch.no_grad():
        for batch in data.test_dataloader():
            classifier(data.on_after_batch_transfer(batch, 0).images)
    figures = {"store": (written - began) - (opened - written), "image": (loaded - loading) / images}
    figures["test"] = cpu_seconds() - tested
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    classifiers = [run.build_classifier(job, run.prepare(job).backbone, classes).train() for job in jobs]

    def train(which: int) -> None:
        F.cross_entropy(classifiers[which](batch.images), batch.labels).backward()

    times = [[milliseconds(lambda way=way: train(way), "cpu") for way in (0, 1)] for _ in range(ROUNDS + 1)]
    exact, carried = zip(*times[1:], strict=True)  # the first round warms up
    return figures | {"exact": median(exact), "carried": median(carried)}


def same(comparison: "Comparison") -> dict[str, float]:
    """Return how far images and logits of both codes differ, under the released code's prompts and head."""
    file = comparison.folder / "reference.npz"
    comparison.official("same", comparison.official_words("same"), reference=str(file))
    written = {name: torch.from_numpy(array) for name, array in np.load(file).items()}
    prepared = run.prepare(job_of(comparison, True).vary({"split": "tune"}))
    data, classes = prepared.datamodule, comparison.options.classes
    classifier = run.build_classifier(prepared.job, prepared.backbone, classes).eval()
    transformer, head = "enc.transformer.", "head.last_layer."
    prompts = [written[f"{transformer}{name}prompt_embeddings"] for name in ("", "deep_")]
    given = {"method.prompts": torch.cat(prompts)}
    given |= {f"head.{name}": written[f"{head}{name}"] for name in ("weight", "bias")}
    classifier.load_state_dict(given, strict=False)
    with torch.no_grad():
        logits = classifier(written["images"])
    loader = data.feature_dataloader(data.val_dataset)
    images = torch.cat([data.on_after_batch_transfer(batch, 0).images for batch in loader])
    count = len(images)  # here by class, there by number
    order = {number: row for row, number in enumerate(sorted(range(count), key=lambda n: (n % classes, n)))}
    ours = images[[order[number] for number in range(len(logits))]]
    error = (logits - written["logits"]).abs().max() / written["logits"].abs().max()
    return {"images": float((ours - written["images"]).abs().max()), "logits": float(error)}


def job_of(comparison: "Comparison", exact: bool) -> Job:
    """Return the job of a run of this code, with its own store."""
    words = [word for word in comparison.our_words("alone") if not word.startswith("data.store_dir=")]
    words += [f"data.store_dir={comparison.folder / 'alone'}", f"backbone.exact={str(exact).lower()}"]
    with compose.composing():
        return compose.job("train", words)


def parts(comparison: "Comparison", figures: dict[str, Any]) -> list[Part]:
    """Return what each part takes in the whole comparison; the last one is what is left."""
    options, alone = comparison.options, figures["alone"]
    seeds = len(options.seeds)
    runs = len(comparison.points) + seeds
    loads, epochs = figures["loads"]["runs"], runs * options.epochs
    image = sum(load["cpu"] for load in loads) / sum(load["images"] for load in loads)
    passes = fmean(point["cpu"] for point in figures["grid"]["runs"]) - figures["no_test"]["runs"][0]["cpu"]
    seen = epochs * (options.train + options.val)
    starts, start = 1 + seeds, figures["start"]["usage"]["cpu"]
    found = [
        Part(f"start of {starts} processes; of 1", starts * start, figures["again"]["cpu"]),
        Part(f"{epochs} passes over test; {seeds}", runs * passes, seeds * alone["test"]),
        Part(
            f"reading {seen:,} images of train and val", seen * image, alone["store"] + seen * alone["image"]
        ),
    ]
    whole = total(figures)
    rest = [
        getattr(whole, side) - sum(getattr(part, side) for part in found) for side in ("official", "ours")
    ]
    return [*found, Part("the rest: steps of training and validation", rest[0], rest[1])]


def total(figures: dict[str, Any]) -> Part:
    """Return the CPU seconds of all."""
    official = sum(side["usage"]["cpu"] for side in (figures["grid"], *figures["seeds"]))
    return Part("all", official, figures["ours"]["cpu"])


def carried(comparison: "Comparison", figures: dict[str, Any]) -> float:
    """Return CPU seconds that this code would take longer with prompts carried through all blocks."""
    options = comparison.options
    runs = len(comparison.points) + len(options.seeds)
    steps = runs * options.epochs * -(-options.train // options.batch)
    return steps * (figures["alone"]["carried"] - figures["alone"]["exact"]) / 1000


def elsewhere(comparison: "Comparison", found: list[Part], test: int, epochs: int) -> Part:
    """Return what another number of test images and epochs would take, calculated from the parts.

    All but the starts and this code's store and test passes is proportional to the epochs.
    """
    options = comparison.options
    more, larger = epochs / options.epochs, test / options.test
    start, passes, images, rest = found
    store = comparison.step("alone", dict)["store"]
    everything = options.train + options.val + options.test
    stored = store * (options.train + options.val + test) / everything
    official = start.official + more * (larger * passes.official + images.official + rest.official)
    ours = start.ours + larger * passes.ours + stored + more * (images.ours - store + rest.ours)
    return Part(f"{test:,} test images, {epochs} epochs", official, ours)
