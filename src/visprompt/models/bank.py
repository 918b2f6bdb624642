"""Many tuned states on one backbone: one pass for a batch of images of several tasks."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from os import PathLike
from pathlib import Path
from threading import Lock, RLock

import torch
from torch import Tensor, nn

from visprompt.data.inputs import Picture, as_input
from visprompt.errors import UserError, unknown
from visprompt.models.api import copied, settings_of, untuned
from visprompt.models.attention import Weights, last_attention, task_attention
from visprompt.models.backbones import Backbone, BackboneSpec, build_backbone
from visprompt.models.backbones.block import run_block
from visprompt.models.backbones.family import Family
from visprompt.models.backbones.token_family import TokenFamily
from visprompt.models.mixed import features_of
from visprompt.models.prepared import Prepared, Task, backbone_only, prepare
from visprompt.models.sharing import Batch, Span, make_per_task, own_tuned_tensors, shared_copy
from visprompt.models.tuned_state import TunedState, check_fits, load_state, read_checksum


@dataclass(frozen=True)
class _Source:
    """Where an evicted task returns from, with the file's checksum, and whether it may be evicted."""

    file: Path | None
    checksum: str | None
    pinned: bool


class Bank:
    """One backbone with any number of tuned states; a batch may mix their images.

    Segmentation tasks share the backbone's weights and no pass: each is computed alone, in the same call.

    Tasks can be added, replaced and removed in any thread while others compute. A batch computes with the
    tasks that it began with; batches run one after the other.

    Args:
        backbone: The name of a backbone, a timm model (which is copied), or a built `Backbone`, whose module
            becomes the bank's own.
        weights: A file of the weights of a backbone that is given by name.
        budget: Bytes that the tasks may take; None for no limit. A task that would exceed it evicts those
            that were not used for the longest time. What is evicted returns from its file with the next
            request. Batches that run may hold more.
        device: Device of the backbone and the tasks.
        dtype: Type of all weights, such as torch.bfloat16; None leaves them as they are.
        compile: Whether the blocks are compiled by `torch.compile`. The first batches compile; a new task of
            prompts does not, nor another mixture. Batches with tasks whose method wraps layers or adds
            branches are not compiled.

    Raises:
        UserError: The backbone cannot be built.
    """

    def __init__(
        self,
        backbone: str | nn.Module | Backbone,
        *,
        weights: str | None = None,
        budget: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        self._by_name = not isinstance(backbone, nn.Module)
        if isinstance(backbone, str):
            backbone = build_backbone(BackboneSpec(name=backbone, weights=weights))
        self._backbone = copied(backbone) if isinstance(backbone, nn.Module) else backbone
        self.budget = budget
        self._module = self._backbone.module.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self._compiled = compile and isinstance(self._module, TokenFamily)
        if self._compiled:
            self._module = shared_copy(self._module)  # the classifiers of tasks are made of copies too
            self._module.plain_step = torch.compile(run_block, dynamic=True)  # type: ignore[assignment]  # a function
        self._batch = Batch()
        # a copy with the same tensors whose layers work task by task; built when a task has wrapped layers
        self._per_task: Family | None = None
        self._loaded: OrderedDict[str, Task] = OrderedDict()  # the least recently used first
        self._sources: dict[str, _Source] = {}
        self._lock = RLock()  # of the two tables above
        self._loading = Lock()  # one state is loaded at a time
        self._running = Lock()  # one batch computes at a time

    @property
    def module(self) -> Family:
        """The backbone's module."""
        return self._module

    @property
    def backbone_name(self) -> str:
        """The backbone's name, of timm or of this project."""
        return self._backbone.spec.name

    @property
    def names(self) -> list[str]:
        """Names of all tasks, also of those that are evicted at present, in the order in which they came."""
        with self._lock:
            return list(self._sources)

    @property
    def loaded(self) -> list[str]:
        """Names of the tasks that are in memory, the least recently used first."""
        with self._lock:
            return list(self._loaded)

    @property
    def nbytes(self) -> int:
        """Memory of all tasks that are loaded, without the backbone."""
        with self._lock:
            return sum(task.nbytes for task in self._loaded.values())

    def add(self, name: str, state: str | PathLike[str] | TunedState, *, pinned: bool = False) -> Task:
        """Add a task, or replace the one of this name; batches that run go on with the old one.

        Args:
            name: The task's name in the bank.
            state: The tuned state, or its file, or the folder of a finished run. A state that is given as an
                object has no file to return from, so it is never evicted.
            pinned: Whether the task is never evicted; replacing a task decides it anew.

        Returns:
            The task.

        Raises:
            UserError: The state cannot be read, was tuned on another backbone, or does not fit in the budget.
        """
        if isinstance(state, TunedState):
            source = _Source(None, None, pinned=True)
        else:
            path = Path(state).resolve()
            file = path / "tuned.safetensors" if path.is_dir() else path
            source = _Source(file, None, pinned)
        with self._loading:
            if source.file is not None:
                state = load_state(source.file)
                source = replace(source, checksum=read_checksum(source.file, hashed=False))
            assert isinstance(state, TunedState)
            task = self._load(name, state, source.file)
            self._keep(task, source)
        return task

    def remove(self, name: str) -> None:
        """Remove a task; batches that run go on with it.

        Raises:
            UserError: There is no such task.
        """
        with self._lock:
            if name not in self._sources:
                raise unknown("task", name, self._sources)
            del self._sources[name]
            self._loaded.pop(name, None)

    def task(self, name: str) -> Task:
        """Return a task, loaded from its file if it was evicted; it counts as used.

        Raises:
            UserError: There is no such task, or its file cannot be read any more or has changed, or the task
                does not fit in the budget beside what is pinned.
        """
        if (task := self.in_memory(name)) is not None:
            return task
        with self._loading:
            if (task := self.in_memory(name)) is not None:  # another thread has loaded it
                return task
            with self._lock:
                source = self._sources.get(name)
            if source is None or source.file is None:
                raise unknown("task", name, self.names)
            state = load_state(source.file)
            if read_checksum(source.file, hashed=False) != source.checksum:
                raise UserError(f"{source.file} has changed since task {name!r} was added: add it again")
            task = self._load(name, state, source.file)
            with self._lock:
                if (
                    self._sources.get(name) is source
                ):  # else it was removed meanwhile: this request has it still
                    self._keep(task, source)
        return task

    def __call__(
        self, images: Tensor | Sequence[Picture], tasks: str | Task | Sequence[str | Task | None]
    ) -> list[Tensor]:
        """Return the logits of each image by its task.

        Args:
            images: Normalised images [B, 3, H, W], or a sequence of images. Each is a normalised tensor
                [3, H, W]; or the path or the content of an image file, decoded and prepared as its task says;
                or a decoded picture, of Pillow or uint8 [h, w, 3], that is only prepared (Pillow's is rotated
                by its EXIF orientation). Images of another size are computed in a pass of their own.
            tasks: Name of each image's task, or one name for all. None gives the backbone's features. A
                `Task` in place of a name is computed as it is, also after it was replaced or removed, so
                that a caller can pair the logits with its class names.

        Returns:
            For each image its logits [C], of a segmentation task [C, H, W], or features [width].

        Raises:
            UserError: There is no such task, an image does not fit, or there are more tasks than images or
                fewer.
        """
        names = [tasks] * len(images) if isinstance(tasks, str | Task) else list(tasks)
        if len(names) != len(images):
            raise UserError(f"{len(names)} tasks for {len(images)} images: give each image its task")
        found = {name: self.task(name) if isinstance(name, str) else name for name in dict.fromkeys(names)}
        like = next(self._module.parameters())
        inputs = []
        for image, name in zip(images, names, strict=True):
            task = found[name]
            made = as_input(image, None if task is None else task.preprocessing)
            inputs.append(made.to(like.device, like.dtype))
        out: list[Tensor | None] = [None] * len(inputs)
        # equal sizes together, then equal tasks; tasks of one method stand side by side
        keys = [(tuple(x.shape), *_rank(found[name])) for x, name in zip(inputs, names, strict=True)]
        order = sorted(range(len(inputs)), key=keys.__getitem__)
        with torch.inference_mode(), self._running:
            for _, group in groupby(order, lambda i: keys[i][0]):
                rows = list(group)
                batch = torch.stack([inputs[i] for i in rows])
                for i, logits in zip(rows, self._logits(batch, [found[names[i]] for i in rows]), strict=True):
                    out[i] = logits
        return [logits for logits in out if logits is not None]

    @torch.inference_mode()
    def attention(self, image: Tensor, task: Task) -> Weights:
        """Return the attention of a task's pooled tokens in the last block; see `models/attention.py`.

        Args:
            image: A normalised image [3, H, W].
            task: Its task.

        Raises:
            UserError: The backbone is neither a plain ViT nor an EVA, or its attention is not the fused one.
        """
        like, alone = next(self._module.parameters()), task.prepared.alone
        images = image[None].to(like.device, like.dtype)
        with self._running:
            if alone is not None:
                return last_attention(alone, images)
            mixed = self._mixed([((0, 1), task.prepared)])
            backbone = self._backbone.module if mixed is self._module else mixed  # the one not compiled
            try:
                return task_attention(backbone, images, task.prepared, self._batch)
            finally:
                self._batch.layers = ()  # as in `_logits`

    def in_memory(self, name: str) -> Task | None:
        """Return a task that is in memory, as the most recently used; None if it was evicted.

        Raises:
            UserError: There is no such task.
        """
        with self._lock:
            if name not in self._sources:
                raise unknown("task", name, self._sources)
            if name in self._loaded:
                self._loaded.move_to_end(name)
            return self._loaded.get(name)

    def _load(self, name: str, state: TunedState, file: Path | None) -> Task:
        """Prepare a tuned state on the shared weights; refuse one of another backbone."""
        given = self._backbone
        if not self._by_name:
            given = replace(given, spec=settings_of(given.spec, state))
        check_fits(state, file or Path(name), backbone=given.record())
        classifier = untuned(state, shared_copy(self._module))
        own_tuned_tensors(classifier)
        self._module.requires_grad_(False)  # the classifier has marked what it would tune
        classifier.load_tuned_state(state.tensors)
        like = next(self._module.parameters())
        for module in (classifier.method, classifier.head):
            module.to(like.device, like.dtype)
        prepared = prepare(classifier.eval(), self._module)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in prepared.tensors()}
        about = state.class_names, state.preprocessing, state.method, classifier.kind
        return Task(name, *about, sum(storages.values()), prepared, classifier.temperature)

    def _keep(self, task: Task, source: _Source) -> None:
        """Put a task into the tables, and evict others until the budget holds."""
        with self._lock:
            others = [name for name in self._loaded if name != task.name]
            evictable = [name for name in others if not self._sources[name].pinned]
            over = sum(self._loaded[name].nbytes for name in others) + task.nbytes - (self.budget or 0)
            evicted = []
            while self.budget is not None and over > 0:
                if not evictable:
                    raise UserError(
                        f"task {task.name!r} takes {task.nbytes:,} bytes, and the budget of {self.budget:,} "
                        "has no room beside what is pinned: give a larger budget, or remove tasks"
                    )
                evicted.append(evictable.pop(0))
                over -= self._loaded[evicted[-1]].nbytes
            for name in evicted:
                del self._loaded[name]
            self._loaded[task.name] = task
            self._loaded.move_to_end(task.name)
            self._sources[task.name] = source

    def _logits(self, images: Tensor, tasks: Sequence[Task | None]) -> list[Tensor]:
        """Return the logits of images of one size, sorted by task."""
        parts: list[tuple[Span, Prepared]] = []
        for task, group in groupby(tasks):
            start = parts[-1][0][1] if parts else 0
            prepared = backbone_only(self._module) if task is None else task.prepared
            parts.append(((start, start + len(list(group))), prepared))
        shared = [part for part in parts if part[1].alone is None]
        out: list[Tensor] = []
        if shared:
            own = images[: shared[-1][0][1]]
            backbone = self._mixed(shared)
            pad_always = self._compiled and backbone is self._module
            try:
                features = features_of(backbone, own, shared, self._batch, pad_always)
            finally:
                self._batch.layers = ()  # or it would keep layers of tasks that are removed
            for (start, stop), prepared in shared:
                assert prepared.head is not None
                out += prepared.head(features[start:stop])
        for (start, stop), prepared in parts[len(shared) :]:
            assert prepared.alone is not None
            out += prepared.alone(images[start:stop])
        return out

    def _mixed(self, parts: Sequence[tuple[Span, Prepared]]) -> Family:
        """Return the backbone, or its copy whose layers work task by task if a task has wrapped layers."""
        paths = {path for _, prepared in parts for path in prepared.layers or ()}
        if not paths:
            return self._module
        if self._per_task is None:
            self._per_task = shared_copy(self._module)
            self._per_task.__dict__.pop("plain_step", None)  # each layer would be compiled by itself
        make_per_task(self._per_task, sorted(paths), self._batch)
        return self._per_task


def _rank(task: Task | None) -> tuple[bool, str, str]:
    """Return the place of a task in a batch: those that share a pass first, equal methods side by side."""
    return (False, "", "") if task is None else (not task.shares, str(task.method["name"]), task.name)
