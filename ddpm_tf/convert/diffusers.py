"""Hugging Face diffusers `UNet2DModel` folders (config.json and safetensors), both ways.

Files are read by the `safetensors` library, which runs no code from them. Convolution kernels are OIHW there and HWIO here.
Dense kernels are [out, in] there and [in, out] here. The levels of the up path are numbered from the bottom there and from
the top here.
"""

import json
import os
import struct
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ddpm_tf.convert.diffusers_config import describe_architecture, read_architecture
from ddpm_tf.errors import InputError
from ddpm_tf.files import atomic_folder, check_new_folder
from ddpm_tf.networks import UNet
from ddpm_tf.storage.bundles import assign, check_names

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_MAX_HEADER = 100 * 2**20
# The attention keys that diffusers 0.17 renamed: {old: new}.
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# {name of a layer here: its name in diffusers}, in a residual block and in an attention block.
_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "temb_proj": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_ATTN = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def load_diffusers(path: str | os.PathLike[str]) -> UNet:
    """A UNet with the architecture and weights of a diffusers `UNet2DModel`.

    Args:
        path: a folder with config.json and one .safetensors file, or the .safetensors file beside its config.json.

    Raises:
        InputError: files that are missing or damaged, a format that can run code, an architecture that is not Ho et al.'s
            (names the config key), or weights that do not fit the architecture (lists them).
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


def save_diffusers(network: UNet, path: str | os.PathLike[str]) -> None:
    """Write a UNet as a diffusers `UNet2DModel` folder, which appears whole or not at all.

    The attention weights have the keys of diffusers 0.17 and later.

    Args:
        network: a UNet without classes, pixel blocks or resampling without convolution, with the paper's theta.
        path: a new or empty folder.

    Raises:
        InputError: a network that UNet2DModel cannot be, or a folder that is not empty.
    """
    path = os.fspath(path)
    check_new_folder(path, "path")
    config = describe_architecture(network)
    arrays = {}
    for v in network.variables:
        name = diffusers_name(v.path, len(network.ch_mult))
        arrays[name] = np.ascontiguousarray(_to_theirs(v.numpy(), v))
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with atomic_folder(path) as folder:
        save_file(arrays, os.path.join(folder, _WEIGHTS), metadata={"format": "pt"})
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(config, f, indent=2)


def diffusers_name(path: str, levels: int) -> str:
    """diffusers' key of a variable, e.g. down_blocks.0.resnets.1.conv1.weight of model/down_0.block_1/conv1/kernel.

    Args:
        path: the variable's path.
        levels: how many levels the network has.
    """
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
        number = {"block_1": "0", "attn_1": "0", "block_2": "1"}[unit]
    else:
        place = f"down_blocks.{level}" if side == "down" else f"up_blocks.{levels - 1 - int(level)}"
        number = unit.rpartition("_")[2]
    if unit in ("downsample", "upsample"):
        return f"{place}.{unit}rs.0.conv.{leaf}"
    kind, names = ("resnets", _BLOCK) if unit.startswith("block") else ("attentions", _ATTN)
    return f"{place}.{kind}.{number}.{names[rest[0]]}.{leaf}"


def _check_size(architecture: Mapping[str, Any], weights: str, config_path: str) -> None:
    """Refuse an architecture whose 3x3 convolutions alone are larger than the file, before the network is made."""
    blocks = 2 * architecture["num_res_blocks"] + 1
    widths = [architecture["ch"] * m for m in architecture["ch_mult"]]
    least = 4 * 9 * (blocks * sum(w * w for w in widths) + 4 * widths[-1] ** 2)
    if least > os.path.getsize(weights):
        raise InputError(
            f"{config_path} describes a network of more than {least:,} bytes, but {weights} has "
            f"{os.path.getsize(weights):,}: the file is truncated, or weights and config do not belong together."
        )


def _find_files(path: str) -> tuple[str, str]:
    """The weights' file and its config.json."""
    if os.path.isdir(path):
        names = sorted(n for n in os.listdir(path) if n.endswith(".safetensors"))
        others = sorted(n for n in os.listdir(path) if n.endswith((".bin", ".pt", ".ckpt", ".msgpack")))
        if _WEIGHTS in names:
            names = [_WEIGHTS]
        if len(names) != 1:
            hint = f" {others[0]} is not read: its format can run code when it is loaded." if others else ""
            raise InputError(f"{path} has {len(names)} .safetensors files, expected {_WEIGHTS}.{hint}")
        weights = os.path.join(path, names[0])
    else:
        weights = path
        if not os.path.isfile(path):
            raise InputError(f"{path} does not exist; expected a folder with config.json and {_WEIGHTS}.")
        if not path.endswith(".safetensors"):
            raise InputError(
                f"{path} is not a .safetensors file. Pickles (.bin, .pt, .ckpt), .h5 and .keras files are not read, because "
                "they can run code when they are loaded. Save the model with save_pretrained(safe_serialization=True)."
            )
    config = os.path.join(os.path.dirname(weights), "config.json")
    if not os.path.isfile(config):
        raise InputError(f"{config} does not exist; the architecture is read from it.")
    return weights, config


def _read_safetensors(path: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """{key: array}, with the new attention keys. Names, shapes and types are checked before any tensor is read.

    Args:
        shapes: {key: shape} that the file must have.
    """
    with open(path, "rb") as f:
        start = f.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(_MAX_HEADER, os.path.getsize(path) - 8):
        raise InputError(
            f"{path} is not a safetensors file: its header claims {length:,} bytes, the file has "
            f"{os.path.getsize(path):,}."
        )
    try:
        with safe_open(path, framework="numpy") as f:
            keys = {key: _new_style(key) for key in f.keys()}  # noqa: SIM118 - not a dict
            slices = {new: f.get_slice(key) for key, new in keys.items()}
            if len(slices) != len(keys):
                raise InputError(f"{path} holds an attention weight under its old and its new key.")
            stored = {new: tuple(s.get_shape()) for new, s in slices.items()}
            check_names(shapes, _without_unit_axes(stored, shapes), path)
            others = [name for name, s in slices.items() if s.get_dtype() != "F32"]
            if others:
                raise InputError(f"{path}: {others[0]} is {slices[others[0]].get_dtype()}, expected F32.")
            arrays = {new: f.get_tensor(key) for key, new in keys.items()}
    except SafetensorError as e:
        raise InputError(f"{path} is damaged: {e}") from e
    infinite = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if infinite:
        raise InputError(f"{path}: {infinite[0]} has values that are not finite.")
    return {name: array.reshape(shapes[name]) for name, array in arrays.items()}


def _new_style(key: str) -> str:
    """The key with the attention names of diffusers 0.17 and later."""
    parts = key.split(".")
    if "attentions" in parts and parts[-2] in _ATTENTION:
        return ".".join([*parts[:-2], _ATTENTION[parts[-2]], parts[-1]])
    return key


def _without_unit_axes(
    stored: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shapes in a file, with [out, in, 1, 1] as [out, in] where a dense weight is expected.

    Older exports have the attention weights as 1x1 convolutions.
    """
    return {
        name: shapes[name] if name in shapes and len(shapes[name]) == 2 and shape == (*shapes[name], 1, 1) else shape
        for name, shape in stored.items()
    }


def _their_shape(variable: keras.Variable) -> tuple[int, ...]:
    """The shape of a variable in diffusers. The 1x1 shortcut is a dense layer here and a convolution there."""
    shape = tuple(variable.shape)
    if len(shape) == 4:
        return shape[3], shape[2], shape[0], shape[1]
    if len(shape) == 2:
        return (shape[1], shape[0], 1, 1) if "nin_shortcut" in variable.path else (shape[1], shape[0])
    return shape


def _to_theirs(array: np.ndarray, variable: keras.Variable) -> np.ndarray:
    if len(variable.shape) == 4:
        return array.transpose(3, 2, 0, 1)  # HWIO -> OIHW
    return array.T.reshape(_their_shape(variable))


def _to_ours(array: np.ndarray, variable: keras.Variable) -> np.ndarray:
    if len(variable.shape) == 4:
        return array.transpose(2, 3, 1, 0)  # OIHW -> HWIO
    return array.reshape(array.shape[:2]).T
