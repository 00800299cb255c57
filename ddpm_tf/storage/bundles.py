"""TensorFlow checkpoint files ("bundles") of named arrays: reading, writing, and assigning to variables."""

import glob
import math
import os
import textwrap
from collections.abc import Callable, Mapping

import keras
import numpy as np
import tensorflow as tf

from ddpm_tf.errors import InputError
from ddpm_tf.paths import check_kind, literal
from ddpm_tf.text import printable, table

_MAX_ROWS = 20

Shapes = Mapping[str, tuple[int, ...]]


def write_bundle(prefix: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Write {name: array} under exactly these names. `tf.train.load_checkpoint` can read the files."""
    names = sorted(tensors)
    with tf.device("CPU"):
        tf.raw_ops.SaveV2(
            prefix=os.fspath(prefix),
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            tensors=[tf.convert_to_tensor(tensors[name]) for name in names],
        )


def read_bundle(
    prefix: str | os.PathLike, *, check: Callable[[dict[str, tuple[int, ...]]], None] | None = None
) -> dict[str, np.ndarray]:
    """Read a checkpoint (`PREFIX.index`, `PREFIX.data-*`) as {name: array}.

    Args:
        prefix: the path without suffix.
        check: called with {name: shape} before any tensor is read. It raises an error if these are not the wanted ones.

    Raises:
        InputError: there is no checkpoint, it has fewer bytes than its index promises, or its data are damaged.
    """
    prefix = os.fspath(prefix)
    check_kind(f"{prefix}.index", f"{printable(prefix)}.index", is_folder=False)
    if not os.path.isfile(prefix + ".index"):
        raise InputError(
            f"There is no checkpoint {printable(prefix)}: the file {printable(prefix)}.index does not exist."
        )
    with literal(prefix) as literal_prefix:
        return _read(prefix, literal_prefix, check)


def _read(
    prefix: str, literal_prefix: str, check: Callable[[dict[str, tuple[int, ...]]], None] | None
) -> dict[str, np.ndarray]:
    """`read_bundle`, through `literal_prefix`; `prefix` is for messages."""
    try:
        reader = tf.train.load_checkpoint(literal_prefix)
        shapes = {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}
        dtypes = reader.get_variable_to_dtype_map()
        promised = sum(math.prod(shape) * dtypes[name].size for name, shape in shapes.items())
        present = sum(os.path.getsize(path) for path in glob.glob(glob.escape(literal_prefix) + ".data-*"))
        if present < promised:
            raise InputError(
                f"The checkpoint {prefix} is damaged: its .data files have {present:,} bytes, its index promises "
                f"{promised:,}."
            )
        if check is not None:
            check(shapes)
        return {name: np.asarray(reader.get_tensor(name)) for name in shapes}
    except InputError:
        raise
    except (tf.errors.OpError, IndexError, ValueError, RuntimeError, KeyError) as e:  # truncated .data: bare IndexError
        raise InputError(
            f"The checkpoint {prefix} is damaged: {type(e).__name__}: " + str(e).replace(literal_prefix, prefix)
        ) from e


def check_names(expected: Shapes, actual: Shapes, origin: str) -> None:
    """Refuse tensors that do not have exactly the expected names and shapes.

    Args:
        expected: {name: shape} of the weights here.
        actual: {name: shape} of the tensors in the file.
        origin: the name of the file, for the message.

    Raises:
        InputError: with a table of the names that are missing, unknown here, or of another shape.
    """
    rows = [(name, "missing in the file") for name in sorted(expected.keys() - actual.keys())]
    rows += [(name, f"{list(actual[name])}, no such weight here") for name in sorted(actual.keys() - expected.keys())]
    rows += [
        (name, f"{list(actual[name])} in the file, {list(expected[name])} here")
        for name in sorted(expected.keys() & actual.keys())
        if tuple(expected[name]) != tuple(actual[name])
    ]
    if rows:
        more = f"\n  ... and {len(rows) - _MAX_ROWS} more" if len(rows) > _MAX_ROWS else ""
        raise InputError(
            f"{origin} does not fit: {len(rows)} of {len(expected)} names disagree.\n"
            f"{textwrap.indent(table(rows[:_MAX_ROWS]), '  ')}{more}"
        )


def assign(
    variables: Mapping[str, tf.Variable | keras.Variable], tensors: Mapping[str, np.ndarray], origin: str
) -> None:
    """Assign every array to the variable of the same name, or none at all if names or shapes differ.

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
