"""Prompts chosen token by token. Liu et al., Token Coordinated Prompt Attention, ICML 2025.

Every block has two pools of m entries, one for the class token and one for the patches. An entry is a key k
[d] and t prompts [t, d]. Before a block a token x chooses the c entries of its own pool whose keys have the
largest cosine with it. All prompts of both pools enter, P = Re FFT2(dropout([class prompts; image prompts])),
and the attention's weights are masked behind their softmax, so that those of a row no longer sum to 1:

    A = softmax(Q [K, K_P]^T / sqrt(d_h));    out = (A * M) [V, V_P];    M = 1 on all image tokens and on the
    prompts
    chosen by the token of the row, else 0.   Outputs of the prompts are not used.

    loss = cross-entropy + match_weight * sum over blocks and both pools of the mean of 1 - cos(x, chosen
    keys)

The mean is over tokens and chosen keys. Only that term moves the keys; it moves the prompts of the blocks
before too, as x is not cut off. In the first `random_epochs` epochs of training entries are chosen at random.

Here the block's own attention reads all prompts, and a branch beside it takes back what M hides: with the
attention recomputed, - (A * (1 - M)) [V, V_P] through the output projection without its bias. The same
numbers, to rounding.

All this is the released code's (VFPT_TCPA, the one form that is there). Not here: its mixup, and the
convolution on the images that one of its scripts (CUB) adds. Own choice where it has no such backbone:
register tokens choose from the class token's pool, each by itself, and where no token stands before the
patches, theirs is the only pool.
"""

from typing import Any, ClassVar

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.models.contract import Flow, Geometry, Method, Place, drop, split_heads
from visprompt.models.methods.adapters import check_probability


class TCPA(Method):
    """Deep prompts of which every token sees those alone whose keys fit it.

    Args:
        backbone: The backbone whose width and number of blocks shape the pools.
        pool_size: Entries of a pool (m).
        chosen: How many a token chooses (c).
        length: Prompts of an entry (t).
        match_weight: Of the loss between tokens and the keys they choose.
        random_epochs: First epochs in which training chooses at random.
        dropout: Dropout on prompt values before the transform, drawn for every image anew.

    Attributes:
        prompts: [blocks, pools, pool_size, length, width], U(-1, 1); the class token's pool, then the
            patches'.
        keys: [blocks, pools, pool_size, width], U(-1, 1).
        epochs: How many are behind, a number of type int64; saved, so that a resumed run goes on.

    Raises:
        UserError: A number lies outside its range, or (`attach`) the blocks have no plain attention.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"tokens", "branches", "stream"})
    places: ClassVar[frozenset[Place]] = frozenset({Place.ATTENTION})
    tokenwise: ClassVar[bool] = False

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
        least: dict[str, tuple[float, int]] = {
            **{"pool_size": (pool_size, 1), "chosen": (chosen, 1), "length": (length, 1)},
            **{"match_weight": (match_weight, 0), "random_epochs": (random_epochs, 0)},
        }
        for option, (value, lowest) in least.items():
            if value < lowest:
                raise UserError(f"method.{option}={value} is too small: give at least {lowest}")
        if chosen > pool_size:
            raise UserError(
                f"method.chosen={chosen} is more than a pool holds: give at most method.pool_size={pool_size}"
            )
        check_probability("dropout", dropout)
        self.chosen, self.match_weight, self.random_epochs = chosen, match_weight, random_epochs
        self.dropout, self._prefix = nn.Dropout(dropout), backbone.num_prefix
        pools = (self.num_blocks, 2 if self._prefix else 1, pool_size)
        self.prompts = nn.Parameter(torch.empty(*pools, length, backbone.width).uniform_(-1, 1))
        self.keys = nn.Parameter(torch.empty(*pools, backbone.width).uniform_(-1, 1))
        self.register_buffer("epochs", torch.tensor(0))
        self._backbone: tuple[Any, ...] = ()  # in a tuple, so that its parameters stay the backbone's alone
        self._state: dict[
            str, Tensor
        ] = {}  # of the forward that runs: tokens, mask, prompts, and the loss so far

    def attach(self, backbone: Geometry) -> None:
        """Keep the backbone, whose attentions are masked."""
        attentions = [getattr(block, "attn", None) for block in backbone.blocks]
        if any(type(attn) is not Attention or not isinstance(attn.norm, nn.Identity) for attn in attentions):
            raise UserError(
                "method tcpa cannot work on this backbone: it masks the weights of timm's plain attention, "
                "and these "
                f"blocks, of class {type(backbone.blocks[0]).__name__}, have another; choose a plain ViT"
            )
        self._backbone = (backbone,)

    def token_flow(self) -> tuple[Flow, ...]:
        """Own prompts enter before every block."""
        return (Flow.ENTER,) * self.num_blocks

    def shift(self, block: int, x: Tensor) -> Tensor:
        """Let the tokens [B, n, width] choose; they stay as they are."""
        if not block:
            self._state = {}
        parts = (x[:, : self._prefix], x[:, self._prefix :]) if self._prefix else (x,)
        chosen = [self._choose(block, pool, part) for pool, part in enumerate(parts)]
        count = chosen[0][0].shape[-1]
        behind = count * (len(parts) - 1)  # prompts of the other pool, which a token does not see
        seen = [F.pad(own, (pool * count, behind - pool * count)) for pool, (own, _) in enumerate(chosen)]
        self._state |= {"x": x, "hidden": 1 - torch.cat(seen, dim=1)}
        if self.training and torch.is_grad_enabled() and self.match_weight:
            distance = torch.stack([away for _, away in chosen]).sum(dim=0)
            self._state["distance"] = self._state["distance"] + distance if block else distance
        return x

    def _choose(self, block: int, pool: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return which prompts of a pool tokens [B, n, width] see, [B, n, pool_size * length], and their mean distance [B]."""
        similarity = F.normalize(x.float(), dim=-1) @ F.normalize(self.keys[block, pool].float(), dim=-1).T
        by_chance = self.training and self.epochs < self.random_epochs
        scores = torch.rand_like(similarity) if by_chance else similarity
        chosen = scores.topk(self.chosen, dim=-1).indices
        distance = (1 - similarity.gather(-1, chosen)).mean(dim=(1, 2))
        seen = torch.zeros_like(similarity).scatter(-1, chosen, 1.0)
        return seen.repeat_interleave(self.prompts.shape[3], dim=-1), distance

    def tokens(self, block: int, x: Tensor, last: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return prompts of both pools, [1, p, width], or [B, p, width] while dropout is active."""
        prompts = drop(self.dropout, self.prompts[block].flatten(0, 2)[None], len(x))
        # float: there is no transform of 16-bit numbers on every device
        self._state["prompts"] = torch.fft.fft2(prompts.float()).real.to(x.dtype)
        return self._state["prompts"]

    def branch(self, place: Place, block: int, x: Tensor, normed: Tensor | None) -> Tensor:
        """Take back what the tokens read of hidden prompts; x holds all, or those before the patches."""
        assert normed is not None
        (backbone,) = self._backbone
        own, (tokens, hidden, prompts) = (
            backbone.blocks[block],
            map(self._state.pop, ("x", "hidden", "prompts")),
        )
        attn, num_image = own.attn, tokens.shape[1]
        count = min(x.shape[1], num_image)  # where prompts are carried in full, they stand behind
        image = normed[:, :num_image] if x.shape[1] >= num_image else own.norm1(tokens)
        q, k, _ = split_heads(attn, attn.qkv(image))
        _, prompt_k, prompt_v = split_heads(attn, attn.qkv(own.norm1(prompts)))
        q = attn.q_norm(q[:, :, :count])
        keys = [attn.k_norm(part).expand(len(q), -1, -1, -1) for part in (k, prompt_k)]
        weights = (attn.scale * q @ torch.cat(keys, dim=2).mT).softmax(dim=-1)[..., num_image:]
        out = (weights * hidden[:, None, :count]).to(prompt_v.dtype) @ prompt_v
        out = out.transpose(1, 2).flatten(2)
        if attn.gate is not None:
            out = out * attn.gate(normed[:, :count]).sigmoid()
        # not by the layer itself: its bias is in the block's own attention
        out = own.ls1(F.linear(out, attn.proj.weight))
        return -F.pad(out, (0, 0, 0, x.shape[1] - count))

    def losses(self, task_loss: Tensor, head: nn.Module, labels: Tensor, weights: Tensor) -> Tensor:
        """Add each image's distance between tokens and chosen keys to the cross-entropies [B]."""
        distance = self._state.pop("distance", None)
        return task_loss if distance is None else task_loss + self.match_weight * distance

    def end_epoch(self, epoch: int) -> None:
        """Count the epochs."""
        self.epochs.fill_(epoch + 1)
