"""config.json of a diffusers `UNet2DModel`: to and from the arguments of a UNet."""

import math
from typing import Any

from ddpm_tf import checks
from ddpm_tf.convert.json_file import is_int, is_number, read_object, shown
from ddpm_tf.errors import InputError
from ddpm_tf.networks import UNet

_NORM_EPS = 1e-6
_MAX_CHANNELS = 65536
# {key: (its value for the network of Ho et al., diffusers' default where the key is absent)}.
_FIXED = {
    "downsample_padding": (0, 1),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (1, 0),
    "norm_eps": (_NORM_EPS, 1e-5),
    "act_fn": ("silu", "silu"),
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "mid_block_scale_factor": (1, 1),
    "attention_head_dim": (None, 8),
    "resnet_time_scale_shift": ("default", "default"),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "add_attention": (True, True),
    "time_embedding_dim": (None, None),
}
# {block type: whether it has attention}.
_DOWN = {"DownBlock2D": False, "AttnDownBlock2D": True}
_UP = {"UpBlock2D": False, "AttnUpBlock2D": True}


def read_architecture(path: str) -> dict[str, Any]:
    """The arguments of the UNet that a config.json describes.

    Raises:
        InputError: a file that cannot be read, or a key whose value the network of Ho et al. does not have.
    """
    config = _read_config(path)
    channels = _positive_ints("block_out_channels", config.get("block_out_channels"), path)
    has_attn = _attention_levels(config, len(channels), path)
    ch = channels[0]
    if any(c % ch for c in channels):
        raise InputError(f"{path}: block_out_channels is {shown(channels)}; they must be multiples of the first.")
    height, width = _size(config, path)
    dropout = config.get("dropout", 0.0)
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise InputError(f"{path}: dropout is {shown(dropout)}, expected a number within [0, 1).")
    return {
        "image_shape": (height, width, _count("in_channels", config.get("in_channels", 3), path)),
        "out_channels": _count("out_channels", config.get("out_channels", 3), path),
        "ch": ch,
        "ch_mult": tuple(c // ch for c in channels),
        "num_res_blocks": _count("layers_per_block", config.get("layers_per_block", 2), path),
        "attn_resolutions": tuple(height >> level for level in range(len(channels)) if has_attn[level]),
        "dropout": float(dropout),
        "num_classes": _num_classes(config, path),
        "num_groups": _count("norm_num_groups", config.get("norm_num_groups", 32), path, most=_MAX_CHANNELS),
    }


def describe_architecture(network: UNet) -> dict[str, Any]:
    """The content of config.json for a UNet.

    Raises:
        InputError: naming the argument that UNet2DModel has no place for.
    """
    for name, needed in (("block_size", 1), ("resamp_with_conv", True), ("theta", 10_000)):
        if getattr(network, name) != needed:
            raise InputError(
                f"A UNet with {name}={getattr(network, name)!r} cannot be written as a UNet2DModel, which has only "
                f"{name}={needed}."
            )
    height, width, channels = network.image_shape
    has_attn = [height >> level in network.attn_resolutions for level in range(len(network.ch_mult))]
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.30.0",
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": network.out_channels,
        "layers_per_block": network.num_res_blocks,
        "block_out_channels": [network.ch * m for m in network.ch_mult],
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in has_attn],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(has_attn)],
        "dropout": network.dropout,
        "norm_num_groups": network.num_groups,
        "attn_norm_num_groups": None,
        "class_embed_type": None,
        "num_class_embeds": None if network.num_classes is None else network.num_classes + 1,
        **{key: value for key, (value, _) in _FIXED.items()},
    }


def _read_config(path: str) -> dict[str, Any]:
    """The parsed file, with every key of _FIXED as the network of Ho et al. needs it."""
    config = read_object(path, "a diffusers config")
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise InputError(f"{path} describes {shown(config['_class_name'])}, expected a UNet2DModel.")
    for key, (needed, default) in _FIXED.items():
        value = config.get(key, default)
        is_close = key == "norm_eps" and is_number(value) and math.isclose(value, _NORM_EPS)
        if value != needed and not is_close:
            raise InputError(
                f"{path}: {key} is {shown(value)}, but the network of Ho et al. has {needed!r}; this is another network."
            )
    if (
        config.get("mid_block_type", "UNetMidBlock2D") != "UNetMidBlock2D"
    ):  # a key of newer versions, which is not written
        raise InputError(f"{path}: mid_block_type is {shown(config['mid_block_type'])}, expected UNetMidBlock2D.")
    groups = config.get("norm_num_groups", 32)
    if config.get("attn_norm_num_groups") not in (None, groups):
        raise InputError(
            f"{path}: attn_norm_num_groups is {shown(config['attn_norm_num_groups'])}, expected null or "
            f"norm_num_groups={shown(groups)}: here all normalisations have the same number of groups."
        )
    return config


def _attention_levels(config: dict[str, Any], levels: int, path: str) -> list[bool]:
    """Whether each level has attention; the levels on the way up must agree with those on the way down."""
    down: Any = config.get("down_block_types")
    up: Any = config.get("up_block_types")
    for key, types, known in (("down_block_types", down, _DOWN), ("up_block_types", up, _UP)):
        if (
            not isinstance(types, list)
            or len(types) != levels
            or any(not isinstance(t, str) or t not in known for t in types)
        ):
            raise InputError(f"{path}: {key} is {shown(types)}; expected {levels} of {sorted(known)}.")
    has_attn = [_DOWN[t] for t in down]
    if has_attn != [_UP[t] for t in reversed(up)]:
        raise InputError(
            f"{path}: attention on the way up ({shown(up)}) is not at the levels of the way down ({shown(down)})."
        )
    return has_attn


def _num_classes(config: dict[str, Any], path: str) -> int | None:
    """The classes of the table of num_class_embeds rows, whose last row is taken for the null class; None without a table."""
    kind, rows = config.get("class_embed_type"), config.get("num_class_embeds")
    if kind is not None:
        raise InputError(
            f"{path}: class_embed_type is {shown(kind)}, expected null. Classes can be read only as a learned table: "
            "class_embed_type null, and num_class_embeds its number of rows."
        )
    if rows is None:
        return None
    if not is_int(rows) or not 2 <= rows <= checks.MAX_TIMESTEPS + 1:
        raise InputError(
            f"{path}: num_class_embeds is {shown(rows)}, expected null or an integer within 2..{checks.MAX_TIMESTEPS + 1}: the "
            "last row of the table is taken for the null class (no condition), and the rows before it are the classes."
        )
    return rows - 1


def _size(config: dict[str, Any], path: str) -> list[int]:
    """[height, width]; a single number in the file is a square."""
    size = config.get("sample_size")
    size = _positive_ints("sample_size", [size] * 2 if is_int(size) else size, path)
    if len(size) != 2:
        raise InputError(f"{path}: sample_size is {size}, expected one number or two.")
    return size


def _count(key: str, value: object, path: str, *, most: int = 64) -> int:
    if not is_int(value) or not 0 < value <= most:
        raise InputError(f"{path}: {key} is {shown(value)}, expected a positive integer of at most {most}.")
    return value


def _positive_ints(key: str, values: object, path: str) -> list[int]:
    if not isinstance(values, list) or not values or not all(is_int(v) and 0 < v <= _MAX_CHANNELS for v in values):
        raise InputError(f"{path}: {key} is {shown(values)}, expected positive integers.")
    return values
