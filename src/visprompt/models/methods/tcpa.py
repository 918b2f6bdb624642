"""Prompts chosen token by token. Liu et al., Token Coordinated Prompt Attention, ICML 2025.

Every block has two pools of m entries, one for the class token and one for the patches. An entry is a key k
[d] and t prompts [t, d]. Before a block, a token x chooses the c entries of its pool whose keys have the
largest cosine similarity with x. All prompts of both pools enter, P = Re FFT2(dropout([class prompts; image
prompts])), and the attention weights are masked after the softmax, so a row no longer sums to 1:

    A = softmax(Q [K, K_P]^T / sqrt(d_h));    out = (A * M) [V, V_P]
    M = 1 for all image tokens and for the prompts that the token of the row has chosen, else 0

    loss = cross-entropy + match_weight * sum over blocks and pools of mean(1 - cos(x, chosen keys))

The outputs of the prompts are not used. The mean is over tokens and chosen keys. Keys get gradients from that
term alone; through x, which is not detached, it also trains the prompts of earlier blocks. In the first
`random_epochs` epochs of training, entries are chosen at random.

Here the block's attention reads all prompts, and a parallel branch subtracts what M hides: it recomputes the
attention and adds - (A * (1 - M)) [V, V_P], through the output projection without its bias. The result is
equal up to rounding.

All this follows the released code (VFPT_TCPA, its only form). Left out: its mixup, and the convolution on the
images that one of its scripts (CUB) adds. Where that code supports no such backbone, this is our choice: each
register token chooses from the class token's pool, and without class and register tokens the patches' pool
is the only one.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.models.contract import Flow, Geometry, Method, Place
from visprompt.models.layers import drop, split_heads
from visprompt.models.methods.checks import check_least, check_probability, plain_attentions


class TCPA(Method):
    """Deep prompts; each token attends only to those whose keys are most similar to it.

    Args:
        backbone: The backbone whose width and number of blocks shape the pools.
        pool_size: Entries of a pool (m).
        chosen: Entries that a token chooses (c).
        length: Prompts of an entry (t).
        match_weight: Weight of the loss between tokens and the keys they choose.
        random_epochs: Number of first epochs in which training chooses at random.
        dropout: Dropout on prompt values before the transform, drawn for every image anew.

    Attributes:
        prompts: [blocks, pools, pool_size, length, width], U(-1, 1); the class token's pool, then the
            patches'.
        keys: [blocks, pools, pool_size, width], U(-1, 1); a buffer, if `match_weight` is 0.
        epochs: Number of finished epochs, int64 []; a buffer, so that a resumed run goes on with it.

    Raises:
        UserError: A number lies outside its range, or (`attach`) the blocks have no plain attention.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"tokens", "branches", "stream"})
    places: ClassVar[frozenset[Place]] = frozenset({Place.ATTENTION})
    tokenwise: ClassVar[bool] = False
    mixes: ClassVar[bool] = False

    keys: Tensor
    epochs: Tensor

    def __init__(
        self,
        backbone: Geometry,
        pool_size: int = 18,
        chosen: int = 10,
        length: int = 1,
        match_weight: float = 0.01,
        random_epochs: int = 10,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(backbone)
        check_least(1, pool_size=pool_size, chosen=chosen, length=length)
        check_least(0, match_weight=match_weight, random_epochs=random_epochs)
        if chosen > pool_size:
            raise UserError(
                f"method.chosen={chosen} is more than a pool holds: give at most method.pool_size={pool_size}"
            )
        check_probability("dropout", dropout)
        self.chosen, self.match_weight, self.random_epochs = chosen, match_weight, random_epochs
        self.dropout, self._prefix = nn.Dropout(dropout), backbone.num_prefix
        pools = (self.num_blocks, 2 if self._prefix else 1, pool_size)
        self.prompts = nn.Parameter(torch.empty(*pools, length, backbone.width).uniform_(-1, 1))
        keys = torch.empty(*pools, backbone.width).uniform_(-1, 1)
        if match_weight:
            self.keys = nn.Parameter(keys)
        else:  # nothing trains them, and DDP waits for the gradient of each parameter
            self.register_buffer("keys", keys)
        self.register_buffer("epochs", torch.tensor(0))
        # in a tuple, so that torch does not register the backbone's parameters as this method's
        self._backbone: tuple[Any, ...] = ()
        # of the current forward: "x", "hidden" (1 - M of the prompts), "prompts", and "distance" (the loss)
        self._state: dict[str, Tensor] = {}

    def attach(self, backbone: Geometry) -> None:
        """Keep the backbone, whose attentions are masked."""
        plain_attentions(backbone, "tcpa", "it masks the weights of", without_norm=True)
        self._backbone = (backbone,)

    def token_flow(self) -> tuple[Flow, ...]:
        """Return `ENTER` for every block."""
        return (Flow.ENTER,) * self.num_blocks

    def shift(self, block: int, x: Tensor) -> Tensor:
        """Choose prompts for the tokens [B, n, width], and return the tokens unchanged."""
        if not block:
            self._state = {}
        parts = (x[:, : self._prefix], x[:, self._prefix :]) if self._prefix else (x,)
        chosen = [self._choose(block, pool, part) for pool, part in enumerate(parts)]
        count = chosen[0][0].shape[-1]
        others = count * (len(parts) - 1)  # prompts of the other pool, which a token does not see
        seen = [F.pad(mask, (pool * count, others - pool * count)) for pool, (mask, _) in enumerate(chosen)]
        self._state |= {"x": x, "hidden": 1 - torch.cat(seen, dim=1)}
        if self.training and torch.is_grad_enabled() and self.match_weight:
            distance = torch.stack([mean_distance for _, mean_distance in chosen]).sum(dim=0)
            self._state["distance"] = self._state["distance"] + distance if block else distance
        return x

    def _choose(self, block: int, pool: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose entries of a pool for tokens [B, n, width].

        Returns:
            A mask with 1 for each prompt that a token sees, [B, n, pool_size * length], and each image's mean
            distance between tokens and chosen keys [B].
        """
        similarity = F.normalize(x.float(), dim=-1) @ F.normalize(self.keys[block, pool].float(), dim=-1).T
        scores = similarity
        if self.training and self.random_epochs:  # a tensor decides: to ask its value would halt a GPU
            at_random = self.epochs < self.random_epochs
            scores = torch.where(at_random, torch.rand_like(similarity), similarity)
        chosen = scores.topk(self.chosen, dim=-1).indices
        distance = (1 - similarity.gather(-1, chosen)).mean(dim=(1, 2))
        seen = torch.zeros_like(similarity).scatter(-1, chosen, 1.0)
        return seen.repeat_interleave(self.prompts.shape[3], dim=-1), distance

    def tokens(self, block: int, x: Tensor, last: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the prompts of both pools, [1, p, width], or [B, p, width] while dropout is active."""
        prompts = drop(self.dropout, self.prompts[block].flatten(0, 2)[None], x.shape[0])
        # in float32: not every device has a 16-bit FFT
        self._state["prompts"] = torch.fft.fft2(prompts.float()).real.to(x.dtype)
        return self._state["prompts"]

    def branch(self, place: Place, block: int, x: Tensor, normed: Tensor | None) -> Tensor:
        """Return minus what tokens x read from hidden prompts; x holds all, or those before the patches."""
        assert normed is not None
        (backbone,) = self._backbone
        module = backbone.blocks[block]
        tokens, hidden, prompts = (self._state.pop(name) for name in ("x", "hidden", "prompts"))
        attn, num_image = module.attn, tokens.shape[1]
        count = min(x.shape[1], num_image)  # x ends with the prompts if they are carried in full
        image = normed[:, :num_image] if x.shape[1] >= num_image else module.norm1(tokens)
        q, k, _ = split_heads(attn, attn.qkv(image))
        _, prompt_k, prompt_v = split_heads(attn, attn.qkv(module.norm1(prompts)))
        q = attn.q_norm(q[:, :, :count])
        keys = [attn.k_norm(part).expand(q.shape[0], -1, -1, -1) for part in (k, prompt_k)]
        weights = (attn.scale * q @ torch.cat(keys, dim=2).mT).softmax(dim=-1)[..., num_image:]
        out = (weights * hidden[:, None, :count]).to(prompt_v.dtype) @ prompt_v
        out = out.transpose(1, 2).flatten(2)
        if attn.gate is not None:
            out = out * attn.gate(normed[:, :count]).sigmoid()
        # without the bias: the block's attention has added it already
        out = module.ls1(F.linear(out, attn.proj.weight))
        return -F.pad(out, (0, 0, 0, x.shape[1] - count))

    def losses(self, task_loss: Tensor, head: nn.Module, labels: Tensor, weights: Tensor) -> Tensor:
        """Add each image's distance between tokens and chosen keys to the cross-entropies [B]."""
        distance = self._state.pop("distance", None)
        return task_loss if distance is None else task_loss + self.match_weight * distance

    def end_epoch(self, epoch: int) -> None:
        """Count the finished epochs."""
        self.epochs.fill_(epoch + 1)
