"""Prompts that start as features of training images.

Class tokens: Jia et al., Visual Prompt Tuning, ECCV 2022, section 4.3 (prompt initialisation). Patch features: Wang et
al., Revisiting the Power of Prompt for Visual Tuning (SPT), ICML 2024, section 3: the prompts of a layer start as that
layer's own patch tokens, sampled, averaged or as the centres of k-means.

Different from the papers' codes: the features are computed here, not read from a file; class tokens by layer are those
behind a block (before the first block they are the same for every image, and equal prompts would stay equal); patch
tokens are a bounded sample of each image's.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from visprompt.backbones.family import TokenFamily
from visprompt.errors import UserError
from visprompt.methods.vpt import VPT

_BATCH = 64
MAX_IMAGES = 800  # VTAB's train800; more would need memory and time, and add little
PATCHES = 16  # of an image; with 800 images of ViT-B 39 MB a layer


def initialise(method: VPT, backbone: TokenFamily, images: Tensor | Iterable[Tensor], seed: int = 42) -> None:
    """Writes a method's initial prompts, features of training images, in place.

    Args:
        method: Its option `init` says which features; where that is "random", nothing is done.
        backbone: The frozen backbone, in evaluation mode, with the method attached.
        images: Normalised training images [N, 3, H, W], or batches of such, in random order: the first `MAX_IMAGES`
            are used.
        seed: Decides which features are taken.

    Raises:
        UserError: There are fewer features than prompt tokens.
    """
    if not method.needs_images:
        return
    layers, count = len(method.prompts), method.prompts[0].shape[0]
    generator = torch.Generator().manual_seed(seed)
    by_class_token = method.init.startswith("cls")
    features = _class_tokens if by_class_token else _patch_tokens
    parts = [features(method, backbone, batch, generator) for batch in _batches(images)]
    rows = [torch.cat([part[layer].cpu() for part in parts]) for layer in range(layers)]
    found = min(len(of_layer) for of_layer in rows)
    if found < count:
        kind = "training images" if by_class_token else "patches"
        raise UserError(
            f"method.init={method.init} takes {count} prompt tokens of as many {kind}, and there are {found}: "
            "give method.num_tokens no larger than that, or method.init=random"
        )
    chosen = torch.randperm(found, generator=generator)[:count]
    for layer in range(layers):
        if method.init == "patch_pool":
            values = _pooled(rows[layer], count)
        elif method.init == "patch_kmeans":
            values = _centres(rows[layer], count, seed)
        else:
            values = rows[layer][chosen]
        with torch.no_grad():
            method.prompts[layer].copy_(values)


def _batches(images: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    """The first images, by batches."""
    left = MAX_IMAGES
    for batch in images.split(_BATCH) if isinstance(images, Tensor) else images:
        if left <= 0:
            return
        yield batch[:left]
        left -= len(batch)


@torch.no_grad()
def _class_tokens(method: VPT, backbone: TokenFamily, images: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Class tokens of images, [B, width] for each layer: behind the final norm, or behind each prompted block."""
    states = backbone.states(images)
    layers = method.prompted_blocks[: len(method.prompts)]
    if method.init == "cls":
        final = states[-1][:, 0]
        for name in backbone.final_names:
            final = backbone.model.get_submodule(name)(final)
        return [final for _ in layers]
    return [states[block + 1][:, 0] for block in layers]


@torch.no_grad()
def _patch_tokens(method: VPT, backbone: TokenFamily, images: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Some patch tokens of each image before each prompted block, [B * n, width] for each layer, n up to `PATCHES`."""
    states, index = backbone.states(images), {}
    rows = torch.arange(len(images))[:, None]
    layers = []
    for block in method.prompted_blocks[: len(method.prompts)]:
        tokens = states[block][:, backbone.num_prefix :]
        if (count := tokens.shape[1]) not in index:  # the same places before all blocks of a stage
            drawn = [torch.randperm(count, generator=generator)[:PATCHES] for _ in images]
            index[count] = torch.stack(drawn)
        layers.append(tokens[rows.to(tokens.device), index[count].to(tokens.device)].flatten(0, 1))
    return layers


def _pooled(rows: Tensor, count: int) -> Tensor:
    """Means [count, d] of as many groups of successive rows [n, d], that is of the patches of successive images."""
    return F.adaptive_avg_pool1d(rows.T, count).T


def _centres(rows: Tensor, count: int, seed: int) -> Tensor:
    """Centres [count, d] of k-means over rows [n, d]."""
    from sklearn.cluster import KMeans  # only where it is asked for: the library itself does without scikit-learn

    found = KMeans(count, n_init=1, max_iter=100, random_state=seed).fit(rows.float().numpy())
    return torch.from_numpy(found.cluster_centers_).to(rows.dtype)
