"""The report over a broad set of written runs, figure by figure.

What a change of its code must leave as it is.

After a meant change: `VISPROMPT_GOLDEN=write pytest tests/reports/test_golden_report.py`, and read the
difference.
"""

import os
import random
import re
from pathlib import Path

import pytest
from hydra import compose

from helpers.written_runs import CROPPED, result, write
from visprompt.data.catalog import SUITES
from visprompt.reports.report import report
from visprompt.runs.compose import composing

pytestmark = pytest.mark.slow  # 450 runs are written and read
GOLDEN = Path(__file__).parents[1] / "golden" / "report"
SEEDS = (42, 44, 82)
SHARES = {"linear": 0.0, "full": 1.0, "bias": 0.001, "vpt_shallow": 0.0001, "vpt_deep": 0.004, "e2vpt": 0.002}


def write_all(folder):
    """Two benchmarks by six methods, three seeds each.

    Grids, sweeps, other protocols, failures and a demo task.
    """
    draw = random.Random(7)
    for task in (*SUITES["vtab_all"], *SUITES["fgvc"], "digits"):
        data = {"preprocessing": CROPPED} if task in SUITES["fgvc"] else {}
        for number, (method, share) in enumerate(SHARES.items()):
            tuned = {"parameters": round(85_798_656 * share), "share": share, "bytes": 1000 * number + 24}
            level = draw.uniform(0.3, 0.8) + 0.02 * number
            for seed in SEEDS if method != "full" else SEEDS[:1]:
                if task == "dmlab" and method == "bias":
                    continue
                score = round(level + draw.uniform(-0.01, 0.01), 3)
                took = {"train_s": 100.0 + 10 * number, "last_process_s": 120.0}
                write(folder, result(task, method, score, seed=seed, tuned=tuned, data=data, time=took))
    for task in ("cifar", "dtd", "svhn"):
        for lr in (0.1, 1.0, 10.0):
            score = round(draw.uniform(0.4, 0.7), 3)
            write(folder, result(task, "linear", score, split="tune", recipe={"lr": lr}))
        for tokens in (1, 5, 10, 50):
            for depth in (1, 6, 12):
                score = round(0.5 + 0.001 * tokens + 0.01 * depth + draw.uniform(0, 0.02), 3)
                options = {"num_tokens": tokens, "depth": depth}
                tuned = {"parameters": 768 * tokens * depth, "depth": depth, "num_tokens": tokens}
                write(folder, result(task, "vpt_deep", score, split="tune", options=options, tuned=tuned))
        for fraction in (0.1, 0.5):
            score = round(draw.uniform(0.3, 0.5), 3)
            write(
                folder,
                result(task, "vpt_deep", score, data={"fraction": fraction}, options={"num_tokens": 10}),
            )
    swin = {"name": "swin_base_patch4_window7_224.ms_in22k", "sha256": "b" * 64}
    write(folder, result("cifar", "vpt_deep", 0.6, backbone=swin, options={"num_tokens": 10}))
    write(folder, result("cifar", "vpt_deep", 0.61, precision="bf16-mixed", options={"num_tokens": 10}))
    diverged = result(
        "cifar", "vpt_deep", 0.1, split="tune", status="diverged", diverged_step=3, recipe={"lr": 1e3}
    )
    write(folder, diverged)
    write(folder, result("digits", "ssf", 0.9, per_class={str(n): 0.9 for n in range(10)}))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    write_all(folder / "logs")
    with composing():
        places = (f"runs={folder / 'logs'}", f"output={folder / 'report'}")
        cfg = compose("report", [*places, "formats=[markdown,csv,latex]"])
    output = report(cfg)
    texts = [path for path in output.rglob("*") if path.suffix in (".md", ".csv", ".tex")]
    return {path.relative_to(output).as_posix(): settled(path.read_text(), folder) for path in sorted(texts)}


def settled(text, folder):
    """Without what is another text in each call: the time and the folder."""
    return re.sub(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?", "TIME", text.replace(str(folder), "FOLDER"))


def test_the_report_is_as_it_was(made):
    if os.environ.get("VISPROMPT_GOLDEN") == "write":
        for name, text in made.items():
            (GOLDEN / name).parent.mkdir(parents=True, exist_ok=True)
            (GOLDEN / name).write_text(text)
    held = {path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*") if path.is_file()}
    assert set(made) == held
    for name, text in made.items():
        assert text == (GOLDEN / name).read_text(), name
