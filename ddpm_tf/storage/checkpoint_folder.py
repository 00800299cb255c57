"""A checkpoint folder: writing, verifying and reading its files, in every format there has been.

It holds `state.*` (a TensorFlow checkpoint, the tensors by name), `meta.json` (format, version of ddpm_tf, what the caller
adds, the tensors' types and shapes) and `MANIFEST.json` (format, version, size and SHA-256 of every other file).
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from ddpm_tf import __version__, files
from ddpm_tf.errors import InputError
from ddpm_tf.paths import check_kind
from ddpm_tf.storage.bundles import read_bundle, write_bundle

FORMAT = 2  # of the tensors and of meta.json
MANIFEST_FORMAT = 2  # format 1 was {file: {"size", "sha256"}} alone

_SKIPPED_STEPS: dict[str, np.ndarray] = {
    "skipped/total": np.array(0, np.int64),
    "skipped/in_a_row": np.array(0, np.int64),
    "skipped/steps": np.full(32, -1, np.int64),
}
_LOSS_SCALE: dict[str, np.ndarray] = {
    "loss_scale/scale": np.array(2**15, np.float32),
    "loss_scale/finite_steps": np.array(0, np.int64),
}
# {format: tensors that its checkpoints may lack, with the values that a new run begins with}. The loss scale was added
# without a new format.
_MAY_LACK: dict[int, dict[str, np.ndarray]] = {1: _SKIPPED_STEPS | _LOSS_SCALE, 2: _LOSS_SCALE}

_BUNDLE, _META, _MANIFEST = "state", "meta.json", "MANIFEST.json"


class NewerFormatError(InputError):
    """A checkpoint is not damaged, but a newer version of ddpm_tf wrote it, in a format that is unknown here."""


def fill(folder: str, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Write the files of a checkpoint into an empty folder."""
    variables = {name: f"{array.dtype.name} {list(array.shape)}" for name, array in tensors.items()}
    with open(os.path.join(folder, _META), "w") as f:
        json.dump({"format": FORMAT, "version": __version__, **meta, "variables": variables}, f, indent=2)
    # After the file above: at the limit of open files `open` raises an error, and TensorFlow crashes.
    write_bundle(os.path.join(folder, _BUNDLE), tensors)
    paths = {name: os.path.join(folder, name) for name in sorted(os.listdir(folder))}
    entries = {name: {"size": os.path.getsize(p), "sha256": files.sha256(p)} for name, p in paths.items()}
    with open(os.path.join(folder, _MANIFEST), "w") as f:
        json.dump({"format": MANIFEST_FORMAT, "version": __version__, "files": entries}, f, indent=2)


def verify(path: str | os.PathLike) -> None:
    """Compare a checkpoint folder with its manifest, file by file, and check that its format is known here.

    Raises:
        NewerFormatError: a newer version of ddpm_tf wrote it.
        InputError: it is damaged. The message names the file, what was found and what was expected.
    """
    manifest, meta = os.path.join(path, _MANIFEST), os.path.join(path, _META)
    entries = _read_manifest(manifest)
    if _META not in entries:
        raise InputError(f"{manifest} does not name {_META}.")
    for name, (size, digest) in entries.items():
        file = os.path.join(path, name)
        actual_size = os.path.getsize(file) if os.path.isfile(file) else None
        if actual_size != size:
            raise InputError(f"{file} has {actual_size} bytes, expected {size}.")
        if files.sha256(file) != digest:
            raise InputError(f"{file} has other contents than when it was written (SHA-256).")
    _check_format(meta, _read_object(meta), FORMAT)
    if f"{_BUNDLE}.index" not in entries:
        raise InputError(f"{manifest} does not name {_BUNDLE}.index.")


def _read_manifest(manifest: str) -> dict[str, tuple[int, str]]:
    """{file: (size, SHA-256)} of a manifest of any known format."""
    content = _read_object(manifest)
    number = _check_format(manifest, {"format": 1, **content}, MANIFEST_FORMAT)
    try:
        entries = content["files"] if number > 1 else content
        return {name: (entry["size"], entry["sha256"]) for name, entry in entries.items()}
    except (KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{manifest} cannot be read: {e}") from e


def _read_object(file: str) -> dict[str, Any]:
    """The JSON object in a file."""
    check_kind(file, file, is_folder=False)
    try:
        with open(file) as f:
            content = json.load(f)
    except FileNotFoundError:
        raise InputError(f"{file} is missing.") from None
    except ValueError as e:
        raise InputError(f"{file} cannot be read: {e}") from e
    if not isinstance(content, dict):
        raise InputError(f"{file} cannot be read: expected a JSON object.")
    return content


def _check_format(file: str, content: dict[str, Any], newest: int) -> int:
    """The format of a manifest or of meta.json, if it is known here; `newest` is the newest one that is."""
    number = content.get("format")
    if isinstance(number, int) and number > newest:
        raise NewerFormatError(
            f"{file} was written by ddpm_tf {content.get('version', '(no version)')} in format {number}, and this is ddpm_tf "
            f"{__version__}, which reads formats up to {newest}: upgrade ddpm_tf."
        )
    if not isinstance(number, int) or not 1 <= number <= newest:
        raise InputError(f"{file} has format {number!r}, expected one of 1 to {newest}.")
    return number


def read_meta(path: str | os.PathLike) -> dict[str, Any]:
    """The content of meta.json: what `fill` got as `meta`, and format, version and variables."""
    with open(os.path.join(path, _META)) as f:
        return json.load(f)


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a folder that verifies, {name: array}.

    Tensors that its format lacks get the values that a new run begins with.
    """
    number = read_meta(path)["format"]
    tensors = read_bundle(os.path.join(path, _BUNDLE))
    added = {name: value for name, value in _MAY_LACK[number].items() if name not in tensors}
    if added:
        logging.info("%s (format %d) lacks %s: they begin as in a new run.", path, number, ", ".join(sorted(added)))
    return tensors | added
