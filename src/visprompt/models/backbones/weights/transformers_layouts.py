"""Convert vision transformers from the names of Hugging Face's transformers to timm's names.

ViT (also in ViTForImageClassification and ViT-MAE), DINOv2 with and without registers, and the image towers
of CLIP and SigLIP, under the names in their files and under those that transformers 5 has in memory.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import QuickGELU
from torch import Tensor, nn

from visprompt.errors import UserError

# every file of these layouts has one of these names, and no file of another layout does
_MARKS = ("embeddings.patch_embeddings.projection.weight", "embeddings.patch_embedding.weight")
_BLOCK = r"(?:encoder\.)?layers?\.(\d+)\."
_NAMES = (
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"embeddings\.class_embedding", "cls_token"),
    (r"embeddings\.(?:position_embeddings|position_embedding\.weight)", "pos_embed"),
    (r"embeddings\.(?:patch_embeddings\.projection|patch_embedding)\.", "patch_embed.proj."),
    (r"pre_layrnorm\.", "norm_pre."),
    (r"(?:layernorm|post_layernorm)\.", "norm."),
    (_BLOCK + r"(?:norm|layer_norm)([12])\.", r"blocks.\1.norm\2."),
    (_BLOCK + r"layernorm_before\.", r"blocks.\1.norm1."),
    (_BLOCK + r"layernorm_after\.", r"blocks.\1.norm2."),
    (
        _BLOCK + r"(?:attention\.attention\.|attention\.|self_attn\.)(q|k|v)(?:uery|ey|alue|_proj)\.",
        r"blocks.\1.attn.\2.",
    ),
    (
        _BLOCK + r"(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.",
        r"blocks.\1.attn.proj.",
    ),
    (_BLOCK + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (_BLOCK + r"mlp\.(fc[12]|gate_proj|up_proj)\.", r"blocks.\1.mlp.\2."),
    (_BLOCK + r"(?:intermediate\.dense|mlp\.weights_in)\.", r"blocks.\1.mlp.fc1."),
    (_BLOCK + r"(?:output\.dense|mlp\.weights_out|mlp\.down_proj)\.", r"blocks.\1.mlp.fc2."),
)
_POOLING = (  # SigLIP's attention pooling; timm's has the query's projection apart from key's and value's
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.layernorm\.", "attn_pool.norm."),
    (r"head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"head\.mlp\.", "attn_pool.mlp."),
)
_POOLED = "head.attention.in_proj_"
_JOINT = {"attn.qkv.": ("attn.q.", "attn.k.", "attn.v."), "mlp.fc1.": ("mlp.gate_proj.", "mlp.up_proj.")}
_POOLERS = ("pooler.", "classifier.")  # layers after the class token that timm's models do not have


def to_timm(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the tensors of a transformers model to timm's names; return all others unchanged.

    Args:
        tensors: For example `encoder.layer.0.attention.attention.query.weight`, `.key.weight` and
            `.value.weight`, which timm joins to `blocks.0.attn.qkv.weight`.
    """
    if not any(mark in tensors for mark in _MARKS):
        return dict(tensors)
    patterns = _NAMES + (_POOLING if f"{_POOLED}weight" in tensors else ())
    renamed = {
        _renamed(name, patterns): tensor for name, tensor in tensors.items() if not name.startswith(_POOLERS)
    }
    for leaf in ("weight", "bias"):
        if isinstance(joined := renamed.get(f"{_POOLED}{leaf}"), Tensor) and joined.shape[0] % 3 == 0:
            query, key, value = renamed.pop(f"{_POOLED}{leaf}").chunk(3)
            renamed |= {f"attn_pool.q.{leaf}": query, f"attn_pool.kv.{leaf}": torch.cat([key, value])}
    for joint, parts in _JOINT.items():
        for name in [name for name in renamed if parts[0] in name]:
            names = [name.replace(parts[0], part) for part in parts]
            if all(isinstance(renamed.get(part), Tensor) for part in names):
                renamed[name.replace(parts[0], joint)] = torch.cat([renamed.pop(part) for part in names])
    for name, ndim in (("cls_token", 3), ("pos_embed", 3)):  # CLIP's are [width] and [tokens, width]
        while isinstance(renamed.get(name), Tensor) and renamed[name].ndim < ndim:
            renamed[name] = renamed[name][None]
    if "register_tokens" in renamed:  # timm's filter detects DINOv2, and its registers, by the mask token
        renamed.setdefault("mask_token", renamed["register_tokens"][0, :1])
    return renamed


def _renamed(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, text in patterns:
        if match := re.match(pattern, name):
            return match.expand(text) + name[match.end() :]
    return name


def check_activation(file: Path, tensors: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse weights trained with QuickGELU for a model with GELU, and the reverse.

    The `config.json` in the file's folder says which it is. Names and shapes of the weights are the same, so
    without this check the features would be wrong silently, for OpenAI's CLIP for example.
    """
    if not any(name.endswith(_MARKS) for name in tensors):
        return
    try:
        config = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
        named = config.get("vision_config", config).get("hidden_act")
    except (OSError, ValueError, AttributeError, RecursionError):  # no such file, or one of another kind
        return
    quick = any(isinstance(module, QuickGELU) for module in model.modules())
    if not isinstance(named, str) or (named == "quick_gelu") == quick:
        return
    name = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture"))
    other = name.replace("_quickgelu", "") if quick else name.replace("_clip_", "_clip_quickgelu_")
    remedy = "choose another backbone.name"
    if other != name and timm.is_model(other):
        remedy = f"set backbone.name={other}"
    raise UserError(
        f"{file} was trained with the activation {named} (config.json in its folder) and {name} has "
        f"{'quick_gelu' if quick else 'gelu'}: {remedy}"
    )
