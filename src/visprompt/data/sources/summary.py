"""The summary of own images that a run prints before training and records in its result."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visprompt.data.sources.own_images import OwnImages
from visprompt.data.splits import SPLITS
from visprompt.text import visible

_NAMED = 10  # classes whose names are printed


def summarise(
    images: OwnImages, root: Path, unreadable: Sequence[str] = (), notes: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Return the summary of some images, as plain JSON values.

    Args:
        images: The images.
        root: Their folder.
        unreadable: Keys of the images that could not be decoded and were left out.
        notes: `OwnImages.notes` after decoding.

    Returns:
        root, classes (their number), images (number by split), cut (whether every class was cut 80/10/10),
        smallest_class and smallest (its number of training images), left_out (number by kind),
        unread_columns, repeated (number by split of copies of training images), and the notes.
    """
    lost = set(unreadable)
    items = [item for item in images.items if item.key not in lost]
    counts = Counter(item.split for item in items)
    trained = Counter(dict.fromkeys(images.classes, 0))
    for item in items:
        trained.update(images.classes_of(item) if item.split == "train" else ())
    smallest_class, smallest = min(trained.items(), key=lambda pair: (pair[1], pair[0]))
    left_out = dict(images.left_out) | ({"files that cannot be read": len(lost)} if lost else {})
    return {
        "root": str(root.absolute()),
        "classes": len(images.classes),
        "images": {split: counts[split] for split in SPLITS if counts[split]},
        "cut": images.cut,
        "smallest_class": smallest_class,
        "smallest": smallest,
        "left_out": left_out,
        "unread_columns": list(images.unread),
        "repeated": images.repeated,
        **({"multi_label": True} if images.multi_label else {}),
        **(notes or {}),
    }


def sentences(task: str, class_names: Sequence[str], summary: Mapping[str, Any]) -> list[str]:
    """Return a summary as one or two lines of text, and one more for each warning.

    Args:
        task: Name of the task.
        class_names: Names of the classes; printed where they are few.
        summary: The result of `summarise`.
    """
    images = summary["images"]
    names = f" ({', '.join(class_names)})" if len(class_names) <= _NAMED else ""
    counts = ", ".join(f"{split} {count:,}" for split, count in images.items())
    cut = " (no splits were given: every class was cut 80/10/10)" if summary["cut"] else ""
    cut = cut.replace("every class was", "images were") if summary.get("multi_label") else cut
    smallest = f"smallest class: {summary['smallest_class']} with {summary['smallest']:,} training images"
    lines = [
        f"data: {task} in {summary['root']}: {summary['classes']:,} classes{names}; images: {counts}{cut}; "
        f"{smallest}"
    ]
    left = [f"{what} ({count:,})" for what, count in summary["left_out"].items()]
    left += (
        [f"columns {', '.join(summary['unread_columns'])} of the CSV"] if summary["unread_columns"] else []
    )
    if left:
        lines.append(f"left out: {', '.join(left)}")
    lines += [
        f"warning: {count:,} of {images[split]:,} {split} images have the same bytes as training images, so "
        "the score says little: remove them from one of the two"
        for split, count in summary["repeated"].items()
    ]
    if count := summary.get("faint"):
        top = summary["faint_top"]
        lines.append(
            f"warning: {count:,} grey images use less than a quarter of their 16 or 32 bits (up to {top:,}) "
            "and look "
            f"dark: give data.white_level={max(255, 2 ** top.bit_length() - 1)} if that is their white"
        )
    return [visible(line) for line in lines]
