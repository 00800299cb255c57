"""TFRecord files with StyleGAN2's records, which the original read for LSUN; by record number.

A data set may be cut into several files, its shards.
"""

import os
import struct
import zipfile
from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow as tf
from absl import logging
from tensorflow.python.lib.io.tf_record import tf_record_random_reader  # checks the CRC of every record it reads

from ddpm_tf.data.arrays import ArraySource
from ddpm_tf.data.contract import LoadOptions, file_entries
from ddpm_tf.errors import DataNotFoundError, InputError
from ddpm_tf.files import atomic_file

_HEADER = 12  # length uint64, its CRC uint32
_FOOTER = 4  # CRC of the data


class TFRecordSource:
    """Records with the features `shape`, int64 [3], and `data`, uint8 bytes in CHW order; see `contract.Source`.

    Args:
        paths: the shards, uncompressed.
        image_shape: (H, W, C) that every record must have.
        keep_offsets: write the index of a shard beside it, see `load_offsets`.

    Raises:
        InputError: a shard that cannot be read, is not a TFRecord file or is truncated, or a first record of another kind.
    """

    def __init__(self, paths: Sequence[str], image_shape: tuple[int, int, int], *, keep_offsets: bool = True) -> None:
        self.image_shape, self._paths = image_shape, list(paths)
        for path in self._paths:
            if not os.access(path, os.R_OK):
                raise InputError(f"{path} is missing, or you have no permission to read it.")
        self.files = file_entries(self._paths, os.path.dirname(self._paths[0]))
        offsets = [load_offsets(path, keep=keep_offsets) for path in self._paths]
        self._ends = np.cumsum([len(o) for o in offsets])
        self._offsets, self.num_examples = offsets, int(self._ends[-1])
        self.decode([0])

    def read(self, indices: np.ndarray | tf.Tensor) -> dict[str, tf.Tensor]:
        """See `contract.Source.read`."""
        return {"image": tf.numpy_function(self.decode, [indices], tf.uint8)}

    def decode(self, indices: Iterable[int]) -> np.ndarray:
        """int [B] -> uint8 [B, H, W, C]."""
        return np.stack([self._image(int(i)) for i in indices])

    def _image(self, index: int) -> np.ndarray:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        record = index - (int(self._ends[shard - 1]) if shard else 0)
        path = self._paths[shard]
        try:
            # Every record gets a new reader: the pipeline's threads cannot share one.
            data, _ = tf_record_random_reader(path).read(int(self._offsets[shard][record]))
            features = tf.train.Example.FromString(data).features.feature
        except Exception as e:  # DataLossError, DecodeError
            raise InputError(f"{path}: record {record} is damaged: {e}") from e
        missing = {"shape", "data"} - set(features)
        if missing:
            raise InputError(
                f"{path}: record {record} has the features {sorted(features)}; expected 'shape' and 'data'."
            )
        shape, pixels = tuple(features["shape"].int64_list.value), features["data"].bytes_list.value
        height, width, channels = self.image_shape
        if shape != (channels, height, width) or len(pixels) != 1 or len(pixels[0]) != height * width * channels:
            raise InputError(
                f"{path}: record {record} has shape {list(shape)} (CHW) and {sum(map(len, pixels))} bytes; expected "
                f"{[channels, height, width]}. Ask for that shape, or use the file of the other resolution."
            )
        return np.frombuffer(pixels[0], np.uint8).reshape(shape).transpose(1, 2, 0)


def load_tfrecord(path: str, options: LoadOptions) -> ArraySource | TFRecordSource:
    """A TFRecord file, or every *.tfrecord and *.tfrecords file of a folder in the byte order of the names."""
    paths = [path]
    if os.path.isdir(path):
        names = sorted((n for n in os.listdir(path) if n.endswith((".tfrecord", ".tfrecords"))), key=os.fsencode)
        paths = [os.path.join(path, name) for name in names]
    if not paths or not os.path.isfile(paths[0]):
        raise DataNotFoundError(f"{path!r} is no TFRecord file and no folder of *.tfrecord or *.tfrecords files.")
    source = TFRecordSource(paths, options.image_shape, keep_offsets=not options.read_only)
    if options.fits_in_memory(source.num_examples):
        return ArraySource(source.decode(range(source.num_examples)), files=source.files)
    return source


def load_offsets(path: str, *, keep: bool = True) -> np.ndarray:
    """The byte offset of every record of a shard, uint64 [N].

    Args:
        path: the shard. Its offsets are read from PATH.offsets.npz, or from the shard itself where that file is missing,
            damaged or made for another size.
        keep: write PATH.offsets.npz if it had to be made.

    Raises:
        InputError: a shard that is empty, truncated, or not a TFRecord file.
    """
    size, index = os.path.getsize(path), f"{path}.offsets.npz"
    if os.path.isfile(index):
        try:
            with np.load(index, allow_pickle=False) as arrays:
                if int(arrays["size"]) == size:
                    return arrays["offsets"]
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
            logging.warning("%s cannot be read: %s", index, e)
        logging.info("%s does not fit %s as it is now; the offsets are made again.", index, path)
    offsets = _scan(path, size)
    if not keep:
        return offsets
    try:
        with atomic_file(index, "wb", sync=False) as f:  # a lost index is only made again
            np.savez(f, offsets=offsets, size=size)
    except OSError as e:
        logging.warning("The offsets of %s cannot be kept (%s); they will be made again at every start.", path, e)
    return offsets


def _scan(path: str, size: int) -> np.ndarray:
    """The offsets, by the lengths that stand before the records; the records themselves are skipped."""
    offsets: list[int] = []
    position = 0
    with open(path, "rb") as f:
        while position < size:
            f.seek(position)
            header = f.read(_HEADER)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == _HEADER else size
            following = position + _HEADER + length + _FOOTER
            if following > size:
                raise InputError(
                    f"{path}: record {len(offsets)} at byte {position:,} runs past the end of the file ({size:,} bytes). "
                    "The file is truncated, or it is not an uncompressed TFRecord file."
                )
            offsets.append(position)
            position = following
    if not offsets:
        raise InputError(f"{path} is empty; expected a TFRecord file.")
    return np.array(offsets, np.uint64)
