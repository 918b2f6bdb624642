"""Convolutional networks of timm.

ConvNeXt (both versions), and ResNet with ResNeXt, SE-ResNet and deep stems.

Their blocks take maps [B, channels, height, width], which cannot hold prompt tokens: methods enter through
the pixels, the layers and the weights. timm's blocks run one after the other, so that the output of blocks
before the tuned ones can be computed once. A frozen backbone stays in evaluation mode, so its batch norms
keep their statistics.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.models import convnext, resnet
from torch import Tensor, nn
from torch.func import functional_call

from visprompt.errors import UserError
from visprompt.models.backbones.family import Family, side_of
from visprompt.models.contract import Method


class ConvNet(Family):
    """A timm convolutional network without its head.

    Args:
        model: A model of exactly `model_class`. It takes images of any size; its own size is `input_size` in
            its `pretrained_cfg`, else 224.
        exact: No effect: there are no prompt tokens.

    Raises:
        UserError: The model is of another class, or has no pooling.
    """

    any_size = True
    sites = frozenset({"weights", "modules", "pixels"})

    def __init__(self, model: nn.Module, exact: bool = True) -> None:
        self.check_class(model)
        cast(Any, model).reset_classifier(0)
        super().__init__(model, exact)
        order = self._order()
        self.block_names, self.between_names = tuple(order), tuple(order.values())
        convs = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
        self.stem, conv = next(convs)
        self.patch_size = conv.kernel_size[0]
        config = getattr(model, "pretrained_cfg", None) or {}
        self.image_size = (config.get("input_size") or (3, 224, 224))[-1]
        self.heads = (0,) * self.num_blocks
        self._measure()

    def _order(self) -> dict[str, str | None]:
        """Return each block's name, mapped to that of the module between it and the block before, or None."""
        raise NotImplementedError

    @torch.no_grad()
    def _measure(self) -> None:
        """Set widths and grids from a forward on meta tensors, which have shapes but no values."""
        shapes: list[torch.Size] = []
        hooks = [
            block.register_forward_hook(lambda *call: shapes.append(call[2].shape)) for block in self.blocks
        ]
        tensors = {name: t.to("meta") for name, t in (*self.named_parameters(), *self.named_buffers())}
        like = next(iter(tensors.values()))
        # two images: batch statistics need more than one
        images = like.new_empty(2, 3, self.image_size, self.image_size)
        features: Tensor = functional_call(self, tensors, (images, Method(self)))
        for hook in hooks:
            hook.remove()
        if features.ndim != 2:
            raise UserError("the backbone has no pooling: set backbone.global_pool to avg, avgmax or max")
        self.width = features.shape[1]
        self.widths = tuple(shape[1] for shape in shapes)
        self.grids = tuple((shape[2], shape[3]) for shape in shapes)

    def embed(self, images: Tensor, method: Method) -> Tensor:
        """Return maps [B, channels, height, width] of images [B, 3, H, W], before the first block."""
        raise NotImplementedError

    def pool(self, x: Tensor) -> Tensor:
        """Return features [B, width] from the last block's maps, as the model's classifier would get them."""
        return cast(Tensor, cast(Any, self.model).forward_head(x, pre_logits=True))

    def pooling(self, pool: str | None) -> str:
        """Return timm's word for the pooling; `pool`, which chooses tokens, has no effect here."""
        return str(cast(Any, getattr(self.model, "head", self.model)).global_pool.pool_type)

    def to_block(self, stop: int, images: Tensor, method: Method) -> Tensor:
        """Return flat maps [B, channels, height * width] before block `stop`; see `Family.to_block`.

        Raises:
            UserError: The images are not square, so `from_block` could not restore height and width.
        """
        x = self._through(self.embed(images, method), 0, stop)
        flat = x.flatten(2)
        if x.shape[2] != x.shape[3]:
            raise UserError(
                f"the first blocks are computed once for all epochs, which needs square images, and these "
                f"are {images.shape[-2]} x {images.shape[-1]}: crop or resize them"
            )
        return flat

    def from_block(self, start: int, x: Tensor, method: Method) -> Tensor:
        """Return pooled features [B, width] of the flat maps of `to_block`, or of maps before flattening."""
        if x.ndim == 3:
            x = x.unflatten(2, side_of(x.shape[2], self.grids[start]))
        return self.pool(self._through(x, start, self.num_blocks))

    def maps_from(
        self, start: int, x: Tensor, method: Method, blocks: Sequence[int], normed: bool
    ) -> list[Tensor]:
        """Return the maps of blocks; see `Family.maps`."""
        if x.ndim == 3:
            x = x.unflatten(2, side_of(x.shape[2], self.grids[start]))
        outputs: dict[int, Tensor] = {}
        self._through(x, start, blocks[-1] + 1, outputs)
        maps = [outputs[i] for i in blocks]
        return [*maps[:-1], self.norm(maps[-1])] if normed else maps

    def norm(self, x: Tensor) -> Tensor:
        """Apply the norm after the last block, if there is one, to each position of [B, width, h, w]."""
        return x

    def _through(self, x: Tensor, start: int, stop: int, outputs: dict[int, Tensor] | None = None) -> Tensor:
        """Run blocks `start` to `stop` - 1, and what is between them, on the maps before block `start`."""
        for i in range(start, stop):
            x = self.model.get_submodule(self.block_names[i])(x)
            if outputs is not None:
                outputs[i] = x
            between = self.between_names[i + 1] if i + 1 < self.num_blocks else None
            if between is not None:
                x = self.model.get_submodule(between)(x)
        return x


class ConvNeXt(ConvNet):
    """A timm `ConvNeXt` without its head.

    Any stem, linear or convolutional MLPs, norm before or after the pooling.

    Args:
        model: The model; it takes images of any size.
        exact: No effect: there are no prompt tokens.

    Raises:
        UserError: The model is of another class, has no pooling, or has a stage without blocks.
    """

    model_class = convnext.ConvNeXt
    model: convnext.ConvNeXt

    def __init__(self, model: nn.Module, exact: bool = True) -> None:
        super().__init__(model, exact)
        norms = {
            name: module for name, module in self.model.named_modules() if name in ("norm_pre", "head.norm")
        }
        self.final_names = tuple(name for name, norm in norms.items() if not isinstance(norm, nn.Identity))

    def _order(self) -> dict[str, str | None]:
        order: dict[str, str | None] = {}
        for i, stage in enumerate(cast(Any, self.model.stages)):
            if not len(stage.blocks):
                raise UserError(
                    f"stage {i} of the backbone has no blocks: give backbone.kwargs.depths of at least 1"
                )
            before = None if i == 0 or isinstance(stage.downsample, nn.Identity) else f"stages.{i}.downsample"
            order |= {f"stages.{i}.blocks.{j}": before if j == 0 else None for j in range(len(stage.blocks))}
        return order

    def embed(self, images: Tensor, method: Method) -> Tensor:
        """Return maps [B, channels, height, width] before the first block, after the first downsampling."""
        self.check_size(images, method)
        maps = self.model.stem(method.pixels(images))
        return cast(Tensor, cast(Any, self.model.stages[0]).downsample(maps))

    def norm(self, x: Tensor) -> Tensor:
        """Apply timm's norms before and after the pooling; the head is without its pooling here."""
        x = self.model.norm_pre(x)
        return cast(Any, self.model.head).norm(x) if "head.norm" in self.final_names else x

    def pool(self, x: Tensor) -> Tensor:
        """Return features [B, width] from the last block's maps."""
        return super().pool(self.model.norm_pre(x))


class ResNet(ConvNet):
    """A timm `ResNet` without its head: basic blocks or bottlenecks, any stem.

    There is no norm after the last block.

    Args:
        model: The model; it takes images of any size.
        exact: No effect: there are no prompt tokens.

    Raises:
        UserError: The model is of another class, or has no pooling.
    """

    model_class = resnet.ResNet
    model: resnet.ResNet

    def _order(self) -> dict[str, str | None]:
        stages = ("layer1", "layer2", "layer3", "layer4")
        return {
            f"{stage}.{name}": None
            for stage in stages
            for name, _ in getattr(self.model, stage).named_children()
        }

    def embed(self, images: Tensor, method: Method) -> Tensor:
        """Return maps [B, channels, height, width] before the first block."""
        self.check_size(images, method)
        model = self.model
        return cast(Tensor, model.maxpool(model.act1(model.bn1(model.conv1(method.pixels(images))))))
