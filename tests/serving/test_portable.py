"""ONNX Runtime and OpenVINO against TensorFlow."""

import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf import experiment
from ddpm_tf.errors import InputError
from ddpm_tf.samplers import sample
from ddpm_tf.samplers.base import initial_noise

SEEDS = np.arange(3)


def run_onnx(path, inputs):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, the extra 'onnx'")
    session = onnxruntime.InferenceSession(f"{path}.onnx", providers=["CPUExecutionProvider"])
    assert {i.name for i in session.get_inputs()} == inputs.keys()
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True))


def run_openvino(path, inputs):
    openvino = pytest.importorskip("openvino", reason="needs openvino, the extra of that name")
    # Without the hint a CPU that has bfloat16 matrix units would compute in it.
    model = openvino.Core().compile_model(f"{path}.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {output.any_name: value for output, value in model(inputs).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package", "run"), [("onnx", "tf2onnx", run_onnx), ("openvino", "openvino", run_openvino)]
)
def test_other_runtimes_compute_what_tensorflow_computes(name, package, run, inference, samplers, workdir, tmp_path):
    pytest.importorskip(package, reason=f"needs {package}, the extra {name!r}")
    out = tmp_path / "digits"
    experiment.export(str(workdir), str(out), format=name)
    noise = initial_noise(SEEDS, (8, 8, 1)).numpy()
    images = run(out / "1" / "sample_from_noise", {"noise": noise})["images"]
    expected = sample(inference.network, samplers["ddim"], SEEDS).images
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-3)
    t = np.array([0, 50, 99], np.int32)
    output = run(out / "1" / "denoise", {"x_t": noise, "t": t})["output"]
    np.testing.assert_allclose(output, inference.network({"x_t": noise, "t": tf.constant(t)}), rtol=0, atol=1e-3)
    assert np.abs(expected).mean() > 0.1 and np.abs(output).mean() > 0.1
    with pytest.raises(InputError, match="another format"):
        experiment.export(str(workdir), str(out))


@pytest.mark.slow
def test_what_draws_noise_is_not_exported(workdir, tmp_path):
    pytest.importorskip("openvino", reason="needs openvino, the extra of that name")
    experiment.export(str(workdir), str(tmp_path / "digits"), format="openvino", settings={"sampler": "ddpm"})
    files = {p.name for p in (tmp_path / "digits" / "1").iterdir()}
    assert files == {"denoise.xml", "denoise.bin", "model_card.json"}


@pytest.mark.parametrize(("name", "package"), [("onnx", "tf2onnx"), ("openvino", "openvino")])
def test_a_missing_package_is_named_and_nothing_is_written(name, package, workdir, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(InputError, match=f"--format={name} needs {package}, which cannot be imported"):
        experiment.export(str(workdir), str(tmp_path / "digits"), format=name)
    assert not (tmp_path / "digits").exists()
