"""The base of the VTAB-1k records: 800 training and 200 validation images, and the whole test set."""

from collections.abc import Mapping
from typing import Any

from visprompt.data.catalog.task import Cut, Golden, TaskSpec

TRAIN = Cut("train", 0, 800)


def size(cut: Cut, official: Mapping[str, int]) -> int:
    """Return the number of images in a cut, given the sizes of the official splits."""
    return len(range(official[cut.split])[cut.start : cut.stop])


def vtab(
    task: str,
    *,
    official: Mapping[str, int],
    num_classes: int,
    val: Cut | None = None,
    test: Cut | None = None,
    golden: Mapping[str, Golden] | None = None,
    family: str = "vtab",
    **facts: Any,
) -> TaskSpec:
    """Return the record of a VTAB-1k task; the sizes of its split sets follow from the cuts.

    Args:
        task: Its id, which is also its dataset unless `facts` say otherwise.
        official: Number of images of each official split.
        num_classes: Number of classes; all of them occur in the test set.
        val: The 200 validation images; None for the first of an official validation split.
        test: The test images; None for the whole official test split.
        golden: Known values of the split sets.
        family: "vtab", or "other" for a dataset outside the benchmark that is cut like it.
        facts: The other fields of `TaskSpec`.
    """
    cuts = {"train800": TRAIN, "val200": val or Cut("validation", 0, 200), "test": test or Cut("test")}
    return TaskSpec(
        **{"dataset": task, **facts},
        id=task,
        family=family,
        num_classes=num_classes,
        official_sizes=official,
        golden={**(golden or {}), "test": Golden(classes=num_classes)},
        cuts=cuts,
        split_sizes={name: size(cut, official) for name, cut in cuts.items()},
    )
