"""How a client speaks to TensorFlow Serving: REST by `requests`, gRPC by `tensorflow-serving-api`.

A transport imports its package when it is made, so that REST needs no TensorFlow. Each call sends one request. It returns
the answer, or raises `ServerError` with a code of gRPC, which stands for the same error over both protocols.
"""

import base64
import functools
import importlib
import json
import time
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import numpy as np

from ddpm_tf.errors import InputError, RunError

INSTALL = "pip install -e '.[serving]'"
_URL = "http(s)://host[:port]"
_HTTP_CODES = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
    413: "INVALID_ARGUMENT", 429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 501: "UNIMPLEMENTED", 502: "UNAVAILABLE",
    503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED",
}  # fmt: skip
_CALLERS_FAULT = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "OUT_OF_RANGE", "UNAUTHENTICATED"}
_ADVICE = {
    "UNAVAILABLE": "Is the server running, and is this the port of the protocol (usually 8501 for REST, 8500 for gRPC)?",
    "DEADLINE_EXCEEDED": "Ask for fewer images at once, or raise the client's deadline and the server's and proxy's timeouts.",
    "NOT_FOUND": "Check the model's name, version and label against the server's model config.",
    "INVALID_ARGUMENT": "Correct the request: metadata() lists the inputs, and max_batch sets the images of one request.",
    "FAILED_PRECONDITION": "Correct the request: metadata() lists the inputs.",
    "RESOURCE_EXHAUSTED": "Ask for fewer images at once, or give the server more memory.",
}


class ServerError(RunError):
    """The server answered with an error, or not at all.

    `code` is gRPC's name of the error, over REST too. `exit_code` is 2 if the request is at fault, else 69
    (EX_UNAVAILABLE of sysexits.h).
    """

    def __init__(self, code: str, address: str, reason: str) -> None:
        advice = _ADVICE.get(code, "")
        one_line = " ".join(reason.split()) or "the server gave no reason."
        super().__init__(f"The request to {address} failed, {code}: {one_line} {advice}".rstrip())
        self.code = code
        self.exit_code = 2 if code in _CALLERS_FAULT else 69


class TensorInfo(NamedTuple):
    """dtype: numpy's name, or "str" for bytes. shape: sizes, None for a size that is open; None if the rank is open."""

    dtype: str
    shape: tuple[int | None, ...] | None


class SignatureInfo(NamedTuple):
    """inputs, outputs: name -> TensorInfo."""

    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]


class VersionStatus(NamedTuple):
    """state: START, LOADING, AVAILABLE, UNLOADING or END. error: the server's message, "" if there is none."""

    version: int
    state: str
    error: str


class RESTTransport:
    """Columnar JSON over HTTP.

    Args:
        address: host:port, or a URL (https behind a proxy). Put credentials into ~/.netrc, which `requests` reads.
    """

    def __init__(self, address: str, model: str, *, version: int | None = None, label: str | None = None) -> None:
        self._requests, self._urllib3 = _import("requests"), _import("urllib3.exceptions")
        self.address = address if "://" in address else f"http://{address}"
        try:
            parts = urlsplit(self.address)
        except ValueError as e:
            raise InputError(f"The address {self.address!r} is not a URL: {e}. Expected host:port or {_URL}.") from e
        if parts.username is not None or parts.query or parts.fragment:
            raise InputError(
                "The address contains a user name, a query or a fragment, which error messages would show. Give host:port "
                f"or {_URL}, and credentials in ~/.netrc."
            )
        which = f"/versions/{version}" if version is not None else f"/labels/{quote(label)}" if label else ""
        self._url = f"{self.address.rstrip('/')}/v1/models/{quote(model, safe='')}{which}"
        self._session = self._requests.Session()

    def predict(
        self, signature: str, inputs: dict[str, np.ndarray], output_names: list[str], timeout: float
    ) -> dict[str, Any]:
        columns = {name: value.tolist() for name, value in inputs.items()}
        # json writes NaN, which is not JSON. The server reads it all the same, and the model's own check refuses it.
        body = json.dumps({"signature_name": signature, "inputs": columns})
        outputs = self._call("POST", ":predict", timeout, "outputs", body=body)
        if not isinstance(outputs, dict):  # the server leaves out the name of a single output
            outputs = {output_names[0]: outputs}
        return {name: _undo_base64(value) for name, value in outputs.items()}

    def status(self, timeout: float) -> list[VersionStatus]:
        rows = self._call("GET", "", timeout, "model_version_status")
        errors = (row.get("status", {}).get("error_message", "") for row in rows)
        return [
            VersionStatus(int(row["version"]), row["state"], error) for row, error in zip(rows, errors, strict=True)
        ]

    def metadata(self, timeout: float) -> dict[str, SignatureInfo]:
        signatures = self._call("GET", "/metadata", timeout, "metadata", "signature_def", "signature_def")
        return {
            name: SignatureInfo(*(_tensor_infos(s.get(side, {})) for side in ("inputs", "outputs")))
            for name, s in signatures.items()
            if not name.startswith("__")
        }

    def close(self) -> None:
        self._session.close()

    def _call(self, method: str, resource: str, timeout: float, *keys: str, body: str | None = None) -> Any:
        """Send one request, and return the value under the nested `keys` of the answer's JSON."""
        end = time.monotonic() + timeout
        try:
            with self._session.request(
                method,
                self._url + resource,
                data=body,
                timeout=timeout,
                stream=True,
                allow_redirects=False,
                headers={"Content-Type": "application/json"},
            ) as response:
                content = b""
                # `timeout` above limits the wait for the next bytes. read1 returns the bytes that have arrived, so that
                # this loop can limit the wait for the whole answer.
                while chunk := response.raw.read1(1 << 16, decode_content=True):
                    content += chunk
                    if time.monotonic() > end:
                        raise self._requests.Timeout
        except (self._requests.Timeout, self._urllib3.TimeoutError):
            raise ServerError("DEADLINE_EXCEEDED", self.address, f"no answer within {timeout:.3g} s.") from None
        except ValueError as e:  # requests and urllib3 raise it for a malformed URL
            raise InputError(f"No request can be sent to {self.address}: {e}. Expected host:port or {_URL}.") from e
        except (self._requests.RequestException, self._urllib3.HTTPError) as e:
            raise ServerError("UNAVAILABLE", self.address, f"no connection ({_root(e)}).") from None
        return self._parse(response.status_code, content, keys)

    def _parse(self, http_status: int, content: bytes, keys: tuple[str, ...]) -> Any:
        try:
            answer = json.loads(content)
            if http_status == 200:
                return functools.reduce(lambda value, key: value[key], keys, answer)
            reason = str(answer["error"])
        except (ValueError, KeyError, TypeError):
            excerpt = content[:200].decode(errors="replace")
            reason = f"HTTP {http_status}, {excerpt!r}, which is not an answer of TensorFlow Serving."
        raise ServerError(_HTTP_CODES.get(http_status, "UNKNOWN"), self.address, reason)


class GRPCTransport:
    """TensorFlow Serving's PredictionService and ModelService over a channel without TLS."""

    def __init__(self, address: str, model: str, *, version: int | None = None, label: str | None = None) -> None:
        if "://" in address:
            raise InputError(f"gRPC takes host:port without a scheme, found {address!r}.")
        if "@" in address:
            raise InputError("The address contains a user name, which error messages would show. gRPC takes host:port.")
        self._grpc = _import("grpc")
        self._apis = {
            name: _import(f"tensorflow_serving.apis.{name}")
            for name in (
                "predict_pb2",
                "get_model_metadata_pb2",
                "get_model_status_pb2",
                "prediction_service_pb2_grpc",
                "model_service_pb2_grpc",
            )
        }
        self._tf = _import("tensorflow")
        self.address, self._which = address, (model, version, label)
        self._channel = self._grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)])
        self._predictions = self._apis["prediction_service_pb2_grpc"].PredictionServiceStub(self._channel)
        self._models = self._apis["model_service_pb2_grpc"].ModelServiceStub(self._channel)

    def predict(
        self, signature: str, inputs: dict[str, np.ndarray], output_names: list[str], timeout: float
    ) -> dict[str, Any]:
        request = self._address_to(self._apis["predict_pb2"].PredictRequest())
        request.model_spec.signature_name = signature
        for name, value in inputs.items():
            request.inputs[name].CopyFrom(self._tf.make_tensor_proto(value))
        answer = self._call(self._predictions.Predict, request, timeout)
        return {name: self._tf.make_ndarray(proto) for name, proto in answer.outputs.items()}

    def status(self, timeout: float) -> list[VersionStatus]:
        messages = self._apis["get_model_status_pb2"]
        answer = self._call(self._models.GetModelStatus, self._address_to(messages.GetModelStatusRequest()), timeout)
        state = messages.ModelVersionStatus.State.Name
        return [VersionStatus(v.version, state(v.state), v.status.error_message) for v in answer.model_version_status]

    def metadata(self, timeout: float) -> dict[str, SignatureInfo]:
        messages = self._apis["get_model_metadata_pb2"]
        request = self._address_to(messages.GetModelMetadataRequest(metadata_field=["signature_def"]))
        answer = self._call(self._predictions.GetModelMetadata, request, timeout)
        signatures = messages.SignatureDefMap()
        answer.metadata["signature_def"].Unpack(signatures)
        return {
            name: SignatureInfo(*({k: self._tensor_info(v) for k, v in side.items()} for side in (s.inputs, s.outputs)))
            for name, s in signatures.signature_def.items()
            if not name.startswith("__")
        }

    def close(self) -> None:
        self._channel.close()

    def _tensor_info(self, info: Any) -> TensorInfo:
        shape = self._tf.TensorShape(info.tensor_shape)
        dtype = self._tf.dtypes.as_dtype(info.dtype)
        return TensorInfo(_numpy_name(dtype.name), None if shape.rank is None else tuple(shape.as_list()))

    def _address_to(self, request: Any) -> Any:
        model, version, label = self._which
        request.model_spec.name = model
        if version is not None:
            request.model_spec.version.value = version
        elif label:
            request.model_spec.version_label = label
        return request

    def _call(self, method: Any, request: Any, timeout: float) -> Any:
        try:
            return method(request, timeout=timeout)
        except self._grpc.RpcError as e:
            raise ServerError(e.code().name, self.address, e.details() or "") from None


TRANSPORTS: dict[str, type[RESTTransport | GRPCTransport]] = {"rest": RESTTransport, "grpc": GRPCTransport}


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise InputError(f"The client needs {name!r}, which cannot be imported ({e}). Install it: {INSTALL}.") from e


def _root(error: Exception) -> str:
    """The text of an error's first cause, such as "[Errno 111] Connection refused"; `requests` wraps it three times."""
    reason = getattr(error.args[0], "reason", error.args[0]) if error.args else error
    return str(reason).rpartition(": ")[2] or type(error).__name__


def _undo_base64(value: Any) -> Any:
    """Bytes instead of {"b64": ...}, which stands for them in JSON; at any depth of lists."""
    if isinstance(value, dict):
        return base64.b64decode(value["b64"])
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_undo_base64(v) for v in value]
    return value


def _tensor_infos(side: dict[str, Any]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(_numpy_name(i["dtype"].removeprefix("DT_").lower()), _shape(i)) for name, i in side.items()
    }


def _shape(info: dict[str, Any]) -> tuple[int | None, ...] | None:
    shape = info.get("tensor_shape", {})
    if shape.get("unknown_rank"):
        return None
    return tuple(None if int(d["size"]) < 0 else int(d["size"]) for d in shape.get("dim", []))


def _numpy_name(name: str) -> str:
    return {"float": "float32", "double": "float64", "string": "str"}.get(name, name)
