"""Warm-up requests: a model server runs them when it loads a version, so that the first client does not wait."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from ddpm_tf.errors import InputError
from ddpm_tf.serving.transports import INSTALL

_MOST_EVALUATIONS = 100  # A request that calls the network more often would delay the loading too long.


def write_warmup(path: str, name: str, functions: Mapping[str, Any], *, evaluations: Mapping[str, int]) -> list[str]:
    """Write assets.extra/tf_serving_warmup_requests: for every cheap signature, a request for one image.

    The server prepares a signature's graph at its first request, which takes seconds. A signature is cheap if a request
    calls the network at most 100 times.

    Args:
        path: the SavedModel's folder.
        name: the model's name on the server.
        functions: {signature: ConcreteFunction}.
        evaluations: {signature: how often one request calls the network}.

    Returns:
        the names of the cheap signatures.

    Raises:
        InputError: tensorflow-serving-api is not installed.
    """
    prediction_log_pb2 = _protos()
    cheap = [signature for signature in functions if evaluations[signature] <= _MOST_EVALUATIONS]
    folder = os.path.join(path, "assets.extra")
    os.makedirs(folder, exist_ok=True)
    with tf.io.TFRecordWriter(os.path.join(folder, "tf_serving_warmup_requests")) as writer:
        for signature in cheap:
            log = prediction_log_pb2.PredictionLog()
            request = log.predict_log.request
            request.model_spec.name, request.model_spec.signature_name = name, signature
            for spec in functions[signature].structured_input_signature[0]:
                value = np.zeros([1, *spec.shape[1:]], spec.dtype.as_numpy_dtype)
                request.inputs[spec.name].CopyFrom(tf.make_tensor_proto(value))
            writer.write(log.SerializeToString())
    return cheap


def _protos() -> Any:
    try:
        from tensorflow_serving.apis import prediction_log_pb2
    except ImportError as e:
        raise InputError(f"tensorflow-serving-api cannot be imported ({e}). Install it: {INSTALL}.") from e
    return prediction_log_pb2
