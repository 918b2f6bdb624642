"""Prompts that start as features of training images.

Class tokens: Jia et al., Visual Prompt Tuning, ECCV 2022, section 4.3 (prompt initialisation). Patch
features: Wang et al., Revisiting the Power of Prompt for Visual Tuning (SPT), ICML 2024, section 3: the
prompts of a layer start as that layer's own patch tokens, sampled, averaged or as the centres of k-means.

Different from the papers' codes: the features are computed here, not read from a file; class tokens by layer
are those behind a block (before the first block they are the same for every image, and equal prompts would
stay equal); patch tokens are a bounded sample of each image's.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.models.contract import Geometry, Method, TokenBackbone

_BATCH = 64
MAX_IMAGES = 800  # VTAB's train800; more would need memory and time, and add little
PATCHES = 16  # of an image; with 800 images of ViT-B 39 MB a layer


def initialise(
    method: Method, backbone: TokenBackbone, images: Tensor | Iterable[Tensor], seed: int = 42
) -> None:
    """Write those first values of a method that are made of training images, in place.

    Args:
        method: Where it does not need images (`needs_images`), nothing is done.
        backbone: The frozen backbone, in evaluation mode, with the method attached.
        images: Normalised training images [N, 3, H, W], or batches of such, in random order: the first
            `MAX_IMAGES` are used.
        seed: Decides what is drawn.

    Raises:
        UserError: The images do not suffice.
    """
    if method.needs_images:
        method.initialise(backbone, _batches(images), seed)


def _batches(images: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    """Return the first images, by batches."""
    left = MAX_IMAGES
    for batch in images.split(_BATCH) if isinstance(images, Tensor) else images:
        if left <= 0:
            return
        yield batch[:left]
        left -= len(batch)


def features(
    init: str, backbone: TokenBackbone, blocks: Sequence[int], count: int, images: Iterable[Tensor], seed: int
) -> list[Tensor]:
    """Return features of training images that prompts may start as.

    Args:
        init: "cls", "cls_layer", "patch_sample", "patch_pool" or "patch_kmeans".
        backbone: The frozen backbone.
        blocks: Those with prompts.
        count: Number of features of each block (p).
        images: Batches of normalised images [B, 3, H, W].
        seed: Decides which features are taken.

    Returns:
        [p, width] of each block.

    Raises:
        UserError: There are fewer features than that.
    """
    generator = torch.Generator().manual_seed(seed)
    by_class_token = init.startswith("cls")
    if by_class_token:
        parts = [_class_tokens(init, backbone, blocks, batch) for batch in images]
    else:
        parts = [_patch_tokens(backbone, blocks, batch, generator) for batch in images]
    rows = [torch.cat([part[layer].cpu() for part in parts]) for layer in range(len(blocks))]
    found = min(len(of_layer) for of_layer in rows)
    if found < count:
        kind = "training images" if by_class_token else "patches"
        raise UserError(
            f"method.init={init} takes {count} prompt tokens of as many {kind}, and there are {found}: "
            "give method.num_tokens no larger than that, or method.init=random"
        )
    chosen = torch.randperm(found, generator=generator)[:count]
    take: Callable[[Tensor], Tensor] = {
        "patch_pool": lambda of_layer: _pooled(of_layer, count),
        "patch_kmeans": lambda of_layer: _centres(of_layer, count, seed),
    }.get(init, lambda of_layer: of_layer[chosen])
    return [take(of_layer) for of_layer in rows]


@torch.no_grad()
def _class_tokens(init: str, backbone: TokenBackbone, blocks: Sequence[int], images: Tensor) -> list[Tensor]:
    """Class tokens of images, [B, width] for each block: behind the final norm, or behind the block."""
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
    """Return some patch tokens of each image before each block, [B * n, width] for each block, n up to `PATCHES`."""
    states, index = backbone.states(images), {}
    rows = torch.arange(len(images))[:, None]
    layers = []
    for block in blocks:
        tokens = states[block][:, backbone.num_prefix :]
        if (count := tokens.shape[1]) not in index:  # the same places before all blocks of a stage
            drawn = [torch.randperm(count, generator=generator)[:PATCHES] for _ in images]
            index[count] = torch.stack(drawn)
        layers.append(tokens[rows.to(tokens.device), index[count].to(tokens.device)].flatten(0, 1))
    return layers


class Means:
    """Means over images of tensors by name, in float64 on the CPU, image by image added."""

    def __init__(self) -> None:
        self._sums: dict[Any, Tensor] = {}
        self._counts: dict[Any, int] = {}

    def add(self, name: Any, values: Tensor) -> None:
        """Add values [B, ...] of B images."""
        self._sums[name] = self._sums.get(name, 0) + values.float().sum(0).cpu().double()
        self._counts[name] = self._counts.get(name, 0) + len(values)

    def __getitem__(self, name: Any) -> Tensor:
        return self._sums[name] / self._counts[name]


def check_plain_attentions(backbone: Geometry, blocks: Sequence[int], option: str) -> None:
    """Refuse blocks other than timm's plain one, where one linear layer gives queries, keys and values.

    Args:
        backbone: The backbone.
        blocks: Those whose attentions are read.
        option: What reads them, as on the command line.

    Raises:
        UserError: A block is of another class (windows, rotary positions), or its attention has further
            parts.
    """
    for index in blocks:
        block: Any = backbone.blocks[index]
        attn = getattr(block, "attn", None)
        if not (
            type(block) is Block
            and type(attn) is Attention
            and type(attn.qkv) is nn.Linear
            and isinstance(attn.norm, nn.Identity)
            and attn.gate is None
        ):
            name, _, value = option.partition("=")
            raise UserError(
                f"{option} reads the attention of plain ViT blocks, and block {index} of this backbone, of "
                "class "
                f"{type(block).__name__}, has another: give another {name} than {value}, or choose a plain "
                "ViT"
            )


def _pooled(rows: Tensor, count: int) -> Tensor:
    """Return means [count, d] of as many groups of successive rows [n, d], that is of the patches of successive images."""
    return F.adaptive_avg_pool1d(rows.T, count).T


def _centres(rows: Tensor, count: int, seed: int) -> Tensor:
    """Centre [count, d] of k-means over rows [n, d]."""
    from sklearn.cluster import (
        KMeans,
    )  # only where it is asked for: the library itself does without scikit-learn

    found = KMeans(count, n_init=1, max_iter=100, random_state=seed).fit(rows.float().numpy())
    return torch.from_numpy(found.cluster_centers_).to(rows.dtype)
