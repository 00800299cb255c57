"""TFRecord shards by record number: StyleGAN2's LSUN files, which the original read."""

import os
import struct
import zipfile

import numpy as np
import tensorflow as tf
from absl import logging
from tensorflow.python.lib.io.tf_record import tf_record_random_reader  # checks the CRC of every record it reads

from ddpm_tf.data.manifest import file_entries
from ddpm_tf.errors import InputError

_HEADER = 12  # length uint64, its CRC uint32
_FOOTER = 4  # CRC of the data


class TFRecordSource:
    """Records with the features `shape` int64 [3] and `data`, uint8 bytes in CHW order, uncompressed.

    Args:
        paths: the shards.
        keep_offsets: write the index of a shard beside it.
        image_shape: (H, W, C) that every record has to have.

    Raises:
        InputError: a shard that cannot be read, is no TFRecord file or is truncated, or a first record of another kind.
    """

    def __init__(self, paths, image_shape, *, keep_offsets=True):
        self.image_shape, self._paths = tuple(image_shape), list(paths)
        for path in self._paths:
            if not os.access(path, os.R_OK):
                raise InputError(f"{path} is missing, or there is no right to read it.")
        self.files = file_entries(self._paths, os.path.dirname(self._paths[0]))
        offsets = [load_offsets(path, keep=keep_offsets) for path in self._paths]
        self._ends = np.cumsum([len(o) for o in offsets])
        self._offsets, self.num_examples = offsets, int(self._ends[-1])
        self.decode([0])

    def read(self, indices):
        return {"image": tf.numpy_function(self.decode, [indices], tf.uint8)}

    def decode(self, indices):
        """int [B] -> uint8 [B, H, W, C]."""
        return np.stack([self._image(int(i)) for i in indices])

    def _image(self, index):
        shard = int(np.searchsorted(self._ends, index, side="right"))
        record = index - (int(self._ends[shard - 1]) if shard else 0)
        path = self._paths[shard]
        try:
            # A reader of its own per record: readers are not safe to share between the pipeline's threads.
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
                f"{[channels, height, width]}. Set data.image_size, or name the shard of that resolution."
            )
        return np.frombuffer(pixels[0], np.uint8).reshape(shape).transpose(1, 2, 0)


def load_offsets(path, *, keep=True):
    """The byte offset of every record, uint64 [N]; unless `keep` is False, kept beside the shard in PATH.offsets.npz.

    Raises:
        InputError: a file that is empty, truncated, or no TFRecord file.
    """
    size, index = os.path.getsize(path), f"{path}.offsets.npz"
    if os.path.isfile(index):
        try:
            with np.load(index, allow_pickle=False) as arrays:
                if int(arrays["size"]) == size:
                    return arrays["offsets"]
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
            logging.warning("%s cannot be read: %s", index, e)
        logging.info("%s does not belong to %s as it is now; indexing it again.", index, path)
    offsets = _scan(path, size)
    if not keep:
        return offsets
    try:
        with open(f"{index}.tmp", "wb") as f:
            np.savez(f, offsets=offsets, size=size)
        os.replace(f"{index}.tmp", index)
    except OSError as e:
        logging.warning("The offsets of %s are not kept (%s): it will be indexed at every start.", path, e)
    return offsets


def _scan(path, size):
    offsets, position = [], 0
    with open(path, "rb") as f:
        while position < size:
            f.seek(position)
            header = f.read(_HEADER)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == _HEADER else size
            following = position + _HEADER + length + _FOOTER
            if following > size:
                raise InputError(
                    f"{path}: record {len(offsets)} at byte {position:,} runs past the end of the file ({size:,} bytes). "
                    "The file is truncated or no uncompressed TFRecord file."
                )
            offsets.append(position)
            position = following
    if not offsets:
        raise InputError(f"{path} is empty; expected a TFRecord file.")
    return np.array(offsets, np.uint64)
