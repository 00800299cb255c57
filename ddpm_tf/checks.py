"""Numbers that users give, checked at the boundary: nothing wraps round, is rounded, or is repeated in silence."""

import math
import numbers
import os
from collections.abc import Container, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from ddpm_tf.errors import InputError, unknown_name

INT64: dict[str, Any] = {"low": -(2**63), "high": 2**63 - 1}  # any seed
# Limits that no sensible run meets. They stand between a mistyped number and a machine without memory.
MAX_IMAGES = 100_000_000
MAX_BATCH = 1_000_000
MAX_TIMESTEPS = 1_000_000


def integer(name: str, value: Any, *, low: int, high: int) -> int:
    """One integer within low..high: Python's or numpy's, no bool and no float.

    Args:
        name: of the argument, for the message.

    Raises:
        InputError
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not _is_integer(value):
        raise InputError(f"{name} must be an integer, found {_shown(value)}.")
    if not low <= value <= high:
        raise InputError(f"{name} must be {_range(low, high)}, found {_shown(int(value))}.")
    return int(value)


def real(name: str, value: Any, *, low: float = -math.inf, high: float = math.inf) -> float:
    """One finite number within low..high, both included; no bool.

    Raises:
        InputError
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not _is_number(value):
        raise InputError(f"{name} must be a number, found {_shown(value)}.")
    try:
        number = float(value)
    except OverflowError:  # of an integer
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{name} must be a finite number, found {_shown(value)}.")
    if not low <= number <= high:
        raise InputError(f"{name} must be {_range(low, high)}, found {_shown(value)}.")
    return number


def boolean(name: str, value: Any) -> bool:
    """True or False, and nothing that merely counts as one.

    Raises:
        InputError
    """
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} must be True or False, found {_shown(value)}.")
    return bool(value)


def integers(name: str, values: Any, *, low: int, high: int, shape: Sequence[int] | None = None) -> np.ndarray:
    """Integers within low..high, as int64.

    Args:
        name: of the argument, a plural, for the message.
        values: a sequence, range, array or eager tensor of an integer type.
        shape: that the array must have; None: any length, one dimension.

    Returns:
        int64 of that shape.

    Raises:
        InputError
    """
    array = _array(name, values, "integers")
    # numpy makes an array of objects or floats of integers beyond 64 bits, and integers of a list that mixes in bools.
    if isinstance(values, list | tuple) or array.dtype == object:
        for value in array.flat if array.dtype == object else values:
            if _is_integer(value):
                if not low <= value <= high:
                    raise InputError(f"{name} hold {_shown(int(value))}; expected {low}..{high}.")
            elif array.dtype == object or _is_number(value) or isinstance(value, bool | None):
                integer(f"Each of {name}", value, low=low, high=high)
    if array.size and array.dtype.kind not in "iu":
        raise InputError(f"{name} must be integers, found {array.dtype} {list(array.shape)}.")
    _check_shape(name, array, shape)
    for extreme in (array.min(), array.max()) if array.size else ():
        if not low <= int(extreme) <= high:
            raise InputError(f"{name} hold {int(extreme)}; expected {low}..{high}.")
    return array.astype(np.int64)


def reals(
    name: str, values: Any, *, low: float = -math.inf, high: float = math.inf, shape: Sequence[int] | None = None
) -> np.ndarray:
    """Finite numbers within low..high, as float64; the arguments are those of `integers`.

    Raises:
        InputError
    """
    array = _array(name, values, "numbers")
    if array.size and array.dtype.kind not in "iuf" and array.dtype.name != "bfloat16":
        raise InputError(f"{name} must be numbers, found {array.dtype} {list(array.shape)}.")
    array = array.astype(np.float64)
    _check_shape(name, array, shape)
    bad = array[~(np.isfinite(array) & (array >= low) & (array <= high))]
    if bad.size:
        expected = "finite" if not np.isfinite(bad[0]) else _range(low, high)
        raise InputError(f"{name} must be {expected}; they hold {bad[0]:g}.")
    return array


class _Names(Container, Iterable, Protocol):  # a table of choices, or a list of them
    pass


def known(kind: str, name: Any, names: _Names) -> None:
    """Refuse a name that is not in a table; also what is no name at all, such as a list.

    Raises:
        InputError
    """
    if not isinstance(name, str) or name not in names:
        raise unknown_name(kind, name, names)


def memory(what: str, size: int, advice: str) -> None:
    """Refuse what needs more bytes than this machine has memory, before any of it is asked for.

    Args:
        what: subject of the message's sentence.
        size: a lower bound of the bytes.

    Raises:
        InputError
    """
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > here:
        raise InputError(
            f"{what} would take at least {_gib(size)} of memory, and this machine has {_gib(here)}. {advice}"
        )


def _array(name: str, values: Any, kind: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except Exception as e:  # of varying lengths, symbolic tensors, whatever else an object's own conversion raises
        raise InputError(f"{name} must be an array of {kind}, found {_shown(values)}.") from e


def _check_shape(name: str, array: np.ndarray, shape: Sequence[int] | None) -> None:
    if (shape is None and array.ndim != 1) or (shape is not None and array.shape != tuple(shape)):
        expected = "[N], a list" if shape is None else str(list(shape))
        raise InputError(f"{name} have the shape {list(array.shape)}; expected {expected}.")


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def _shown(value: object) -> str:
    """A value for a message, at most about a line of it."""
    if isinstance(value, numbers.Integral) and abs(int(value)) >= 10**40:
        return f"an integer of {int(value).bit_length()} bits"
    text = str(value) if _is_number(value) else repr(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 80 else f"{text[:77]}... (a {type(value).__name__})"


def _range(low: float, high: float) -> str:
    if high == math.inf:
        return f"at least {low:g}"
    if low == -math.inf:
        return f"at most {high:g}"
    return f"within {_end(low)}..{_end(high)}"


def _end(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size < 2**70 else f"2^{size.bit_length() - 1} bytes"
