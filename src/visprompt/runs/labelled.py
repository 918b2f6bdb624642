"""Score the labels that `predict.py` gives to images whose folders have the names of classes."""

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import torch
from torch import Tensor

from visprompt.data.splits import SPLITS
from visprompt.models.kind import SINGLE_LABEL
from visprompt.models.scores import in_percent
from visprompt.models.task_kind import TaskKind
from visprompt.runs.class_table import print_classes
from visprompt.text import Terminal


def labels_by_folder(paths: Sequence[str], class_names: Sequence[str]) -> dict[str, int]:
    """Return the labels of images in folders that have the name of a class.

    Args:
        paths: Paths of images below the folder that was given, such as "cat/new/1.jpg".
        class_names: Names of the classes.

    Returns:
        The place of the class in `class_names` by path, by the topmost folder that has a class's name, also
        below a folder of a split. Images without such a folder are left out.
    """
    places: Mapping[str, int] = {name: place for place, name in enumerate(class_names)}
    found: dict[str, int] = {}
    for path in paths:
        parts = [unicodedata.normalize("NFC", part) for part in PurePosixPath(path).parts[:-1]]
        known = [part for part in parts if part in places]
        if len(known) > 1 and parts[0] in SPLITS:  # a split, though a class has its name
            known = [part for part in parts[1:] if part in places]
        if known:
            found[path] = places[known[0]]
    return found


class LabelledImages:
    """The images of a task whose labels are known from their folders, and how they were predicted.

    Args:
        paths: Paths of all images below the folder that was given.
        class_names: Names of the classes.
        kind: The kind of the task.
    """

    def __init__(self, paths: Sequence[str], class_names: Sequence[str], kind: TaskKind) -> None:
        # folders give an image one class
        one_class = kind.name == SINGLE_LABEL.name
        self._labels = labels_by_folder(paths, class_names) if one_class else {}
        self._names, self._kind = class_names, kind
        # there is nothing to score with a single class
        self._figures = kind.figures(len(class_names)) if self._labels and len(class_names) > 1 else None
        self._seen = 0

    def __bool__(self) -> bool:
        """Whether the label of an image is known."""
        return bool(self._labels)

    def add(self, path: str, shares: Tensor) -> str:
        """Count the probabilities [C] of an image; return the name of its class, "" if it is not known."""
        self._seen += 1
        label = self._labels.get(path)
        if label is None or self._figures is None:
            return ""
        self._figures.update(shares[None], torch.tensor([label]), torch.ones(1))
        return self._names[label]

    def show(self, console: Terminal, task: str) -> None:
        """Print the table of classes and the score, if an image with a known label was predicted."""
        if self._figures is None or not self._figures.update_called:
            return
        figures = self._figures.compute()
        count = int(figures["count"])
        print_classes(console, self._kind, figures["confusion"], self._names)
        score, interval = figures[self._kind.score], self._kind.interval
        shown = in_percent(score, interval(score, count) if interval else None)
        others = self._seen - count
        left = f"; {others} others are in no folder with the name of a class" if others else ""
        console.print(
            f"{task}: {self._kind.score} {shown} on {count} images, labelled by their folders{left}",
            soft_wrap=True,
        )
