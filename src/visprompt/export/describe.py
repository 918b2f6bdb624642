"""Write the table of docs/export.md by exporting pairs of method and backbone: `make docs`.

Methods that have a row keep it. `make docs ARGS=all` makes all rows anew, which takes half an hour on two CPU
cores.
"""

import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.export import ExportedProgram

from visprompt.errors import UserError
from visprompt.export.graph import Network, capture
from visprompt.export.write import FORMATS, Request, write
from visprompt.models.api import build
from visprompt.models.classifier import Classifier
from visprompt.models.methods import METHODS
from visprompt.models.methods.describe import member, refusal
from visprompt.models.tuned_state import TunedState

FAMILIES = ("ViT", "Swin", "ConvNeXt")
"""Names of `methods.describe.MEMBERS`; of the other families the tests export a pair each"""
_CLASSES = ("a", "b", "c")
_START, _END = "<!-- the table, by make docs -->\n", "<!-- end of the table -->\n"


def classifier_of(method: str, family: str, **options: Any) -> Classifier:
    """Build a small classifier of a pair, whose tuned values are all large enough to be seen.

    Args:
        method: A name of `METHODS`.
        family: A name of `methods.describe.MEMBERS`.
        **options: Options of the method.

    Raises:
        UserError: The pair cannot work.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = build(member(family), method, len(_CLASSES), **options)
        with torch.no_grad():
            for _, parameter in classifier.tuned_parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return classifier.eval()


def state_of(classifier: Classifier, **preprocessing: Any) -> TunedState:
    """Return a tuned state of a classifier, as a run on images of the backbone's size would write it.

    Args:
        classifier: A result of `classifier_of`.
        **preprocessing: What differs from squashing by Pillow's bilinear filter.
    """
    assert classifier.origin is not None
    images: dict[str, Any] = {"native": None, "short_side": None}
    images |= {"size": classifier.backbone.image_size, "resize": "squash"}
    images |= {"interpolation": "bilinear", "resampling": "pillow", "decode": "upright", "crop": None}
    images |= {"flip": 0.0, "mean": [0.5] * 3, "std": [0.25] * 3}
    return TunedState(
        tensors=classifier.tuned_state(),
        method=classifier.origin.method,
        task="own",
        class_names=_CLASSES,
        preprocessing=images | preprocessing,
        backbone=classifier.origin.backbone,
        versions={},
    )


@cache
def options_of(method: str, family: str) -> Mapping[str, Any] | None:
    """Return options with which a pair works: none, or prompts of pixels; None if it does not work."""
    reason = refusal(method, family)
    if reason is None:
        return {}
    if "method.location" not in reason:
        return None
    pad: dict[str, Any] = {"location": "pad"}
    pad |= {} if "shallow" in method else {"depth": 1, "dropout": 0.0}
    return pad if refusal(method, family, **pad) is None else None


def problems(classifier: Classifier) -> dict[str, str | None]:
    """Export a classifier to every format; return why it cannot be, or None, by format."""
    state = state_of(classifier)
    try:
        program = capture(Network(classifier, state.preprocessing, in_graph=False))
    except UserError as error:
        reasons: dict[str, str | None] = dict.fromkeys(FORMATS, str(error))
        return reasons | {"timm": _problem(classifier, "timm", None)}
    return {to: _problem(classifier, to, program) for to in FORMATS}


def _problem(classifier: Classifier, to: str, program: ExportedProgram | None) -> str | None:
    with TemporaryDirectory() as folder:
        try:
            write(Path(folder), classifier, state_of(classifier), Request(to=to), program=program)
        except UserError as error:
            return str(error)
    return None


def cell(method: str, family: str, reasons: list[str]) -> str:
    """Return a cell of the table: the formats that work and numbers of reasons why others do not.

    Args:
        method: A name of `METHODS`.
        family: A name of `methods.describe.MEMBERS`.
        reasons: The sentences that are listed below the table; new ones are added.

    Returns:
        For example "onnx, torch [1]", with "(pad)" for prompts of pixels; "-" for a pair that does not work
        itself.
    """
    options = options_of(method, family)
    if options is None:
        return "-"
    found = problems(classifier_of(method, family, **options))
    works = [to for to in FORMATS if found[to] is None] or ["none"]
    numbers = []
    for reason in filter(None, found.values()):
        if reason not in reasons:
            reasons.append(reason)
        numbers.append(f" [{reasons.index(reason) + 1}]")
    return ", ".join(works) + "".join(dict.fromkeys(numbers)) + (" (pad)" if options else "")


def table(page: str = "") -> str:
    """Return the table, and the reasons below it, as Markdown.

    Args:
        page: The page with the rows that are kept.
    """
    rows, reasons = known(page)
    lines = [f"| method | {' | '.join(FAMILIES)} |", f"|---|{'---|' * len(FAMILIES)}"]
    for method in METHODS:
        cells = rows.get(method) or [cell(method, family, reasons) for family in FAMILIES]
        lines.append(f"| {' | '.join([method, *cells])} |")
    lines += ["", "Refused with:", "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))]
    return "\n".join(lines) + "\n"


def known(page: str) -> tuple[dict[str, list[str]], list[str]]:
    """Return the cells of each method in the table of a page, and the reasons that their numbers refer to."""
    part = page.partition(_START)[2].partition(_END)[0]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in rows[1:]}, re.findall(r"^\d+\. (.*)$", part, re.MULTILINE)


def with_table(page: str, lines: str) -> str:
    """Return the page with another table between its two marks."""
    before, _, rest = page.partition(_START)
    return f"{before}{_START}{lines}{_END}{rest.partition(_END)[2]}"


if __name__ == "__main__":
    target, *words = map(Path, sys.argv[1:])
    page = target.read_text(encoding="utf-8")
    target.write_text(with_table(page, table("" if words else page)), encoding="utf-8")
