"""Hugging Face diffusers `UNet2DModel` folders (config.json and safetensors), both ways.

Read as data only, through the `safetensors` library. Convolutions are OIHW there and HWIO here, dense weights [out, in]
there and [in, out] here; the up path is numbered from the bottom there and from the top here.
"""

import json
import math
import os
import struct

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ddpm_tf.errors import InputError
from ddpm_tf.networks import UNet
from ddpm_tf.storage.bundles import assign, check_names

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_MAX_HEADER = 100 * 2**20
# Keys of the release's networks that diffusers renamed in 0.17, old to new.
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# What config.json must say for the network to be Ho et al.'s; absent keys have diffusers' defaults.
_FIXED = {
    "downsample_padding": (0, 1),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (1, 0),
    "norm_eps": (1e-6, 1e-5),
    "norm_num_groups": (32, 32),
    "act_fn": ("silu", "silu"),
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "mid_block_scale_factor": (1, 1),
    "attention_head_dim": (None, 8),
    "attn_norm_num_groups": (None, None),
    "resnet_time_scale_shift": ("default", "default"),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "add_attention": (True, True),
    "class_embed_type": (None, None),
    "num_class_embeds": (None, None),
    "time_embedding_dim": (None, None),
}
_DOWN = {"DownBlock2D": False, "AttnDownBlock2D": True}
_UP = {"UpBlock2D": False, "AttnUpBlock2D": True}
_BLOCK = {"norm1": "norm1", "conv1": "conv1", "temb_proj": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
          "nin_shortcut": "conv_shortcut"}  # fmt: skip
_ATTN = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def load_diffusers(path):
    """A UNet with the architecture and weights of a diffusers `UNet2DModel`.

    Args:
        path: a folder with config.json and one .safetensors file, or the .safetensors file beside its config.json.

    Returns:
        UNet.

    Raises:
        InputError: files that are missing, damaged or could run code, an architecture that is not Ho et al.'s (with the
            config key), weights that do not fit it (with a table).
    """
    weights, config_path = _find_files(os.fspath(path))
    architecture = read_architecture(config_path)
    _check_size(architecture, weights, config_path)
    network = UNet(**architecture)
    expected = {diffusers_name(v.path, len(network.ch_mult)): v for v in network.variables}
    shapes = {name: _their_shape(v) for name, v in expected.items()}
    arrays = _read_safetensors(weights, shapes)
    ours = {name: _to_ours(arrays[name], v) for name, v in expected.items()}
    assign(expected, ours, weights)
    return network


def save_diffusers(network, path):
    """Write a UNet as a diffusers `UNet2DModel` folder, with the new attention key names.

    Args:
        network: a UNet without classes, blocks of pixels or resampling without convolution, with attention at the
            middle only beside its attention levels.
        path: a new or empty folder.

    Raises:
        InputError: a network that UNet2DModel cannot be, or a folder that is not empty.
    """
    path = os.fspath(path)
    if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise InputError(f"{path} exists and is not an empty folder; nothing is written over. Choose another.")
    config = describe_architecture(network)
    arrays = {}
    for v in network.variables:
        name = diffusers_name(v.path, len(network.ch_mult))
        arrays[name] = np.ascontiguousarray(_to_theirs(v.numpy(), v))
    os.makedirs(path, exist_ok=True)
    save_file(arrays, os.path.join(path, _WEIGHTS), metadata={"format": "pt"})
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(config, f, indent=2)


def diffusers_name(path, levels):
    """diffusers' key of a variable path: model/down_0.block_1/conv1/kernel -> down_blocks.0.resnets.1.conv1.weight."""
    _, *parts = path.split("/")
    leaf = {"kernel": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}[parts.pop()]
    block, *rest = parts
    if block == "temb":
        return f"time_embedding.linear_{int(rest[0][-1]) + 1}.{leaf}"
    if "." not in block:
        return f"{'conv_norm_out' if block == 'norm_out' else block}.{leaf}"
    scope, unit = block.split(".")
    side, _, level = scope.partition("_")
    if side == "mid":
        place = "mid_block"
        number = {"block_1": 0, "attn_1": 0, "block_2": 1}[unit]
    else:
        place = f"down_blocks.{level}" if side == "down" else f"up_blocks.{levels - 1 - int(level)}"
        number = unit.rpartition("_")[2]
    if unit in ("downsample", "upsample"):
        return f"{place}.{unit}rs.0.conv.{leaf}"
    kind, names = ("resnets", _BLOCK) if unit.startswith("block") else ("attentions", _ATTN)
    return f"{place}.{kind}.{number}.{names[rest[0]]}.{leaf}"


def read_architecture(path):
    """UNet arguments from a UNet2DModel's config.json.

    Raises:
        InputError: naming the key whose value is not Ho et al.'s network.
    """
    try:
        with open(path) as f:
            config = json.load(f)
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as e:  # JSON and UTF-8 errors are ValueErrors
        raise InputError(f"{path} cannot be read as a diffusers config: {e}") from e
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise InputError(f"{path} describes a {config['_class_name']}, expected a UNet2DModel.")
    for key, (wanted, default) in _FIXED.items():
        found = config.get(key, default)
        if found != wanted and not (key == "norm_eps" and _is_number(found) and math.isclose(found, wanted)):
            raise InputError(
                f"{path}: {key} is {found!r}, but the network of Ho et al. has {wanted!r}; this is another network."
            )
    channels = _ints(config, "block_out_channels", path)
    ch, levels = channels[0], len(channels)
    down, up = (config.get(key) for key in ("down_block_types", "up_block_types"))
    for key, types, known in (("down_block_types", down, _DOWN), ("up_block_types", up, _UP)):
        if (
            not isinstance(types, list)
            or len(types) != levels
            or any(not isinstance(t, str) or t not in known for t in types)
        ):
            raise InputError(f"{path}: {key} is {types!r}; expected {levels} of {sorted(known)}.")
    has_attn = [_DOWN[t] for t in down]
    if has_attn != [_UP[t] for t in reversed(up)]:
        raise InputError(f"{path}: attention on the way up ({up}) is not at the levels of the way down ({down}).")
    if any(c <= 0 or c % ch for c in channels):
        raise InputError(f"{path}: block_out_channels {channels} must be multiples of the first.")
    size = config.get("sample_size")
    size = _ints({"sample_size": [size] * 2 if _is_int(size) else size}, "sample_size", path)
    if len(size) != 2:
        raise InputError(f"{path}: sample_size is {size}, expected one number or two.")
    height, width = size
    dropout = config.get("dropout", 0.0)
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise InputError(f"{path}: dropout is {dropout!r}, expected a number within [0, 1).")
    counts = {k: config.get(k, d) for k, d in (("in_channels", 3), ("out_channels", 3), ("layers_per_block", 2))}
    for key, value in counts.items():
        if not _is_int(value) or not 0 < value <= 64:
            raise InputError(f"{path}: {key} is {value!r}, expected a positive integer.")
    return {
        "image_shape": (height, width, counts["in_channels"]),
        "out_channels": counts["out_channels"],
        "ch": ch,
        "ch_mult": tuple(c // ch for c in channels),
        "num_res_blocks": counts["layers_per_block"],
        "attn_resolutions": tuple(height >> level for level in range(levels) if has_attn[level]),
        "dropout": float(dropout),
    }


def describe_architecture(network):
    """The config.json of a UNet.

    Raises:
        InputError: naming the argument that UNet2DModel has no place for.
    """
    for name, wanted in (("num_classes", None), ("block_size", 1), ("resamp_with_conv", True)):
        if getattr(network, name) != wanted:
            raise InputError(f"A UNet with {name}={getattr(network, name)!r} cannot be written as a UNet2DModel.")
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
        **{key: wanted for key, (wanted, _) in _FIXED.items()},
    }


def _check_size(architecture, weights, config_path):
    """Refuse, before any memory is taken, an architecture whose 3x3 convolutions alone outgrow the file."""
    blocks = 2 * architecture["num_res_blocks"] + 1
    widths = [architecture["ch"] * m for m in architecture["ch_mult"]]
    least = 4 * 9 * (blocks * sum(w * w for w in widths) + 4 * widths[-1] ** 2)
    if least > os.path.getsize(weights):
        raise InputError(
            f"{config_path} describes a network of more than {least:,} bytes, but {weights} has "
            f"{os.path.getsize(weights):,}: the file is truncated, or they do not belong together."
        )


def _find_files(path):
    if os.path.isdir(path):
        names = sorted(n for n in os.listdir(path) if n.endswith(".safetensors"))
        others = sorted(n for n in os.listdir(path) if n.endswith((".bin", ".pt", ".ckpt", ".msgpack")))
        if _WEIGHTS in names:
            names = [_WEIGHTS]
        if len(names) != 1:
            hint = f" {others[0]} is a format that can run code when it is loaded and is not read." if others else ""
            raise InputError(f"{path} has {len(names)} .safetensors files, expected {_WEIGHTS}.{hint}")
        weights = os.path.join(path, names[0])
    else:
        weights = path
        if not os.path.isfile(path):
            raise InputError(f"{path} does not exist; give a folder with config.json and {_WEIGHTS}.")
        if not path.endswith(".safetensors"):
            raise InputError(
                f"{path} is not a .safetensors file. Pickles (.bin, .pt, .ckpt), .h5 and .keras files can run code when they "
                "are loaded and are not read: save the model with save_pretrained(safe_serialization=True)."
            )
    config = os.path.join(os.path.dirname(weights), "config.json")
    if not os.path.isfile(config):
        raise InputError(f"{config} does not exist; the architecture is read from it.")
    return weights, config


def _read_safetensors(path, shapes):
    """{new-style key: array}; names, shapes and dtypes are checked before any tensor is read."""
    with open(path, "rb") as f:
        start = f.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(_MAX_HEADER, os.path.getsize(path) - 8):
        raise InputError(
            f"{path} is no safetensors file: its header claims {length:,} bytes, the file has "
            f"{os.path.getsize(path):,}."
        )
    try:
        with safe_open(path, framework="numpy") as f:
            keys = {key: _new_style(key) for key in f.keys()}  # noqa: SIM118 - not a dict
            slices = {new: f.get_slice(key) for key, new in keys.items()}
            if len(slices) != len(keys):
                raise InputError(f"{path} holds an attention weight under its old and its new key.")
            found = {new: tuple(s.get_shape()) for new, s in slices.items()}
            check_names(shapes, _without_unit_axes(found, shapes), path)
            odd = [name for name, s in slices.items() if s.get_dtype() != "F32"]
            if odd:
                raise InputError(f"{path}: {odd[0]} is {slices[odd[0]].get_dtype()}, expected F32.")
            arrays = {new: f.get_tensor(key) for key, new in keys.items()}
    except SafetensorError as e:
        raise InputError(f"{path} is damaged: {e}") from e
    bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if bad:
        raise InputError(f"{path}: {bad[0]} has values that are not finite.")
    return {name: array.reshape(shapes[name]) for name, array in arrays.items()}


def _new_style(key):
    parts = key.split(".")
    if "attentions" in parts and parts[-2] in _ATTENTION:
        return ".".join([*parts[:-2], _ATTENTION[parts[-2]], parts[-1]])
    return key


def _without_unit_axes(found, shapes):
    """A 1x1 convolution [out, in, 1, 1] is a dense weight [out, in]: older exports have attention weights so."""
    return {
        name: shapes[name] if name in shapes and len(shapes[name]) == 2 and shape == (*shapes[name], 1, 1) else shape
        for name, shape in found.items()
    }


def _their_shape(variable):
    """The shape a variable has in diffusers. The 1x1 shortcut is a dense layer here and a convolution there."""
    shape = tuple(variable.shape)
    if len(shape) == 4:
        return shape[3], shape[2], shape[0], shape[1]
    if len(shape) == 2:
        return (shape[1], shape[0], 1, 1) if "nin_shortcut" in variable.path else (shape[1], shape[0])
    return shape


def _to_theirs(array, variable):
    if len(variable.shape) == 4:
        return array.transpose(3, 2, 0, 1)  # HWIO -> OIHW
    return array.T.reshape(_their_shape(variable))


def _to_ours(array, variable):
    if len(variable.shape) == 4:
        return array.transpose(2, 3, 1, 0)  # OIHW -> HWIO
    return array.reshape(array.shape[:2]).T


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ints(config, key, path):
    values = config.get(key)
    if not isinstance(values, list) or not values or not all(_is_int(v) and 0 < v <= 65536 for v in values):
        raise InputError(f"{path}: {key} is {values!r}, expected positive integers.")
    return values
