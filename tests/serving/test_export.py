"""The SavedModel in processes that know nothing of ddpm_tf, and what it may consist of."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from ddpm_tf import experiment
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.errors import RunError
from ddpm_tf.images import to_uint8
from ddpm_tf.networks import Classifier, UNet
from ddpm_tf.samplers import guided_by, make_sampler, sample
from ddpm_tf.serving.export import OPS, SAVER_OPS, check_ops, save_model
from tests.conftest import drawn_weight, tf1_name
from tests.serving.c_api import CSession
from tests.serving.conftest import ROOT, grey_levels, run_python

C_API = """
import sys
import numpy as np
from tests.serving.c_api import CSession
session = CSession(sys.argv[1])
with np.load(sys.argv[2]) as requests:
    answers = {name: session.run("sample", {"seed": seed})["images"] for name, seed in requests.items()}
assert "tensorflow" not in sys.modules and "ddpm_tf" not in sys.modules
np.savez(sys.argv[3], **answers)
"""

FRESH_PYTHON = """
import sys
import numpy as np
import tensorflow as tf
sample = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
with np.load(sys.argv[2]) as requests:
    answers = {name: sample(seed=tf.constant(seed))["images"].numpy() for name, seed in requests.items()}
assert "ddpm_tf" not in sys.modules
np.savez(sys.argv[3], **answers)
"""


@pytest.mark.slow
def test_a_seed_is_the_same_image_everywhere_alone_and_in_any_order(workdir, exported, tmp_path):
    run_python(
        "run_sample.py", f"--workdir={workdir}", f"--out={tmp_path / 's'}", "--num_images=9", "--seed=-4", cwd=ROOT
    )
    with np.load(tmp_path / "s" / "samples.npz") as arrays:
        expected = arrays["images"]
    assert len({image.tobytes() for image in expected}) == 9
    seeds, order = np.arange(-4, 5), np.random.Generator(np.random.PCG64(0)).permutation(9)
    np.savez(tmp_path / "in.npz", all=seeds, shuffled=seeds[order], **{str(k): seeds[k : k + 1] for k in range(9)})
    saved_model = exported / "1"
    for name, code in (("c", C_API), ("python", FRESH_PYTHON)):
        out = tmp_path / f"{name}.npz"
        run_python("-c", code, saved_model, tmp_path / "in.npz", out, cwd=ROOT if name == "c" else tmp_path)
        with np.load(out) as images:
            assert grey_levels(images["all"], expected) <= 1
            assert grey_levels(images["shuffled"], expected[order]) <= 1
            assert grey_levels(np.concatenate([images[str(k)] for k in range(9)]), expected) <= 1
    np.save(tmp_path / "seeds.npy", seeds)
    run_python(
        "-m",
        "tensorflow.python.tools.saved_model_cli",
        "run",
        "--dir",
        saved_model,
        "--tag_set",
        "serve",
        "--signature_def",
        "sample",
        "--inputs",
        f"seed={tmp_path / 'seeds.npy'}",
        "--outdir",
        tmp_path,
        cwd=tmp_path,
    )
    assert grey_levels(np.load(tmp_path / "images.npy"), expected) <= 1


@pytest.mark.slow
def test_nothing_in_it_is_compiled_by_xla_and_the_lists_of_ops_are_what_is_used(exported):
    model = saved_model_pb2.SavedModel()
    model.ParseFromString((exported / "1" / "saved_model.pb").read_bytes())
    functions = model.meta_graphs[0].graph_def.library.function
    assert len(functions) > 10
    assert not any(f.attr["_XlaMustCompile"].b for f in functions if "_XlaMustCompile" in f.attr)
    saver = {node.op for f in functions if "traced" in f.signature.name for node in f.node_def}
    assert SAVER_OPS <= saver and not OPS & SAVER_OPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "diffusion", "sampler"),
    [
        ({"block_size": 2, "attn_resolutions": ()}, {"prediction": "v"}, "ddim"),
        ({"resamp_with_conv": False}, {"prediction": "x_0", "variance": "fixed_small"}, "ddpm"),
        ({"out_channels": 2}, {"variance": "learned_range"}, "ddpm"),
    ],
)
def test_other_networks_and_diffusions_need_no_other_ops(network, diffusion, sampler, tmp_path):
    diffusion = GaussianDiffusion(Schedule(make_betas("linear_scaled", 100)), **diffusion)
    sampler = make_sampler(sampler, diffusion, num_steps=4)
    network = UNet((8, 8, 1), **{"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)} | network)
    save_model(str(tmp_path), network, sampler, sampler.diffusion, max_batch=1)
    assert CSession(str(tmp_path)).run("sample", {"seed": np.zeros(1, int)})["images"].shape == (1, 8, 8, 1)


@pytest.mark.parametrize(
    ("sampler", "settings", "guide"),
    [
        ("dpm_solver", {"dynamic_threshold": 0.9}, None),
        pytest.param("heun", {"churn": 3.0}, None, marks=pytest.mark.slow),
        pytest.param("ddim", {}, {"attn_resolutions": (4,)}, marks=pytest.mark.slow),
        pytest.param("dpm_solver", {}, {"attn_resolutions": (), "resamp_with_conv": False}, marks=pytest.mark.slow),
    ],
)
def test_other_samplers_and_a_classifier_draw_the_same_from_a_server(sampler, settings, guide, tmp_path):
    small = {"ch": 32, "num_res_blocks": 1, "seed": 1}
    network = UNet((8, 8, 1), ch_mult=(1,), attn_resolutions=(), **small)
    seeds, conditions, inputs = np.arange(3), {}, {}
    if guide is not None:
        network = guided_by(network, Classifier((8, 8, 1), num_classes=3, ch_mult=(1, 2), **small, **guide))
        conditions = {"labels": np.arange(3), "classifier_scale": 2.0}
        inputs = {"label": np.arange(3, dtype=np.int32), "classifier_scale": np.full(3, 2.0, np.float32)}
    for v in network.variables:
        v.assign(drawn_weight(tf1_name(v.path), v.shape, 3))
    diffusion = GaussianDiffusion(Schedule(make_betas("linear_scaled", 100)))
    made = make_sampler(sampler, diffusion, num_steps=4, **settings)
    save_model(str(tmp_path), network, made, made.diffusion, max_batch=4)
    served = CSession(str(tmp_path)).run("sample", {"seed": seeds, **inputs})["images"]
    assert grey_levels(served, to_uint8(sample(network, made, seeds, **conditions).images)) <= 1


FORBIDDEN = {
    "ReadFile": lambda x: tf.strings.length(tf.io.read_file("/etc/passwd")) + x,
    "WriteFile": lambda x: (tf.io.write_file("x", "x"), x)[1],
    "EagerPyFunc": lambda x: tf.py_function(lambda v: v, [x], tf.int32),
    "RandomUniformInt": lambda x: tf.random.uniform([], maxval=5, dtype=tf.int32) + x,
    "RestoreV2": lambda x: tf.cast(tf.raw_ops.RestoreV2(
        prefix="x", tensor_names=["x"], shape_and_slices=[""], dtypes=[tf.float32])[0], tf.int32) + x,
}  # fmt: skip


@pytest.mark.parametrize("op", FORBIDDEN)
def test_an_op_that_is_not_on_the_list_fails_the_export_wherever_it_is(tmp_path, op):
    module = tf.Module()

    @tf.function(input_signature=[tf.TensorSpec([], tf.int32, "x")], autograph=False)
    def run(x):
        return {"y": tf.while_loop(lambda y: y < 3, lambda y: (tf.reshape(FORBIDDEN[op](y), []) + 1,), (x,))[0]}

    tf.saved_model.save(module, str(tmp_path), {"serving_default": run})
    with pytest.raises(RunError, match=f"not on the list of those allowed on a server: .*{op} .in while_body"):
        check_ops(str(tmp_path))


@pytest.mark.slow
def test_an_op_that_is_not_on_the_list_leaves_no_version(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_tf.serving.export.OPS", OPS - {"Conv2D"})
    with pytest.raises(RunError, match="Conv2D .in "):
        experiment.export(str(workdir), str(tmp_path / "models" / "digits"))
    assert not (tmp_path / "models").exists()
