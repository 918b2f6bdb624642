"""An allow-list of the options of timm's models that a backbone may be built with (`backbone.kwargs`).

timm's factory also takes options that download a file, or read and write at a path (`pretrained`,
`cache_dir`, `checkpoint_path`, `pretrained_cfg_overlay.url`, ...). They are not allowed, neither on the
command line nor in a tuned state, so that whoever gets a tuned state can build its backbone.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from visprompt.errors import UserError, unknown

_LARGEST = 16384  # of any size or count; the widest published transformers are smaller
_MOST = 8  # entries of a list, which has one for each stage or is a pair


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _are_counts(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return 0 < len(value) <= _MOST and all(map(_is_count, value))
    return value is None or _is_count(value)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite int or float of at most 1e6 in absolute value; a bool is not."""
    return type(value) in (int, float) and abs(value) <= 1e6 and math.isfinite(value)


def _is_number(value: Any) -> bool:
    return value is None or is_number(value)


def _is_one_of(*words: str) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, str) and value in words)


_WORDS: Mapping[str, tuple[str, ...]] = {
    "act_layer": (
        "gelu",
        "gelu_tanh",
        "quick_gelu",
        "relu",
        "silu",
        "swish",
        "mish",
        "hard_swish",
        "leaky_relu",
    ),
    "attn_type": ("eva", "rope"),
    "global_pool": ("", "avg", "avgmax", "max", "token"),
    "norm_layer": ("batchnorm2d", "groupnorm", "layernorm", "layernorm2d", "rmsnorm", "simplenorm"),
    "pos_embed": ("", "learn", "none"),
    "rope_grid_indexing": ("ij", "xy"),
    "rope_type": ("cat", "dinov3", "mixed"),
    "stem_type": ("", "deep", "deep_tiered", "overlap", "overlap_act", "overlap_tiered", "patch"),
    "weight_init": ("", "jax", "jax_nlhb", "moco", "reset", "skip"),
}
_COUNTS = (
    "attn_pool_num_heads",
    "base_width",
    "block_reduce_first",
    "cardinality",
    "channels",
    "depth",
    "depths",
    "dims",
    "down_kernel_size",
    "embed_dim",
    "head_dim",
    "head_hidden_size",
    "img_size",
    "kernel_sizes",
    "layers",
    "num_heads",
    "num_kv_heads",
    "num_reg_tokens",
    "output_stride",
    "patch_size",
    "ref_feat_shape",
    "reg_tokens",
    "rope_mrope_section",
    "stem_width",
    "swiglu_align_to",
    "window_size",
)
_NUMBERS = (
    "attn_drop_rate",
    "attn_pool_mlp_ratio",
    "drop_block_rate",
    "drop_path_rate",
    "drop_rate",
    "head_init_scale",
    "init_values",
    "ls_init_value",
    "mlp_ratio",
    "norm_eps",
    "patch_drop_rate",
    "pos_drop_rate",
    "proj_drop_rate",
    "rope_grid_offset",
    "rope_jitter_coords",
    "rope_rescale_coords",
    "rope_shift_coords",
    "rope_temperature",
)
_FLAGS = (
    "always_partition",
    "attn_only_layer_scale",
    "avg_down",
    "class_token",
    "conv_bias",
    "conv_mlp",
    "dynamic_img_pad",
    "dynamic_img_size",
    "fc_norm",
    "final_norm",
    "fix_init",
    "head_norm_first",
    "no_embed_class",
    "pool_include_prefix",
    "pre_norm",
    "proj_bias",
    "qk_norm",
    "qkv_bias",
    "qkv_fused",
    "replace_stem_pool",
    "rope_rotate_half",
    "scale_attn_inner",
    "scale_attn_norm",
    "scale_mlp",
    "scale_mlp_norm",
    "strict_img_size",
    "swiglu_mlp",
    "use_abs_pos_emb",
    "use_fc_norm",
    "use_grn",
    "use_post_norm",
    "use_post_transformer_norm",
    "use_pre_transformer_norm",
    "use_rot_pos_emb",
    "zero_init_last",
)
_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_FLAGS, (_is_flag, "true or false")),
    **dict.fromkeys(_COUNTS, (_are_counts, f"a whole number from 0 to {_LARGEST}, or a short list of them")),
    **dict.fromkeys(_NUMBERS, (_is_number, "a number")),
    **{
        name: (_is_one_of(*words), "one of " + ", ".join(filter(None, words)))
        for name, words in _WORDS.items()
    },
}
_OVERLAY = ("mean", "std")  # what images are normalised with, for weights that are not timm's


def check_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Refuse options of a timm model that are not in the allow-list, or have a value of the wrong kind.

    Args:
        kwargs: Options by name, for example `{"img_size": 64, "depth": 6}`.

    Raises:
        UserError: The message names the option, and what to give instead.
    """
    for name, value in kwargs.items():
        if name == "pretrained_cfg_overlay":
            _check_overlay(value)
        elif name not in _KINDS:
            raise unknown("option in backbone.kwargs", name, [*_KINDS, "pretrained_cfg_overlay"])
        elif not _KINDS[name][0](value):
            raise UserError(f"backbone.kwargs.{name}={value!r:.60} does not fit: give {_KINDS[name][1]}")


def _check_overlay(overlay: Any) -> None:
    name = "backbone.kwargs.pretrained_cfg_overlay"
    for key in overlay if isinstance(overlay, Mapping) else ():
        if key not in _OVERLAY:
            raise unknown(f"option in {name}", key, _OVERLAY)
    if not isinstance(overlay, Mapping) or not all(map(_are_three_numbers, overlay.values())):
        raise UserError(f"{name} does not fit: give mean and std, three numbers each")


def _are_three_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(is_number, value))
