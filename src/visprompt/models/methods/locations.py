"""Where prompts enter. Jia et al., Visual Prompt Tuning, ECCV 2022, section 4.3 and its released code.

prepend         [x, P, E]          tokens before a block
add             [x, E + P]         one vector for each patch position
add_one         [x, E + 1 p^T]     one vector for all patch positions
prepend_pixel   [x, Conv(P), E]    pixel patches, through the frozen patch convolution, before the first block
pad             E = Conv(pad(I))   pixels around the image; U[0, 1], normalised by ImageNet's mean and std
concat_channel  E = Conv(I) + W P  further input channels P, patch embedding W tuned (the code's `below`)

Different from the released code: `add` and `add_one` leave class and register tokens unchanged, as in the
paper's text; with `concat_channel` the pre-trained patch embedding of the three image channels (and a
ResNet's first norm) stays frozen, and the further channels start in U(-v, v) on every backbone, where that
code uses U[0, 1] on a ResNet.
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
VECTORS = ("prepend", "add", "add_one")  # prompts are vectors, before any block; the others are pixels
_SITES = {"pad": "pixels", "concat_channel": "pixels"}  # all others need "tokens"


def check_sites(location: str, backbone: Geometry) -> None:
    """Refuse a location whose site the backbone does not offer.

    Raises:
        UserError: The message names the site, and the locations that work.
    """
    site = _SITES.get(location, "tokens")
    if site not in backbone.sites:
        fitting = [name for name in LOCATIONS if _SITES.get(name, "tokens") in backbone.sites]
        advice = f"give method.location={' or '.join(fitting)}" if fitting else "choose another backbone"
        raise UserError(
            f"method.location={location} cannot work on this backbone: it needs the site {site}, and the "
            f"backbone offers {', '.join(sorted(backbone.sites))}; {advice}"
        )


def tokens_at(location: str, num_tokens: int, backbone: Geometry, block: int) -> int:
    """Return the number of a block's prompts: one for each patch (add), 1 (add_one), or `num_tokens`."""
    if location == "add":
        return math.prod(backbone.grids[block])
    return 1 if location == "add_one" else num_tokens


def vpt_bound(patch_size: int, width: int) -> float:
    """Return the released code's bound of a uniform initialisation: sqrt(6 / (3 * patch^2 + width))."""
    return math.sqrt(6 / (3 * patch_size**2 + width))


def draw_pixels(location: str, num_tokens: int, backbone: Geometry, pad_resize: bool) -> Tensor:
    """Draw prompts that are pixels.

    Args:
        location: A location that is not in `VECTORS`.
        num_tokens: Number of patches (prepend_pixel), of pixels on each side (pad), or of channels
            (concat_channel); p below.
        backbone: The backbone they are for.
        pad_resize: Whether images shrink before padding, so that the padded image keeps their side.

    Returns:
        prepend_pixel: [p, 3, patch, patch] from U(-v, v), v by `vpt_bound`.
        concat_channel: [p, side, side], likewise.
        pad: [4, 3, p, side - p] from U(0, 1), where side is that of the padded image; see `pad`.

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
    """Refuse padding that makes images larger than the backbone takes.

    A plain timm ViT takes images of one side only. Padding grows them to side + 2p, which is then cut to a
    multiple of the patch size, so the side does not change while 2p is less than a patch.

    Raises:
        UserError: The side changes, and the model was not built for other sizes.
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
        prompts: The frame, in 0..1: [4, 3, p, side - p]. The first is the strip above the image, without the
            corner at its right; the others are the same strip of the image turned by 90, 180 and 270
            degrees. Together they cover the frame once.
        resize: Whether to shrink the images by 2p first, so that the side stays H; else it grows to H + 2p.
        patch_size: A side that grew is cut at the right and below to a multiple of this, as the released
            code's patch embedding does; timm's refuses such a side. 1 cuts nothing.

    Returns:
        [B, 3, side, side].
    """
    width = prompts.shape[2]
    side = prompts.shape[3] + width
    if resize:
        small = F.interpolate(images.float(), size=(side - 2 * width,) * 2, mode="bilinear", antialias=True)
        images = small.to(images.dtype)  # resized in float32: not every device has a 16-bit kernel
    scales = zip(prompts.unbind(1), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, strict=True)
    # plain numbers, because a GPU would wait for the copy of a tensor
    normalised = torch.stack([(channel - mean) / std for channel, mean, std in scales], dim=1)
    strips = F.pad(normalised, (0, width, 0, side - width))
    # strip k is at the top at first; k counter-clockwise quarter turns move it to its side of the frame
    frame = torch.stack([torch.rot90(strip, turns, (1, 2)) for turns, strip in enumerate(strips)]).sum(0)
    cut = side if resize else side // patch_size * patch_size
    return (F.pad(images, (width,) * 4) + frame)[..., :cut, :cut]


def patch_tokens(patch_embed: nn.Module, prompts: Tensor) -> Tensor:
    """Embed patches [p, 3, patch, patch] by the backbone's patch convolution and norm, as [1, p, width]."""
    proj, norm = patch_embed.get_submodule("proj"), patch_embed.get_submodule("norm")
    return cast(Tensor, norm(proj(prompts).flatten(1)))[None]


class MoreChannels(nn.Module):
    """A patch convolution with further input channels, which are the same for every image.

    Their term is added here and not as a shift before the first block, because a model may normalise its
    patch embedding (`patch_embed.norm`, `norm_pre`), and the further channels are part of what is normalised.
    They are convolved once for the whole batch.

    Args:
        base: The patch convolution.
        term: Computes what the further channels add, [1, width, grid, grid].
    """

    def __init__(self, base: nn.Module, term: Callable[[], Tensor]) -> None:
        super().__init__()
        self.base, self.term = base, term

    def forward(self, images: Tensor) -> Tensor:
        """Return the patch embeddings [B, width, grid, grid] of images [B, 3, H, W]."""
        return cast(Tensor, self.base(images)) + self.term()
