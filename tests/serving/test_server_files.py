"""The files beside the models: each is read by what will read it, as far as that is installed."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import threading
import time

import pytest
import yaml

from ddpm_tf.errors import InputError, StorageError
from ddpm_tf.serving.server_files import allowed_batch_sizes, write_server_files

FILES = {"models.config", "batching.config", "docker-compose.yml", "nginx.conf"}


@pytest.fixture
def folder(tmp_path):
    assert write_server_files(str(tmp_path), "digits-8.v1", max_batch=12) == (
        ["models.config", "batching.config", "docker-compose.yml", "nginx.conf"],
        [],
    )
    return tmp_path


def uncommented(text):
    """models.config with its example of two labelled versions switched on."""
    return re.sub(r"# (model_version_policy|version_labels)", r"\1", text)


def test_a_folder_holds_the_files_and_nothing_else(folder):
    assert {p.name for p in folder.iterdir()} == FILES


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_pipe_in_the_place_of_a_file_is_an_error_and_nothing_is_written(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} is a named pipe; expected a regular file"):
        write_server_files(str(tmp_path), "digits", max_batch=12)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_models_config_is_a_model_server_config(folder):
    text_format = pytest.importorskip("google.protobuf.text_format")
    reason = "needs ddpm_tf[serving]: tensorflow-serving-api"
    messages = pytest.importorskip("tensorflow_serving.config.model_server_config_pb2", reason=reason)
    text = (folder / "models.config").read_text()
    (model,) = text_format.Parse(text, messages.ModelServerConfig()).model_config_list.config
    assert (model.name, model.base_path, model.model_platform) == ("digits-8.v1", "/models/digits-8.v1", "tensorflow")
    assert not model.version_labels and not model.HasField("model_version_policy")
    (model,) = text_format.Parse(uncommented(text), messages.ModelServerConfig()).model_config_list.config
    assert dict(model.version_labels) == {"stable": 1, "canary": 2}
    assert list(model.model_version_policy.specific.versions) == [1, 2]


def test_batching_config_keeps_within_the_models_bound(folder):
    from tests.serving.batching import read_batching

    parameters = read_batching((folder / "batching.config").read_text())
    assert parameters.max_batch_size.value == 12
    assert list(parameters.allowed_batch_sizes) == [1, 2, 4, 8, 12]
    assert parameters.batch_timeout_micros.value > 0
    assert parameters.max_enqueued_batches.value > 0
    assert parameters.num_batch_threads.value > 0


@pytest.mark.parametrize("max_batch", range(1, 70))
def test_allowed_batch_sizes_increase_to_max_batch(max_batch):
    sizes = allowed_batch_sizes(max_batch)
    assert sizes[0] == 1 and sizes[-1] == max_batch and sorted(set(sizes)) == sizes
    assert all(b <= 2 * a for a, b in zip(sizes, sizes[1:], strict=False))  # padding at most doubles a batch


def test_compose_mounts_what_is_there_and_sets_the_timeouts(folder):
    services = yaml.safe_load((folder / "docker-compose.yml").read_text())["services"]
    assert services["gpu"]["image"].endswith("-gpu") and services["gpu"]["deploy"]
    for service in (services["cpu"], services["gpu"]):
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in service["command"])
        for name in ("model_config_file", "batching_parameters_file"):
            assert (folder / flags[name].removeprefix("/models/")).is_file()
        assert int(flags["rest_api_timeout_in_ms"]) > 30_000
        assert int(flags["file_system_poll_wait_seconds"]) > 0
        assert service["volumes"] == [".:/models:ro"]
    assert (folder / services["proxy"]["volumes"][0].split(":")[0]).is_file()
    ports = [port for service in services.values() for port in service["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in ports)  # nothing is open to others unless somebody opens it
    read_timeout = int(re.search(r"proxy_read_timeout (\d+)s", (folder / "nginx.conf").read_text())[1])
    assert read_timeout * 1000 > int(flags["rest_api_timeout_in_ms"])


def test_files_that_exist_are_left_alone_and_named(folder, caplog):
    (folder / "models.config").write_text("mine")
    assert write_server_files(str(folder), "digits-8.v1", max_batch=12) == ([], ["models.config"])
    assert (folder / "models.config").read_text() == "mine"
    assert "models.config" in caplog.text and "left alone" in caplog.text
    assert "nginx.conf" not in caplog.text  # it is as it would be written
    (folder / "nginx.conf").unlink()
    assert write_server_files(str(folder), "digits-8.v1", max_batch=12) == (["nginx.conf"], ["models.config"])
    assert {p.name for p in folder.iterdir()} == FILES


@pytest.mark.parametrize("name", ["", "a b", "../x", ".x", "-x", 'x"', "x/y", "x:predict", "x;", "x\n", "x}"])
def test_names_that_would_break_an_address_or_a_file(name, tmp_path):
    with pytest.raises(InputError, match="name"):
        write_server_files(str(tmp_path), name, max_batch=1)
    assert not list(tmp_path.iterdir())


def test_other_arguments_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="max_batch"):
        write_server_files(str(tmp_path), "digits", max_batch=0)
    with pytest.raises(StorageError, match="models.config"):
        write_server_files(str(tmp_path / "missing"), "digits", max_batch=1)


needs_nginx = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not on PATH: nginx.conf was not run")


@needs_nginx
def test_nginx_takes_the_configuration(folder):
    result = subprocess.run(
        [
            "nginx",
            "-t",
            "-e",
            "stderr",
            "-p",
            str(folder),
            "-c",
            str(folder / "nginx.conf"),
            "-g",
            f"pid {folder}/pid;",
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def proxy(folder, upstream):
    """nginx with the written file, on a free port and before another upstream."""
    port, path = free_port(), folder / "here.conf"
    text = (folder / "nginx.conf").read_text()
    path.write_text(text.replace("listen 8080", f"listen 127.0.0.1:{port}").replace("model-server:8501", upstream))
    process = subprocess.Popen(
        [
            "nginx",
            "-e",
            str(folder / "error.log"),
            "-p",
            str(folder),
            "-c",
            str(path),
            "-g",
            f"daemon off; pid {folder}/pid; error_log {folder}/error.log;",
        ],
    )
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@needs_nginx
def test_the_proxy_lets_the_model_through_and_nothing_else(folder):
    requests = pytest.importorskip("requests", reason="needs ddpm_tf[serving]: requests")
    import http.server

    class Upstream(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.path)))
            self.end_headers()
            self.wfile.write(self.path.encode())

        do_POST = do_DELETE = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream) as upstream:
        threading.Thread(target=upstream.serve_forever, args=(0.02,), daemon=True).start()
        with proxy(folder, f"127.0.0.1:{upstream.server_port}") as url:
            model = f"{url}/v1/models/digits-8.v1"
            for path in ("", "/metadata", "/versions/2", "/labels/stable/metadata"):
                assert requests.get(model + path, timeout=10).text == f"/v1/models/digits-8.v1{path}"
            assert requests.post(f"{model}:predict", b"{}", timeout=10).status_code == 200
            assert requests.post(f"{model}/labels/stable:predict", b"x" * 1_000_000, timeout=10).status_code == 200
            assert requests.post(f"{model}:predict", b"x" * 1_048_577, timeout=10).status_code == 413
            packed = {"Content-Encoding": "gzip"}
            assert requests.post(f"{model}:predict", b"x", headers=packed, timeout=10).status_code == 415
            assert requests.delete(model, timeout=10).status_code == 403
            for path in ("/", "/v1/models", "/v1/models/digits-8xv1", "/monitoring/prometheus/metrics"):
                assert requests.get(url + path, timeout=10).status_code == 404
            statuses = [requests.get(model, timeout=10).status_code for _ in range(60)]
            assert set(statuses) == {200, 503}  # a burst of 20 passes, then 10 a second
        upstream.shutdown()


@needs_nginx
@pytest.mark.slow
def test_the_client_through_the_proxy(exported, tmp_path):
    pytest.importorskip("requests", reason="needs ddpm_tf[serving]: requests")
    pytest.importorskip("tensorflow_serving.apis", reason="needs ddpm_tf[serving]: tensorflow-serving-api")
    from ddpm_tf.serving.client import Client
    from ddpm_tf.serving.transports import ServerError
    from tests.serving.stand_in import StandIn

    models = tmp_path / "models"
    shutil.copytree(exported.parent, models)
    with StandIn(models) as stand_in, proxy(models, f"127.0.0.1:{stand_in.rest_api_port}") as url:
        with Client(url, "digits", max_batch=1) as client:
            assert (
                len(client.sample(range(40))) == 40
            )  # more than the rate allows at once: refused ones are asked again
            images = [[0] * 600_000]
            with pytest.raises(ServerError, match="413") as e:
                client.predict("bits_per_dim", {"images": images, "seed": [0]})
            assert e.value.code == "INVALID_ARGUMENT"
    with proxy(models, f"127.0.0.1:{free_port()}") as url, Client(url, "digits", attempts=2) as client:
        with pytest.raises(ServerError, match="502") as e:
            client.status()
        assert e.value.code == "UNAVAILABLE"


def test_a_batching_config_that_merges_more_than_the_new_bound_is_refused(folder):
    with pytest.raises(InputError, match="batching.config merges up to 12 images, but .* --max_batch=4 refuses more"):
        write_server_files(str(folder), "other", max_batch=4)
    assert write_server_files(str(folder), "digits-8.v1", max_batch=20)[0] == []
