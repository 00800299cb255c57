"""MNIST's own files: idx, plain or gzipped (https://github.com/cvdfoundation/mnist describes the format)."""

import gzip
import os
import zlib
from typing import IO

import numpy as np

from ddpm_tf import text
from ddpm_tf.checks import memory
from ddpm_tf.data.arrays import ADVICE, ArraySource
from ddpm_tf.data.contract import LoadOptions, file_entries
from ddpm_tf.data.reading import open_regular
from ddpm_tf.errors import DataNotFoundError, InputError

_UINT8 = 8  # the type byte of the header
_PREFIXES = {"train": "train", "test": "t10k"}  # split: how the names of its files begin


def load_idx(path: str, options: LoadOptions) -> ArraySource:
    """Images [N, H, W] of an idx file, and the labels of the file beside it.

    Args:
        path: a folder with MNIST's files, of which the split (train or test) is read; or a file of images. The labels of
            NAME-images-idx3-ubyte are in NAME-labels-idx1-ubyte, if there is such a file; each may end in .gz.
    """
    images_path = _find(path, options.split) if os.path.isdir(path) else path
    images = _read(images_path, dimensions=3)[..., None]
    paths, labels = [images_path], None
    folder, name = os.path.split(images_path)
    labels_name = name.replace("images-idx3", "labels-idx1").removesuffix(".gz")
    if "images-idx3" in name:
        for labels_path in (os.path.join(folder, labels_name), os.path.join(folder, f"{labels_name}.gz")):
            if os.path.lexists(labels_path):
                labels = _read(labels_path, dimensions=1)
                paths.append(labels_path)
                break
    return ArraySource(images, labels, files=file_entries(paths, folder))


def _find(folder: str, split: str) -> str:
    if split not in _PREFIXES:
        raise InputError(f"idx: has the splits {sorted(_PREFIXES)}, but data.split={split}.")
    names = [f"{_PREFIXES[split]}-images{dot}idx3-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    for name in names:
        if os.path.lexists(path := os.path.join(folder, name)):
            return path
    raise DataNotFoundError(f"The folder {text.printable(folder)} has none of {', '.join(names)}.")


def _read(path: str, *, dimensions: int) -> np.ndarray:
    """The uint8 array of an idx file. Its size is looked at before memory is taken."""
    shown = text.printable(path)
    with open_regular(path, "idx:PATH") as raw:
        is_zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file: IO[bytes] = gzip.open(raw) if is_zipped else raw  # type: ignore[assignment]
        try:
            head = file.read(4 + 4 * dimensions)
            if len(head) < 4 + 4 * dimensions or head[:4] != bytes([0, 0, _UINT8, dimensions]):
                begin = head[:4].hex(" ") or "nothing"
                raise InputError(
                    f"{shown} is no idx file of bytes in {dimensions} dimensions: it begins with {begin}, expected "
                    f"{bytes([0, 0, _UINT8, dimensions]).hex(' ')}."
                )
            shape = [int.from_bytes(head[k : k + 4], "big") for k in range(4, len(head), 4)]
            size = int(np.prod(np.array(shape, dtype=object)))
            memory(shown, size, ADVICE)
            if not is_zipped and os.fstat(raw.fileno()).st_size < len(head) + size:
                raise InputError(f"{shown} is truncated: its header says {size:,} bytes of data.")
            data = file.read(size + 1)
        except (OSError, EOFError, zlib.error) as e:
            raise InputError(f"{shown} cannot be read: {e}. Copy or download it again.") from e
    if len(data) != size:
        found = f"{len(data):,}" if len(data) < size else "more"
        raise InputError(
            f"{shown} has {found} bytes of data; its header says {shape}, {size:,} bytes. Download it again."
        )
    return np.frombuffer(data, np.uint8).reshape(shape)
