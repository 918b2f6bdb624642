"""The papers' own accuracies and mean IoU, read from published.yaml, which names their sources."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from visprompt.data.catalog import SUITES, TASKS
from visprompt.reports.settings import NEUTRAL, UNRECORDED, label, text
from visprompt.reports.writers import Entry, Missing, Number, decimal

if TYPE_CHECKING:
    from visprompt.reports.rows import Row

GROUPS = ("vtab_natural", "vtab_specialized", "vtab_structured")
FLAT = "vtab, mean of 19 tasks"
GROUPED = "vtab, mean of 3 groups"
_FILE = Path(__file__).with_name("published.yaml")
_THE_PAPERS: Mapping[str, tuple[str, ...]] = {  # a row that recorded other values is not compared with papers
    "data.fraction": ("1.0",),
    "backbone.pretrained": ("true",),
    "backbone.kwargs": ("{}",),
    "trainer": (NEUTRAL,),
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a paper reports for one method on one backbone. Accuracies are in per cent.

    Attributes:
        paper: Short name of the paper, for example "vpt".
        source: The paper and its venue.
        name: The method's name in the paper.
        method: The method's name in this project; None if this project does not have it.
        options: Options that a run must have to be the same method, if it recorded them; a list names
            alternatives.
        unlike: Options that make a run a different method.
        backbone: Name of this project's config of the backbone.
        weights: Name of the backbone's weights in timm; None if timm does not have them.
        global_pools: Values of a run's backbone.global_pool that pool as the paper does; None is the model's
            default.
        final_norm: Value of a run's backbone.final_norm that normalises features as the paper does.
        image_sizes: Values of a run's backbone.image_size; None is the model's own.
        head: Value of a run's recipe.head.
        tasks: Score by task, named as by `settings.label`, including tasks of `unreliable` groups; mean IoU
            is at a single scale; empty if the paper's are not known.
        means: Mean accuracy by group: "vtab_natural", "vtab_specialized", "vtab_structured", "fgvc".
        printed_mean: Mean of VTAB-1k's three group means; None if the paper does not print it.
        printed_flat_mean: Mean over VTAB-1k's 19 tasks; None if the paper does not print it.
        params: Parameters of a backbone and 24 tuned tasks, as a multiple of the backbone; None if unknown.
        unreliable: Groups whose accuracies by task do not agree with the paper's own group means.
        caution: What to know before comparing with it; "" if there is nothing.
    """

    paper: str
    source: str
    name: str
    method: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    unlike: Mapping[str, Any] = field(default_factory=dict)
    backbone: str
    weights: str | None
    global_pools: tuple[str | None, ...]
    final_norm: str = "trained"
    image_sizes: tuple[int | None, ...] = (None, 224)
    head: str = "linear"
    tasks: Mapping[str, float] = field(default_factory=dict)
    means: Mapping[str, float] = field(default_factory=dict)
    printed_mean: float | None = None
    printed_flat_mean: float | None = None
    params: float | None = None
    unreliable: tuple[str, ...] = ()
    caution: str = ""

    @property
    def flat_mean(self) -> float | None:
        """Return the mean over the 19 tasks of VTAB-1k; None if an accuracy is unknown or unreliable."""
        if self.printed_flat_mean is not None:
            return self.printed_flat_mean
        tasks = SUITES["vtab_all"]
        known = not self.unreliable and all(task in self.tasks for task in tasks)
        return fmean(self.tasks[task] for task in tasks) if known else None

    @property
    def mean_of_groups(self) -> float | None:
        """Return the mean of VTAB-1k's three group means; None if one is unknown."""
        if self.printed_mean is not None:
            return self.printed_mean
        return (
            fmean(self.means[group] for group in GROUPS)
            if all(group in self.means for group in GROUPS)
            else None
        )

    @property
    def all_means(self) -> dict[str, float]:
        """Return all known means in per cent: by group, and the overall means under `FLAT` and `GROUPED`."""
        overall = {FLAT: self.flat_mean, GROUPED: self.mean_of_groups}
        return dict(self.means) | {name: value for name, value in overall.items() if value is not None}

    @property
    def worked_out(self) -> tuple[str, ...]:
        """Return the names of means that the paper does not print, computed here from its other numbers."""
        printed = {FLAT: self.printed_flat_mean, GROUPED: self.printed_mean}
        return tuple(name for name, value in printed.items() if value is None and name in self.all_means)

    def fits(self, options: Mapping[str, Any]) -> bool:
        """Return whether a run's options are those of the paper, as far as the run recorded them."""
        same = all(options[name] in _listed(value) for name, value in self.options.items() if name in options)
        return same and not any(
            options[name] == value for name, value in self.unlike.items() if name in options
        )


def published(
    method: str, backbone: str, paper: str | None = None, options: Mapping[str, Any] | None = None
) -> Published | None:
    """Return a paper's accuracies.

    Args:
        method: This project's name of the method.
        backbone: Name of this project's config, "swin_b" for example, or of the weights in timm.
        paper: Short name of a paper; by default the first in published.yaml that has method and backbone,
            which is the method's own paper if that is among them.
        options: Options of the run that is compared; they must fit, see `Published.fits`.

    Returns:
        The accuracies, or None if no paper has them.
    """
    for found in all_published():
        known = found.method == method and backbone in (found.backbone, found.weights)
        if known and paper in (None, found.paper) and found.fits(options or {}):
            return found
    return None


def published_of(row: "Row", paper: str | None = None) -> Published | None:
    """Return a paper's accuracies for a row's method and backbone; None if the row is not comparable.

    That is so for a fraction of the data, another image size, pooling, final norm or head, a backbone with
    other options or random weights, trainer settings that change the numbers, and options of another method.
    """
    if any(row.told.get(key, UNRECORDED) not in (*values, UNRECORDED) for key, values in _THE_PAPERS.items()):
        return None
    first, *others = (
        published(row.method, row.backbone, paper, result.method) for result in row.runs["result"]
    )
    if first is None or any(other != first for other in others):
        return None
    known: dict[str, Sequence[Any]] = {
        "global_pool": first.global_pools,
        "final_norm": (first.final_norm,),
        "image_size": first.image_sizes,
    }
    same = all(
        row.told.get(f"backbone.{name}", UNRECORDED) in (*map(text, values), UNRECORDED)
        for name, values in known.items()
    )
    heads = {result.recipe.get("head", "linear") for result in row.runs["result"]}
    return first if same and heads == {first.head} else None


@cache
def all_published() -> tuple[Published, ...]:
    """Return the accuracies of all papers, in the order of published.yaml."""
    return tuple(_records(contents()))


@cache
def contents() -> dict[str, Any]:
    """Load all of published.yaml, including what `Published` leaves out: prompt lengths, rates, memory."""
    read: Any = OmegaConf.to_container(OmegaConf.load(_FILE))
    return dict(read)


def _records(read: Mapping[str, Any]) -> Iterator[Published]:
    for paper, backbones in read["figures"].items():
        about = read["papers"][paper]
        for backbone, methods in backbones.items():
            for name, figures in methods.items():
                ours = read["methods"].get(name, {"method": name})
                options = {**ours.get("options", {}), **figures.get("options", {})}
                pooling = read["pooling"][backbone]
                unreliable = tuple(figures.get("unreliable", ()))
                yield Published(
                    paper=paper,
                    source=f"{about['title']}, {about['venue']}" if "venue" in about else about["title"],
                    name=name,
                    **_on_backbone(
                        {**ours, "options": options}, read["blocks"].get(backbone), pooling["pool"]
                    ),
                    backbone=backbone,
                    weights=read["backbones"][backbone],
                    global_pools=tuple(pooling["global_pool"]),
                    final_norm=pooling.get("final_norm", "trained"),
                    image_sizes=tuple(pooling.get("image_size", (None, 224))),
                    head=figures.get("head", "linear"),
                    tasks=_by_task(read["order"], figures.get("tasks", {})),
                    means=figures.get("means", {}),
                    printed_mean=figures.get("mean_of_groups"),
                    printed_flat_mean=figures.get("mean_of_tasks"),
                    params=figures.get("params"),
                    unreliable=unreliable,
                    caution=_caution(about, unreliable, figures.get("caution")),
                )


def _by_task(order: Mapping[str, list[str]], groups: Mapping[str, list[float]]) -> dict[str, float]:
    pairs = (zip(order[group], values, strict=True) for group, values in groups.items())
    return {label(task, TASKS[task].kind): value for group in pairs for task, value in group}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _on_backbone(ours: Mapping[str, Any], blocks: int | None, pools: list[str | None]) -> dict[str, Any]:
    """Return a method with its null options replaced: depth by all blocks, pool by the paper's pooling."""
    options = dict(ours.get("options", {}))
    for name, meant in {"depth": [None, blocks], "pool": pools}.items():
        if name in options and options[name] is None:
            options[name] = meant
    return dict(ours) | {"options": options}


def _caution(about: Mapping[str, Any], unreliable: tuple[str, ...], own: str | None) -> str:
    """Return the reasons to be careful, as one text."""
    parts = ["quoted by another paper, not read in its own"] if about.get("secondary") else []
    if unreliable:
        parts.append(f"its accuracies by task do not agree with its own means of {', '.join(unreliable)}")
    if own:
        parts.append(own)
    if "note" in about:
        parts.append(about["note"])
    return "; ".join(parts)


# lines next to a row of a table


def beside(
    row: "Row",
    found: Published,
    ours: Sequence[float | None],
    theirs: Sequence[float | None],
    digits: int = 1,
) -> Iterator[tuple[Entry, ...]]:
    """Yield two lines to show below a row: the paper's accuracies in per cent, and the row's minus them."""
    yield (f"{row.label}: {found.source}", *(Missing("") if one is None else _exact(one) for one in theirs))
    pairs = zip(ours, theirs, strict=True)
    differences = [None if one is None or other is None else 100 * one - other for one, other in pairs]
    yield (
        f"{row.label}: difference",
        *(Missing("") if d is None else decimal(d, digits, sign=True) for d in differences),
    )


def _exact(figure: float) -> Number:
    """Return a published number with one or two decimals, as the paper prints it."""
    return decimal(figure, 1 if round(figure, 1) == figure else 2)


def worked_out_notes(compared: Mapping[tuple[str, str], Published], names: Sequence[str]) -> tuple[str, ...]:
    """Return notes that name the means that are shown but that a paper does not print."""
    by_source: dict[str, dict[str, None]] = {}
    for (source, _), found in compared.items():
        by_source.setdefault(source, {}).update(
            dict.fromkeys(name for name in found.worked_out if name in names)
        )
    said = "not printed there but worked out from its other figures"
    return tuple(f"{source}: {'; '.join(own)}: {said}." for source, own in by_source.items() if own)


def cautions(compared: Mapping[tuple[str, str], Published]) -> tuple[str, ...]:
    """Return notes on what to know before comparing with a paper."""
    return tuple(
        f"{source}, {name}: {one.caution}." for (source, name), one in compared.items() if one.caution
    )
