"""Hugging Face diffusers `UNet2DModel` folders (config.json and safetensors), both ways.

Files are read by the `safetensors` library, which runs no code from them. Convolution kernels are OIHW there and HWIO here.
Dense kernels are [out, in] there and [in, out] here; the table of the classes is [classes, channels] in both. The levels of
the up path are numbered from the bottom there and from the top here.

A class-conditional `UNet2DModel` has num_class_embeds rows and no null class (the label that stands for no condition). Here
the last row is the null class, so that a table of K rows is read as K - 1 classes, and num_classes + 1 rows are written.
"""

import contextlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ddpm_tf.convert.diffusers_config import describe_architecture, read_architecture
from ddpm_tf.convert.diffusers_files import CONFIG, SCHEDULER, WEIGHTS, find_files
from ddpm_tf.convert.diffusers_scheduler import Scheduler, read_scheduler
from ddpm_tf.errors import InputError
from ddpm_tf.files import atomic_folder, check_new_folder, made_folder
from ddpm_tf.networks import UNet
from ddpm_tf.storage.bundles import assign, check_names

_MAX_HEADER = 100 * 2**20
# What is read; half precision becomes float32 exactly.
_DTYPES = ("F32", "F16")
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
        path: a folder with config.json and .safetensors, in one file or in shards; a pipeline's folder, which has it as
            unet/; or the .safetensors file itself.

    Returns:
        the network. If it has classes, the last row of the file's table is its null class, which is logged.

    Raises:
        InputError: files that are missing or damaged, a format that can run code, an architecture that is not Ho et al.'s
            (names the config key), or weights that do not fit the architecture (lists them).
    """
    files = find_files(os.fspath(path))
    architecture = read_architecture(files.config)
    _check_size(architecture, files.weights, files.config)
    network = UNet(**architecture)
    expected = {diffusers_name(v.path, len(network.ch_mult)): v for v in network.variables}
    shapes = {name: _their_shape(v) for name, v in expected.items()}
    arrays = _read_safetensors(files.weights, shapes)
    ours = {name: _to_ours(arrays[name], v) for name, v in expected.items()}
    assign(expected, ours, files.weights[0])
    if network.num_classes is not None:
        logging.warning("%s", describe_null_class(network.num_classes))
    return network


def describe_null_class(num_classes: int) -> str:
    """What was assumed of the table of a class-conditional `UNet2DModel`, which became a network of so many classes."""
    return (
        f"num_class_embeds={num_classes + 1} was read as {num_classes} classes and a null class: the last row of the table, "
        f"label {num_classes}, is taken for the null class (no condition). A UNet2DModel does not say whether it was trained "
        f"with one. If it was not, label {num_classes} is a class like the others: draw with any label within "
        f"0..{num_classes}, but without guidance, which needs a null class."
    )


def load_diffusers_scheduler(path: str | os.PathLike[str]) -> Scheduler | None:
    """What the scheduler_config.json of a model says, or None if there is none.

    Args:
        path: as for `load_diffusers`. The file lies beside the weights, or in the scheduler/ beside their folder.

    Raises:
        InputError: a file that cannot be read or says what this program does not have, or two files that differ.
    """
    first = None
    for each in map(read_scheduler, find_files(os.fspath(path)).scheduler):
        if first and (first.facts, first.choices, first.foreign) != (each.facts, each.choices, each.foreign):
            raise InputError(
                f"{first.path} and {each.path} say different things, and both belong to these weights. Move the wrong one "
                "away."
            )
        first = first or each
    return first


def save_diffusers(network: UNet, path: str | os.PathLike[str], *, scheduler: Mapping[str, Any] | None = None) -> None:
    """Write a UNet as a diffusers `UNet2DModel` folder, which appears whole or not at all.

    The attention weights have the keys of diffusers 0.17 and later.

    Args:
        network: a UNet without pixel blocks or resampling without convolution, with the paper's theta.
        path: a new or empty folder.
        scheduler: the content of scheduler_config.json, as `describe_scheduler` makes it; None: there will be no such file.

    Raises:
        InputError: a network that UNet2DModel cannot be, or a folder that is not empty.
        OSError: it cannot be written; nothing is left of it.
    """
    path = os.fspath(path)
    check_new_folder(path, "path")
    documents = {CONFIG: describe_architecture(network), SCHEDULER: scheduler}
    arrays = {}
    for v in network.variables:
        name = diffusers_name(v.path, len(network.ch_mult))
        arrays[name] = np.ascontiguousarray(_to_theirs(v.numpy(), v))
    with made_folder(os.path.dirname(os.path.abspath(path))), atomic_folder(path) as folder:
        # safetensors' own save_file makes a file that only its owner can read, and its errors are no OSErrors.
        with open(os.path.join(folder, WEIGHTS), "wb") as f:
            f.write(save(arrays, metadata={"format": "pt"}))
        for name, content in documents.items():
            if content is not None:
                with open(os.path.join(folder, name), "w") as f:
                    json.dump(content, f, indent=2)


def diffusers_name(path: str, levels: int) -> str:
    """diffusers' key of a variable, e.g. down_blocks.0.resnets.1.conv1.weight of model/down_0.block_1/conv1/kernel.

    Args:
        path: the variable's path.
        levels: how many levels the network has.
    """
    _, *parts = path.split("/")
    leaf = {"kernel": "weight", "gamma": "weight", "embeddings": "weight", "bias": "bias", "beta": "bias"}[parts.pop()]
    block, *rest = parts
    if rest == ["labels"]:
        return f"class_embedding.{leaf}"
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


def _check_size(architecture: Mapping[str, Any], weights: Sequence[str], config_path: str) -> None:
    """Refuse an architecture whose 3x3 convolutions and classes alone are larger than the files, before it is made."""
    blocks = 2 * architecture["num_res_blocks"] + 1
    widths = [architecture["ch"] * m for m in architecture["ch_mult"]]
    convolutions = 9 * (blocks * sum(w * w for w in widths) + 4 * widths[-1] ** 2)
    table = 4 * architecture["ch"] * ((architecture["num_classes"] or -1) + 1)
    least = 2 * (convolutions + table)  # 2 bytes each, in half precision
    present = sum(os.path.getsize(path) for path in weights)
    if least > present:
        raise InputError(
            f"{config_path} describes a network of more than {least:,} bytes, but {_named(weights)} has {present:,}: the "
            "weights are truncated, or weights and config do not belong together."
        )


def _named(paths: Sequence[str]) -> str:
    """A file, or the first of several and their number, for messages."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} (with its {len(paths) - 1} other shards)"


def _read_safetensors(paths: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """{key: float32 array}, with the new attention keys. Names, shapes and types are checked before any tensor is read.

    Args:
        paths: one file, or the shards that together hold every key once.
        shapes: {key: shape} that they must have.
    """
    for path in paths:
        _check_header(path)
    with contextlib.ExitStack() as stack:
        try:
            tensors: dict[str, tuple[Any, str]] = {}
            for path in paths:
                file = stack.enter_context(safe_open(path, framework="numpy"))
                for key in file.keys():  # noqa: SIM118 - not a dict
                    if _new_style(key) in tensors:
                        raise InputError(
                            f"{path} holds {key} a second time: an attention weight is there under its old and its new key, or "
                            "a weight is in two shards."
                        )
                    tensors[_new_style(key)] = (file, key)
            slices = {name: file.get_slice(key) for name, (file, key) in tensors.items()}
            stored = {name: tuple(s.get_shape()) for name, s in slices.items()}
            check_names(shapes, _without_unit_axes(stored, shapes), _named(paths))
            for name, s in slices.items():
                if s.get_dtype() not in _DTYPES:
                    raise InputError(
                        f"{_named(paths)}: {name} is {s.get_dtype()}, expected F32 or F16. Save the model again in float32: "
                        "model.float().save_pretrained(NEW_FOLDER)."
                    )
            arrays = {name: file.get_tensor(key).astype(np.float32) for name, (file, key) in tensors.items()}
        except SafetensorError as e:
            raise InputError(f"{_named(paths)} is damaged: {e}. Copy or download it again.") from e
    infinite = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if infinite:
        raise InputError(f"{_named(paths)}: {infinite[0]} has values that are not finite.")
    return {name: array.reshape(shapes[name]) for name, array in arrays.items()}


def _check_header(path: str) -> None:
    """Refuse a file whose first 8 bytes, the header's length, do not fit it."""
    with open(path, "rb") as f:
        start = f.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(_MAX_HEADER, os.path.getsize(path) - 8):
        raise InputError(
            f"{path} is not a safetensors file: its header claims {length:,} bytes, the file has "
            f"{os.path.getsize(path):,}. Copy or download it again."
        )


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
    if len(shape) == 2 and not _is_table(variable):
        return (shape[1], shape[0], 1, 1) if "nin_shortcut" in variable.path else (shape[1], shape[0])
    return shape


def _to_theirs(array: np.ndarray, variable: keras.Variable) -> np.ndarray:
    if len(variable.shape) == 4:
        return array.transpose(3, 2, 0, 1)  # HWIO -> OIHW
    return array if _is_table(variable) else array.T.reshape(_their_shape(variable))


def _to_ours(array: np.ndarray, variable: keras.Variable) -> np.ndarray:
    if len(variable.shape) == 4:
        return array.transpose(2, 3, 1, 0)  # OIHW -> HWIO
    return array if _is_table(variable) else array.reshape(array.shape[:2]).T


def _is_table(variable: keras.Variable) -> bool:
    """Whether a variable is the table of the classes, [num_classes + 1, 4 ch]; it is the same in diffusers."""
    return variable.path.endswith("/embeddings")
