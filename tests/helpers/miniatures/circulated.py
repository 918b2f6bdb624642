"""Miniatures of what circulates of a task.

Its folder of vtab-1k, and a clone of its mirror on the Hugging Face hub.

The colour of an image tells its label.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from visprompt.data.catalog.task import TaskSpec


def _picture(spec: TaskSpec, label: int, draw: np.random.Generator) -> Image.Image:
    colour = np.random.default_rng(0).integers(40, 216, (spec.num_classes, 3))[label]
    side = spec.native or 40
    return Image.fromarray((colour + draw.integers(-12, 13, (side, side, 3))).astype(np.uint8))


def prepared(
    root: Path, spec: TaskSpec, counts: Mapping[str, int], draw: np.random.Generator
) -> dict[str, int]:
    """Writes `<root>/<task>` as in vtab-1k: lists and images, JPEG of quality 75.

    Args:
        root: The folder of all tasks.
        spec: The task; its id names the folder.
        counts: Number of images of train800, val200 and test; train800val200 is the first two again, in files
            of its own.
        draw: Source of the noise.

    Returns:
        The number of images of train800, val200 and test.
    """
    folder = root / spec.id
    written: dict[str, list[tuple[bytes, int]]] = {}
    for part in ("train800", "val200", "test"):
        labels = [row % spec.num_classes for row in range(counts[part])]
        written[part] = [(_jpeg(_picture(spec, label, draw)), label) for label in labels]
    both = written["train800"] + written["val200"]
    for part, images in {**written, "train800val200": both}.items():
        (folder / "images" / part).mkdir(parents=True, exist_ok=True)
        lines = []
        for row, (data, label) in enumerate(images):
            name = f"images/{part}/{row:06d}.jpg"
            (folder / name).write_bytes(data)
            lines.append(f"{name} {label}\n")
        (folder / f"{part}.txt").write_text("".join(lines), encoding="utf-8")
    return {part: len(images) for part, images in written.items()}


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "jpeg", quality=75)
    return file.getvalue()


def mirror(
    root: Path, spec: TaskSpec, counts: Mapping[str, int], draw: np.random.Generator, encoding: str = "png"
) -> dict[str, int]:
    """Writes a clone of the task's mirror: README.md and `data/<split>-00000-of-00001.parquet`.

    Args:
        root: The clone's folder.
        spec: The task; its mirror tells the columns. Labels of the other tasks in it are 0 or 1.
        counts: Number of images of each official split.
        draw: Source of the noise.
        encoding: Of the images, as Pillow names it.

    Returns:
        The number of images of each official split that the mirror has.

    Raises:
        ValueError: The task has no mirror.
    """
    if spec.mirror is None:
        raise ValueError(f"{spec.id} has no mirror")
    (root / "data").mkdir(parents=True, exist_ok=True)
    lines = ["---", "configs:", f"- config_name: {spec.mirror.config or 'default'}", "  data_files:"]
    for split, name in spec.mirror.splits.items():
        _write_split(root / f"data/{name}-00000-of-00001.parquet", spec, split, counts[split], draw, encoding)
        lines += [f"  - split: {name}", f"    path: data/{name}-*"]
    (root / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")
    return {split: counts[split] for split in spec.mirror.splits}


def _write_split(
    path: Path, spec: TaskSpec, split: str, count: int, draw: np.random.Generator, encoding: str
) -> None:
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    assert spec.mirror
    labels = [row % spec.num_classes for row in range(count)]
    columns: dict[str, list] = {spec.mirror.image: []}
    features: dict[str, object] = {spec.mirror.image: ImageFeature()}
    for label in labels:
        file = io.BytesIO()
        _picture(spec, label, draw).save(file, encoding)
        columns[spec.mirror.image].append({"bytes": file.getvalue(), "path": None})
    for task, name in spec.mirror.labels.items():
        columns[name] = labels if task == spec.id else [label % 2 for label in labels]
        named = task == spec.id and spec.class_names
        features[name] = ClassLabel(names=list(spec.class_names)) if named else Value("int64")
    if spec.mirror.key:
        columns[spec.mirror.key] = [f"{split}_{row:06d}" for row in range(count)]
        features[spec.mirror.key] = Value("string")
    Dataset.from_dict(columns, Features(features)).to_parquet(path)
