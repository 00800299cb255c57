"""Where a diffusers model's files are: a model's folder, a pipeline's folder, one file, or shards with an index."""

import os
import re
from typing import NamedTuple

from ddpm_tf.convert.json_file import read_object, shown
from ddpm_tf.errors import InputError

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG, SCHEDULER = "config.json", "scheduler_config.json"
_INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
# Pickles and other formats that can run code when they are loaded.
_CODE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".keras", ".onnx")
_SAVE_AGAIN = (
    "Where you trust the file, load it with diffusers and save it again: "
    "UNet2DModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)."
)


class ModelFiles(NamedTuple):
    """weights: the .safetensors files, more than one if the weights are in shards. config: the config.json.
    scheduler: the scheduler_config.json files, beside the weights and in the pipeline's scheduler/; often one, or none."""

    weights: tuple[str, ...]
    config: str
    scheduler: tuple[str, ...]


def find_files(path: str) -> ModelFiles:
    """The files of the model at `path`.

    Args:
        path: a folder with config.json and weights; a pipeline's folder, with unet/ and scheduler/; a .safetensors file or
            the index of its shards, beside config.json.

    Raises:
        InputError: nothing there, no weights or several, or a format that can run code.
    """
    if not os.path.exists(path):
        raise InputError(
            f"{path} does not exist; expected a folder with {CONFIG} and {WEIGHTS}, or a pipeline's folder."
        )
    folder = _model_folder(path) if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
    weights = _weights_in(folder) if os.path.isdir(path) else _weights_at(path)
    config = os.path.join(folder, CONFIG)
    if not os.path.isfile(config):
        raise InputError(f"{config} does not exist; the architecture is read from it. Put it beside the weights.")
    pipeline = os.path.dirname(os.path.abspath(folder))
    schedulers = (os.path.join(folder, SCHEDULER), os.path.join(pipeline, "scheduler", SCHEDULER))
    return ModelFiles(weights, config, tuple(s for s in schedulers if os.path.lexists(s)))


def _model_folder(path: str) -> str:
    """The folder itself, or the unet/ of a pipeline."""
    unet = os.path.join(path, "unet")
    return unet if os.path.isdir(unet) and not os.path.isfile(os.path.join(path, CONFIG)) else path


def _weights_in(folder: str) -> tuple[str, ...]:
    """The weights of a folder. diffusers' own name goes before others, as in diffusers."""
    names = sorted(os.listdir(folder))
    whole = [n for n in names if n.endswith(".safetensors") and not _SHARD.search(n)]
    indexes = [n for n in names if n.endswith(_INDEX)]
    if WEIGHTS in whole:
        return (os.path.join(folder, WEIGHTS),)
    if len(whole) + len(indexes) == 1:
        return _weights_at(os.path.join(folder, (whole + indexes)[0]))
    if whole or indexes:
        raise InputError(
            f"{folder} has {len(whole) + len(indexes)} sets of weights ({', '.join(map(shown, whole + indexes))}) and no "
            f"{WEIGHTS}: give the path of the one to read."
        )
    if shards := [n for n in names if _SHARD.search(n)]:
        raise InputError(
            f"{folder} has shards ({shown(shards[0])}, ...) without their index, a file that ends with {_INDEX}: copy it too."
        )
    if codes := [n for n in names if n.endswith(_CODE)]:
        raise InputError(
            f"{folder} has no .safetensors file, expected {WEIGHTS}. {shown(codes[0])} is not read: its format can run code "
            f"when it is loaded. {_SAVE_AGAIN}"
        )
    inner = [n for n in names if os.path.isfile(os.path.join(folder, n, WEIGHTS))]
    hint = f" Did you mean {os.path.join(folder, inner[0])}?" if inner else ""
    raise InputError(f"{folder} has no .safetensors file; expected {WEIGHTS} and {CONFIG}.{hint}")


def _weights_at(path: str) -> tuple[str, ...]:
    """The files behind the path of a .safetensors file, of a shard, or of an index."""
    if not os.path.isfile(path):
        raise InputError(f"{path} is not a regular file; expected a .safetensors file.")
    if path.endswith(_INDEX):
        return _shards(path)
    if _SHARD.search(path):
        return _weights_at_index(_SHARD.sub(_INDEX, path), path)
    if not path.endswith(".safetensors"):
        raise InputError(
            f"{path} is not a .safetensors file. Pickles (.bin, .pt, .ckpt), .h5 and .keras files are not read, because "
            f"they can run code when they are loaded. {_SAVE_AGAIN}"
        )
    return (path,)


def _weights_at_index(index: str, shard: str) -> tuple[str, ...]:
    if not os.path.isfile(index):
        raise InputError(f"{shard} is one of several shards, and their index {index} does not exist: copy it too.")
    return _shards(index)


def _shards(index: str) -> tuple[str, ...]:
    """The files that an index names, all of which must lie beside it."""
    names = read_object(index, "the index of sharded weights").get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index}: weight_map is {shown(names)}, expected {{weight: file}}.")
    folder = os.path.dirname(index)
    for name in names.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or os.path.basename(name) != name:
            raise InputError(f"{index}: weight_map names {shown(name)}, expected a .safetensors file beside the index.")
    paths = tuple(os.path.join(folder, name) for name in sorted(set(names.values())))
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise InputError(f"{missing[0]} does not exist, but {index} names it: copy all {len(paths)} shards.")
    return paths
