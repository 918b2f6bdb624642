"""Visual Fourier prompt tuning. Zeng et al., Visual Fourier Prompt Tuning, NeurIPS 2024.

The first floor(share * p) prompts P of each block enter as Re(F_tokens(F_width(P))), the real part of their
unnormalised two-dimensional Fourier transform; the others enter unchanged. There are no parameters besides
those of VPT-deep.

As in the released code, dropout comes before the transform. Different from it: prompts come after the image
tokens, as in `visprompt.models.methods.vpt`, and the two one-dimensional transforms are one call.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from visprompt.models.contract import Geometry
from visprompt.models.methods.checks import check_share
from visprompt.models.methods.vpt import VPT


class VFPT(VPT):
    """VPT-deep with a share of its prompts Fourier transformed.

    Args:
        backbone: The backbone whose width, patch size and number of blocks shape the prompts.
        num_tokens: Prompt tokens of a block (p).
        fourier_share: Share of them that is transformed, rounded down to whole tokens; 0 is VPT-deep.
        depth: Number of blocks that get prompts; None means all.
        depth_from: "first" or "last": which blocks these are.
        dropout: Dropout on prompt values before the transform, drawn for every image anew.

    Attributes:
        prompts: [depth, num_tokens, width], drawn as VPT's.
        num_fourier: Number of tokens of a block that are transformed.

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
        check_share("fourier_share", fourier_share)
        # 0.29 * 100 is 28.999... in floating point, and should be 29
        self.num_fourier = math.floor(fourier_share * num_tokens + 1e-6)

    def tokens(self, block: int, x: Tensor, last: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return a block's prompts, [1, p, width], or [B, p, width] while dropout is active."""
        prompts = super().tokens(block, x, last)
        if not self.num_fourier:
            return prompts
        # in float32: not every device has a 16-bit FFT
        fourier = torch.fft.fft2(prompts[:, : self.num_fourier].float()).real.to(prompts.dtype)
        return torch.cat([fourier, prompts[:, self.num_fourier :]], dim=1)
