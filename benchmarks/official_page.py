"""The page that `official.py` writes."""

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import machine
from official_data import SIDES
from official_parts import carried, elsewhere, parts, total
from visprompt.runs.result import Cell, Result, markdown_table, open_result

if TYPE_CHECKING:
    from official import Comparison

PAGE = """# The released code of VPT and this code, end to end

Written by [official.py](official.py), whose first lines say what is run:

```
{command}
```

{task}

{where}

## The whole comparison

{whole}

{agreement}

{load}

## What each part takes

CPU seconds; [official_parts.py](official_parts.py) says how each part is measured. The last column is the
part's share of everything that is saved.

{parts}

{carried}

## Other sizes, calculated from the parts

These figures were not measured.

{elsewhere}

## What differs between the two sides

{notes}
"""
NOTES = """\
- The released code pauses before and after its runs, to keep jobs of a cluster apart: {slept:.0f} s
  here, which are left out.
- It loads images in {workers} worker processes, which it starts anew for each pass over a split; the
  default of its configuration is 4. This code loads in the training process. So with {threads}
  thread(s) of PyTorch on both sides the released code can use more than one core, and this code cannot:
  CPU time is the fairer figure of work, wall time that of waiting.
- Without TensorFlow only its image folders (FGVC) can be read. They are decoded, resized and cropped at
  every access, and the grid reads the test set too. Its code for VTAB-1k keeps decoded images in memory
  and reads no test set in the grid, so less can be saved there; that was not measured.
- Its grid is made in one process and each seed in another, as its notebook does. Both sides score val
  after each epoch, and train on train only in the final runs too.
- Its grid has no seed, that of this code has. The order of images, crops, flips, initial values and
  dropout are drawn differently on the two sides.
- The images are small files ({width} x {height}), which are quick to decode, and the ViT is small. On
  larger images decoding weighs more, on a larger ViT less.
- Peak memory is that of the largest process. The released code's workers add theirs, of which most is
  shared with it.
- What is replaced in memory so that the released code runs on this version of Python and on this ViT is
  listed at the top of [official_driver.py](official_driver.py)."""


def page(comparison: "Comparison", figures: dict[str, Any]) -> str:
    """Return the page."""
    found = parts(comparison, figures)
    options, slept = comparison.options, sum(run["slept"] for run in _runs(figures))
    width, height = SIDES
    notes = NOTES.format(
        slept=slept, workers=options.workers, threads=options.threads, width=width, height=height
    )
    return PAGE.format(
        command=_command(options),
        task=_task(comparison),
        where=f"{machine()}. Released code: {_commit(options.code)}, {_versions(options.python)}.",
        whole=_whole(comparison, figures),
        agreement=_agreement(comparison, figures),
        load=_load(figures),
        parts=_parts(figures, found),
        carried=_carried(comparison, figures),
        elsewhere=_elsewhere(comparison, found),
        notes=notes,
    )


def our_results(logs: Path) -> list[Result]:
    """Return the results of this code's runs."""
    return [open_result(file.parent) for file in sorted(logs.glob("*/*/*/result.json"))]


def _runs(figures: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for side in (figures["grid"], *figures["seeds"]) for run in side["runs"]]


def _command(options: Any) -> str:
    return f".venv/bin/python benchmarks/official.py --code CODE --python PYTHON --test {options.test}"


def _task(comparison: "Comparison") -> str:
    options, vit = comparison.options, comparison.vit
    return (
        f"{options.train} images of train, {options.val} of val, {options.test:,} of test, {options.classes} "
        f"classes; a ViT of width {vit.width}, {vit.blocks} blocks, {vit.heads} heads, {vit.tokens} tokens, "
        f"random weights; VPT-deep with {options.prompts} prompts, dropout {options.dropout:g}; rates "
        f"{_listed(options.rates)} x weight decays {_listed(options.decays)}, then seeds "
        f"{_listed(options.seeds)}; {options.epochs} epochs, {options.warmup} of them warm-up, batch "
        f"{options.batch}, float32, {options.threads} thread(s)."
    )


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _commit(code: Path) -> str:
    """Return the commit of the released code, if its folder is a clone."""
    asked = ["git", "-C", str(code), "rev-parse", "--show-prefix", "HEAD"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.splitlines()
    return f"commit {answer[1][:12]}" if len(answer) == 2 and not answer[0] else "of unknown commit"


def _versions(python: str) -> str:
    code = "import platform as p, importlib.metadata as m; print(p.python_version(), m.version('torch'))"
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return "python {}, torch {}".format(*answer.stdout.partition("+")[0].split())


def _whole(comparison: "Comparison", figures: dict[str, Any]) -> str:
    usages = [side["usage"] for side in (figures["grid"], *figures["seeds"])]
    ours, results = figures["ours"], our_results(comparison.folder / "logs")
    point, final = _chosen(figures), next(r for r in results if r.split == "final")
    tuned = next(r for r in results if r.split == "tune" and r.recipe == final.recipe)
    rows = []
    for name, key in (("wall time, s", "wall"), ("CPU time, s", "cpu")):
        rows.append(_row(name, sum(usage[key] for usage in usages), ours[key]))
    rows.append(_row("peak memory, MiB", max(usage["mib"] for usage in usages), ours["mib"]))
    rows.append(["processes", f"{len(usages)}, and loader workers", "1", ""])
    settings = [f"{p['lr']:g}, {p['weight_decay']:g}" for p in (point, tuned.recipe)]
    rows.append(["chosen rate, weight decay", *settings, ""])
    rows.append(["its accuracy on val, %", f"{point['val']:.1f}", f"{100 * tuned.score:.1f}", ""])
    cells = [str(cell) for cell in _cells(comparison, figures)]
    rows.append(["accuracy on test, %", *cells, ""])
    return markdown_table(["", "released code", "this code", "ratio"], rows).rstrip()


def _chosen(figures: dict[str, Any]) -> dict[str, Any]:
    from official import chosen

    return chosen(figures["grid"]["runs"])


def _cells(comparison: "Comparison", figures: dict[str, Any]) -> tuple[Cell, Cell]:
    """Return mean and deviation over the seeds of the test accuracies of both sides."""
    official = tuple(side["runs"][0]["test"] / 100 for side in figures["seeds"])
    results = our_results(comparison.folder / "logs")
    return Cell(official), Cell(tuple(r.score for r in results if r.split == "final"))


def _agreement(comparison: "Comparison", figures: dict[str, Any]) -> str:
    official, ours = _cells(comparison, figures)
    difference = 100 * (ours.mean - official.mean)
    noise = 100 * ((official.std**2 / len(official.scores)) + (ours.std**2 / len(ours.scores))) ** 0.5
    same = figures["same"]
    return (
        "With equal prompts and head, the logits of a batch of val differ by "
        f"{same['logits']:.0e} of the largest one, and its preprocessed images by {same['images']:g}. "
        f"The two mean accuracies on test differ by {difference:+.1f} points; the standard error of that "
        f"difference, from the deviations over the seeds, is {noise:.1f}."
    )


def _load(figures: dict[str, Any]) -> str:
    """Say whether the processes had the cores that they could use."""
    ours = figures["ours"]
    return (
        f"This code, with one thread, had the CPU for {100 * ours['cpu'] / ours['wall']:.0f} % of the wall "
        "time: the lower that is, the more other programs were running. So compare CPU time, not wall time."
    )


def _row(name: str, official: float, ours: float) -> list[str]:
    return [name, f"{official:,.0f}", f"{ours:,.0f}", f"{official / ours:.1f}"]


def _parts(figures: dict[str, Any], found: list[Any]) -> str:
    whole = total(figures)
    saved = whole.official - whole.ours
    rows = [
        [
            part.name,
            f"{part.official:,.0f}",
            f"{part.ours:,.0f}",
            f"{100 * (part.official - part.ours) / saved:.0f} %",
        ]
        for part in (*found, whole)
    ]
    return markdown_table(["part", "released code", "this code", "of what is saved"], rows).rstrip()


def _carried(comparison: "Comparison", figures: dict[str, Any]) -> str:
    alone = figures["alone"]
    return (
        f"Of the rest, exact prompts save {carried(comparison, figures):.0f} s: a step of this code takes "
        f"{alone['exact']:.0f} ms, and {alone['carried']:.0f} ms with prompts that are carried through all "
        "blocks (`backbone.exact=false`). What else makes the rest differ (fused attention, the optimiser, "
        "logging, files of a run) was not separated."
    )


def _elsewhere(comparison: "Comparison", found: list[Any]) -> str:
    rows = []
    for epochs in (comparison.options.epochs, 100):
        for test in (1000, 5000, 20000):
            part = elsewhere(comparison, found, test, epochs)
            rows.append(_row(part.name, part.official, part.ours))
    return markdown_table(["", "released code, CPU s", "this code, CPU s", "ratio"], rows).rstrip()
