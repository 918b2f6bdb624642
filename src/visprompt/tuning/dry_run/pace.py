"""Estimate how long a run would take on this machine from a few training steps on random images."""

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visprompt.models.backbones import Backbone
from visprompt.models.classifier import Classifier
from visprompt.models.frozen_weights import MIXED, TRUE, cast_for
from visprompt.models.kind import MULTI_LABEL, SINGLE_LABEL
from visprompt.models.optim import build_optimizer
from visprompt.runs.job import Job
from visprompt.runs.matmul import matmul_precision
from visprompt.runs.run import build_classifier

PATIENCE = 5.0  # seconds; the time of a step that would take longer is estimated from a step on a few images
_FEW = 4  # images
_TIMED = 3  # timed calls, of which the median is taken
_BFLOAT16 = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}


@dataclass(frozen=True)
class Pace:
    """The measured times of a run on one device.

    Attributes:
        device: The device on which they were measured; "" if they could not be measured.
        why: Why they could not be measured; otherwise "".
        step: Seconds of an optimiser step on one device's share of the batch.
        image: Seconds to score one image.
        kept: Seconds to score one image from the cached output of the frozen layers; equal to `image` if
            that output is not cached.
        frozen: Seconds that one image takes in the frozen layers; 0 if their output is not cached.
        whole: Whether the step was measured on a device's whole share, not estimated from a few images.
        faster: Which precision would be faster on this device; "" if none is known.
    """

    device: str = ""
    why: str = ""
    step: float = 0.0
    image: float = 0.0
    kept: float = 0.0
    frozen: float = 0.0
    whole: bool = True
    faster: str = ""


def measure_pace(
    job: Job,
    backbone: Backbone,
    classes: int,
    devices: int,
    augments: bool,
    kind: str = SINGLE_LABEL.name,
) -> Pace:
    """Measure the times of a job without reading or writing data, and without compiling anything.

    Args:
        job: A composed job.
        backbone: The job's backbone; random weights take the same time.
        classes: Number of classes.
        devices: Number of devices that share a batch.
        augments: Whether training images differ between epochs, so that no output of layers can be cached.
        kind: The kind of the task.

    Returns:
        The times, or why they could not be measured.

    Raises:
        UserError: A setting of the job is wrong, or its method does not fit its backbone.
    """
    dtype = (MIXED | TRUE).get(job.precision, torch.float32)
    classifier = build_classifier(job, backbone, classes, kind)
    device = _device(str(job.trainer.accelerator))
    if device is None:
        return Pace(why=f"trainer.accelerator={job.trainer.accelerator} has no device on this machine")
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"the CPU (threads: {torch.get_num_threads()})"
    )
    mixed = job.precision.endswith("mixed")
    context = torch.autocast(device.type, dtype) if mixed else contextlib.nullcontext()
    try:
        with context, matmul_precision(job):
            classifier.to(device, torch.float32 if mixed else dtype)
            cast_for(classifier, job.precision)
            bench = Bench(job, classifier, augments)
            faster = _faster_precision(job.precision, device)
            return Pace(device=name, faster=faster, **bench.figures(-(-job.recipe.batch_size // devices)))
    except torch.OutOfMemoryError:
        batch = f"recipe.batch_size={job.recipe.batch_size} on {devices} device(s)"
        return Pace(
            why=f"{batch} does not fit into the memory of {name}: raise trainer.accumulate_grad_batches"
        )


def _faster_precision(precision: str, device: torch.device) -> str:
    """Return that a CPU is faster in bfloat16, if it multiplies bfloat16 matrices by itself; else ""."""
    if precision != "32-true" or device.type != "cpu":
        return ""
    capabilities = torch.cpu.get_capabilities()
    names = [words for name, words in _BFLOAT16.items() if capabilities.get(name)]
    faster = "precision=bf16-mixed, another run, is usually faster on this CPU"
    return f"{faster}, which has {names[0]}" if names else ""


def in_time(seconds: float) -> str:
    """Return a time in words: "45 s", "12 min", "3 h" or "5 days"."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{hours} h" if hours < 100 else f"{hours / 24:.0f} days"


def state_bytes(classifier: Classifier) -> int:
    """Return the number of bytes of the tensors of a classifier's tuned state."""
    return sum(tensor.nbytes for tensor in classifier.tuned_state().values())


def _device(accelerator: str) -> torch.device | None:
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda") if torch.cuda.is_available() else None


class Bench:
    """A classifier with its optimiser, to be timed on random images."""

    def __init__(self, job: Job, classifier: Classifier, augments: bool) -> None:
        self.classifier = classifier
        self.side = int(classifier.backbone.image_size)  # type: ignore[arg-type]  # nn.Module hides the int
        self.like = next(classifier.tuned_parameters())[1]  # frozen ones may be in autocast's type
        self.accumulate = int(job.trainer.accumulate_grad_batches)
        self.keeps = classifier.has_frozen_part and not augments
        recipe, undecayed = job.recipe, classifier.method.undecayed
        self.optimizer, _ = build_optimizer(classifier.tuned_parameters(), recipe, 1, undecayed)

    def step(self, count: int) -> Callable[[], None]:
        """Return a function that makes an optimiser step on random images, or on cached features of them."""
        self.classifier.eval()
        inputs = self._kept(self._images(count))
        pixels = (self.side, self.side) if self.classifier.kind.dense else ()
        classes = (self.classifier.num_classes,) if self.classifier.kind is MULTI_LABEL else ()
        labels = torch.zeros(count, *pixels, *classes, dtype=torch.long, device=self.like.device)
        weights = torch.ones(count, device=self.like.device)
        self.classifier.train()

        def step() -> None:
            logits = self.classifier(inputs)
            self.classifier.losses(logits, labels, weights).mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return step

    def figures(self, share: int) -> dict[str, Any]:
        """Measure the times of `Pace` for a device's share of a batch."""
        micro = -(-share // self.accumulate)
        few = min(1 if self.classifier.kind.dense else _FEW, micro)  # gigabytes for each image of 512 pixels
        part = self._seconds(self.step(few))
        whole = part * micro / few <= PATIENCE
        step = self._seconds(self.step(micro)) if whole else part * micro / few
        count = micro if whole else few
        images = self._images(count)
        self.classifier.eval()
        with torch.no_grad():
            image = self._seconds(lambda: self.classifier(images)) / count
            if not self.keeps:
                return {"step": self.accumulate * step, "whole": whole, "image": image, "kept": image}
            inputs = self._kept(images)
            kept = self._seconds(lambda: self.classifier(inputs)) / count
        frozen = max(0.0, image - kept)  # an image's total time without the layers after the frozen ones
        return {
            "step": self.accumulate * step,
            "whole": whole,
            "image": image,
            "kept": kept,
            "frozen": frozen,
        }

    def _images(self, count: int) -> Tensor:
        return torch.randn(count, 3, self.side, self.side, device=self.like.device, dtype=self.like.dtype)

    @torch.no_grad()
    def _kept(self, images: Tensor) -> Tensor:
        return self.classifier.frozen(images) if self.keeps else images

    def _seconds(self, work: Callable[[], object]) -> float:
        """Return the median time of a few calls after a warm-up; of fewer calls if they take long."""
        times: list[float] = []
        while len(times) < 2 or (len(times) <= _TIMED and sum(times) < PATIENCE / 2):
            self._wait()
            started = time.perf_counter()
            work()
            self._wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    def _wait(self) -> None:
        if self.like.device.type == "cuda":
            torch.cuda.synchronize()
