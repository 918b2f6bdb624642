"""Plain vision transformers of timm: supervised ViT, MAE, MoCo v3, DINO, DINOv2, DeiT III, CLIP, SigLIP.

Blocks of the classes in `block.is_proven` are run by `block.run_block`, which does not compute outputs that
nothing reads.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

from timm.layers import global_pool_nlc
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from visprompt.errors import UserError
from visprompt.models.backbones.block import Rows, attend, is_proven
from visprompt.models.backbones.token_family import TokenFamily
from visprompt.models.contract import Method
from visprompt.models.layers import keys_values


class ViT(TokenFamily):
    """A timm `VisionTransformer` without its head.

    Args:
        model: Any `VisionTransformer`: class token or not, register tokens, any pooling, dynamic image size.
        exact: False computes the prompt tokens' outputs in every block, as the papers' codes do; for
            comparison.

    Raises:
        UserError: The model is of another class, has no pooling, or its side is not a multiple of the patch
            size.
    """

    model_class: ClassVar[type[nn.Module]] = VisionTransformer
    model: VisionTransformer
    final_names = ("norm", "fc_norm")
    stem = "patch_embed.proj"

    def __init__(self, model: nn.Module, exact: bool = True) -> None:
        self.check_class(model)
        model = cast(VisionTransformer, model)
        if model.attn_pool is None and not model.global_pool:
            raise UserError(
                "the backbone has no pooling: set backbone.global_pool to token, avg, avgmax or max"
            )
        _check_sides(model)
        model.reset_classifier(0)
        super().__init__(model, exact)
        self.block_names = tuple(f"blocks.{i}" for i in range(len(model.blocks)))
        self.between_names = (None,) * self.num_blocks
        self.width = model.num_features
        self.widths = (self.width,) * self.num_blocks
        # 0 for blocks of other classes: no method may enter their attention
        self.heads = tuple(getattr(getattr(block, "attn", None), "num_heads", 0) for block in model.blocks)
        self.grids = (model.patch_embed.grid_size,) * self.num_blocks
        self.patch_size = model.patch_embed.patch_size[0]
        self.image_size = model.patch_embed.img_size[0]
        self.any_size = model.dynamic_img_size
        self.num_prefix, self.has_class_token = model.num_prefix_tokens, model.cls_token is not None
        everywhere = {"tokens", "weights", "pixels", "stream"}
        driven = {"modules", "keys_values", "branches"} if all(map(self.is_proven, model.blocks)) else set()
        self.sites = frozenset(everywhere | driven)

    @property
    def own_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the model was built for; they may differ."""
        height, width = self.model.patch_embed.img_size
        return height, width

    def check_size(self, images: Tensor, method: Method) -> None:
        """Refuse images of a size that the method or the patch embedding does not support.

        Raises:
            UserError: The size is not the backbone's own or, if it takes any size, is not a multiple of the
                patch size.
        """
        super().check_size(images, method)
        (height, width), embed = images.shape[-2:], self.model.patch_embed
        if not self.any_size:
            if (height, width) != self.own_size:
                expected = " x ".join(map(str, self.own_size))
                raise UserError(
                    f"this backbone takes images of size {expected} only and got {height} x {width}: resize "
                    "them, or set backbone.image_size"
                )
        elif not embed.dynamic_img_pad and (height % embed.patch_size[0] or width % embed.patch_size[1]):
            raise UserError(
                f"images of {height} x {width} do not fit, because their sides are not multiples of the "
                f"patch size {self.patch_size}: crop or resize them"
            )

    def is_proven(self, block: nn.Module) -> bool:
        """Return whether the block is of the plain class."""
        return is_proven(block)

    def embed(self, images: Tensor, method: Method) -> Tensor:
        """Return image tokens [B, n, width] before the first block; class and register tokens come first."""
        self.check_size(images, method)
        model = self.model
        tokens = model._pos_embed(model.patch_embed(method.pixels(images)))
        return cast(Tensor, model.norm_pre(model.patch_drop(tokens)))

    def attend(
        self, attn: Any, read: Tensor, context: Sequence[Tensor], rows: Rows | None, mask: Tensor | None
    ) -> Tensor:
        """Return timm's plain attention of `read` [B, n, width] over itself, the context and `rows`."""
        return attend(attn, read, context, rows, mask)

    def keys_values(self, index: int, prompts: Tensor) -> Rows:
        """Return the keys and values that prompts give in a block."""
        block: Any = self.model.blocks[index]
        return keys_values(block.attn, block.norm1(prompts))

    def carry(self, index: int, x: Tensor, num_image: int) -> Tensor:
        """Run timm's block on all tokens."""
        return cast(Tensor, self.model.blocks[index](x))

    def pooled_rows(self, num_image: int, pool: str | None) -> tuple[slice, bool]:
        """Return the rows of the last block's output that are pooled, and whether they include prompts."""
        model = self.model
        if pool is not None:
            rows = {
                "cls": slice(0, 1),
                "image": slice(self.num_prefix, num_image),
                "prompt": slice(num_image, None),
                "image_prompt": slice(self.num_prefix, None),
            }
            return rows[pool], pool in ("prompt", "image_prompt")
        if model.attn_pool is None and model.global_pool == "token":
            return slice(0, 1), False
        return slice(0 if self._pools_prefix() else model.num_prefix_tokens, num_image), False

    def _pools_prefix(self) -> bool:
        """Return whether a pooling over tokens reads class and register tokens with the patches."""
        return self.model.pool_include_prefix

    def norm(self, x: Tensor) -> Tensor:
        """Apply the final norms to each token; timm has one of them before and one after the pooling."""
        return cast(Tensor, self.model.fc_norm(self.model.norm(x)))

    def pool(self, x: Tensor, pool: str | None) -> Tensor:
        """Apply the final norm to the rows chosen by `pooled_rows`, and pool them, as timm does."""
        model = self.model
        x = model.norm(x)
        if pool is not None:
            x = x.mean(dim=1)
        elif model.attn_pool is not None:
            x = model.attn_pool(x)
        else:
            x = global_pool_nlc(x, pool_type=model.global_pool, num_prefix_tokens=0)
        return cast(Tensor, model.head_drop(model.fc_norm(x)))


def _check_sides(model: VisionTransformer) -> None:
    """Refuse a side that patches do not fill, unless the model was pre-trained with it, as one SigLIP was."""
    embed, config = model.patch_embed, getattr(model, "pretrained_cfg", None) or {}
    if tuple(config.get("input_size", ())[1:]) == embed.img_size or getattr(embed, "dynamic_img_pad", False):
        return
    for side, patch in zip(embed.img_size, embed.patch_size, strict=True):
        if side % patch:
            raise UserError(
                f"backbone.image_size={side} is not a multiple of the patch size {patch}: give a multiple"
            )
