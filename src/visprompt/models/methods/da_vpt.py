"""Prompts guided by classes. Ren et al., DA-VPT: Semantic-Guided Visual Prompt Tuning, CVPR 2025.

VPT-deep, and a loss that draws the prompts of the last blocks to the images of the classes that are mapped to
them. Let m(y) be the prompt of class y, P_l [p, d] the prompts of a guided block l, and of image i let c_i,
E_i be the class token and patches that enter block l. Then with

    e_i = mean of E_i's rows,    q_i = W_q LN(c_i) + b_q  (block l's own, before heads and norms of queries),
    s_k(z) = scale * cos(z, P_lk),
    D(z) = 1/p sum_k log(1 + sum_{i: m(y_i) = k} exp(-32 (s_k(z_i) - 0.1)))
         + 1/p sum_k log(1 + sum_{i: m(y_i) != k} exp(32 (s_k(z_i) + 0.1)))     (proxy anchor, over a batch)

    loss = cross-entropy + mean over guided blocks of (patch_weight * D(e) + class_weight * D(q)).

m comes from spherical k-means with p centres over one vector per class, layer-normed without scale: first the
mean of the frozen backbone's features of up to ten of its training images, behind each epoch from
`remap_from` on the mean of that epoch's features. Where there are no more classes than prompts, p is their
number and m the identity. Predicting reads neither m nor the loss. `bias=true` tunes, as every released
setting does, the class token, norm1, and the biases of values, attention output, second MLP layer and norm2.

This is what the released code runs. Its settings choose the attention's output at P_lm(y) in place of e
(`patch_type=output`), but the loss reads e whatever they say; its mask over the prompts' attention changes
outputs that nobody reads, and its biases of the keys cannot be seen by a softmax: none of the three is here.
Different from it: batches are drawn at random (there two images of each drawn class), images are mapped
without augmentation, gradients are not clipped at 10, the head has no weight decay of its own (0.05 to 20
there), the backbone's tuned biases and norms are decayed like the prompts, and stochastic depth (0.1 in some
settings) is off. Without a class token D(q) is left out.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError, unknown
from visprompt.models.contract import Flow, Geometry, Method, Wrapped
from visprompt.models.methods.ranks import gathered, summed

NORMS = ("none", "l2")
SHARPNESS, MARGIN = 32.0, 0.1  # alpha and delta of proxy anchor, the released code's for all settings
_BIASES = ("norm1.weight", "norm1.bias", "norm2.bias", "attn.proj.bias", "mlp.fc2.bias")
_ITERATIONS, _STILL = 20, 1e-4  # of k-means: at most so many, and the sum of its centres' moves that ends it


class ValueBias(Wrapped):
    """A joint projection of queries, keys and values, and what a method adds to the values."""

    base: nn.Linear

    def __init__(self, base: nn.Linear, method: "DAVPT", block: int) -> None:
        super().__init__(base)
        self._method, self._block = (
            (method,),
            block,
        )  # in a tuple, so that its parameters are not registered here too

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [..., width] -> [..., 3 * width]."""
        out: Tensor = self.base(x)
        bias = self._method[0].value_bias[self._block]
        return out + F.pad(bias, (out.shape[-1] - len(bias), 0))


class DAVPT(Method):
    """Deep prompts, those of the last blocks drawn to the images of the classes that are mapped to them.

    Args:
        backbone: The backbone whose width and number of blocks shape the prompts.
        num_tokens: Prompt tokens of a block that is not guided; 0 for none.
        guided_tokens: Prompt tokens of a guided block (p); with fewer classes, as many as those.
        guided_blocks: How many blocks are guided, counted from the last.
        patch_weight: Of the patches' term.
        class_weight: Of the class token's term.
        scale: Factor on the cosines.
        norm: "none", or "l2" for prompts that enter divided by their length.
        remap_from: The first epoch, counted from 0, behind which classes are mapped anew; 0 for never.
        bias: Whether the numbers of the backbone named above are tuned too.

    Attributes:
        prompts: [depth, num_tokens, width] of the other blocks, U(-v, v) with v = sqrt(6 / ((depth +
            num_tokens) * width)) / 8 (the released code's: Xavier's rule on the tensor of all these blocks,
            over 8); None without any.
        guided: [guided_blocks, p, width], likewise.
        mapping: The prompt of each class, [classes]; saved, so that a run that is resumed goes on with it.
        centres: Of the k-means that made it, [p, width]; zero before.
        value_bias: [blocks, width], from 0, with `bias`.

    Raises:
        UserError: A number lies outside its range, a word is unknown, or (`attach`) the blocks have no plain
            attention.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"tokens", "modules", "stream", "weights"})
    compares_images: ClassVar[bool] = True
    images_per_class: ClassVar[int | None] = 10
    undecayed: ClassVar[frozenset[str]] = frozenset({"value_bias"})

    mapping: Tensor
    centres: Tensor

    def __init__(
        self,
        backbone: Geometry,
        num_tokens: int = 10,
        guided_tokens: int = 10,
        guided_blocks: int = 1,
        patch_weight: float = 0.05,
        class_weight: float = 0.05,
        scale: float = 5.0,
        norm: str = "none",
        remap_from: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(backbone)
        least: dict[str, tuple[float, int]] = {
            **{
                "num_tokens": (num_tokens, 0),
                "guided_tokens": (guided_tokens, 1),
                "remap_from": (remap_from, 0),
            },
            **{"patch_weight": (patch_weight, 0), "class_weight": (class_weight, 0)},
        }
        for option, (value, lowest) in least.items():
            if value < lowest:
                raise UserError(f"method.{option}={value} is too small: give at least {lowest}")
        if not 1 <= guided_blocks <= self.num_blocks:
            raise UserError(
                f"method.guided_blocks={guided_blocks} does not fit: give 1 to {self.num_blocks}, the "
                "backbone's blocks"
            )
        if scale <= 0:
            raise UserError(f"method.scale={scale} does not fit: give a number above 0")
        if norm not in NORMS:
            raise unknown("method.norm", norm, NORMS)
        self.patch_weight, self.class_weight, self.scale, self.norm = patch_weight, class_weight, scale, norm
        self.remap_from, self.bias = remap_from, bias
        self._first = self.num_blocks - guided_blocks
        self._width, self._prefix, self._has_class = (
            backbone.width,
            backbone.num_prefix,
            backbone.has_class_token,
        )
        free = self._first > 0 and num_tokens > 0
        self.prompts = _draw(self._first, num_tokens, self._width) if free else None
        self.guided = _draw(guided_blocks, guided_tokens, self._width)
        if bias:
            self.value_bias = nn.Parameter(torch.zeros(self.num_blocks, self._width))
        self._blocks: tuple[Any, ...] = ()  # in a tuple, so that their parameters stay the backbone's alone
        self._seen: dict[
            int, Tensor
        ] = {}  # tokens before each guided block, of the forward whose loss comes next
        self._features: Tensor | None = None  # of that forward
        self._sums = self._counts = torch.zeros(())  # of this epoch's features, by class

    @property
    def needs_images(self) -> bool:
        """Whether classes have to be mapped to fewer prompts."""
        return len(self.mapping) > self.guided.shape[1]

    def attach(self, backbone: Geometry) -> None:
        """Keep the blocks, whose queries of class tokens are compared, and puts in the biases of values."""
        if any(type(getattr(block, "attn", None)) is not Attention for block in backbone.blocks):
            raise UserError(
                "method da_vpt cannot work on this backbone: it reads queries of timm's plain attention, "
                "and these "
                f"blocks, of class {type(backbone.blocks[0]).__name__}, have another; choose a plain ViT"
            )
        self._blocks = tuple(backbone.blocks)
        for i, name in enumerate(backbone.block_names if self.bias else ()):
            layer = cast(nn.Linear, backbone.model.get_submodule(f"{name}.attn.qkv"))
            backbone.model.set_submodule(f"{name}.attn.qkv", ValueBias(layer, self, i))

    def make_head(self, width: int, num_classes: int, init: str) -> nn.Module:
        """Build a linear head, now that the classes are known.

        They are dealt to the prompts until they are seen.
        """
        depth, count, _ = self.guided.shape
        if num_classes < count:
            count, self.guided = num_classes, _draw(depth, num_classes, self._width)
        self.register_buffer("mapping", torch.arange(num_classes) % count)
        self.register_buffer("centres", torch.zeros(count, width))
        self._forget()
        return super().make_head(width, num_classes, init)

    def tuned_names(self, classifier: nn.Module) -> frozenset[str]:
        """Return the prompts and the head; with `bias`, some numbers of the backbone."""
        names = super().tuned_names(classifier)
        if not self.bias:
            return names
        known = {name for name, _ in classifier.named_parameters()}
        blocks = {f"backbone.model.blocks.{i}.{own}" for i in range(self.num_blocks) for own in _BIASES}
        return names | (known & (blocks | {"backbone.model.cls_token"}))

    def token_flow(self) -> tuple[Flow, ...]:
        """Return every block's own prompts replace those before."""
        free = Flow.KEEP if self.prompts is None else Flow.ENTER
        return (free,) * self._first + (Flow.ENTER,) * len(self.guided)

    def tokens(self, block: int, x: Tensor, last: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return prompts of a block, [1, p, width]."""
        own = block - self._first
        if own >= 0 and self.training and torch.is_grad_enabled():
            self._seen[own] = x
        prompts = self.guided[own] if own >= 0 else cast(Tensor, self.prompts)[block]
        return (F.normalize(prompts, dim=-1, eps=1e-6) if self.norm == "l2" else prompts).unsqueeze(0)

    def features(self, pooled: Tensor, images: Tensor) -> Tensor:
        """Return the pooled features as they are; the epoch's means are made of them."""
        if self.training and torch.is_grad_enabled():
            self._features = pooled.detach()
        return pooled

    def losses(self, task_loss: Tensor, head: nn.Module, labels: Tensor, weights: Tensor) -> Tensor:
        """Add the terms of the last forward to the cross-entropies [B]."""
        seen, features = self._seen, self._features
        self._seen, self._features = {}, None
        if not seen or features is None:
            return task_loss
        self._count(features, labels, weights)
        real, prompt_of = gathered(weights > 0)[:, None], gathered(self.mapping[labels])
        own = prompt_of[:, None] == torch.arange(self.guided.shape[1], device=labels.device)
        term = task_loss.new_zeros(())
        for i, x in seen.items():
            vectors = [(self.patch_weight, x[:, self._prefix :].float().mean(dim=1))]
            if self._has_class:
                vectors += [(self.class_weight, self._queries(i, x))]
            for weight, z in vectors:
                if weight:
                    term = term + weight * self._proxy_anchor(gathered(z), self.guided[i].float(), own, real)
        return task_loss + term / len(self.guided)

    def _queries(self, guided: int, x: Tensor) -> Tensor:
        """Of the class tokens, [B, width], in that block's attention."""
        block = self._blocks[self._first + guided]
        class_tokens = x[:, 0].to(block.attn.proj.weight.dtype)
        out: Tensor = block.attn.qkv(block.norm1(class_tokens))
        return out[:, : block.attn.attn_dim].float()

    def _proxy_anchor(self, z: Tensor, prompts: Tensor, own: Tensor, real: Tensor) -> Tensor:
        """D of vectors [N, d] and prompts [p, d].

        Which pairs belong together [N, p], which vectors count [N, 1].
        """
        similarity = self.scale * F.normalize(z, dim=-1) @ F.normalize(prompts, dim=-1).T
        near = -SHARPNESS * (similarity - MARGIN)
        far = SHARPNESS * (similarity + MARGIN)
        return _one_and_sum(near, own & real).mean() + _one_and_sum(far, ~own & real).mean()

    @torch.no_grad()
    def _count(self, features: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Add features to this epoch's sums by class."""
        if not self.remap_from or not self.needs_images:
            return
        if not self._sums.ndim or self._sums.device != features.device:
            self._sums = torch.zeros(len(self.mapping), features.shape[1], device=features.device)
            self._counts = torch.zeros(len(self.mapping), device=features.device)
        real = (weights > 0).float()
        self._sums.index_add_(0, labels, features.float() * real[:, None])
        self._counts.index_add_(0, labels, real)

    def _forget(self) -> None:
        self._sums = self._counts = torch.zeros(())

    def end_epoch(self, epoch: int) -> None:
        """Map the classes anew by the epoch's mean features."""
        if self._sums.ndim and self.remap_from and epoch >= self.remap_from:
            self._map(summed(self._sums), summed(self._counts), torch.Generator().manual_seed(epoch))
        self._forget()

    @torch.no_grad()
    def see_classes(self, backbone: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> None:
        """Map the classes by the mean features of their images without prompts."""
        plain, like = Method(cast(Geometry, backbone)), next(backbone.parameters())
        sums, counts = torch.zeros(len(self.mapping), self.centres.shape[1]), torch.zeros(len(self.mapping))
        for images, labels in batches:
            features = backbone(images.to(like.device, like.dtype), plain).float().cpu()
            sums.index_add_(0, labels.cpu(), features)
            counts.index_add_(0, labels.cpu(), torch.ones(len(labels)))
        self._map(sums, counts, torch.Generator().manual_seed(seed))

    def _map(self, sums: Tensor, counts: Tensor, generator: torch.Generator) -> None:
        """Write mapping and centres, unless all classes would have one prompt, as in the released code."""
        count = self.guided.shape[1]
        known = counts.cpu() > 0
        if known.sum() < count:
            return
        means = sums.cpu()[known] / counts.cpu()[known, None]
        start = self.centres.cpu().float() if self.centres.any() else None
        found, centres = cosine_kmeans(F.layer_norm(means, means.shape[1:]), count, start, generator)
        mapping = torch.randint(count, known.shape, generator=generator)  # of classes without an image
        mapping[known] = found
        several = len(mapping.unique()) > 1
        if several:
            self.mapping.copy_(mapping)
        self.centres.copy_(centres if several else torch.zeros_like(centres))


def _draw(depth: int, count: int, width: int) -> nn.Parameter:
    """Return prompts [depth, count, width]."""
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(depth, count, width)) / 8)


def _one_and_sum(exponents: Tensor, mask: Tensor) -> Tensor:
    """log(1 + sum over the masked rows of exp), [p], of exponents [N, p]."""
    one = exponents.new_zeros(1, exponents.shape[1])
    return torch.cat([one, exponents.masked_fill(~mask, -torch.inf)]).logsumexp(dim=0)


def cosine_kmeans(
    data: Tensor, count: int, centres: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Spherical k-means: a vector goes to the centre of the largest cosine, a centre is the mean of its vectors.

    Args:
        data: [n, d], n >= count.
        count: Number of centres.
        centres: To begin from, [count, d]; None for as many vectors, drawn.
        generator: Draws them.

    Returns:
        Each vector's centre [n], and the centres [count, d]; one that no vector goes to stays where it is.
    """
    centres = data[torch.randperm(len(data), generator=generator)[:count]] if centres is None else centres
    for _ in range(_ITERATIONS):
        nearest = (F.normalize(data, dim=1) @ F.normalize(centres, dim=1).T).argmax(dim=1)
        means = [data[nearest == i].mean(dim=0) if (nearest == i).any() else centres[i] for i in range(count)]
        moved = torch.stack(means)
        if (moved - centres).norm(dim=1).sum() < _STILL:
            break
        centres = moved
    return nearest, centres
