"""How a client speaks to TensorFlow Serving: REST by `requests`, gRPC by `tensorflow-serving-api`.

Both are imported when a transport is made, so that REST needs no TensorFlow. A transport sends one request and answers
with arrays, or raises `ServerError` with the canonical code that both protocols share.
"""

import base64
import functools
import importlib
import json
import time
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from ddpm_tf.errors import InputError, RunError

EXTRA = "pip install -e '.[serving]'"
_HTTP_CODES = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
    413: "INVALID_ARGUMENT", 429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 501: "UNIMPLEMENTED", 502: "UNAVAILABLE",
    503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED",
}  # fmt: skip
_CALLERS_FAULT = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "OUT_OF_RANGE", "UNAUTHENTICATED"}
_ADVICE = {
    "UNAVAILABLE": "Is it running, and does this port speak the protocol asked for (usually 8501 REST, 8500 gRPC)?",
    "DEADLINE_EXCEEDED": "Ask for fewer images at once, or raise the client's deadline and the server's and proxy's timeouts.",
    "NOT_FOUND": "Check the model's name, version and label against the server's model config.",
    "INVALID_ARGUMENT": "Correct the request: metadata() lists the inputs, max_batch is how many images are asked for at once.",
    "FAILED_PRECONDITION": "Correct the request; the inputs are in metadata().",
    "RESOURCE_EXHAUSTED": "Ask for fewer images at once, or give the server more memory.",
}


class ServerError(RunError):
    """The server answered with an error, or not at all.

    `code` is gRPC's name of the error over both protocols. Exit code 2 where the request is at fault, else 69
    (sysexits' EX_UNAVAILABLE).
    """

    def __init__(self, code, address, said):
        advice = _ADVICE.get(code, "")
        said = " ".join(str(said).split()) or "nothing"  # on one line
        super().__init__(f"The server at {address} answered {code}: {said} {advice}".rstrip())
        self.code = code
        self.exit_code = 2 if code in _CALLERS_FAULT else 69


class TensorInfo(NamedTuple):
    """dtype: numpy's name, bytes are "str"; shape: a tuple, None where any size goes, or None for any rank."""

    dtype: str
    shape: tuple | None


class Signature(NamedTuple):
    """inputs, outputs: name -> TensorInfo."""

    inputs: dict
    outputs: dict


class VersionStatus(NamedTuple):
    """version: int; state: START, LOADING, AVAILABLE, UNLOADING or END; error: the server's words, "" if there are none."""

    version: int
    state: str
    error: str


class RESTTransport:
    """Columnar JSON over HTTP.

    Args:
        address: host:port, or a URL (https behind a proxy). Credentials belong in ~/.netrc, which requests reads.
    """

    def __init__(self, address, model, *, version=None, label=None):
        self._requests, self._urllib3 = _import("requests"), _import("urllib3.exceptions")
        self.address = address if "://" in address else f"http://{address}"
        try:
            parts = urlsplit(self.address)
        except ValueError as e:
            raise InputError(f"The address {self.address!r} is no URL: {e}.") from e
        if parts.username is not None or parts.query or parts.fragment:
            raise InputError(
                "The address holds a user name, a query or a fragment, which messages would show; use ~/.netrc."
            )
        which = f"/versions/{version}" if version is not None else f"/labels/{quote(label)}" if label else ""
        self._url = f"{self.address.rstrip('/')}/v1/models/{quote(model, safe='')}{which}"
        self._session = self._requests.Session()

    def predict(self, signature, inputs, output_names, timeout):
        columns = {name: value.tolist() for name, value in inputs.items()}
        # NaN is no JSON, but the server reads it, and answers by the model's own check.
        body = json.dumps({"signature_name": signature, "inputs": columns})
        outputs = self._call("POST", ":predict", timeout, "outputs", body=body)
        if not isinstance(outputs, dict):  # the server drops the name of an only output
            outputs = {output_names[0]: outputs}
        return {name: _undo_base64(value) for name, value in outputs.items()}

    def status(self, timeout):
        rows = self._call("GET", "", timeout, "model_version_status")
        errors = (row.get("status", {}).get("error_message", "") for row in rows)
        return [
            VersionStatus(int(row["version"]), row["state"], error) for row, error in zip(rows, errors, strict=True)
        ]

    def metadata(self, timeout):
        signatures = self._call("GET", "/metadata", timeout, "metadata", "signature_def", "signature_def")
        return {
            name: Signature(*(_tensor_infos(s.get(side, {})) for side in ("inputs", "outputs")))
            for name, s in signatures.items()
            if not name.startswith("__")
        }

    def close(self):
        self._session.close()

    def _call(self, method, resource, timeout, *keys, body=None):
        """What stands under the keys in the JSON of the answer."""
        end = time.monotonic() + timeout
        try:
            with self._session.request(
                method, self._url + resource, data=body, timeout=timeout, stream=True, allow_redirects=False,
                headers={"Content-Type": "application/json"},
            ) as response:  # fmt: skip
                content = b""
                # A timeout of requests is from byte to byte; read1 returns with what there is, so that the whole has one.
                while chunk := response.raw.read1(1 << 16, decode_content=True):
                    content += chunk
                    if time.monotonic() > end:
                        raise self._requests.Timeout
        except (self._requests.Timeout, self._urllib3.TimeoutError):
            raise ServerError("DEADLINE_EXCEEDED", self.address, f"no answer within {timeout:.3g} s.") from None
        except ValueError as e:  # of requests and urllib3: URLs that are none
            raise InputError(
                f"{self.address} cannot be asked: {e}. Expected host:port or http(s)://host[:port]."
            ) from e
        except (self._requests.RequestException, self._urllib3.HTTPError) as e:
            raise ServerError("UNAVAILABLE", self.address, f"no connection ({_root(e)}).") from None
        return self._parse(response.status_code, content, keys)

    def _parse(self, http_status, content, keys):
        try:
            answer = json.loads(content)
            if http_status == 200:
                return functools.reduce(lambda value, key: value[key], keys, answer)
            said = answer["error"]
        except (ValueError, KeyError, TypeError):
            excerpt = content[:200].decode(errors="replace")
            said = f"HTTP {http_status}, {excerpt!r}, which is nothing that TensorFlow Serving says."
        raise ServerError(_HTTP_CODES.get(http_status, "UNKNOWN"), self.address, said)


class GRPCTransport:
    """TensorFlow Serving's PredictionService and ModelService over a channel without TLS."""

    def __init__(self, address, model, *, version=None, label=None):
        if "://" in address:
            raise InputError(f"gRPC takes host:port without a scheme, found {address!r}.")
        if "@" in address:
            raise InputError("The address holds a user name, which messages would show; gRPC takes host:port.")
        self._grpc = _import("grpc")
        self._apis = {
            name: _import(f"tensorflow_serving.apis.{name}")
            for name in ("predict_pb2", "get_model_metadata_pb2", "get_model_status_pb2", "prediction_service_pb2_grpc",
                         "model_service_pb2_grpc")
        }  # fmt: skip
        self._tf = _import("tensorflow")
        self.address, self._which = address, (model, version, label)
        self._channel = self._grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)])
        self._predictions = self._apis["prediction_service_pb2_grpc"].PredictionServiceStub(self._channel)
        self._models = self._apis["model_service_pb2_grpc"].ModelServiceStub(self._channel)

    def predict(self, signature, inputs, output_names, timeout):
        request = self._address_to(self._apis["predict_pb2"].PredictRequest())
        request.model_spec.signature_name = signature
        for name, value in inputs.items():
            request.inputs[name].CopyFrom(self._tf.make_tensor_proto(value))
        answer = self._call(self._predictions.Predict, request, timeout)
        return {name: self._tf.make_ndarray(proto) for name, proto in answer.outputs.items()}

    def status(self, timeout):
        messages = self._apis["get_model_status_pb2"]
        answer = self._call(self._models.GetModelStatus, self._address_to(messages.GetModelStatusRequest()), timeout)
        state = messages.ModelVersionStatus.State.Name
        return [VersionStatus(v.version, state(v.state), v.status.error_message) for v in answer.model_version_status]

    def metadata(self, timeout):
        messages = self._apis["get_model_metadata_pb2"]
        request = self._address_to(messages.GetModelMetadataRequest(metadata_field=["signature_def"]))
        answer = self._call(self._predictions.GetModelMetadata, request, timeout)
        signatures = messages.SignatureDefMap()
        answer.metadata["signature_def"].Unpack(signatures)
        return {
            name: Signature(*({k: self._tensor_info(v) for k, v in side.items()} for side in (s.inputs, s.outputs)))
            for name, s in signatures.signature_def.items()
            if not name.startswith("__")
        }

    def close(self):
        self._channel.close()

    def _tensor_info(self, info):
        shape = self._tf.TensorShape(info.tensor_shape)
        dtype = self._tf.dtypes.as_dtype(info.dtype)
        return TensorInfo(_numpy_name(dtype.name), None if shape.rank is None else tuple(shape.as_list()))

    def _address_to(self, request):
        model, version, label = self._which
        request.model_spec.name = model
        if version is not None:
            request.model_spec.version.value = version
        elif label:
            request.model_spec.version_label = label
        return request

    def _call(self, method, request, timeout):
        try:
            return method(request, timeout=timeout)
        except self._grpc.RpcError as e:
            raise ServerError(e.code().name, self.address, e.details() or "") from None


TRANSPORTS = {"rest": RESTTransport, "grpc": GRPCTransport}


def _import(name):
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise InputError(f"The client needs the package of {name!r}, which cannot be imported ({e}): {EXTRA}.") from e


def _root(error):
    """The first cause of an error, such as [Errno 111] Connection refused; requests wraps it three times."""
    reason = getattr(error.args[0], "reason", error.args[0]) if error.args else error
    return str(reason).rpartition(": ")[2] or type(error).__name__


def _undo_base64(value):
    """{"b64": ...}, the JSON of bytes, at any depth, to bytes."""
    if isinstance(value, dict):
        return base64.b64decode(value["b64"])
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_undo_base64(v) for v in value]
    return value


def _tensor_infos(side):
    return {
        name: TensorInfo(_numpy_name(i["dtype"].removeprefix("DT_").lower()), _shape(i)) for name, i in side.items()
    }


def _shape(info):
    shape = info.get("tensor_shape", {})
    if shape.get("unknown_rank"):
        return None
    return tuple(None if int(d["size"]) < 0 else int(d["size"]) for d in shape.get("dim", []))


def _numpy_name(name):
    return {"float": "float32", "double": "float64", "string": "str"}.get(name, name)
