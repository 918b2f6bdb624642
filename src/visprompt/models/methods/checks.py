"""Checks of options and of blocks that several methods share; each raises one `UserError`."""

import math
from collections.abc import Sequence
from typing import Any, cast

from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import nn

from visprompt.errors import UserError, unknown
from visprompt.models.contract import POOLS, Flow, Geometry, Method


def check_least(least: int, **options: float) -> None:
    """Raise a UserError if an option is below the least value allowed.

    Args:
        least: The smallest value allowed.
        **options: Values by option, for example `check_least(1, window=16, stride=8)`.
    """
    for option, value in options.items():
        if value < least:
            raise UserError(f"method.{option}={value} is too small: give at least {least}")


def check_size(option: str, value: int) -> None:
    """Raise a UserError unless the option that decides how much is tuned is 1 or more."""
    if value < 1:
        raise UserError(f"method.{option}={value} is too small: give at least 1, or use method=linear")


def check_rank(value: int, width: int) -> None:
    """Raise a UserError unless a low-rank update of [width, width] matrices can have this rank."""
    check_size("rank", value)
    if value > width:
        raise UserError(
            f"method.rank={value} is larger than the width {width} of the layers, which bounds the rank of "
            f"an update: give 1 to {width}"
        )


def check_scale(value: float) -> None:
    """Raise a UserError unless `scale` is a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"method.scale={value} is not a positive finite number: give a number above 0")


def check_probability(option: str, value: float) -> None:
    """Raise a UserError unless an option's value lies in [0, 1)."""
    if not 0 <= value < 1:
        raise UserError(f"method.{option}={value} is not a probability: give a number from 0 to below 1")


def check_share(option: str, value: float) -> None:
    """Raise a UserError unless an option's value lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise UserError(f"method.{option}={value} is not a share: give a number from 0 to 1")


def plain_attentions(
    backbone: Geometry, method: str, purpose: str, *, without_norm: bool = False
) -> tuple[Attention, ...]:
    """Return the attention of every block; refuse a backbone where one is not timm's plain `Attention`.

    Args:
        backbone: The backbone.
        method: The method's name, for the message.
        purpose: What the method does with the attentions, for the message: "it reads its prompts through".
        without_norm: Whether an attention with a norm before its output projection is refused too.

    Raises:
        UserError: A block has another attention, such as one in windows or with rotary positions.
    """
    attentions = [getattr(block, "attn", None) for block in backbone.blocks]
    plain = all(type(attention) is Attention for attention in attentions)
    if plain and without_norm:
        plain = all(isinstance(cast(Attention, attention).norm, nn.Identity) for attention in attentions)
    if not plain:
        raise UserError(
            f"method {method} cannot work on this backbone: {purpose} timm's plain attention, and these "
            f"blocks, of class {type(backbone.blocks[0]).__name__}, have another; choose a plain ViT"
        )
    return tuple(cast(list[Attention], attentions))


def check_plain_blocks(backbone: Geometry, blocks: Sequence[int], option: str) -> None:
    """Refuse blocks other than timm's plain one, where one linear layer gives queries, keys and values.

    Args:
        backbone: The backbone.
        blocks: Indices of the blocks whose attentions are read.
        option: The option that reads them, as on the command line: "method.init=vipamin".

    Raises:
        UserError: A block is of another class (windows, rotary positions), or its attention has a norm or a
            gate before the output projection.
    """
    for index in blocks:
        block: Any = backbone.blocks[index]
        attn = getattr(block, "attn", None)
        plain = (
            type(block) is Block
            and type(attn) is Attention
            and type(attn.qkv) is nn.Linear
            and isinstance(attn.norm, nn.Identity)
            and attn.gate is None
        )
        if not plain:
            name, _, value = option.partition("=")
            raise UserError(
                f"{option} reads the attention of plain ViT blocks, and block {index} of this backbone, of "
                f"class {type(block).__name__}, has another: give another {name} than {value}, or choose a "
                "plain ViT"
            )


def check_pool(method: Method, backbone: Geometry) -> None:
    """Refuse a `Method.pool` whose tokens do not exist after the last block; needs the final `token_flow`.

    Raises:
        UserError: The word is unknown, or there are no such outputs after the last block.
    """
    if method.pool is None:
        return
    if method.pool not in POOLS:
        raise unknown("method.pool", method.pool, POOLS)
    if "tokens" not in backbone.sites:
        raise UserError(
            f"method.pool={method.pool} reads tokens, which this backbone does not have: give "
            "method.pool=null"
        )
    if method.pool == "cls" and not backbone.has_class_token:
        raise UserError(
            "method.pool=cls needs a class token, which this backbone does not have: give another "
            "method.pool, or null"
        )
    has_prompts = False  # after the last block
    for flow in method.token_flow():
        has_prompts = has_prompts if flow is Flow.KEEP else flow is not Flow.DROP
    if method.pool in ("prompt", "image_prompt") and not has_prompts:
        raise UserError(
            f"method.pool={method.pool} reads prompts after the last block, which they do not reach: let "
            "them enter or flow on to it (method.depth=null, depth_from=last or carry_over=true, and a "
            "location that prepends)"
        )
