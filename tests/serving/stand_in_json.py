"""The JSON of TensorFlow Serving's REST predict requests, row ("instances") and columnar ("inputs"), for the stand-in.

Written after the documented behaviour: types are not converted (1.0 is no integer), every list of a tensor has the same
size, a request has either form, and inputs that the signature does not know are ignored in the columnar form only.
"""

import base64
import json

import numpy as np


class RequestError(Exception):
    """A body that is no request for this signature."""


def decode(body, known_inputs):
    """(is_row, {input key: array}) of a body; known_inputs {key: (tensor name, dtype, shape)}."""
    is_row, value = ("instances" in body), body.get("instances", body.get("inputs"))
    if ("instances" in body) == ("inputs" in body):
        raise RequestError("Expected one of 'inputs' and 'instances'.")
    return is_row, (_rows if is_row else _columns)(value, known_inputs)


def parse(text):
    """(body, signature name) of a request's text."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise RequestError(f"JSON Parse error: {e}") from e
    if not isinstance(body, dict):
        raise RequestError("The JSON value is not an object.")
    signature = body.get("signature_name", "serving_default")
    if not isinstance(signature, str):
        raise RequestError("'signature_name' must be a string.")
    return body, signature


def encode(is_row, outputs):
    """The JSON text of {output key: array}; the key of an only output is left out."""
    values = {key: [_value(key, v) for v in array.tolist()] for key, array in outputs.items()}
    if not is_row:
        return json.dumps({"outputs": values if len(values) > 1 else next(iter(values.values()))})
    rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    return json.dumps({"predictions": rows if len(values) > 1 else next(iter(values.values()))})


def _rows(rows, known):
    if not isinstance(rows, list) or not rows:
        raise RequestError("'instances' must be a list with at least one element.")
    if not _is_object(rows[0]):
        if len(known) > 1:
            raise RequestError("'instances' is a plain list, but this signature has several inputs.")
        rows = [{next(iter(known)): row} for row in rows]
    for row in rows:
        if not _is_object(row) or row.keys() != known.keys():
            raise RequestError(f"Every element of 'instances' must have the keys {sorted(known)}.")
    return {key: _array([row[key] for row in rows], known[key][1]) for key in known}


def _columns(columns, known):
    if not _is_object(columns):
        if len(known) > 1:
            raise RequestError("'inputs' is a plain list, but this signature has several inputs.")
        columns = {next(iter(known)): columns}
    missing = known.keys() - columns.keys()
    if missing:
        raise RequestError(f"Missing named input: {sorted(missing)} in 'inputs' object.")
    return {key: _array(columns[key], known[key][1]) for key in known}


def _array(value, dtype):
    try:
        found = np.asarray(value)
    except ValueError as e:
        raise RequestError(f"Encountered list at unexpected size: {e}") from e
    wanted = "iuf" if dtype.kind == "f" else "iu"
    if found.size and (found.dtype.kind not in wanted or _has_bool(value)):
        raise RequestError(f"JSON value {str(value)[:80]} is not of expected type: {dtype}")
    if found.size and dtype.kind == "i" and not np.can_cast(found.dtype, np.int64):
        raise RequestError(f"JSON value {str(value)[:80]} is out of range for {dtype}")
    return found.astype(dtype)


def _has_bool(value):
    return any(map(_has_bool, value)) if isinstance(value, list) else isinstance(value, bool)


def _is_object(value):
    return isinstance(value, dict) and value.keys() != {"b64"}


def _value(key, value):
    if not isinstance(value, bytes):
        return value
    return {"b64": base64.b64encode(value).decode()} if key.endswith("_bytes") else value.decode()
