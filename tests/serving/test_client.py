"""The client where no model is needed: settings, and servers that are not there or do not answer."""

import contextlib
import http.server
import socket
import sys
import threading
import time

import numpy as np
import pytest

from ddpm_tf.errors import InputError
from ddpm_tf.serving.client import Client
from ddpm_tf.serving.client.__main__ import main
from ddpm_tf.serving.transports import TRANSPORTS, ServerError, SignatureInfo, TensorInfo, VersionStatus

pytest.importorskip("requests", reason="the client needs ddpm_tf[serving]: requests")


@pytest.fixture(params=["rest", "grpc"])
def transport(request):
    if request.param == "grpc":
        pytest.importorskip("tensorflow_serving.apis", reason="gRPC needs ddpm_tf[serving]: tensorflow-serving-api")
    return request.param


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"version": 1, "label": "stable"}, "one of them"),
        ({"attempts": 0}, "attempts"),
        ({"max_batch": 0}, "max_batch"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"deadline_s": float("inf")}, "deadline_s"),
    ],
)
def test_settings_that_cannot_be_used(kwargs, message):
    with pytest.raises(InputError, match=message):
        Client("localhost:1", "digits", **kwargs)


def test_addresses_that_cannot_be_used():
    with pytest.raises(InputError, match="netrc") as e:
        Client("http://me:secret@localhost:8501", "digits")
    assert "secret" not in str(e.value)
    for address, kind in (("localhost:1/?token=secret", "rest"), ("me:secret@localhost:1", "grpc")):
        with pytest.raises(InputError, match="messages would show") as e:
            Client(address, "digits", transport=kind)
        assert "secret" not in str(e.value)
    with pytest.raises(InputError, match="is not a URL"):
        Client("http://[::1", "digits")
    with pytest.raises(InputError, match="without a scheme"):
        Client("http://localhost:8500", "digits", transport="grpc")
    with pytest.raises(InputError, match="Expected host:port"):
        Client("http://", "digits").status()


def test_nobody_listening(transport):
    with socket.create_server(("127.0.0.1", 0)) as s:
        address = f"127.0.0.1:{s.getsockname()[1]}"  # nobody's, once it is closed
    with Client(address, "digits", transport=transport, attempts=2) as client, pytest.raises(ServerError) as e:
        client.sample([1])
    assert e.value.code == "UNAVAILABLE"
    assert address in str(e.value) and "running" in str(e.value)


def test_a_server_that_does_not_answer_ends_at_the_deadline(transport):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        with Client(address, "digits", transport=transport, deadline_s=0.5) as client, pytest.raises(ServerError) as e:
            client.sample([1])
        assert 0.4 < time.monotonic() - start < 2
    assert e.value.code == "DEADLINE_EXCEEDED"


def test_an_answer_that_trickles_ends_at_the_deadline():
    def trickle():
        connection, _ = silent.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(100):
                connection.sendall(b" ")
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        threading.Thread(target=trickle, daemon=True).start()
        start = time.monotonic()
        with Client(f"127.0.0.1:{silent.getsockname()[1]}", "digits", deadline_s=0.5) as client:
            with pytest.raises(ServerError) as e:
                client.status()
        assert e.value.code == "DEADLINE_EXCEEDED" and time.monotonic() - start < 2


@pytest.mark.parametrize("status", [200, 301, 500])
@pytest.mark.parametrize("body", [b"<html>welcome</html>", b"[]", b'{"a": 1}', b"", b'{"error": 3}'])
def test_a_server_that_is_something_else(transport, status, body):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, args=(0.02,), daemon=True).start()
        address = f"127.0.0.1:{other.server_port}"
        with Client(address, "digits", transport=transport, attempts=1, deadline_s=5) as client:
            with pytest.raises(ServerError, match=address):
                client.sample([1])
        other.shutdown()


def test_credentials_come_from_netrc(tmp_path, monkeypatch):
    class Asking(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found.append(self.headers["Authorization"])
            self.send_error(401)

        def log_message(self, *_):
            pass

    found, netrc = [], tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with http.server.HTTPServer(("127.0.0.1", 0), Asking) as asking:
        threading.Thread(target=asking.serve_forever, args=(0.02,), daemon=True).start()
        with Client(f"127.0.0.1:{asking.server_port}", "digits") as client, pytest.raises(ServerError) as e:
            client.status()
        asking.shutdown()
    assert found == ["Basic bWU6c2VjcmV0"] and e.value.code == "UNAUTHENTICATED"


@pytest.mark.parametrize("name", ["requests", "tensorflow_serving.apis.predict_pb2"])
def test_a_missing_package_names_the_extra(name, monkeypatch):
    pytest.importorskip("tensorflow_serving.apis")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install -e '.\[serving\]'"):
        Client("localhost:1", "digits", transport="rest" if name == "requests" else "grpc")


class RollingOver:
    """A server whose newest version is a new one at every request; it answers with the version that was asked for."""

    newest, asked = 1, []

    def __init__(self, address, model, *, version=None, label=None):
        self.version = version

    def status(self, timeout):
        return [VersionStatus(RollingOver.newest, "AVAILABLE", ""), VersionStatus(99, "LOADING", "")]

    def metadata(self, timeout):
        image, seed = TensorInfo("float32", (None, 1, 1, 1)), TensorInfo("int64", (None,))
        step = {"x_t": image, "step": TensorInfo("int32", (None,)), "seed": seed}
        return {
            "sample": SignatureInfo({"seed": seed}, {"images": TensorInfo("uint8", (None, 1, 1, 1))}),
            "initial_noise": SignatureInfo({"seed": seed}, {"x_T": image}),
            "denoise_step": SignatureInfo(step, {"x_prev": image, "x_0": image}),
        }

    def predict(self, signature, inputs, names, timeout):
        RollingOver.asked.append(self.version)
        RollingOver.newest += 1
        return {name: np.zeros((len(inputs["seed"]), 1, 1, 1)) for name in names}

    def close(self):
        pass


def test_one_call_is_answered_by_one_version(monkeypatch):
    monkeypatch.setitem(TRANSPORTS, "rest", RollingOver)
    monkeypatch.setattr(RollingOver, "asked", [])
    client = Client("localhost:1", "digits", max_batch=2)
    for call, requests in ((lambda: client.sample(range(5)), 3), (lambda: list(client.denoise([0], num_steps=3)), 4)):
        first = RollingOver.newest
        call()
        assert RollingOver.asked[-requests:] == [first] * requests
    client.sample([0])
    assert RollingOver.asked[-1] is None  # the newest, whichever it is
    newest, both = RollingOver.newest, [client.denoise([k], num_steps=2) for k in range(2)]
    for steps in both * 2:  # in turn, each by its own version
        next(steps)
    first, second = newest, newest + 2
    assert RollingOver.asked[-6:] == [first, first, second, second, first, second]
    with pytest.raises(InputError, match="num_steps must be at least 1"):
        list(client.denoise([0], num_steps=0))


class Conditional:
    """A class-conditional model with self-conditioning; its images hold label and guidance_scale."""

    requests = []

    def __init__(self, address, model, *, version=None, label=None):
        pass

    def status(self, timeout):
        return [VersionStatus(1, "AVAILABLE", "")]

    def metadata(self, timeout):
        image, seed = TensorInfo("float32", (None, 1, 1, 1)), {"seed": TensorInfo("int64", (None,))}
        label = {"label": TensorInfo("int32", (None,))}
        conditions = label | {"guidance_scale": TensorInfo("float32", (None,))}
        step = {"x_t": image, "step": TensorInfo("int32", (None,)), "x_0": image}
        return {
            "sample": SignatureInfo(seed | conditions, {"images": TensorInfo("uint8", (None, 1, 1, 2))}),
            "initial_noise": SignatureInfo(seed, {"x_T": image}),
            "denoise_step": SignatureInfo(seed | conditions | step, {"x_prev": image, "x_0": image}),
            "bits_per_dim": SignatureInfo(
                seed | label | {"images": image}, {"total_bpd": TensorInfo("float32", (None,))}
            ),
        }

    def predict(self, signature, inputs, names, timeout):
        Conditional.requests.append((signature, inputs))
        count = len(inputs["seed"])
        if signature == "sample":
            return {"images": np.stack([inputs["label"], inputs["guidance_scale"]], 1).reshape(-1, 1, 1, 2)}
        if signature == "denoise_step":
            return {"x_prev": inputs["x_t"], "x_0": inputs["x_0"] + 1}
        return {name: np.zeros((count, 1, 1, 1) if name == "x_T" else count) for name in names}

    def close(self):
        pass


@pytest.fixture
def conditional(monkeypatch):
    monkeypatch.setitem(TRANSPORTS, "rest", Conditional)
    monkeypatch.setattr(Conditional, "requests", [])
    return Client("localhost:1", "digits", max_batch=2)


def test_labels_and_guidance_are_sent_one_for_each_image(conditional):
    images = conditional.sample(range(5), labels=[0, 1, 2, 3, 4], guidance_scale=3.0)
    assert images.reshape(5, 2).tolist() == [[k, 3] for k in range(5)]
    assert conditional.sample([7], labels=2).reshape(2).tolist() == [2, 1]  # conditional
    conditional.bits_per_dim(np.zeros((3, 1, 1, 1), np.float32), range(3), labels=1)
    assert [sorted(inputs) for _, inputs in Conditional.requests[-2:]] == [["images", "label", "seed"]] * 2


def test_a_model_with_self_conditioning_gets_the_x_0_of_the_step_before(conditional):
    steps = list(conditional.denoise([0, 1], num_steps=3, labels=0))
    sent = [inputs["x_0"].max() for name, inputs in Conditional.requests if name == "denoise_step"]
    assert sent == [0, 1, 2] and steps[-1].x_0.max() == 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "This model is class-conditional: give labels"),
        ({"labels": [0, 1]}, "labels must be one number or 3 of them"),
        ({"labels": 0.5}, "labels must be int32, found float64"),
        ({"labels": [0, 0, 2**40]}, "labels must be int32, found int64"),  # the first request would have been sent
        ({"labels": 0, "guidance_scale": [1.0, 2.0]}, "guidance_scale must be one number or 3"),
    ],
)
def test_labels_that_a_model_does_not_take_are_refused_before_a_request(conditional, kwargs, message):
    with pytest.raises(InputError, match=message):
        conditional.sample(range(3), **kwargs)
    assert not Conditional.requests


def test_the_command_line_uses_labels_in_turn(conditional, tmp_path, capsys):
    command = ["--model=digits", "--num_images=3", "--guidance_scale=2.5", f"--out={tmp_path / 'drawn'}"]
    assert main([*command, "--labels=4,1"]) == 0, capsys.readouterr().err
    ((_, inputs),) = Conditional.requests
    assert inputs["label"].tolist() == [4, 1, 4] and inputs["guidance_scale"].tolist() == [2.5] * 3
    assert main([*command[:-1], f"--out={tmp_path / 'other'}"]) == 2
    assert "give labels" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        main([*command, "--labels=4,x"])
    assert e.value.code == 2 and "expected integers such as 0,1,2, found '4,x'" in capsys.readouterr().err


def test_an_unconditional_model_takes_no_labels(monkeypatch):
    monkeypatch.setitem(TRANSPORTS, "rest", RollingOver)
    client = Client("localhost:1", "digits")
    for kwargs, message in (
        ({"labels": 0}, "Labels were given, but this model is unconditional"),
        ({"guidance_scale": 2.0}, "guidance_scale was given, but this model is unconditional"),
    ):
        with pytest.raises(InputError, match=message):
            client.sample([0], **kwargs)
