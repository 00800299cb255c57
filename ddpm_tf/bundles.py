"""TensorFlow checkpoint files (`PREFIX.index`, `PREFIX.data-00000-of-00001`) as a dict of arrays."""

import os

import numpy as np
import tensorflow as tf

from ddpm_tf.errors import InputError


def write_bundle(prefix, tensors):
    """Write {name: array} under the names given, readable by `tf.train.load_checkpoint`."""
    names = sorted(tensors)
    with tf.device("CPU"):
        tf.raw_ops.SaveV2(
            prefix=os.fspath(prefix),
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            tensors=[tf.convert_to_tensor(tensors[name]) for name in names],
        )


def read_bundle(prefix):
    """{name: array} of a checkpoint.

    Raises:
        InputError: no checkpoint there, or one that cannot be read.
    """
    prefix = os.fspath(prefix)
    if not os.path.isfile(prefix + ".index"):
        raise InputError(f"There is no checkpoint {prefix}: the file {prefix}.index does not exist.")
    try:
        reader = tf.train.load_checkpoint(prefix)
        return {name: np.asarray(reader.get_tensor(name)) for name in reader.get_variable_to_shape_map()}
    except (
        tf.errors.OpError,
        IndexError,
        ValueError,
        RuntimeError,
    ) as e:  # a truncated .data: a bare IndexError
        raise InputError(f"The checkpoint {prefix} is damaged: {type(e).__name__}: {e}") from e
