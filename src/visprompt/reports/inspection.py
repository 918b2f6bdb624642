"""What a report needs the model for: pictures, features, attention and latency of a finished run.

Everything is computed as scoring does it, with the run's data, precision and batches. No parameter is
changed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.plugins import Precision
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor

from visprompt.data.datamodule import TaskDataModule
from visprompt.data.datasets import TicketDataset
from visprompt.errors import UserError
from visprompt.models.attention import last_attention
from visprompt.models.backbones import Backbone
from visprompt.models.classifier import Classifier
from visprompt.models.methods import Method
from visprompt.models.tuned_state import load_state
from visprompt.runs import run
from visprompt.runs.evaluate import check_prepared, restore_on
from visprompt.runs.job import Job
from visprompt.runs.matmul import matmul_precision
from visprompt.runs.predict import find_device
from visprompt.runs.recorded import job_of
from visprompt.runs.result import Result, open_result
from visprompt.runs.run_lock import tidy
from visprompt.runs.trainer import build_trainer

_LEAST_REPEATS = 3


@dataclass(frozen=True, eq=False)
class Opened:
    """A finished run, restored with its data.

    Attributes:
        folder: The run's folder.
        result: The run's record.
        classifier: The tuned classifier, in evaluation mode, on `device`.
        backbone: The backbone before tuning. All runs of this process share it: copy its module before you
            move it.
        datamodule: The run's data.
        device: The device of the classifier.
        precision: Lightning's precision plugin for the run.
        job: The run's job, on this machine.
    """

    folder: Path
    result: Result
    classifier: Classifier
    backbone: Backbone
    datamodule: TaskDataModule
    device: torch.device
    precision: Precision
    job: Job

    @property
    def set_name(self) -> str:
        """Return the split set that the run was scored on: test, or under `split=tune` the validation set."""
        return "test" if self.result.split == "final" else self.datamodule.val_set

    @property
    def dataset(self) -> TicketDataset:
        """Return the images that the run was scored on."""
        return self.datamodule.test_dataset if self.result.split == "final" else self.datamodule.val_dataset

    def batches(self, dataset: TicketDataset) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images [B, 3, H, W] on the device and labels [B], in the batches of one rank."""
        like = next(self.classifier.parameters())
        for batch in self.datamodule.feature_dataloader(dataset):
            moved = self.datamodule.on_after_batch_transfer(
                batch._replace(images=batch.images.to(self.device)), 0
            )
            yield moved.images.to(like.dtype), batch.labels

    def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the run's precision and without gradients."""
        with torch.no_grad(), self.precision.forward_context(), matmul_precision(self.job):
            return function(*arguments)


def open_run(
    folder: Path, device: str = "cpu", *, data_dir: str | None = None, weights: str | None = None
) -> Opened:
    """Restore a finished run with its data.

    Args:
        folder: The run's folder, logs/<task>/<method>/<hash>.
        device: "auto", "cpu", "cuda" or another device of PyTorch.
        data_dir: This machine's folder of data; by default that of configs/paths and configs/local.
        weights: A file of backbone weights, if the path that the run recorded is not on this machine.

    Raises:
        UserError: The folder holds no finished run, or its data or backbone are missing or have changed.
    """
    tidy(folder)
    result, state = open_result(folder), load_state(folder)
    job, where = job_of(folder, state, result, data_dir=data_dir, weights=weights), find_device(device)
    accelerator, devices = ("gpu", [where.index or 0]) if where.type == "cuda" else (where.type, 1)
    here = {"accelerator": accelerator, "devices": devices, "enable_progress_bar": False}
    job = job.vary({"data.num_workers": 0, **{f"trainer.{name}": value for name, value in here.items()}})
    prepared = run.prepare(job)
    check_prepared(prepared, state, result, folder, folder / "config.yaml")
    precision = build_trainer(job).precision_plugin
    classifier = restore_on(prepared, state, folder)
    precision.convert_module(classifier.to(where))
    opened = folder, result, classifier, prepared.backbone, prepared.datamodule, where, precision
    return Opened(*opened, job)


@dataclass(frozen=True, eq=False)
class Features:
    """The features of the same images after and before tuning.

    Attributes:
        after: float32 [N, width], of the tuned classifier; its head reads these.
        before: float32 [N, width], of the backbone before tuning, without method or prompts.
        labels: int64 [N].
        rows: int64 [N], positions in `Opened.dataset`.
    """

    after: np.ndarray
    before: np.ndarray
    labels: np.ndarray
    rows: np.ndarray


def features(opened: Opened, limit: int = 1000, seed: int = 0) -> Features:
    """Compute features before and after tuning, of images that the run was scored on.

    Args:
        opened: The run.
        limit: Maximum number of images (N).
        seed: Seed of the choice of images, if there are more.
    """
    dataset = opened.dataset
    rows = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:limit])
    backbone = opened.precision.convert_module(deepcopy(opened.backbone.module).to(opened.device))
    nobody = Method(opened.backbone.module)
    after, before, labels = [], [], []
    for images, of_batch in opened.batches(dataset.subset(rows)):
        after.append(opened.compute(opened.classifier.features, images).float().cpu())
        before.append(opened.compute(backbone, images, nobody).float().cpu())
        labels.append(of_batch)
    return Features(torch.cat(after).numpy(), torch.cat(before).numpy(), torch.cat(labels).numpy(), rows)


def embed(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """Place images in the plane by t-SNE; the same features and seed give the same places.

    Args:
        features: float32 [N, width].
        seed: Seed of the initialisation, which computes principal components with random numbers.

    Returns:
        float32 [N, 2].

    Raises:
        UserError: There are fewer than four images.
    """
    if len(features) < 4:
        raise UserError(f"t-SNE needs at least 4 images, and there are {len(features)}: take a larger set")
    if not np.ptp(features, axis=0).any():
        return np.zeros((len(features), 2), np.float32)  # t-SNE cannot scale the components of equal rows
    perplexity = min(30.0, (len(features) - 1) / 3)
    with threadpool_limits(1):  # the order of sums over several threads varies
        placed = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(features)
    return np.asarray(placed, np.float32)


def pictures(opened: Opened, rows: Sequence[int]) -> np.ndarray:
    """Return images as the backbone sees them, float32 [N, H, W, 3], RGB in 0..1.

    Args:
        opened: The run.
        rows: Positions in `opened.dataset`.
    """
    batches = opened.batches(opened.dataset.subset(np.asarray(rows)))
    return torch.cat([_shown(opened, images) for images, _ in batches]).numpy()


def _shown(opened: Opened, images: Tensor) -> Tensor:
    """Return normalised images [B, 3, H, W] as pictures [B, H, W, 3] in 0..1."""
    data = opened.datamodule
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    return (images.float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1)


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention of the pooled tokens in the last block; the weights of an image and a head sum to 1.

    Attributes:
        asking: The query in words: the class token, or the pooled tokens whose weights were averaged.
        block: Index of the block.
        images: float32 [N, H, W, 3], RGB in 0..1, as the backbone saw them.
        labels: int64 [N], or [N, C] of 0 and 1.
        predicted: The predicted labels, in the same form.
        prefix: To class and register tokens, float32 [N, heads, prefix].
        patches: To patches, float32 [N, heads, h, w] of their grid.
        prompts: To prompt tokens of the sequence, float32 [N, heads, p]; p is 0 if the block has no prompts.
        keys_values: To rows that the method added to the keys and values, float32 [N, heads, t]; t is 0 if it
            added no rows.
    """

    asking: str
    block: int
    images: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    prefix: np.ndarray
    patches: np.ndarray
    prompts: np.ndarray
    keys_values: np.ndarray


def attention(opened: Opened, rows: Sequence[int]) -> Attention:
    """Compute the attention in the last block for some images, one at a time.

    Args:
        opened: A run on a plain ViT or an EVA.
        rows: Positions in `opened.dataset`.

    Raises:
        UserError: There is no such image, or see `last_attention`.
    """
    dataset = opened.dataset
    wrong = next((row for row in rows if not 0 <= row < len(dataset)), None)
    if wrong is not None or not len(rows):
        asked = "no image" if wrong is None else f"image {wrong}"
        raise UserError(
            f"{asked} was asked for, of {opened.set_name} in {opened.folder}: give 0 to {len(dataset) - 1}"
        )
    images, labels, found = [], [], []
    for batch, of_batch in opened.batches(dataset.subset(np.asarray(rows))):
        for image in batch:
            found.append(opened.compute(last_attention, opened.classifier, image[None]))
        images.append(_shown(opened, batch))
        labels.append(of_batch)
    parts, kind = ("prefix", "patches", "prompts", "keys_values"), opened.classifier.kind
    return Attention(
        asking=found[0].asking,
        block=found[0].block,
        images=torch.cat(images).numpy(),
        labels=torch.cat(labels).numpy(),
        predicted=kind.decide(kind.probabilities(torch.cat([one.logits for one in found]), 1.0))
        .cpu()
        .numpy(),
        **{name: torch.cat([getattr(one, name) for one in found]).cpu().numpy() for name in parts},
    )


@dataclass(frozen=True)
class Latency:
    """Seconds per image of a classifier's logits, from normalised images that are on the device already.

    Attributes:
        batch_size: Images at a time.
        seconds: Median over the repetitions, per image.
        low: Lower quartile, per image.
        high: Upper quartile, per image.
        repeats: Number of repetitions.
        device: The GPU's name, or the type of another device, such as "cpu".
        threads: Number of PyTorch's CPU threads.
        precision: Lightning's precision, such as "32-true".
    """

    batch_size: int
    seconds: float
    low: float
    high: float
    repeats: int
    device: str
    threads: int
    precision: str


def latency(
    opened: Opened, batch_sizes: Sequence[int] = (1, 64), repeats: int = 20, seconds: float = 0.2
) -> list[Latency]:
    """Measure a run's classifier, not compiled, after a warm-up batch of each size.

    Args:
        opened: The run.
        batch_sizes: Images at a time.
        repeats: Maximum number of repetitions of each size.
        seconds: Time for each size, after which no further repetition starts, once there are three.
    """
    cuda = opened.device.type == "cuda"
    device = torch.cuda.get_device_name(opened.device) if cuda else opened.device.type
    measured = []
    for size in batch_sizes:
        times = np.array(_times(opened, size, repeats, seconds)) / size
        low, median, high = (float(value) for value in np.quantile(times, (0.25, 0.5, 0.75)))
        threads, precision = torch.get_num_threads(), opened.result.precision
        measured.append(Latency(size, median, low, high, len(times), device, threads, precision))
    return measured


def _times(opened: Opened, batch_size: int, repeats: int, seconds: float) -> list[float]:
    """Return the time of each repetition in seconds."""
    side, like = opened.datamodule.image_size, next(opened.classifier.parameters())
    images = torch.zeros(batch_size, 3, side, side, device=opened.device, dtype=like.dtype)
    times: list[float] = []
    opened.compute(opened.classifier, images)
    _wait(opened.device)
    while len(times) < min(repeats, _LEAST_REPEATS) or (len(times) < repeats and sum(times) < seconds):
        started = time.perf_counter()
        opened.compute(opened.classifier, images)
        _wait(opened.device)
        times.append(time.perf_counter() - started)
    return times


def _wait(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
