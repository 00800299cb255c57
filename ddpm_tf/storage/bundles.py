"""Named arrays: to and from TensorFlow checkpoint files, and into variables."""

import glob
import math
import os

import numpy as np
import tensorflow as tf

from ddpm_tf.errors import InputError

_MAX_ROWS = 20


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


def read_bundle(prefix, *, check=None):
    """{name: array} of a checkpoint (`PREFIX.index`, `PREFIX.data-*`).

    Args:
        prefix: the path without suffix.
        check: called with {name: shape} before any tensor is read, to raise if they are not what is wanted.

    Raises:
        InputError: no checkpoint there, fewer bytes than its index promises, damaged data.
    """
    prefix = os.fspath(prefix)
    if not os.path.isfile(prefix + ".index"):
        raise InputError(f"There is no checkpoint {prefix}: the file {prefix}.index does not exist.")
    try:
        reader = tf.train.load_checkpoint(prefix)
        found = {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}
        dtypes = reader.get_variable_to_dtype_map()
        promised = sum(math.prod(shape) * dtypes[name].size for name, shape in found.items())
        there = sum(os.path.getsize(path) for path in glob.glob(glob.escape(prefix) + ".data-*"))
        if there < promised:
            raise InputError(
                f"The checkpoint {prefix} is damaged: its .data files have {there:,} bytes, its index promises "
                f"{promised:,}."
            )
        if check is not None:
            check(found)
        return {name: np.asarray(reader.get_tensor(name)) for name in found}
    except InputError:
        raise
    except (tf.errors.OpError, IndexError, ValueError, RuntimeError, KeyError) as e:  # truncated .data: bare IndexError
        raise InputError(f"The checkpoint {prefix} is damaged: {type(e).__name__}: {e}") from e


def check_names(expected, found, origin):
    """Refuse anything but the same names with the same shapes.

    Args:
        expected, found: {name: shape}.
        origin: what `found` is, for the message.

    Raises:
        InputError: with a table of what is missing, left over, or of another shape.
    """
    rows = [f"{name:<60} missing in the file" for name in sorted(expected.keys() - found.keys())]
    rows += [f"{name:<60} {list(found[name])}, no such weight here" for name in sorted(found.keys() - expected.keys())]
    rows += [
        f"{name:<60} {list(found[name])} in the file, {list(expected[name])} here"
        for name in sorted(expected.keys() & found.keys())
        if tuple(expected[name]) != tuple(found[name])
    ]
    if rows:
        more = f"\n  ... and {len(rows) - _MAX_ROWS} more" if len(rows) > _MAX_ROWS else ""
        table = "\n  ".join(rows[:_MAX_ROWS])
        raise InputError(f"{origin} does not fit: {len(rows)} of {len(expected)} names disagree.\n  {table}{more}")


def assign(variables, tensors, origin):
    """Give every variable its array; nothing is assigned unless names and shapes agree exactly.

    Args:
        variables: {name: variable}.
        tensors: {name: array}.
        origin: where the arrays come from, for the message.

    Raises:
        InputError: as `check_names`.
    """
    shapes = {name: tuple(v.shape) for name, v in variables.items()}
    check_names(shapes, {name: tensor.shape for name, tensor in tensors.items()}, origin)
    for name, variable in variables.items():
        variable.assign(tensors[name])
