"""The command line, the model card and the warm-up requests."""

import hashlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf import experiment
from ddpm_tf.errors import InputError
from ddpm_tf.serving.model_card import weights_digest
from tests.serving.c_api import CSession
from tests.serving.conftest import MAX_BATCH, ROOT, run_python


def card_of(version):
    return json.loads((version / "model_card.json").read_text())


@pytest.mark.slow
def test_the_card_tells_what_is_served_and_every_file(workdir, inference, exported):
    card = card_of(exported / "1")
    assert (card["name"], card["version"], card["format"], card["max_batch"]) == ("digits", 1, "saved_model", MAX_BATCH)
    assert card["weights"] == "moving average" and card["weights_sha256"] == weights_digest(inference.network)
    assert card["license"] == "not stated" and card["evaluation"] is None
    config = json.loads((workdir / "config.json").read_text())
    assert config.pop("ddpm_tf") == card["versions"]["ddpm_tf"]
    assert card["config"] == config | {"sample": card["config"]["sample"]}
    assert card["sampler"]["timesteps"] == [0, 25, 50, 75] and card["bits_per_dim"]["timesteps"] == [0, 50, 99]
    files = {str(p.relative_to(exported / "1")): p for p in (exported / "1").rglob("*") if p.is_file()}
    del files["model_card.json"]
    assert {name: f["sha256"] for name, f in card["files"].items()} == {
        name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()
    }
    assert card["versions"]["tensorflow"] == tf.__version__
    signatures = CSession(str(exported / "1")).signatures
    assert card["signatures"].keys() == signatures.keys()
    for name, (inputs, outputs) in signatures.items():
        types = card["signatures"][name]
        assert types["inputs"].keys() == inputs.keys() and types["outputs"].keys() == outputs.keys()
    assert card["signatures"]["sample"]["outputs"] == {"images": "uint8 [N, 8, 8, 1]"}


@pytest.mark.slow
def test_the_warm_up_requests_are_answered(exported):
    logs = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2", reason="needs tensorflow-serving-api")
    session, warmed = CSession(str(exported / "1")), []
    for record in tf.data.TFRecordDataset(str(exported / "1" / "assets.extra" / "tf_serving_warmup_requests")):
        request = logs.PredictionLog.FromString(record.numpy()).predict_log.request
        assert request.model_spec.name == "digits"
        warmed.append(request.model_spec.signature_name)
        answer = session.run(warmed[-1], {key: tf.make_ndarray(value) for key, value in request.inputs.items()})
        assert all(len(value) == 1 for value in answer.values())
    assert sorted(warmed) == sorted(session.signatures) == sorted(card_of(exported / "1")["warmed_up"])


@pytest.mark.slow
def test_settings_reach_the_export_and_costly_requests_are_not_warmed_up(workdir, tmp_path):
    (tmp_path / "evaluation.json").write_text('{"fid": 3.17}')
    for name in ("config.json", "ckpt"):
        (tmp_path / name).symlink_to(workdir / name)
    output = run_python(
        "run_export.py",
        f"--workdir={tmp_path}",
        f"--out={tmp_path / 'models' / 'd'}",
        "--sampler=ddpm",
        "--num_steps=100",
        "--bpd_steps=100",
        "--max_batch=2",
        "--license=CC0-1.0",
        "--version=5",
        "--noema",
        cwd=ROOT,
    )
    assert re.search(r"models/d/5 \(\d+ s\)\.\nServe it: cd .*models && docker compose", output)
    version = tmp_path / "models" / "d" / "5"
    card = card_of(version)
    assert (card["license"], card["evaluation"], card["weights"]) == ("CC0-1.0", {"fid": 3.17}, "weights")
    assert (card["sampler"]["sampler"], card["sampler"]["num_steps"], card["max_batch"]) == ("ddpm", 100, 2)
    session = CSession(str(version))
    assert "sample_from_noise" not in session.signatures
    assert session.run("sample", {"seed": np.arange(2)})["images"].shape == (2, 8, 8, 1)
    assert "models.config" in os.listdir(tmp_path / "models")


@pytest.mark.slow
def test_without_the_serving_api_the_export_is_whole_but_for_the_warm_up(workdir, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    with caplog.at_level("WARNING"):
        experiment.export(str(workdir), str(tmp_path / "models" / "digits"))
    assert "No warm-up requests were written: tensorflow-serving-api cannot be imported" in caplog.text
    assert card_of(tmp_path / "models" / "digits" / "1")["warmed_up"] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "tflite"}, "Unknown format 'tflite'"),
        ({"max_batch": 0}, "--max_batch must be within"),
        ({"bpd_steps": 101}, "--bpd_steps must be within 1..100"),
        ({"settings": {"num_steps": 101}}, "within 1..100"),
        ({"settings": {"sampler": "hein"}}, "Unknown sampler"),
        ({"settings": {"sampler": "repaint"}}, "repaint cannot be exported"),
        ({"version": 0}, "--version must be within"),
        ({"workdir": "nowhere"}, "does not exist"),
        ({"out": "a b"}, "name must be letters"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(workdir, tmp_path, settings, message):
    settings = {"workdir": str(workdir), "out": "digits", **settings}
    with pytest.raises(InputError, match=message):
        experiment.export(settings.pop("workdir"), str(tmp_path / settings.pop("out")), **settings)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_format_is_refused(workdir, tmp_path):
    (tmp_path / "digits" / "1").mkdir(parents=True)
    (tmp_path / "digits" / "1" / "denoise.onnx").touch()
    with pytest.raises(InputError, match="holds versions of another format than saved_model"):
        experiment.export(str(workdir), str(tmp_path / "digits"))


@pytest.mark.slow
def test_mistakes_leave_with_2_and_one_message(workdir, exported):
    for args, message in (
        ([f"--workdir={workdir}"], "--out is missing"),
        ([f"--workdir={workdir}", f"--out={exported}", "--version=1"], "nothing is written over"),
    ):
        result = subprocess.run([sys.executable, "run_export.py", *args], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert os.listdir(exported) == ["1"]


@pytest.mark.slow
def test_help_names_every_flag():
    output = run_python("run_export.py", "--help", cwd=ROOT)
    for name in re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / "run_export.py").read_text()):
        assert re.search(rf"--(\[no\])?{name}\b", output), name
