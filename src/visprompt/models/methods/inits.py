"""Initial prompts from features of training images.

Class tokens: Jia et al., Visual Prompt Tuning, ECCV 2022, section 4.3 (prompt initialisation). Patch tokens:
Wang et al., Revisiting the Power of Prompt for Visual Tuning (SPT), ICML 2024, section 3: the prompts of a
layer start as patch tokens of that layer: a random sample, averages, or k-means centres.

Different from the released codes: the features are computed here, not read from a file; class tokens by layer
are those after a block (before the first block they are the same for every image, and equal prompts would
stay equal); at most `PATCHES` patch tokens are sampled from each image.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.models.contract import Method, TokenBackbone

_BATCH = 64
MAX_IMAGES = 800  # as in VTAB's train800; more would need memory and time, and add little
PATCHES = 16  # sampled from an image; 800 images on ViT-B are 39 MB a layer


def initialise(
    method: Method, backbone: TokenBackbone, images: Tensor | Iterable[Tensor], seed: int = 42
) -> None:
    """Compute a method's initial values from training images and write them in place.

    Args:
        method: The method; nothing is done unless its `needs_images` is true.
        backbone: The frozen backbone, in evaluation mode, with the method attached.
        images: Normalised training images [N, 3, H, W], or batches of them, in random order: the first
            `MAX_IMAGES` are used.
        seed: Seed of everything that is drawn.

    Raises:
        UserError: There are too few images.
    """
    if method.needs_images:
        method.initialise(backbone, _batches(images), seed)


def _batches(images: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    """Yield the first `MAX_IMAGES` images in batches."""
    left = MAX_IMAGES
    for batch in images.split(_BATCH) if isinstance(images, Tensor) else images:
        if left <= 0:
            return
        yield batch[:left]
        left -= len(batch)


def features(
    init: str, backbone: TokenBackbone, blocks: Sequence[int], count: int, images: Iterable[Tensor], seed: int
) -> list[Tensor]:
    """Return features of training images as initial prompts.

    Args:
        init: "cls", "cls_layer", "patch_sample", "patch_pool" or "patch_kmeans".
        backbone: The frozen backbone.
        blocks: Indices of the blocks with prompts.
        count: Number of prompts of each block (p).
        images: Batches of normalised images [B, 3, H, W].
        seed: Seed of the sampling and of k-means.

    Returns:
        [p, width] for each block.

    Raises:
        UserError: There are fewer than p features.
    """
    generator = torch.Generator().manual_seed(seed)
    by_class_token = init.startswith("cls")
    if by_class_token:
        parts = [_class_tokens(init, backbone, blocks, batch) for batch in images]
    else:
        parts = [_patch_tokens(backbone, blocks, batch, generator) for batch in images]
    layers = [torch.cat([part[layer].cpu() for part in parts]) for layer in range(len(blocks))]
    available = min(len(tokens) for tokens in layers)
    if available < count:
        kind = "training images" if by_class_token else "patches"
        raise UserError(
            f"method.init={init} takes {count} prompt tokens from as many {kind}, and there are only "
            f"{available}: give method.num_tokens no larger than that, or method.init=random"
        )
    chosen = torch.randperm(available, generator=generator)[:count]
    select: Callable[[Tensor], Tensor] = {
        "patch_pool": lambda tokens: _pooled(tokens, count),
        "patch_kmeans": lambda tokens: _centres(tokens, count, seed),
    }.get(init, lambda tokens: tokens[chosen])
    return [select(tokens) for tokens in layers]


@torch.no_grad()
def _class_tokens(init: str, backbone: TokenBackbone, blocks: Sequence[int], images: Tensor) -> list[Tensor]:
    """Return class tokens of images, [B, width] for each block: after the final norm, or after the block."""
    states = backbone.states(images)
    if init == "cls":
        final = states[-1][:, 0]
        for name in backbone.final_names:
            final = backbone.model.get_submodule(name)(final)
        return [final for _ in blocks]
    return [states[block + 1][:, 0] for block in blocks]


@torch.no_grad()
def _patch_tokens(
    backbone: TokenBackbone, blocks: Sequence[int], images: Tensor, generator: torch.Generator
) -> list[Tensor]:
    """Return a random sample of the patch tokens before each block.

    The same positions are taken before all blocks of a stage.

    Returns:
        [B * n, width] for each block, where n <= `PATCHES` tokens are taken from each image.
    """
    states = backbone.states(images)
    positions: dict[int, Tensor] = {}  # [B, n] by number of patches
    image_index = torch.arange(len(images))[:, None]
    layers = []
    for block in blocks:
        tokens = states[block][:, backbone.num_prefix :]
        count = tokens.shape[1]
        if count not in positions:
            drawn = [torch.randperm(count, generator=generator)[:PATCHES] for _ in images]
            positions[count] = torch.stack(drawn)
        sampled = tokens[image_index.to(tokens.device), positions[count].to(tokens.device)]
        layers.append(sampled.flatten(0, 1))
    return layers


class Means:
    """Running means of tensors over images, by name; in float64 on the CPU, whatever the sizes of batches."""

    def __init__(self) -> None:
        self._sums: dict[Any, Tensor] = {}
        self._counts: dict[Any, int] = {}

    def add(self, name: Any, values: Tensor) -> None:
        """Add the values [B, ...] of B images."""
        self._sums[name] = self._sums.get(name, 0) + values.float().sum(0).cpu().double()
        self._counts[name] = self._counts.get(name, 0) + len(values)

    def __getitem__(self, name: Any) -> Tensor:
        return self._sums[name] / self._counts[name]


def _pooled(tokens: Tensor, count: int) -> Tensor:
    """Return the means [count, d] of groups of consecutive tokens [n, d], that is, of consecutive images."""
    return F.adaptive_avg_pool1d(tokens.T, count).T


def _centres(tokens: Tensor, count: int, seed: int) -> Tensor:
    """Return the k-means centres [count, d] of tokens [n, d]."""
    from sklearn.cluster import KMeans  # imported here: scikit-learn is not needed otherwise
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # the order of sums over several threads varies
        kmeans = KMeans(count, n_init=1, max_iter=100, random_state=seed).fit(tokens.float().numpy())
    return torch.from_numpy(kmeans.cluster_centers_).to(tokens.dtype)
