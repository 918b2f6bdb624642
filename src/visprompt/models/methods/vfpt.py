"""Visual Fourier prompt tuning. Zeng et al., Visual Fourier Prompt Tuning, NeurIPS 2024.

Of each block's prompts P the first floor(share * p) enter as Re(F_tokens(F_width(P))), an unnormalised
two-dimensional Fourier transform of themselves; the others enter as they are. No parameter is added to
VPT-deep's.

As in the released code, dropout comes before the transform. Different from it: prompts stand behind the image
tokens, as in `visprompt.models.methods.vpt`, and the two one-dimensional transforms are one call.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from visprompt.errors import UserError
from visprompt.models.contract import Geometry
from visprompt.models.methods.vpt import VPT


class VFPT(VPT):
    """VPT-deep, a share of whose prompts is Fourier transformed.

    Args:
        backbone: The backbone whose width, patch size and number of blocks shape the prompts.
        num_tokens: Prompt tokens of a block (p).
        fourier_share: Share of them that is transformed, rounded down to whole tokens; 0 is VPT-deep.
        depth: Number of blocks that get prompts of their own; None means all.
        depth_from: "first" or "last": which blocks these are.
        dropout: Dropout on prompt values before the transform, drawn for every image anew.

    Attributes:
        prompts: [depth, num_tokens, width], drawn as VPT's.
        num_fourier: How many tokens of a block are transformed.

    Raises:
        UserError: A number lies outside its range, or a word is unknown.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __init__(
        self,
        backbone: Geometry,
        num_tokens: int = 10,
        fourier_share: float = 0.5,
        depth: int | None = None,
        depth_from: str = "first",
        dropout: float = 0.1,
    ) -> None:
        super().__init__(backbone, num_tokens=num_tokens, depth=depth, depth_from=depth_from, dropout=dropout)
        if not 0 <= fourier_share <= 1:
            raise UserError(f"method.fourier_share={fourier_share} is not a share: give a number from 0 to 1")
        # a share such as 0.29 of 100 tokens is 28.999... in binary: it means 29
        self.num_fourier = math.floor(fourier_share * num_tokens + 1e-6)

    def tokens(self, block: int, x: Tensor, last: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return prompts of a block, [1, p, width], or [B, p, width] while dropout is active."""
        prompts = super().tokens(block, x, last)
        if not self.num_fourier:
            return prompts
        # float: there is no transform of 16-bit numbers on every device
        fourier = torch.fft.fft2(prompts[:, : self.num_fourier].float()).real.to(prompts.dtype)
        return torch.cat([fourier, prompts[:, self.num_fourier :]], dim=1)
