"""The client over REST and gRPC against a server on the loopback: the stand-in, and the real one where it is installed."""

import contextlib
import functools
import io
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("requests", reason="needs ddpm_tf[serving]: requests")
pytest.importorskip("tensorflow_serving.apis", reason="needs ddpm_tf[serving]: tensorflow-serving-api")

from ddpm_tf import experiment
from ddpm_tf import samplers as samplers_lib
from ddpm_tf.errors import InputError
from ddpm_tf.images import to_uint8
from ddpm_tf.serving.client import Client
from ddpm_tf.serving.transports import ServerError, TensorInfo
from tests.serving.batching import read_batching
from tests.serving.c_api import CSession
from tests.serving.conftest import MAX_BATCH, grey_levels
from tests.serving.stand_in import StandIn
from tests.serving.test_server_files import free_port, uncommented

ROOT = Path(__file__).parent.parent.parent
SEEDS = [7, 0, -1, 2**63 - 1, -(2**63), 12345, 3]
NUM_STEPS = 4
pytestmark = pytest.mark.slow
open_session = functools.cache(CSession)  # loading takes seconds


class Server(NamedTuple):
    rest: str
    grpc: str
    stand_in: StandIn | None = None


@pytest.fixture(scope="module")
def models(exported, workdir, tmp_path_factory):
    """digits/1 is DDIM, digits/2 ancestral; models.config has its example of two labels switched on."""
    folder = tmp_path_factory.mktemp("served") / "models"
    shutil.copytree(exported.parent, folder)
    experiment.export(
        str(workdir), str(folder / "digits"), settings={"sampler": "ddpm"}, max_batch=MAX_BATCH, bpd_steps=3
    )
    (folder / "digits" / ".tmp-3").mkdir()  # as an export that was killed leaves it
    config = folder / "models.config"
    config.write_text(uncommented(config.read_text()))
    return folder


@pytest.fixture(scope="module", params=["stand_in", "tensorflow_model_server"])
def server(request, models, tmp_path_factory):
    if request.param == "stand_in":
        with start(models) as stand_in:
            yield address_of(stand_in)
    else:
        if shutil.which("tensorflow_model_server") is None:
            pytest.skip("tensorflow_model_server is not on PATH: only the stand-in was tested")
        with real_server(models, tmp_path_factory.mktemp("real")) as found:
            yield found


@pytest.fixture(params=["rest", "grpc"])
def transport(request):
    return request.param


@pytest.fixture(scope="module")
def sessions(models):
    """{version: the SavedModel in a session of this process}"""
    return {version: open_session(str(models / "digits" / str(version))) for version in (1, 2)}


@pytest.fixture
def stand_in(models):
    with start(models) as stand_in:
        yield stand_in


def start(models, **kwargs):
    return StandIn(models, open_session=open_session, **kwargs)


def address_of(stand_in):
    return Server(f"127.0.0.1:{stand_in.rest_api_port}", f"127.0.0.1:{stand_in.port}", stand_in)


def connect(server, transport, **kwargs):
    return Client(getattr(server, transport), kwargs.pop("model", "digits"), transport=transport, **kwargs)


@contextlib.contextmanager
def real_server(models, folder):
    config = (models / "models.config").read_text().replace("/models/", f"{models}/")
    (folder / "models.config").write_text(config)
    rest, grpc = free_port(), free_port()
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [
                "tensorflow_model_server",
                f"--port={grpc}",
                f"--rest_api_port={rest}",
                f"--model_config_file={folder}/models.config",
                "--allow_version_labels_for_unavailable_models=true",
                "--enable_batching=true",
                f"--batching_parameters_file={models}/batching.config",
            ],
            stdout=log,
            stderr=log,
        )
    found = Server(f"127.0.0.1:{rest}", f"127.0.0.1:{grpc}")
    try:
        with connect(found, "rest", deadline_s=120, attempts=50) as client:
            client.status()
        yield found
    finally:
        process.terminate()
        process.wait()


def test_images_are_those_of_the_saved_model_in_any_batch(server, transport, sessions):
    expected = sessions[2].run("sample", {"seed": np.array(SEEDS)})["images"]
    for max_batch in (MAX_BATCH, 3, 1):
        with connect(server, transport, max_batch=max_batch) as client:
            images = client.sample(SEEDS)
            assert images.shape == (7, 8, 8, 1)
            assert grey_levels(images, expected) <= 1
            assert grey_levels(client.sample(SEEDS[::-1]), expected[::-1]) <= 1


def test_pngs_hold_the_images(server, transport):
    with connect(server, transport, max_batch=4) as client:
        pngs, images = client.sample_png(SEEDS), client.sample(SEEDS)
    assert len(pngs) == len(SEEDS)
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in pngs])
    assert grey_levels(decoded[..., None], images) <= 1


@pytest.mark.parametrize("version, name", [(1, "ddim"), (2, "ddpm")])
def test_steps_of_a_client_are_the_sampler(server, transport, version, name, inference, samplers):
    with connect(server, transport, version=version) as client:
        steps = list(client.denoise(SEEDS, num_steps=NUM_STEPS))
        images = client.sample(SEEDS)
    expected = samplers_lib.sample(inference.network, samplers[name], SEEDS).images
    assert [step.index for step in steps] == [3, 2, 1, 0]
    assert all(step.x.shape == step.x_0.shape == expected.shape for step in steps)
    np.testing.assert_allclose(steps[-1].x, expected, rtol=0, atol=1e-4)
    assert grey_levels(to_uint8(steps[-1].x), images) <= 1
    assert np.abs(steps[0].x_0 - steps[-1].x_0).max() > 0.01  # it is a prediction, and gets better


def test_steps_can_be_left_early(server, transport):
    with connect(server, transport) as client:
        step = next(client.denoise(SEEDS, num_steps=NUM_STEPS))
        assert step.index == 3
        assert client.sample([1]).shape == (1, 8, 8, 1)


def test_bits_per_dim_is_the_saved_models(server, transport, sessions):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    expected = sessions[2].run("bits_per_dim", {"images": images, "seed": np.arange(5)})["total_bpd"]
    with connect(server, transport, max_batch=2) as client:
        np.testing.assert_allclose(client.bits_per_dim(images, range(5)), expected, rtol=1e-5)


def test_any_signature_can_be_called(server, transport, sessions):
    noise = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)
    expected = sessions[1].run("sample_from_noise", {"noise": noise})["images"]
    with connect(server, transport, version=1) as client:
        assert grey_levels(client.predict("sample_from_noise", {"noise": noise})["images"], expected) <= 1


def test_status_and_metadata_are_the_same_over_both_protocols(server, transport):
    with connect(server, transport) as client:
        assert [(v.version, v.state, v.error) for v in sorted(client.status())] == [
            (1, "AVAILABLE", ""),
            (2, "AVAILABLE", ""),
        ]
        signatures = client.metadata()
    assert {"serving_default", "sample", "sample_png", "initial_noise", "denoise_step", "bits_per_dim"} == set(
        signatures
    )
    assert signatures["serving_default"].inputs == {"seed": TensorInfo("int64", (None,))}
    assert signatures["serving_default"].outputs == {"images": TensorInfo("uint8", (None, 8, 8, 1))}
    assert signatures["sample_png"].outputs == {"image_bytes": TensorInfo("str", (None,))}
    assert signatures["denoise_step"].inputs["x_t"] == TensorInfo("float32", (None, 8, 8, 1))


def test_versions_and_labels(server, transport, sessions):
    expected = {v: s.run("sample", {"seed": np.array(SEEDS)})["images"] for v, s in sessions.items()}
    assert grey_levels(expected[1], expected[2]) > 10
    for which, version in (({"version": 1}, 1), ({"label": "stable"}, 1), ({"label": "canary"}, 2), ({}, 2)):
        with connect(server, transport, **which) as client:
            assert grey_levels(client.sample(SEEDS), expected[version]) <= 1
    with connect(server, transport, label="stable") as client:
        assert [v.version for v in client.status()] == [1]


@pytest.mark.parametrize(
    "which, code, said",
    [
        ({"version": 9}, "NOT_FOUND", "9"),
        ({"model": "faces"}, "NOT_FOUND", "faces"),
        ({"label": "nope"}, "INVALID_ARGUMENT", "nope"),
    ],
)
def test_what_the_server_does_not_have_is_said(server, transport, which, code, said):
    with connect(server, transport, **which) as client, pytest.raises(ServerError, match=said) as e:
        client.sample([1])
    assert (e.value.code, e.value.exit_code) == (code, 2)
    assert getattr(server, transport) in str(e.value)


def test_a_batch_above_the_models_bound_names_the_bound(server, transport):
    with connect(server, transport, max_batch=17) as client, pytest.raises(ServerError, match="16") as e:
        client.sample(range(17))
    assert (e.value.code, e.value.exit_code) == ("INVALID_ARGUMENT", 2)


@pytest.mark.parametrize(
    "signature, inputs, message",
    [
        ("denoise_step", {"x_t": np.zeros((1, 8, 8, 1)), "step": [4], "seed": [0]}, "step must be within"),
        ("denoise_step", {"x_t": np.zeros((1, 4, 8, 1)), "step": [0], "seed": [0]}, None),
        ("sample_from_noise", {"noise": np.full((1, 8, 8, 1), np.nan)}, "finite"),
        ("sample", {}, "seed"),
        ("sample", {"seed": [[0]]}, None),
    ],
)
def test_a_malformed_request_is_the_callers_fault_and_harms_nobody(server, transport, signature, inputs, message):
    with connect(server, transport, version=1) as client:
        before = client.sample(SEEDS)
        with pytest.raises(ServerError, match=message) as e:
            client.predict(signature, inputs)
        assert (e.value.code, e.value.exit_code) == ("INVALID_ARGUMENT", 2)
        assert (client.sample(SEEDS) == before).all()


@pytest.mark.parametrize("seeds", [[], [1.5], [2**63], [[1, 2]], ["1"], [True, None]])
def test_seeds_that_are_none_never_leave_the_client(stand_in, transport, seeds):
    with connect(address_of(stand_in), transport) as client, pytest.raises(InputError, match="seed"):
        client.sample(seeds)
    assert stand_in.requests == 0


def test_unknown_names_list_the_known_ones(stand_in):
    with pytest.raises(InputError, match="carrier_pigeon.*grpc.*rest"):
        Client("localhost:1", "digits", transport="carrier_pigeon")
    with connect(address_of(stand_in), "rest") as client, pytest.raises(InputError, match="draw.*bits_per_dim"):
        client.predict("draw", {})


def test_a_server_that_is_not_available_for_a_moment_is_asked_again(stand_in, transport):
    with connect(address_of(stand_in), transport) as client:
        client.metadata()
        stand_in.refuse = 2
        assert client.sample([1]).shape == (1, 8, 8, 1)
    assert stand_in.requests == 3


def test_attempts_are_limited(stand_in, transport):
    stand_in.refuse = 10
    with connect(address_of(stand_in), transport, attempts=3) as client, pytest.raises(ServerError, match="queue") as e:
        client.sample([1])
    assert (e.value.code, e.value.exit_code) == ("UNAVAILABLE", 69)
    assert stand_in.requests == 3


def test_what_asking_again_cannot_mend_is_asked_once(stand_in, transport):
    with connect(address_of(stand_in), transport, max_batch=17) as client, pytest.raises(ServerError):
        client.sample(range(17))
    assert stand_in.requests == 1


def test_a_server_that_comes_up_late_is_waited_for(models, transport):
    port = free_port()
    ports = {"rest_api_port" if transport == "rest" else "port": port}
    stop = threading.Event()

    def come_late():
        time.sleep(0.7)
        with start(models, **ports):
            stop.wait()

    thread = threading.Thread(target=come_late)
    thread.start()
    try:
        with Client(f"127.0.0.1:{port}", "digits", transport=transport, attempts=20, deadline_s=30) as client:
            assert client.sample([1]).shape == (1, 8, 8, 1)
    finally:
        stop.set()
        thread.join()


def test_the_servers_own_deadline_is_said_and_not_asked_again(models):
    with start(models, rest_api_timeout_s=1e-6) as stand_in, connect(address_of(stand_in), "rest") as client:
        with pytest.raises(ServerError, match="timeouts") as e:
            client.sample(SEEDS)
        assert e.value.code == "DEADLINE_EXCEEDED"
        assert stand_in.requests == 1


def test_rest_needs_no_tensorflow(stand_in):
    code = (
        "import sys; from ddpm_tf.serving.client import Client\n"
        f"print(Client('127.0.0.1:{stand_in.rest_api_port}', 'digits').sample([1, 2]).shape)\n"
        "assert not {'tensorflow', 'keras', 'grpc'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "(2, 8, 8, 1)\n"), result.stderr


def test_rows_and_columns_are_one_request(server, sessions):
    import requests

    url = f"http://{server.rest}/v1/models/digits:predict"
    expected = sessions[2].run("sample", {"seed": np.array([3, 4])})["images"]
    for body, key in (
        ({"instances": [3, 4]}, "predictions"),
        ({"instances": [{"seed": 3}, {"seed": 4}]}, "predictions"),
        ({"inputs": [3, 4]}, "outputs"),
        ({"inputs": {"seed": [3, 4]}, "signature_name": "sample"}, "outputs"),
    ):
        answer = requests.post(url, json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert grey_levels(np.array(answer.json()[key], np.uint8), expected) <= 1


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"{}", b'{"instances": []}', b'{"instances": 3}', b'{"instances": [1.0]}', b'{"inputs": ["1"]}',
     b'{"instances": [1], "inputs": [1]}', b'{"inputs": {"sead": [1]}}', b'{"inputs": [1], "signature_name": "draw"}',
     b'{"inputs": [1], "signature_name": 1}', b'{"instances": [9223372036854775808]}', b'{"inputs": [[1], [1, 2]]}',
     b'{"inputs": ' + b"[" * 2000 + b"]" * 2000 + b"}"],
)  # fmt: skip
def test_json_that_is_no_request(server, body):
    import requests

    answer = requests.post(f"http://{server.rest}/v1/models/digits:predict", data=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_a_new_version_is_served_and_rolled_back(exported, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(exported.parent, models)
    config = models / "models.config"
    with start(models) as stand_in, connect(address_of(stand_in), "grpc") as client:
        assert [v.version for v in client.status()] == [1]
        shutil.copytree(models / "digits" / "1", models / "digits" / "2")
        stand_in.refresh()
        assert [v.version for v in client.status()] == [2]
        config.write_text(re.sub(r"# (model_version_policy.*) versions: 2", r"\1", config.read_text()))
        stand_in.refresh()
        assert [v.version for v in client.status()] == [1]


def test_batching_merges_requests_and_changes_no_image(models, transport, sessions):
    parameters = read_batching((models / "batching.config").read_text())
    parameters.batch_timeout_micros.value = 1_000_000
    expected = sessions[2].run("sample", {"seed": np.arange(16)})["images"]
    sizes = []

    class Counting(CSession):
        def run(self, signature, inputs):
            sizes.append(len(inputs["seed"]))
            return super().run(signature, inputs)

    with StandIn(models, batching=parameters, open_session=Counting) as stand_in:
        images = np.zeros_like(expected)

        def ask(k):
            with connect(address_of(stand_in), transport) as client:
                images[2 * k : 2 * k + 2] = client.sample([2 * k, 2 * k + 1])

        threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert grey_levels(images, expected) <= 1
    assert stand_in.requests == 8 and len(sizes) < 8
    assert set(sizes) <= set(parameters.allowed_batch_sizes)


def run_cli(*args):
    return subprocess.run(
        [sys.executable, "-m", "ddpm_tf.serving.client", *args], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("extra", [[], ["--progress_steps=4"]])
def test_the_command_line_draws_pngs(server, transport, extra, tmp_path):
    out = tmp_path / "new" / "drawn"
    result = run_cli(
        f"--address={getattr(server, transport)}",
        f"--transport={transport}",
        "--model=digits",
        "--seed=40",
        "--num_images=3",
        f"--out={out}",
        *extra,
    )
    assert result.returncode == 0, result.stderr
    assert {p.name for p in out.iterdir()} == {"grid.png", *(f"seed_{s:06d}.png" for s in (40, 41, 42))}
    with connect(server, transport) as client:
        expected = client.sample([40, 41, 42])
    found = np.stack([np.asarray(Image.open(out / f"seed_{s:06d}.png")) for s in (40, 41, 42)])
    assert grey_levels(found[..., None], expected) <= 1
    again = run_cli("--address=127.0.0.1:1", "--model=digits", f"--out={out}")  # before anybody is asked
    assert again.returncode == 2 and "not an empty folder" in again.stderr


def test_the_command_line_shows_status(server):
    result = run_cli(f"--address={server.rest}", "--model=digits", "--status")
    assert result.returncode == 0, result.stderr
    assert "version 2: AVAILABLE" in result.stdout
    assert "sample: seed int64 (None,) -> images uint8 (None, 8, 8, 1)" in result.stdout


def test_exit_codes_and_messages_of_the_command_line(stand_in):
    address = f"--address=127.0.0.1:{stand_in.rest_api_port}"
    assert run_cli("--help").returncode == 0
    for args, code, message in (
        ((address,), 2, "--model"),
        ((address, "--model=digits"), 2, "--out is missing"),
        ((address, "--model=digits", "--out=/tmp/x", "--num_images=0"), 2, "--num_images"),
        ((address, "--model=faces", "--status"), 2, "faces"),
        ((f"--address=127.0.0.1:{free_port()}", "--model=digits", "--status", "--attempts=1"), 69, "running"),
    ):
        result = run_cli(*args)
        assert result.returncode == code and message in result.stderr, result.stderr
        assert "Traceback" not in result.stderr
