"""TFRecord files with StyleGAN2's records, which the original read for LSUN; by record number.

A data set may be cut into several files, its shards.
"""

import hashlib
import os
import struct
from collections.abc import Iterable, Sequence
from typing import IO, NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging
from tensorflow.python.lib.io.tf_record import tf_record_random_reader  # checks the CRC of every record it reads

from ddpm_tf import text
from ddpm_tf.data.arrays import ArraySource
from ddpm_tf.data.contract import Details, LoadOptions, file_entries
from ddpm_tf.data.reading import open_regular
from ddpm_tf.errors import DataNotFoundError, InputError
from ddpm_tf.files import atomic_file

_HEADER = 12  # length uint64, its CRC uint32
_FOOTER = 4  # CRC of the data
_SAMPLES, _BLOCK = 16, 4096  # how much of a file is looked at to know it again


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
            open_regular(path, "a TFRecord file").close()
        self.files, self.details = file_entries(self._paths, os.path.dirname(self._paths[0])), Details()
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
        path, begin = self._paths[shard], int(self._offsets[shard][record])
        end = int(self._offsets[shard][record + 1]) if record + 1 < len(self._offsets[shard]) else self.files[shard][1]
        shown = text.printable(path)
        try:
            with open(path, "rb") as file:
                if _record_end(file, begin) != end:  # TensorFlow would ask for as much memory as the length says
                    raise ValueError("its length is not what it was when the file was indexed")
            # Every record gets a new reader: the pipeline's threads cannot share one.
            data, _ = tf_record_random_reader(path).read(begin)
            features = tf.train.Example.FromString(data).features.feature
        except Exception as e:  # OSError, DataLossError, DecodeError
            raise InputError(f"{shown}: record {record} is damaged: {text.printable(str(e))}") from e
        missing = {"shape", "data"} - set(features)
        if missing:
            raise InputError(
                f"{shown}: record {record} has the features {sorted(features)}; expected 'shape' and 'data'."
            )
        shape, pixels = tuple(features["shape"].int64_list.value), features["data"].bytes_list.value
        height, width, channels = self.image_shape
        if shape != (channels, height, width) or len(pixels) != 1 or len(pixels[0]) != height * width * channels:
            raise InputError(
                f"{shown}: record {record} has shape {list(shape)} (CHW) and {sum(map(len, pixels))} bytes; expected "
                f"{[channels, height, width]}. Ask for that shape, or use the file of the other resolution."
            )
        return np.frombuffer(pixels[0], np.uint8).reshape(shape).transpose(1, 2, 0)


def load_tfrecord(path: str, options: LoadOptions) -> ArraySource | TFRecordSource:
    """A TFRecord file, or every *.tfrecord and *.tfrecords file of a folder in the byte order of the names."""
    paths = [path]
    if os.path.isdir(path):
        names = sorted((n for n in os.listdir(path) if n.endswith((".tfrecord", ".tfrecords"))), key=os.fsencode)
        paths = [os.path.join(path, name) for name in names]
    if not paths or not os.path.lexists(paths[0]):
        raise DataNotFoundError(f"{path!r} is no TFRecord file and no folder of *.tfrecord or *.tfrecords files.")
    source = TFRecordSource(paths, options.image_shape, keep_offsets=not options.read_only)
    if options.fits_in_memory(source.num_examples):
        return ArraySource(source.decode(range(source.num_examples)), files=source.files)
    return source


def load_offsets(path: str, *, keep: bool = True) -> np.ndarray:
    """The byte offset of every record of a shard, uint64 [N].

    Args:
        path: the shard. Its offsets are read from PATH.offsets.npz, or from the shard itself where that file is missing,
            damaged or made for another file, see `_Key`.
        keep: write PATH.offsets.npz if it had to be made.

    Raises:
        InputError: a shard that is empty, truncated, or not a TFRecord file.
    """
    index = f"{path}.offsets.npz"
    with open_regular(path, "tfrecord:PATH") as shard:
        key = _key(shard)
        if os.path.lexists(index):
            try:
                return _kept_offsets(index, shard, key)
            except InputError as e:
                logging.info("%s is made again: %s", text.printable(index), e)
        offsets = _scan(text.printable(path), shard, key.size)
    if keep:
        try:
            with atomic_file(index, "wb", sync=False) as f:  # a lost index is only made again
                np.savez(f, offsets=offsets, **key._asdict())
        except OSError as e:
            logging.warning("The offsets of %s cannot be kept (%s); they will be made again at every start.", path, e)
    return offsets


class _Key(NamedTuple):
    """Which file an index is of.

    size: bytes. mtime_ns: when it was changed. digest: SHA-256 of _SAMPLES blocks, evenly spread.
    """

    size: int
    mtime_ns: int
    digest: str


def _key(shard: IO[bytes]) -> _Key:
    status, sha256 = os.fstat(shard.fileno()), hashlib.sha256()
    for k in range(_SAMPLES):
        shard.seek(max(0, status.st_size - _BLOCK) * k // (_SAMPLES - 1))
        sha256.update(shard.read(_BLOCK))
    return _Key(status.st_size, status.st_mtime_ns, sha256.hexdigest())


def _kept_offsets(index: str, shard: IO[bytes], key: _Key) -> np.ndarray:
    """The offsets of an index.

    Raises:
        InputError: the index is damaged, is of another file, or does not lead from record to record (looked at in samples).
    """
    try:
        with open_regular(index, "an index") as file, np.load(file, allow_pickle=False) as arrays:
            offsets, kept = arrays["offsets"], tuple(arrays[name].item() for name in key._fields)
    except Exception as e:  # of zip files, their decompressors, and arrays that are not these
        raise InputError(f"it cannot be read ({text.printable(str(e))})") from e
    if kept != key:
        raise InputError("it is of another file, or the file has changed since")
    is_ascending = (
        offsets.dtype == np.uint64 and offsets.ndim == 1 and len(offsets) and (offsets[:-1] < offsets[1:]).all()
    )
    if not is_ascending or offsets[0] != 0 or offsets[-1] >= key.size:
        raise InputError("its offsets do not lead through the file")
    ends = np.append(offsets[1:], np.uint64(key.size))
    for k in {0, len(offsets) - 1, *np.linspace(0, len(offsets) - 1, _SAMPLES).astype(int).tolist()}:
        if _record_end(shard, int(offsets[k])) != ends[k]:
            raise InputError(f"its record {k} does not end where the next begins")
    return offsets


def _record_end(shard: IO[bytes], position: int) -> int | None:
    """Where the record at a position ends, by the length before it; None: there is no whole length."""
    shard.seek(position)
    header = shard.read(_HEADER)
    if len(header) < _HEADER:
        return None
    return position + _HEADER + struct.unpack("<Q", header[:8])[0] + _FOOTER


def _scan(path: str, shard: IO[bytes], size: int) -> np.ndarray:
    """The offsets, by the lengths that stand before the records; the records themselves are skipped."""
    offsets: list[int] = []
    position = 0
    while position < size:
        end = _record_end(shard, position)
        if end is None or end > size:
            raise InputError(
                f"{path}: record {len(offsets)} at byte {position:,} runs past the end of the file ({size:,} bytes). "
                "The file is truncated, or it is not an uncompressed TFRecord file."
            )
        offsets.append(position)
        position = end
    if not offsets:
        raise InputError(f"{path} is empty; expected a TFRecord file.")
    return np.array(offsets, np.uint64)
