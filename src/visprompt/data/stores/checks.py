"""Checks of data against its record: counts, golden keys and labels, histograms, disjoint split sets."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from visprompt.data.catalog.task import Golden, TaskSpec


class Check(NamedTuple):
    """The outcome of one check.

    Attributes:
        name: What was checked.
        good: Whether it passed.
        detail: The value, and the expected one where they differ.
        fatal: Whether data that fails is refused; otherwise it is only reported.
    """

    name: str
    good: bool
    detail: str
    fatal: bool = True


def check(
    spec: TaskSpec, keys: Mapping[str, list[str]], labels: Mapping[str, np.ndarray], *, ordered: bool = True
) -> list[Check]:
    """Check split sets against the record of their task.

    Args:
        spec: The record.
        keys: Split set -> the key of every image; an image has the same key in all sets.
        labels: Split set -> int64 [n].
        ordered: Whether the images are in md5 order; otherwise the first keys and labels are not compared.

    Returns:
        All checks, passed or not.
    """
    if "train800" in keys and "val200" in keys:
        both = {"train800val200": np.concatenate([labels["train800"], labels["val200"]])}
    else:
        both = {}
    return [
        *check_keys(spec, keys, ordered=ordered),
        *_range(spec, labels),
        *(
            found
            for name, golden in spec.golden.items()
            if name in labels or name in both
            for found in _golden(name, golden, keys.get(name, []), {**both, **labels}[name], ordered)
        ),
    ]


def check_keys(spec: TaskSpec, keys: Mapping[str, list[str]], *, ordered: bool = True) -> list[Check]:
    """Check the number of images of each split set, and that no image is in two of them; see `check`."""
    disjoint = _disjoint(keys, "") if ordered else _disjoint(_names(keys), ", by name")
    return [*_sizes(spec, keys), *disjoint]


def check_pixels(spec: TaskSpec, pixels: Mapping[str, np.ndarray]) -> list[Check]:
    """Check that each split set has pixels of each class; where it has not, it is only reported.

    Args:
        spec: The record.
        pixels: Split set -> the number of pixels of each class.
    """
    missing = {name: [spec.class_names[row] for row in np.flatnonzero(pixels[name] == 0)] for name in pixels}
    return [
        Check(
            f"classes with pixels in {name}",
            not lost,
            f"{spec.num_classes - len(lost)}" + (f", without {', '.join(lost[:5])}" if lost else ""),
            fatal=False,
        )
        for name, lost in missing.items()
    ]


def _sizes(spec: TaskSpec, keys: Mapping[str, list[str]]) -> Iterator[Check]:
    for name, expected in spec.split_sizes.items():
        found = len(keys.get(name, ()))
        wrong = "" if found == expected else f", expected {expected:,}"
        yield Check(f"number of images in {name}", found == expected, f"{found:,}{wrong}")


def _range(spec: TaskSpec, labels: Mapping[str, np.ndarray]) -> Iterator[Check]:
    everything = np.concatenate(list(labels.values()))
    low, high = int(everything.min()), int(everything.max())
    yield Check(
        "range of labels",
        low >= 0 and high < spec.num_classes,
        f"{low}..{high} of {spec.num_classes} classes",
    )


def _disjoint(keys: Mapping[str, list[str]], how: str) -> Iterator[Check]:
    names = list(keys)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            both = set(keys[first]) & set(keys[second])
            detail = f"{len(both)} in both" + (f", {min(both)} for one" if both else "")
            yield Check(f"{first} and {second} disjoint{how}", not both, detail)
    repeated = sum(len(k) - len(set(k)) for k in keys.values())
    yield Check("no image twice in a set", repeated == 0, f"{repeated} repeated")


def _names(keys: Mapping[str, list[str]]) -> Mapping[str, list[str]]:
    """Return keys without their split: in the prepared folder it is the split set, not the official split."""
    return {name: [key.partition("/")[2] for key in listed] for name, listed in keys.items()}


def _golden(name: str, golden: Golden, keys: list[str], labels: np.ndarray, ordered: bool) -> Iterator[Check]:
    if golden.keys and ordered:
        found = tuple(key.partition("/")[2] for key in keys[: len(golden.keys)])
        yield _same(f"first keys of {name}", found, golden.keys)
    if golden.labels and ordered:
        yield _same(f"first labels of {name}", tuple(labels[: len(golden.labels)].tolist()), golden.labels)
    if golden.histogram:
        counts = tuple(np.bincount(labels[labels >= 0], minlength=len(golden.histogram)).tolist())
        yield _same(f"images per class in {name}", counts, golden.histogram)
    if golden.classes:
        # not fatal in test: the datasets' authors do not say that every class occurs there
        yield _same(f"classes in {name}", (len(np.unique(labels)),), (golden.classes,))._replace(
            fatal=name != "test"
        )


def _same(name: str, found: tuple[object, ...], expected: tuple[object, ...]) -> Check:
    listed, wanted = (" ".join(map(str, values)) for values in (found, expected))
    return Check(name, found == expected, listed if found == expected else f"{listed}, expected {wanted}")
