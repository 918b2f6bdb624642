"""The model card of a tuned state: README.md with YAML front matter, made from `result.json`."""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import yaml

from visprompt.data.catalog import TASKS
from visprompt.errors import UserError, shown
from visprompt.models.backbones import DEMO
from visprompt.models.kind import KINDS
from visprompt.models.tuned_state import TunedState
from visprompt.runs.result import Result, cell
from visprompt.text import in_markdown, visible

_CARD = """---
{head}---

# {title}

A tuned state of visprompt: {method} on a frozen backbone. {backbone}

| | |
| :-- | :-- |
{rows}

## Load

```python
import visprompt
classifier = visprompt.load("{place}")
```

`classifier(images)` returns logits {logits} of images {images}, which are resized and normalised as
`preprocessing` in `config.json` says; `classifier.class_names` has the names of the classes.
"""
_IN_CODE = "The backbone is a part of visprompt."
_FROM_TIMM = (
    "The backbone is not in this repository: `load` takes the weights that timm names, or those of "
    "`weights=FILE`, and compares their hash."
)


def model_card(
    state: TunedState, results: Sequence[Result], *, licence: str | None, repository: str | None
) -> str:
    """Return the card as Markdown.

    Args:
        state: The tuned state.
        results: The result of its run, then those of runs that differ only in the seed.
        licence: The hub's word for the licence of the tuned state; None if it is not stated.
        repository: USER/NAME; None for a folder that is not pushed.

    Raises:
        UserError: The results differ in more than the seed.
    """
    score = _score(results)
    front = _front_matter(state, results[0], score, licence)
    head = yaml.safe_dump(front, sort_keys=False)
    method, backbone = _text(state.method["name"]), _text(state.backbone["name"])
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(state, results, score, licence))
    size, classes = state.preprocessing["size"], len(state.class_names)
    return _CARD.format(
        head=head,
        title=f"{_text(state.task)}: {method} on {backbone}",
        method=method,
        backbone=_IN_CODE if state.backbone["name"] == DEMO else _FROM_TIMM,
        rows=rows,
        place=f"hf-hub:{repository}" if repository else "PATH",
        images=f"[B, 3, {size}, {size}]",
        logits=f"[B, {classes}, {size}, {size}]" if KINDS[state.kind].dense else f"[B, {classes}]",
    )


def _text(value: object) -> str:
    return in_markdown(str(value))


def _front_matter(
    state: TunedState, result: Result, score: Mapping[str, Any] | None, licence: str | None
) -> dict[str, Any]:
    """Return the metadata that the hub indexes."""
    spec = TASKS.get(state.task)
    config = None if state.backbone["name"] == DEMO else timm.get_pretrained_cfg(state.backbone["name"])
    what = "image-segmentation" if KINDS[state.kind].dense else "image-classification"
    base = getattr(config, "hf_hub_id", None)
    head: dict[str, Any] = {
        "library_name": "visprompt",
        "pipeline_tag": what,
        "license": licence or "unknown",
        "tags": ["visprompt", "visual-prompt-tuning", str(state.method["name"])],
    }
    if base:
        head |= {"base_model": base, "base_model_relation": "adapter"}
    if spec and spec.mirror and result.data.get("source") == "hf":
        head["datasets"] = [spec.mirror.repo]
    if score:
        data = {"name": visible(state.task), "type": visible(state.task), "split": score["split"]}
        metric = {
            "type": KINDS[result.kind].words.replace(" ", "_").lower(),
            "value": round(score["value"], 6),
            "name": score["name"],
        }
        task = {"type": what}
        results = [{"task": task, "dataset": data, "metrics": [metric]}]
        head["model-index"] = [{"name": f"{visible(state.task)} {state.method['name']}", "results": results}]
    return head


def _score(results: Sequence[Result]) -> dict[str, Any] | None:
    """Return the score of all runs: value, split, name and text; None if the run was not scored."""
    first = results[0]
    seeds = ", ".join(str(result.seed) for result in results)
    what = KINDS[first.kind].words
    if len(results) > 1:
        scores = cell(results)
        name = f"test {what}, mean over seeds {seeds}"
        text = f"{scores} % test {what} (mean ± standard deviation over seeds {seeds}); this file is seed "
        return {"value": scores.mean, "split": "test", "name": name, "text": f"{text}{first.seed}"}
    if first.status == "diverged":
        raise UserError("this run diverged: there is nothing to share; run it again with a smaller recipe.lr")
    if first.status != "finished":
        return None
    split = "validation" if first.split == "tune" else "test"
    text = f"{100 * first.score:.1f} % {split} {what} (seed {seeds})"
    return {"value": first.score, "split": split, "name": f"{split} {what}, seed {seeds}", "text": text}


def _rows(
    state: TunedState, results: Sequence[Result], score: Mapping[str, Any] | None, licence: str | None
) -> list[tuple[str, str]]:
    """Return the table's rows."""
    result, spec = results[0], TASKS.get(state.task)
    options = {k: v for k, v in state.method.items() if k != "name" and not isinstance(v, list)}
    listed = ", ".join(f"{name}={shown(value)}" for name, value in options.items() if value is not None)
    config = None if state.backbone["name"] == DEMO else timm.get_pretrained_cfg(state.backbone["name"])
    of_backbone = getattr(config, "license", None) or (
        "see its card in visprompt" if state.backbone["name"] == DEMO else "see its page"
    )
    data = f"{_text(spec.source)}; terms: {_text(spec.licence)}" if spec else "the author's own images"
    how = state.preprocessing
    size, counts = f"{how['size']} x {how['size']}", result.tuned
    tuned, head = counts.get("parameters", 0), counts.get("head_parameters", 0)
    about = _text(spec.description if spec else state.task)
    return [
        ("score", score["text"] if score else "not scored"),
        ("task", f"{about} ({len(state.class_names)} classes)"),
        ("data", data),
        ("licence of this state", _text(licence or "not stated")),
        ("backbone", f"{_text(state.backbone['name'])}; licence of its weights: {_text(of_backbone)}"),
        ("sha256 of the backbone's weights", f"`{state.backbone['sha256']}`"),
        ("method", f"{_text(state.method['name'])} ({_text(listed) or 'no options'})"),
        ("tuned", f"{tuned:,} parameters, and {head:,} of the head"),
        ("resizing", _text(f"{how['resize']} to {size}, {how['interpolation']} ({how['resampling']})")),
        ("split", f"{result.split}: {_sizes(result)}"),
        ("versions", _text(", ".join(f"{name} {number}" for name, number in state.versions.items()))),
    ]


def _sizes(result: Result) -> str:
    sizes = result.data.get("sizes") or {}
    return _text(", ".join(f"{name} {count:,}" for name, count in sizes.items())) or "not recorded"
