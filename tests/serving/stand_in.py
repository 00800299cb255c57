"""A stand-in for TensorFlow Serving, for tests: this is NOT tensorflow_model_server.

It speaks the same REST and gRPC interfaces (predict, metadata, status) on the loopback, built on the generated protos, and
runs real SavedModels through TensorFlow's C API. It reads the models.config and batching.config that an export writes,
and looks for new versions when asked to. Everything that makes the real server a server (load, memory, speed, security) is
not in it.

  python -m tests.serving.stand_in MODELS --port=8500 --rest_api_port=8501 [--batching_parameters_file=MODELS/batching.config]
"""

import argparse
import concurrent.futures
import http.server
import os
import threading
import time

import grpc
import tensorflow as tf
from google.protobuf import text_format
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)
from tensorflow_serving.config import model_server_config_pb2

from tests.serving.batching import Batcher, read_batching
from tests.serving.c_api import INVALID_ARGUMENT, CError, CSession
from tests.serving.stand_in_rest import RESTHandler

DEADLINE_EXCEEDED, NOT_FOUND, FAILED_PRECONDITION, UNAVAILABLE = 4, 5, 9, 14
_GRPC_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Servable:
    """One version of a model."""

    def __init__(self, folder, batching, open_session):
        self._session = open_session(folder)
        self.inputs = {name: inputs for name, (inputs, _) in self._session.signatures.items()}
        with open(os.path.join(folder, "saved_model.pb"), "rb") as f:
            self.signature_def = saved_model_pb2.SavedModel.FromString(f.read()).meta_graphs[0].signature_def
        self._run = Batcher(self._session.run, batching).run if batching is not None else self._session.run

    def run(self, signature, inputs, if_unknown=FAILED_PRECONDITION):
        if signature not in self.inputs:
            raise CError(if_unknown, f'Serving signature name: "{signature}" not found in signature def')
        return self._run(signature, inputs)


class StandIn:
    """The server, over all models of a folder with a models.config; a context manager.

    Args:
        models: the folder; base paths /models/NAME of its models.config are taken as folders in it.
        port, rest_api_port: 0 takes a free one; see the attributes of the same name.
        batching: a BatchingParameters (see `read_batching`), or None: every request runs by itself.
        rest_api_timeout_s: as --rest_api_timeout_in_ms.
        open_session: folder -> CSession.

    Attributes:
        requests: how many predict requests came in.
        refuse: answer this many of the next predict requests with UNAVAILABLE.
    """

    def __init__(
        self, models, *, port=0, rest_api_port=0, batching=None, rest_api_timeout_s=30.0, open_session=CSession
    ):
        self._models, self._batching, self._open_session = os.fspath(models), batching, open_session
        self.rest_api_timeout_s, self.requests, self.refuse = rest_api_timeout_s, 0, 0
        self._servables, self._labels, self._lock = {}, {}, threading.Lock()
        self.refresh()
        self._pool = concurrent.futures.ThreadPoolExecutor(32)
        self._grpc = grpc.server(self._pool)
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(_Predictions(self), self._grpc)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(_Models(self), self._grpc)
        self.port = self._grpc.add_insecure_port(f"127.0.0.1:{port}")
        handler = type("Handler", (RESTHandler,), {"core": self})
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", rest_api_port), handler)
        self.rest_api_port = self._http.server_port

    def __enter__(self):
        self._grpc.start()
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()
        self._grpc.stop(None).wait()

    def refresh(self):
        """Read models.config and the version folders again: load what is asked for and not loaded, drop the rest."""
        with open(os.path.join(self._models, "models.config"), encoding="utf-8") as f:
            config = text_format.Parse(f.read(), model_server_config_pb2.ModelServerConfig())
        servables, labels = {}, {}
        for model in config.model_config_list.config:
            base = os.path.join(self._models, os.path.relpath(model.base_path, "/models"))
            labels[model.name] = dict(model.version_labels)
            old = self._servables.get(model.name, {})
            servables[model.name] = {
                v: old.get(v) or Servable(os.path.join(base, str(v)), self._batching, self._open_session)
                for v in _wanted(model, base)
            }
        with self._lock:
            self._servables, self._labels = servables, labels

    def find(self, model, version=None, label=None):
        """(version, Servable)."""
        with self._lock:
            versions, labels = self._servables.get(model, {}), self._labels.get(model, {})
        if label and label not in labels:
            raise CError(INVALID_ARGUMENT, f"Unrecognized servable version label: {label}")
        version = labels[label] if label else version
        if not versions or (version is not None and version not in versions):
            which = f"Latest({model})" if version is None else f"Specific({model}, {version})"
            raise CError(NOT_FOUND, f"Servable not found for request: {which}")
        version = max(versions) if version is None else version
        return version, versions[version]

    def count(self):
        with self._lock:
            self.requests += 1
            self.refuse, refused = max(self.refuse - 1, 0), self.refuse > 0
        if refused:
            raise CError(UNAVAILABLE, "The batch scheduling queue to which this task was submitted is full")

    def status(self, model, version=None, label=None):
        with self._lock:
            versions = dict(self._servables.get(model, {}))
        if version is not None or label:
            versions = dict([self.find(model, version, label)])
        if not versions:
            raise CError(NOT_FOUND, f"Could not find any versions of model {model}")
        answer = get_model_status_pb2.GetModelStatusResponse()
        for v in sorted(versions, reverse=True):
            answer.model_version_status.add(version=v, state="AVAILABLE").status.SetInParent()
        return answer

    def metadata(self, model, version=None, label=None):
        version, servable = self.find(model, version, label)
        answer = get_model_metadata_pb2.GetModelMetadataResponse()
        answer.model_spec.name, answer.model_spec.version.value = model, version
        signatures = get_model_metadata_pb2.SignatureDefMap(signature_def=servable.signature_def)
        answer.metadata["signature_def"].Pack(signatures)
        return answer, signatures

    def timed(self, function, *args):
        try:
            return self._pool.submit(function, *args).result(self.rest_api_timeout_s)
        except concurrent.futures.TimeoutError:
            raise CError(DEADLINE_EXCEEDED, "Timed out waiting for notification") from None


def _wanted(model, base):
    """The versions that a ModelConfig asks for; folders that are no number are none."""
    found = sorted(int(name) for name in os.listdir(base) if name.isdecimal()) if os.path.isdir(base) else []
    policy = model.model_version_policy
    kind = policy.WhichOneof("policy_choice") or "latest"
    if kind == "specific":
        return [v for v in found if v in policy.specific.versions]
    return found if kind == "all" else found[-max(policy.latest.num_versions, 1) :]


class _Predictions(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, core):
        self._core = core

    def Predict(self, request, context):
        spec = request.model_spec
        with _Aborting(context):
            self._core.count()
            version, servable = self._core.find(*_which(spec))
            inputs = {name: tf.make_ndarray(proto) for name, proto in request.inputs.items()}
            outputs = servable.run(spec.signature_name or "serving_default", inputs)
            answer = predict_pb2.PredictResponse()
            answer.model_spec.CopyFrom(spec)
            answer.model_spec.version.value = version
            for name, value in outputs.items():
                answer.outputs[name].CopyFrom(tf.make_tensor_proto(value))
            return answer

    def GetModelMetadata(self, request, context):
        with _Aborting(context):
            return self._core.metadata(*_which(request.model_spec))[0]


class _Models(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, core):
        self._core = core

    def GetModelStatus(self, request, context):
        with _Aborting(context):
            return self._core.status(*_which(request.model_spec))


class _Aborting:
    """Ends an RPC with the code of a CError."""

    def __init__(self, context):
        self._context = context

    def __enter__(self):
        pass

    def __exit__(self, kind, error, _):
        if isinstance(error, CError):
            self._context.abort(_GRPC_CODES[error.code], str(error))


def _which(spec):
    return spec.name, spec.version.value if spec.HasField("version") else None, spec.version_label


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models")
    parser.add_argument("--port", type=int, default=8500)
    parser.add_argument("--rest_api_port", type=int, default=8501)
    parser.add_argument("--batching_parameters_file")
    parser.add_argument("--rest_api_timeout_in_ms", type=int, default=30000)
    args = parser.parse_args()
    batching = None
    if args.batching_parameters_file:
        with open(args.batching_parameters_file, encoding="utf-8") as f:
            batching = read_batching(f.read())
    with StandIn(
        args.models,
        port=args.port,
        rest_api_port=args.rest_api_port,
        batching=batching,
        rest_api_timeout_s=args.rest_api_timeout_in_ms / 1000,
    ) as server:
        print(f"Stand-in: gRPC on {server.port}, REST on {server.rest_api_port}", flush=True)
        while True:
            time.sleep(1)
            server.refresh()


if __name__ == "__main__":
    main()
