"""Pre-train the small ViT that is embedded as the demo backbone, on `.npz` archives of labelled photographs.

    python benchmarks/pretrain.py output=my.safetensors lr=1e-3     (all settings: benchmarks/pretrain.yaml)

An archive holds `jpeg` (uint8, the files one after another), `offsets` (int64 [n + 1]), `labels` (int [n])
and `class_names`. The photographs are decoded once and stay in memory as bytes; they are cropped and coloured
a batch at a time, which leaves nearly all the time of two CPU cores to the network. Half the patches are
dropped for most of the training (FLIP, Li et al. 2023): an epoch costs half as much, and a few epochs with
all patches follow.
"""

import io
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import Attention, PatchDropout
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from visprompt.errors import UserError
from visprompt.files import write_atomically
from visprompt.models.optim import param_groups, warmup_cosine

METADATA_KEY = "visprompt"


@dataclass(frozen=True)
class PretrainRecipe:
    """Everything that decides the weights, apart from the photographs themselves.

    Attributes:
        train: Archives to train on; their images are joined.
        val: Archive whose accuracy is reported; nothing is chosen by it.
        init: Weights to start from (safetensors with timm's names), or None to start from noise.
        output: Where the half-precision weights go, or None to only evaluate.
        epochs: Passes over the training images; 0 evaluates `init`.
        full_epochs: How many of the last epochs see all patches.
        patch_dropout: Share of patches dropped in the epochs before those.
        batch_size: Images per step.
        lr, warmup_steps: Learning rate that the linear warm-up reaches; a cosine takes it to 0.
        betas, weight_decay: Of AdamW; only matrices decay.
        label_smoothing: Share of the target spread over all classes.
        mixup: Parameter of mixup's Beta distribution; 0 turns it off.
        drop_path: Stochastic depth of the last block (linear from 0 in the first).
        crop_area: Smallest and largest share of the image that a crop covers.
        crop_aspect: A crop's aspect ratio lies within `1 / (1 + crop_aspect)` and `1 + crop_aspect`.
        flip: Probability of a horizontal flip.
        brightness, contrast: Strength; an image's factor lies within `1 - strength` and `1 + strength`.
        gradient_clip: Largest norm of a step's gradient.
        precision: Lightning's word for it; the reported accuracy is always measured in float32.
        val_every: Epochs between looks at the validation images.
        seed: Seed of initial weights, order and augmentation.
        image_size: Side of the images, in pixels; further below the network's patch size, width, depth and
            heads.
    """

    train: Sequence[str]
    val: str
    init: str | None = None
    output: str | None = None
    epochs: int = 18
    full_epochs: int = 3
    patch_dropout: float = 0.5
    batch_size: int = 256
    lr: float = 1.5e-3
    warmup_steps: int = 400
    betas: Sequence[float] = (0.9, 0.99)
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    mixup: float = 0.0
    drop_path: float = 0.0
    crop_area: Sequence[float] = (0.45, 1.0)
    crop_aspect: float = 0.0
    flip: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    gradient_clip: float = 1.0
    precision: str = "bf16-mixed"
    val_every: int = 4
    seed: int = 42
    image_size: int = 64
    patch_size: int = 8
    width: int = 192
    depth: int = 6
    heads: int = 3

    def record(self) -> dict[str, Any]:
        """The recipe as plain values for a file's metadata; of paths only the file's name."""
        names = {"train": [Path(path).name for path in self.train], "val": Path(self.val).name}
        return {**asdict(self), **names, "init": self.init and Path(self.init).name, "output": None}


@dataclass(frozen=True)
class Photos(Dataset[Any]):
    """Decoded photographs: images uint8 [n, 3, size, size], labels int64 [n] and the classes' names."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of photographs."""
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """One batch at once: collating single images would cost more than augmenting them."""
        return self.images[rows], self.labels[rows]


def read_photos(paths: Sequence[str], size: int, setting: str) -> Photos:
    """Reads and decodes archives, joined in the given order.

    Args:
        paths: The `.npz` archives.
        size: Side that every image must have, in pixels.
        setting: Name of the setting that gave the paths, for messages.

    Raises:
        UserError: No archive is given, one is missing or not of the stated form, or their classes differ.
    """
    parts = [_read_archive(Path(path), size, setting) for path in paths]
    if not parts:
        raise UserError(f"{setting} is empty: name at least one .npz archive of photographs")
    if len({part.class_names for part in parts}) > 1:
        raise UserError(
            f"{setting}: the archives {', '.join(paths)} differ in their classes; join only like ones"
        )
    images, labels = torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
    return Photos(images, labels, parts[0].class_names)


def _read_archive(path: Path, size: int, setting: str) -> Photos:
    if not path.is_file():
        raise UserError(
            f"{setting}: there is no archive {path}; set {setting} to your .npz archive of photographs"
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            data, offsets, labels, names = (
                archive[key] for key in ("jpeg", "offsets", "labels", "class_names")
            )
        images = np.stack([_decode(data[start:end].tobytes(), size) for start, end in pairwise(offsets)])
    except (KeyError, ValueError, OSError, BadZipFile) as error:
        reason = f"{path} is no archive of photographs of {size} x {size} pixels ({error})"
        raise UserError(f"{setting}: {reason}; see the card beside the embedded weights") from error
    return Photos(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)), tuple(map(str, names)))


def _decode(jpeg: bytes, size: int) -> np.ndarray:
    photo = Image.open(io.BytesIO(jpeg), formats=["JPEG"])
    if photo.size != (size, size):
        raise ValueError(f"one has {photo.width} x {photo.height}")
    return np.asarray(photo.convert("RGB")).transpose(2, 0, 1)


def _as_it_is(batch: Any) -> Any:
    return batch


def to_unit(images: Tensor) -> Tensor:
    """Bytes to the network's range: uint8 [b, 3, h, w] to float [b, 3, h, w] within [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def augment(images: Tensor, recipe: PretrainRecipe) -> Tensor:
    """Crops, flips and re-colours each image of a batch with its own draw.

    [b, 3, h, w] within [-1, 1] to the same.
    """
    n = len(images)
    area = torch.empty(n).uniform_(*recipe.crop_area)
    log_aspect = torch.empty(n).uniform_(-1, 1).mul_(math.log1p(recipe.crop_aspect))
    # A crop is a scaling and a shift of the sampling grid; a side longer than the image is cut to it.
    scale = torch.stack([(area * log_aspect.exp()).sqrt(), (area / log_aspect.exp()).sqrt()], 1).clamp_(
        max=1.0
    )
    theta = torch.zeros(n, 2, 3)
    theta[:, :, 2] = torch.empty(n, 2).uniform_(-1, 1) * (1 - scale)
    theta[:, 0, 0] = torch.where(torch.rand(n) < recipe.flip, -scale[:, 0], scale[:, 0])
    theta[:, 1, 1] = scale[:, 1]
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    # Padding by the border: the outermost samples lie half a pixel beyond the last pixel's centre.
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    spread = torch.tensor([recipe.brightness, recipe.contrast]).view(2, 1, 1, 1, 1)
    brightness, contrast = (1 + spread * torch.empty(2, n, 1, 1, 1).uniform_(-1, 1)).to(images.device)
    images = (images + 1) * brightness - 1
    mean = images.mean((1, 2, 3), keepdim=True)
    return ((images - mean) * contrast + mean).clamp_(-1, 1)


class PhotoDataModule(L.LightningDataModule):
    """Batches of decoded photographs, augmented where they are trained on; read at construction."""

    def __init__(self, recipe: PretrainRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.val = read_photos([recipe.val], recipe.image_size, "val")
        self.train = read_photos(recipe.train, recipe.image_size, "train") if recipe.epochs else self.val
        if self.train.class_names != self.val.class_names:
            raise UserError(
                f"val: {recipe.val} has other classes than the archives of train; give the same classes"
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches; a short last one is left out, unless it is the only one."""
        size = self.recipe.batch_size
        return DataLoader(
            self.train, size, shuffle=True, drop_last=len(self.train) >= size, collate_fn=_as_it_is
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """All validation images in order."""
        return DataLoader(self.val, self.recipe.batch_size, collate_fn=_as_it_is)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Scales to [-1, 1], and augments in training, on the device that trains."""
        images, labels = to_unit(batch[0]), batch[1]
        return (augment(images, self.recipe) if self.trainer and self.trainer.training else images), labels


def build_network(recipe: PretrainRecipe, classes: int) -> VisionTransformer:
    """The plain timm ViT of a recipe, from noise or from `recipe.init`.

    A `UserError` where that does not fit.
    """
    shape: dict[str, Any] = {
        "img_size": recipe.image_size,
        "patch_size": recipe.patch_size,
        "embed_dim": recipe.width,
    }
    shape |= {"depth": recipe.depth, "num_heads": recipe.heads, "num_classes": classes}
    net = VisionTransformer(**shape, patch_drop_rate=recipe.patch_dropout, drop_path_rate=recipe.drop_path)
    if recipe.init is None:
        return net
    if not Path(recipe.init).is_file():
        raise UserError(
            f"init: there is no file {recipe.init}; name a safetensors file, or null to start from noise"
        )
    try:
        net.load_state_dict({name: tensor.float() for name, tensor in load_file(recipe.init).items()})
    except (RuntimeError, SafetensorError) as error:
        raise UserError(
            f"init: {recipe.init} does not fit this network: {' '.join(str(error).split())}"
        ) from error
    return net


def decay_groups(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Optimiser groups: matrices decay; biases, norms, class token and positions do not."""
    groups: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
    for name, parameter in named:
        groups[name.endswith("weight") and parameter.ndim > 1].append((name, parameter))
    return param_groups(groups[True], lr, None, weight_decay) + param_groups(groups[False], lr, None, 0.0)


class PretrainModule(L.LightningModule):
    """Supervised classification with mixup and, in the earlier epochs, half the patches."""

    def __init__(self, net: VisionTransformer, recipe: PretrainRecipe) -> None:
        super().__init__()
        self.net = net
        self.recipe = recipe
        self._started = time.monotonic()

    def on_fit_start(self) -> None:
        """On a CPU takes the plain attention.

        A step with 33 tokens takes three quarters of the fused one's time.
        """
        for layer in self.net.modules():
            if isinstance(layer, Attention) and self.device.type == "cpu":
                layer.fused_attn = False  # type: ignore[misc]  # final for TorchScript alone

    def on_train_epoch_start(self) -> None:
        """Lets all patches in for the last `full_epochs` epochs."""
        drop = self.net.patch_drop
        if (
            isinstance(drop, PatchDropout)
            and self.current_epoch >= self.recipe.epochs - self.recipe.full_epochs
        ):
            drop.prob = 0.0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one augmented batch: images [b, 3, h, w] within [-1, 1], labels [b]."""
        images, labels = batch
        mixup = self.recipe.mixup
        share = float(torch.distributions.Beta(mixup, mixup).sample()) if mixup else 1.0
        # The batch is shuffled already, so its reverse is a random partner.
        logits = self.net(images.lerp(images.flip(0), 1 - share)).float()
        smoothing = self.recipe.label_smoothing
        loss = share * F.cross_entropy(logits, labels, label_smoothing=smoothing)
        loss = loss + (1 - share) * F.cross_entropy(logits, labels.flip(0), label_smoothing=smoothing)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Counts the right answers."""
        images, labels = batch
        right = (self.net(images).argmax(1) == labels).float().mean()
        self.log("val/acc", right, prog_bar=True, batch_size=len(labels))

    def on_train_epoch_end(self) -> None:
        """Prints a line for log files.

        A loss that is not finite ends the run before worthless weights are stored.
        """
        shown = {key: round(float(value), 4) for key, value in self.trainer.callback_metrics.items()}
        epoch, minutes = self.current_epoch + 1, (time.monotonic() - self._started) / 60
        if not math.isfinite(shown["train/loss"]):
            raise UserError(
                f"the loss is not finite in epoch {epoch}: lower lr={self.recipe.lr:g}, or warm up longer"
            )
        self.print(f"epoch {epoch}/{self.recipe.epochs} after {minutes:.1f} min: {shown}", flush=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with decay on matrices, warm-up and cosine by steps."""
        recipe, total = self.recipe, int(self.trainer.estimated_stepping_batches)
        groups = decay_groups(self.net.named_parameters(), recipe.lr, recipe.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.betas[0], recipe.betas[1]))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(total, recipe.warmup_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def save_weights(net: nn.Module, path: Path, metadata: dict[str, Any]) -> None:
    """Writes half-precision weights atomically, with the metadata as one JSON string."""
    tensors = {name: tensor.detach().cpu().half().contiguous() for name, tensor in net.state_dict().items()}
    text = json.dumps(metadata, sort_keys=True)
    write_atomically(path, lambda partial: save_file(tensors, partial, {METADATA_KEY: text}))


def _trainer(recipe: PretrainRecipe, precision: str, progress: bool) -> L.Trainer:
    return L.Trainer(
        max_epochs=recipe.epochs,
        precision=precision,  # type: ignore[arg-type]  # a word from the config; Lightning checks it
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=recipe.gradient_clip,
        check_val_every_n_epoch=recipe.val_every,
    )


def pretrain(recipe: PretrainRecipe, progress: bool = True) -> float:
    """Trains (or, with 0 epochs, only evaluates), writes the half-precision weights and tells their accuracy.

    Args:
        recipe: What to train, on what, how.
        progress: Whether a progress bar is shown; a line per epoch is printed in any case.

    Returns:
        Share of all validation images, within [0, 1], that the weights as stored, in half precision, get
        right.

    Raises:
        UserError: A file is missing or of another form than stated, or the loss is not finite.
    """
    L.seed_everything(recipe.seed)
    data = PhotoDataModule(recipe)
    module = PretrainModule(build_network(recipe, len(data.val.class_names)), recipe)
    if recipe.epochs:
        _trainer(recipe, recipe.precision, progress).fit(module, data)
    module.net.half().float()  # what is stored is what is measured
    accuracy = float(
        _trainer(recipe, "32-true", progress).validate(module, data, verbose=False)[0]["val/acc"]
    )
    print(f"validation accuracy {accuracy:.4f} on {len(data.val)} images", flush=True)
    if recipe.output is not None:
        record = {"recipe": recipe.record(), "val_accuracy": accuracy, "val_images": len(data.val)}
        save_weights(module.net, Path(recipe.output), {**record, "class_names": data.val.class_names})
        print(f"weights written to {recipe.output}", flush=True)
    return accuracy


def main() -> None:
    """Read the settings and hand them over as plain values."""
    settings = OmegaConf.load(Path(__file__).with_suffix(".yaml"))
    OmegaConf.set_struct(settings, True)
    values = cast(dict[str, Any], OmegaConf.to_object(OmegaConf.merge(settings, OmegaConf.from_cli())))
    progress = values.pop("progress")
    pretrain(PretrainRecipe(**values), progress)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OmegaConfBaseException) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
