"""Where prompts enter. Jia et al., Visual Prompt Tuning, ECCV 2022, section 4.3 and its released code.

prepend         [x, P, E]          tokens before a block
add             [x, E + P]         one vector for each patch position
add_one         [x, E + 1 p^T]     one vector for all patch positions
prepend_pixel   [x, Conv(P), E]    patches of pixels, through the frozen patch convolution, before the first
block
pad             E = Conv(pad(I))   pixels around the image; U[0, 1], normalised by ImageNet's mean and
deviation
concat_channel  E = Conv(I) + W P  further input channels with a patch embedding of their own (the code's
`below`)

Different from the released code: `add` and `add_one` leave class and register tokens alone, as the paper's
text has it; beside further channels, the three channels' own patch embedding (and a ResNet's first norm)
stays frozen, with its pre-trained values; further channels start in U(-v, v) on every backbone, where the
code's ResNet has U[0, 1].
"""

import math
from collections.abc import Callable
from typing import cast

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.models.contract import Geometry

LOCATIONS = ("prepend", "add", "add_one", "prepend_pixel", "pad", "concat_channel")
VECTORS = (
    "prepend",
    "add",
    "add_one",
)  # prompts are vectors, before any block; elsewhere pixels, before the first
_SITES = {"pad": "pixels", "concat_channel": "pixels"}


def check_sites(location: str, backbone: Geometry) -> None:
    """Refuse a location that the backbone has no site for.

    Raises:
        UserError: It names the site.
    """
    site = _SITES.get(location, "tokens")
    if site not in backbone.sites:
        fitting = [one for one in LOCATIONS if _SITES.get(one, "tokens") in backbone.sites]
        advice = f"give method.location={' or '.join(fitting)}" if fitting else "choose another backbone"
        raise UserError(
            f"method.location={location} cannot work on this backbone: it needs the site {site}, and the "
            f"backbone offers {', '.join(sorted(backbone.sites))}; {advice}"
        )


def tokens_at(location: str, num_tokens: int, backbone: Geometry, block: int) -> int:
    """Return the number of vectors before a block.

    `num_tokens` where they are prepended, else as many as the location has.
    """
    if location == "add":
        return math.prod(backbone.grids[block])
    return 1 if location == "add_one" else num_tokens


def vpt_bound(patch_size: int, width: int) -> float:
    """Return the released code's bound of a uniform initialisation: sqrt(6 / (3 * patch^2 + width))."""
    return math.sqrt(6 / (3 * patch_size**2 + width))


def draw_pixels(location: str, num_tokens: int, backbone: Geometry, pad_resize: bool) -> Tensor:
    """Draw prompts that are pixels.

    Args:
        location: A location that is not one of `VECTORS`.
        num_tokens: Number of patches, of pixels on each side, or of channels (p).
        backbone: The backbone they are for.
        pad_resize: Whether the padded image has the side of the image before.

    Returns:
        [p, 3, patch, patch] or [p, side, side] from U(-v, v) with `vpt_bound`; [4, 3, p, side - p] from U(0,
        1).

    Raises:
        UserError: The padding leaves nothing of the image, or the image is not square.
    """
    side, patch = backbone.image_size, backbone.patch_size
    if location in ("pad", "concat_channel") and backbone.grids[0][0] != backbone.grids[0][1]:
        raise UserError(
            f"method.location={location} needs square images: choose another location for this backbone"
        )
    if location == "pad":
        if pad_resize and 2 * num_tokens >= side:
            raise UserError(
                f"method.num_tokens={num_tokens} pixels on each side leave nothing of an image of {side}: "
                f"give less than {side / 2:g}, or method.pad_resize=false"
            )
        return torch.rand(4, 3, num_tokens, side - num_tokens + (0 if pad_resize else 2 * num_tokens))
    bound = vpt_bound(patch, backbone.widths[0])
    shape = (num_tokens, 3, patch, patch) if location == "prepend_pixel" else (num_tokens, side, side)
    return torch.empty(shape).uniform_(-bound, bound)


def check_padded_side(backbone: Geometry, num_pixels: int) -> None:
    """Refuse an image that grows beyond what a backbone takes.

    A plain timm ViT takes images of its own side alone. Padding grows them to side + 2p, of which the patch
    embedding drops the remainder: below half a patch the side stays.

    Raises:
        UserError: The side becomes another one, and the model was not built for that.
    """
    side, patch = backbone.image_size, backbone.patch_size
    if (side + 2 * num_pixels) // patch != side // patch and not backbone.any_size:
        raise UserError(
            f"method.pad_resize=false with method.num_tokens={num_pixels} makes images of {side} pixels "
            f"{side + 2 * num_pixels} wide, which this backbone does not take: set "
            "+backbone.kwargs.dynamic_img_size=true, or give method.pad_resize=true"
        )


def pad(images: Tensor, prompts: Tensor, resize: bool, patch_size: int) -> Tensor:
    """Put a frame of pixels around images.

    Args:
        images: Normalised images [B, 3, H, H].
        prompts: The frame, in 0..1: [4, 3, p, side - p], the strip above the image without the corner at its
            right, and the same of the image turned by 90, 180 and 270 degrees. The four cover the frame once.
        resize: Shrink the images by 2p first, so that the side stays H; else it grows to H + 2p.
        patch_size: What is left of a side that it does not divide is dropped, right and below, as by the
            patch embedding of the released code; timm's refuses it. 1 drops nothing.

    Returns:
        [B, 3, side, side].
    """
    width = prompts.shape[2]
    side = prompts.shape[3] + width
    if resize:
        small = F.interpolate(images.float(), size=(side - 2 * width,) * 2, mode="bilinear", antialias=True)
        images = small.to(images.dtype)  # float: there is no such kernel for 16 bits on every device
    mean, std = (
        prompts.new_tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    strips = F.pad((prompts - mean) / std, (0, width, 0, side - width))
    # counter-clockwise: strip k of the turned image stands where k quarter turns bring the first
    frame = torch.stack([torch.rot90(strip, turns, (1, 2)) for turns, strip in enumerate(strips)]).sum(0)
    kept = side if resize else side // patch_size * patch_size
    return (F.pad(images, (width,) * 4) + frame)[..., :kept, :kept]


def patch_tokens(patch_embed: nn.Module, prompts: Tensor) -> Tensor:
    """Return tokens [1, p, width] of patches [p, 3, patch, patch], by the backbone's patch convolution and its norm."""
    proj, norm = patch_embed.get_submodule("proj"), patch_embed.get_submodule("norm")
    return cast(Tensor, norm(proj(prompts).flatten(1)))[None]


class MoreChannels(nn.Module):
    """A patch convolution that sees further channels, the same for every image.

    They enter here and not as a shift before the first block, because a model may normalise its patch
    embedding (`patch_embed.norm`, `norm_pre`): the further channels are part of what is normalised. They are
    convolved once for the batch.

    Args:
        base: The patch convolution.
        term: Gives what the further channels add, [1, width, grid, grid].
    """

    def __init__(self, base: nn.Module, term: Callable[[], Tensor]) -> None:
        super().__init__()
        self.base, self.term = base, term

    def forward(self, images: Tensor) -> Tensor:
        """Patch [B, width, grid, grid] of images [B, 3, H, W]."""
        return cast(Tensor, self.base(images)) + self.term()
