"""JSON files of other programs, read without trust."""

import json
import os
import reprlib
from typing import Any, TypeGuard

from ddpm_tf.errors import InputError

_MAX_BYTES = 64 * 2**20
_SHORT = reprlib.Repr()
_SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlevel = 8, 4, 80, 80, 3


def read_object(path: str, kind: str) -> dict[str, Any]:
    """The content of a file that holds one JSON object.

    Args:
        path: a regular file in UTF-8, with or without a byte order mark.
        kind: what the file is, for messages, for example "a diffusers config".

    Raises:
        InputError: a file that cannot be read, that is too large, or that is no JSON object; or a key that is there twice.
    """
    problem = None
    try:
        if not os.path.isfile(path):
            problem = "it is not a regular file"
        elif os.path.getsize(path) > _MAX_BYTES:
            problem = f"it has {os.path.getsize(path):,} bytes, more than {_MAX_BYTES:,}"
        else:
            with open(path, encoding="utf-8-sig") as f:
                content = json.load(f, object_pairs_hook=_without_repeats)
            if isinstance(content, dict):
                return content
            problem = f"it holds {shown(content)}, expected a JSON object {{...}}"
    except (OSError, ValueError) as e:  # JSON and UTF-8 errors are ValueErrors
        problem = str(e)
    except RecursionError:
        problem = "it is nested too deeply"
    raise InputError(f"{path} cannot be read as {kind}: {problem}.")


def shown(value: object) -> str:
    """A value as Python writes it, cut short where it is long or nested deeply."""
    return _SHORT.repr(value)


def is_int(value: object) -> TypeGuard[int]:
    """Whether a JSON value is an integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a finite number that fits in a float; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(repeated)} is there twice")
    return content
