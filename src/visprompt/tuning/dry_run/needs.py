"""Find out which data and weights jobs lack, without downloading or preparing anything."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants

from visprompt.data.catalog import SUITES, TASKS
from visprompt.data.datamodule import TaskDataModule
from visprompt.data.own_datamodule import OwnDataModule
from visprompt.data.segmentation_datamodule import SegmentationDataModule
from visprompt.data.splits import SPLITS
from visprompt.data.stores.plan import Plan, find
from visprompt.errors import UserError
from visprompt.models.backbones import Backbone, BackboneSpec, build_backbone
from visprompt.models.windows import places
from visprompt.runs.job import Job
from visprompt.runs.paths import ROOT
from visprompt.runs.run import build_data, load_backbone


@dataclass(frozen=True)
class Facts:
    """A job's backbone and data, as far as they are available.

    Attributes:
        backbone: The backbone; with random weights if its weights are missing.
        datamodule: The data module; its data are not opened.
        sizes: Number of images of each split set.
        classes: Number of classes.
        ready: Whether data and weights are available. If not, the run's identity and folder are unknown.
    """

    backbone: Backbone
    datamodule: TaskDataModule
    sizes: dict[str, int]
    classes: int
    ready: bool

    @property
    def windows(self) -> int:
        """Return how often a classifier runs for one image in evaluation; photographs are taken to be 4:3."""
        if not isinstance(self.datamodule, SegmentationDataModule):
            return 1
        window, short = self.datamodule.image_size, self.datamodule.short_side
        sides = (max(window, side) for side in (short, short * 4 // 3))
        return math.prod(len(places(side, window)) for side in sides)


@contextmanager
def offline() -> Iterator[None]:
    """Let the Hugging Face hub's client use only files in its cache."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


class Needs:
    """Data and weights that are missing for the jobs passed to `facts`.

    Attributes:
        stores: Bytes of images to write, by the store's folder; photographs are assumed to be 4:3.
        originals: Bytes of original files to download, by their path.
        commands: Tasks that are not prepared, by the command that prepares them.
        weights: Bytes of missing weights, by a sentence that says how to get them.
    """

    def __init__(self) -> None:
        self.stores: dict[Path, int] = {}
        self.originals: dict[Path, int] = {}
        self.commands: dict[str, list[str]] = {}
        self.weights: dict[str, int] = {}
        self._facts: dict[str, Facts] = {}

    def facts(self, job: Job) -> Facts:
        """Return a job's backbone and data, and note what is missing; call this inside `offline`.

        Raises:
            UserError: A setting of the job or the user's own images are wrong.
        """
        key = json.dumps([dict(job.backbone), dict(job.data)])
        if key not in self._facts:
            self._facts[key] = self._look(job)
        return self._facts[key]

    def _look(self, job: Job) -> Facts:
        backbone, loaded = self._backbone(job)
        datamodule = build_data(job, backbone)
        plan: Plan | None = getattr(datamodule, "plan", None)
        if isinstance(datamodule, OwnDataModule):
            datamodule.check_sets()
            return Facts(backbone, datamodule, self._own_images(datamodule), datamodule.num_classes, loaded)
        if plan is None or find(plan) is not None:
            return Facts(backbone, datamodule, datamodule.sizes, datamodule.num_classes, loaded)
        self._unprepared(plan, job)
        return Facts(backbone, datamodule, dict(plan.spec.split_sizes), plan.spec.num_classes, False)

    def _backbone(self, job: Job) -> tuple[Backbone, bool]:
        """Return a job's backbone, and whether its weights are available; without them they are random."""
        options = dict(job.backbone)
        try:
            return load_backbone(json.dumps(options), 0 if job.backbone.pretrained else job.seed), True
        except UserError as error:
            backbone = _random(json.dumps(options | {"pretrained": False, "weights": None}))
            size = 4 * sum(p.numel() for p in backbone.module.parameters())
            self.weights[_how_to_get(str(error), options["name"])] = size
            return backbone, False

    def _own_images(self, datamodule: OwnDataModule) -> dict[str, int]:
        images = datamodule.images
        if not datamodule.store_folder.is_dir():
            self.stores[datamodule.store_folder] = datamodule.store_bytes
        splits = [item.split for item in images.items]
        return {split: splits.count(split) for split in SPLITS if split in splits}

    def _unprepared(self, plan: Plan, job: Job) -> None:
        spec = plan.spec
        self.stores[plan.folder] = plan.bytes
        files = spec.files if plan.source == "raw" else ()
        places = {plan.files_dir / file.name: file.size or file.roughly or 0 for file in files}
        self.originals |= {place: size for place, size in places.items() if not place.exists()}
        command = plan.command.replace(f"tasks={spec.id}", "tasks=TASKS")
        if Path(job.paths.data_dir) != ROOT / "data":
            command += f" paths.data_dir={job.paths.data_dir}"
        self.commands.setdefault(command, []).append(spec.id)

    def described(self) -> list[str]:
        """Return the lines that describe the user's own images, without duplicates."""
        return list(
            dict.fromkeys(line for facts in self._facts.values() for line in facts.datamodule.described)
        )

    def sentences(self) -> Iterator[str]:
        """Yield one sentence for each missing thing, which says how to get it."""
        for command, tasks in self.commands.items():
            suite = next((name for name, ids in SUITES.items() if set(ids) == set(tasks)), None)
            value = tasks[0] if len(tasks) == 1 else suite or f"'[{','.join(tasks)}]'"
            by_hand = [task for task in tasks if not _downloads(task) and "source=" not in command]
            note = f" ({', '.join(by_hand)}: by hand, verify=true says how)" if by_hand else ""
            yield f"missing: the data of {', '.join(tasks)}: {command.replace('TASKS', value)}{note}"
        for sentence in self.weights:
            yield f"missing: {sentence}"
        if self.commands or self.weights:
            yield "runs that lack data or weights are counted as not done"

    def disk(self) -> dict[str, int]:
        """Return the bytes to write: {"stored images": 120000000, "weights": 343000000}."""
        sizes = [sum(self.stores.values()), sum(self.originals.values()), sum(self.weights.values())]
        names = ("stored images", "original files", "weights")
        return {name: size for name, size in zip(names, sizes, strict=True) if size}


@lru_cache(maxsize=1)
def _random(spec: str) -> Backbone:
    return build_backbone(BackboneSpec(**json.loads(spec)))


def _downloads(task: str) -> bool:
    """Return whether all files of a task can be downloaded without the user's hands."""
    return all(file.urls for file in TASKS[task].files)


def _how_to_get(error: str, name: str) -> str:
    """Return a sentence on how to get missing weights.

    Args:
        error: The message of the error that loading them raised. While offline it says that the hub cannot be
            reached, which has not been tried.
        name: The backbone's name.
    """
    url = re.search(r"https?://\S+", error)
    if "the hub cannot be reached" not in error or url is None:
        return error
    return (
        f"the weights of backbone {name}: the first run fetches {url[0]}; where it cannot be reached, copy "
        "that file here and give backbone.weights=FILE"
    )
