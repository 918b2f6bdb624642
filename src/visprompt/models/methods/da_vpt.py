"""Prompts guided by classes. Ren et al., DA-VPT: Semantic-Guided Visual Prompt Tuning, CVPR 2025.

VPT-deep, with a loss that pulls the prompts of the last ("guided") blocks towards images of the classes
assigned to them. Let m(y) be the prompt assigned to class y, P_l [p, d] the prompts of a guided block l, and
c_i, E_i the class token and the patches of image i that enter block l. Then with

    e_i = mean of E_i over patches,    q_i = W_q LN(c_i) + b_q  (of block l, before the split into heads),
    s_k(z) = scale * cos(z, P_lk),
    D(z) = 1/p sum_k log(1 + sum_{i: m(y_i) = k} exp(-32 (s_k(z_i) - 0.1)))
         + 1/p sum_k log(1 + sum_{i: m(y_i) != k} exp(32 (s_k(z_i) + 0.1)))     (proxy anchor, over a batch)

    loss = cross-entropy + mean over guided blocks of (patch_weight * D(e) + class_weight * D(q)).

m comes from spherical k-means with p centres over one mean feature vector per class, normalised as by a layer
norm without scale and shift. At first these are the frozen backbone's features of up to ten training images
per class; after each epoch from `remap_from` on, they are that epoch's features. If there are at most as many
classes as prompts, p is the number of classes and m the identity. Prediction uses neither m nor the loss.
`bias=true` also tunes, as every released setting does, the class token, norm1, and the biases of the values,
the attention output, the second MLP layer and norm2.

This is what the released code runs. Three parts of it have no effect there and are left out: its settings ask
for the attention's output at P_lm(y) in place of e (`patch_type=output`), but its loss reads e all the same;
its mask over the prompts' attention changes outputs that nothing reads; and a softmax is invariant to its
biases of the keys. Different from it: batches are drawn at random (there: two images of each drawn class),
images are mapped without augmentation, gradients are not clipped at 10, the head has no separate weight decay
(0.05 to 20 there), the backbone's tuned biases and norms are decayed like the prompts, and stochastic depth
(0.1 in some settings) is off. Without a class token, D(q) is left out.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError, unknown
from visprompt.models.contract import Flow, Geometry, Method
from visprompt.models.layers import Wrapped
from visprompt.models.methods.checks import check_least, check_scale, plain_attentions
from visprompt.models.methods.ranks import gathered, summed

NORMS = ("none", "l2")
SHARPNESS, MARGIN = 32.0, 0.1  # alpha and delta of proxy anchor, as in all settings of the released code
_BIASES = ("norm1.weight", "norm1.bias", "norm2.bias", "attn.proj.bias", "mlp.fc2.bias")
_ITERATIONS = 20  # of k-means, at most
_TOLERANCE = 1e-4  # k-means ends when the distances that its centres moved sum up to less


class ValueBias(Wrapped):
    """A joint projection of queries, keys and values, with a tuned bias added to the values."""

    base: nn.Linear

    def __init__(self, base: nn.Linear, method: "DAVPT", block: int) -> None:
        super().__init__(base)
        self._method = (method,)  # in a tuple, so that torch does not register its parameters here too
        self._block = block

    def after(self, x: Tensor, out: Tensor) -> Tensor:
        """Add the bias to the values of a projection [..., 3 * width]."""
        bias = self._method[0].value_bias[self._block]
        return out + F.pad(bias, (out.shape[-1] - len(bias), 0))


class DAVPT(Method):
    """Deep prompts; a loss pulls those of the last blocks towards images of the classes assigned to them.

    Args:
        backbone: The backbone whose width and number of blocks shape the prompts.
        num_tokens: Prompt tokens of a block that is not guided; 0 for no prompts there.
        guided_tokens: Prompt tokens of a guided block (p); at most the number of classes.
        guided_blocks: How many blocks are guided, counted from the last.
        patch_weight: Weight of the patches' term D(e) in the loss.
        class_weight: Weight of the class token's term D(q) in the loss.
        scale: Factor on the cosines.
        norm: "none", or "l2" to divide each prompt by its L2 norm before it enters.
        remap_from: First epoch, counted from 0, after which classes are assigned anew; 0 for never.
        bias: Whether the backbone's biases and norms named above are tuned too.

    Attributes:
        prompts: [depth, num_tokens, width] of the blocks that are not guided, U(-v, v) with v =
            sqrt(6 / ((depth + num_tokens) * width)) / 8: Xavier's rule on the tensor of all these blocks,
            divided by 8, as in the released code. None if there are no such prompts.
        guided: [guided_blocks, p, width], drawn in the same way.
        mapping: Index of each class's prompt, [classes]; a buffer, so that a resumed run goes on with it.
        centres: Centres of the k-means that gave `mapping`, [p, width]; zero before the first k-means.
        value_bias: [blocks, width], zero at first; only with `bias`.

    Raises:
        UserError: A number lies outside its range, a word is unknown, or (`attach`) the blocks have no plain
            attention.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"tokens", "modules", "stream", "weights"})
    compares_images: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True
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
        check_least(1, guided_tokens=guided_tokens)
        check_least(0, num_tokens=num_tokens, remap_from=remap_from)
        check_least(0, patch_weight=patch_weight, class_weight=class_weight)
        if not 1 <= guided_blocks <= self.num_blocks:
            raise UserError(
                f"method.guided_blocks={guided_blocks} does not fit: give 1 to {self.num_blocks}, the "
                "backbone's blocks"
            )
        check_scale(scale)
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
        # in a tuple, so that torch does not register the backbone's parameters as this method's
        self._blocks: tuple[Any, ...] = ()
        self._inputs: dict[int, Tensor] = {}  # of each guided block, kept from the forward to its loss
        self._features: Tensor | None = None  # likewise
        self._sums = self._counts = torch.zeros(())  # of this epoch's features, by class

    @property
    def exact_modules(self) -> Iterable[nn.Module]:
        """The attentions whose queries the loss computes."""
        return [block.attn for block in self._blocks[self._first :]]

    @property
    def needs_images(self) -> bool:
        """Whether there are more classes than prompts, so that k-means over features has to assign them."""
        return len(self.mapping) > self.guided.shape[1]

    def attach(self, backbone: Geometry) -> None:
        """Keep the blocks, whose queries the loss computes; with `bias`, wrap their joint projections."""
        plain_attentions(backbone, "da_vpt", "it reads queries of")
        self._blocks = tuple(backbone.blocks)
        for i, name in enumerate(backbone.block_names if self.bias else ()):
            layer = cast(nn.Linear, backbone.model.get_submodule(f"{name}.attn.qkv"))
            backbone.model.set_submodule(f"{name}.attn.qkv", ValueBias(layer, self, i))

    def make_head(self, width: int, num_classes: int, init: str) -> nn.Module:
        """Build a linear head; classes are assigned to prompts in turn until `see_classes` is called."""
        depth, count, _ = self.guided.shape
        if num_classes < count:
            count, self.guided = num_classes, _draw(depth, num_classes, self._width)
        self.register_buffer("mapping", torch.arange(num_classes) % count)
        self.register_buffer("centres", torch.zeros(count, width))
        self._reset_sums()
        return super().make_head(width, num_classes, init)

    def tuned_names(self, classifier: nn.Module) -> frozenset[str]:
        """Return the names of the prompts and the head; with `bias`, also some of the backbone."""
        names = super().tuned_names(classifier)
        if not self.bias:
            return names
        known = {name for name, _ in classifier.named_parameters()}
        blocks = {f"backbone.model.blocks.{i}.{name}" for i in range(self.num_blocks) for name in _BIASES}
        return names | (known & (blocks | {"backbone.model.cls_token"}))

    def token_flow(self) -> tuple[Flow, ...]:
        """Return `ENTER` for every block that has prompts: they replace those of the block before."""
        unguided = Flow.KEEP if self.prompts is None else Flow.ENTER
        return (unguided,) * self._first + (Flow.ENTER,) * len(self.guided)

    def tokens(self, block: int, x: Tensor, last: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the prompts of a block, [1, p, width]."""
        guided = block - self._first  # index among the guided blocks; below 0 before them
        if guided >= 0 and self.training and torch.is_grad_enabled():
            self._inputs[guided] = x
        prompts = self.guided[guided] if guided >= 0 else cast(Tensor, self.prompts)[block]
        return (F.normalize(prompts, dim=-1, eps=1e-6) if self.norm == "l2" else prompts).unsqueeze(0)

    def features(self, pooled: Tensor, images: Tensor) -> Tensor:
        """Return the pooled features unchanged, and keep them for the epoch's means by class."""
        if self.training and torch.is_grad_enabled():
            self._features = pooled.detach()
        return pooled

    def losses(self, task_loss: Tensor, head: nn.Module, labels: Tensor, weights: Tensor) -> Tensor:
        """Add the proxy-anchor terms of the last forward to the cross-entropies [B]."""
        inputs, features = self._inputs, self._features
        self._inputs, self._features = {}, None
        if not inputs or features is None:
            return task_loss
        self._add_to_sums(features, labels, weights)
        real, prompt_of = gathered(weights > 0)[:, None], gathered(self.mapping[labels])
        positive = prompt_of[:, None] == torch.arange(self.guided.shape[1], device=labels.device)
        term = task_loss.new_zeros(())
        for i, x in inputs.items():
            vectors = [(self.patch_weight, x[:, self._prefix :].float().mean(dim=1))]
            if self._has_class:
                vectors += [(self.class_weight, self._queries(i, x))]
            for weight, z in vectors:
                if weight:
                    prompts = self.guided[i].float()
                    term = term + weight * self._proxy_anchor(gathered(z), prompts, positive, real)
        return task_loss + term / len(self.guided)

    def _queries(self, guided: int, x: Tensor) -> Tensor:
        """Return the queries of the class tokens in a guided block's attention, [B, width]."""
        block = self._blocks[self._first + guided]
        class_tokens = x[:, 0].to(block.attn.proj.weight.dtype)
        out: Tensor = block.attn.qkv(block.norm1(class_tokens))
        return out[:, : block.attn.attn_dim].float()

    def _proxy_anchor(self, z: Tensor, prompts: Tensor, positive: Tensor, real: Tensor) -> Tensor:
        """Return the proxy-anchor loss D.

        Args:
            z: Vectors [N, d].
            prompts: Prompts [p, d].
            positive: Which vector's class is assigned to which prompt, bool [N, p].
            real: Which vectors are of images, not of fillers, bool [N, 1].
        """
        similarity = self.scale * F.normalize(z, dim=-1) @ F.normalize(prompts, dim=-1).T
        near = -SHARPNESS * (similarity - MARGIN)
        far = SHARPNESS * (similarity + MARGIN)
        return _log1p_sum_exp(near, positive & real).mean() + _log1p_sum_exp(far, ~positive & real).mean()

    @torch.no_grad()
    def _add_to_sums(self, features: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Add features to this epoch's sums by class; filler images are left out."""
        if not self.remap_from or not self.needs_images:
            return
        if not self._sums.ndim or self._sums.device != features.device:
            self._sums = torch.zeros(len(self.mapping), features.shape[1], device=features.device)
            self._counts = torch.zeros(len(self.mapping), device=features.device)
        real = (weights > 0).float()
        self._sums.index_add_(0, labels, features.float() * real[:, None])
        self._counts.index_add_(0, labels, real)

    def _reset_sums(self) -> None:
        self._sums = self._counts = torch.zeros(())

    def end_epoch(self, epoch: int) -> None:
        """Assign the classes to prompts anew by the epoch's mean features."""
        if self._sums.ndim and self.remap_from and epoch >= self.remap_from:
            self._map(summed(self._sums), summed(self._counts), torch.Generator().manual_seed(epoch))
        self._reset_sums()

    @torch.no_grad()
    def see_classes(self, backbone: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> None:
        """Assign the classes to prompts by the frozen backbone's mean features of their images."""
        plain, like = Method(cast(Geometry, backbone)), next(backbone.parameters())
        sums, counts = torch.zeros(len(self.mapping), self.centres.shape[1]), torch.zeros(len(self.mapping))
        for images, labels in batches:
            features = backbone(images.to(like.device, like.dtype), plain).float().cpu()
            sums.index_add_(0, labels.cpu(), features)
            counts.index_add_(0, labels.cpu(), torch.ones(len(labels)))
        self._map(sums, counts, torch.Generator().manual_seed(seed))

    def _map(self, sums: Tensor, counts: Tensor, generator: torch.Generator) -> None:
        """Write `mapping` and `centres` in place, from sums of features [classes, d] and counts [classes].

        As in the released code, the mapping stays as it is if all classes would be assigned to one prompt.
        """
        count = self.guided.shape[1]
        known = counts.cpu() > 0
        if known.sum() < count:
            return
        means = sums.cpu()[known] / counts.cpu()[known, None]
        start = self.centres.cpu().float() if self.centres.any() else None
        nearest, centres = cosine_kmeans(F.layer_norm(means, means.shape[1:]), count, start, generator)
        mapping = torch.randint(count, known.shape, generator=generator)  # for classes without an image
        mapping[known] = nearest
        several = len(mapping.unique()) > 1
        if several:
            self.mapping.copy_(mapping)
        self.centres.copy_(centres if several else torch.zeros_like(centres))


def _draw(depth: int, count: int, width: int) -> nn.Parameter:
    """Draw prompts [depth, count, width]."""
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(depth, count, width)) / 8)


def _log1p_sum_exp(exponents: Tensor, mask: Tensor) -> Tensor:
    """Return log(1 + sum of exp over the rows where the mask is true), [p], of exponents [N, p]."""
    zeros = exponents.new_zeros(1, exponents.shape[1])  # exp(0) is the 1
    return torch.cat([zeros, exponents.masked_fill(~mask, -torch.inf)]).logsumexp(dim=0)


def cosine_kmeans(
    data: Tensor, count: int, centres: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Run spherical k-means: assign each vector to the centre of largest cosine, move centres to the means.

    Args:
        data: Vectors [n, d], n >= count.
        count: Number of centres.
        centres: Centres to begin from, [count, d]; None begins from vectors drawn at random.
        generator: Draws those vectors.

    Returns:
        Index of each vector's centre [n], and the centres [count, d]; a centre without vectors stays where it
        is.
    """
    centres = data[torch.randperm(len(data), generator=generator)[:count]] if centres is None else centres
    for _ in range(_ITERATIONS):
        nearest = (F.normalize(data, dim=1) @ F.normalize(centres, dim=1).T).argmax(dim=1)
        means = [data[nearest == i].mean(dim=0) if (nearest == i).any() else centres[i] for i in range(count)]
        moved = torch.stack(means)
        if (moved - centres).norm(dim=1).sum() < _TOLERANCE:
            break
        centres = moved
    return nearest, centres
