"""A real checkpoint of the original release (tests/data/tf1_e), and damaged ones."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from configs import digits
from ddpm_tf import builders, experiment
from ddpm_tf.convert.tf1 import (
    TF1State,
    fields_of_kwargs,
    load_tf1_checkpoint,
    read_tf1_checkpoint,
    save_tf1_checkpoint,
)
from ddpm_tf.errors import InputError
from ddpm_tf.networks import UNet
from ddpm_tf.storage import checkpoints
from ddpm_tf.storage.bundles import read_bundle, write_bundle
from tests.conftest import DATA, Reference

CHECKPOINT = f"{DATA}/tf1_e/model.ckpt-12"


@pytest.fixture(scope="session")
def reference_e():
    return Reference("ho2020_e")


def network(**kwargs):
    return UNet((8, 8, 1), **{"ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1, "attn_resolutions": (4,), **kwargs})


def config(num_steps=17):
    config = digits.get_config()
    config.data.batch_size = 8
    config.network.ch_mult = (1, 1)
    config.network.num_groups = 32
    config.train.num_steps = num_steps
    config.train.log_every = 1
    config.train.sample_every = 0
    config.train.jit_compile = "off"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 15
    config.sample.num_steps = 2
    config.sample.num_images = 2
    return config


@pytest.mark.parametrize(("ema", "key"), [(False, "ckpt_raw_unet_out"), (True, "ckpt_ema_unet_out")])
def test_imported_weights_give_the_originals_output(reference_e, ema, key):
    unet = network()
    report = load_tf1_checkpoint(CHECKPOINT, unet, ema=ema)
    assert report == (142, 284_513, 12)
    output = unet({"x_t": reference_e["x_t"], "t": reference_e["t"]})
    np.testing.assert_allclose(output, reference_e[key], atol=2e-5)


@pytest.mark.slow
def test_a_workdir_holds_the_files_weights_moments_and_step(tmp_path):
    report = experiment.import_tf1(CHECKPOINT, config(), str(tmp_path / "w"))
    assert "142 weights (284,513 parameters), their moving averages and two moments" in report and "step 12" in report
    step, tensors = checkpoints.restore_latest(tmp_path / "w" / "ckpt")
    arrays = read_bundle(CHECKPOINT)
    assert step == 12 == tensors["step"]
    used = set()
    for group, suffix in (
        ("network", ""),
        ("ema", "/ExponentialMovingAverage"),
        ("optimizer/momentum", "/Adam"),
        ("optimizer/velocity", "/Adam_1"),
    ):
        for path, name in (("conv_in/kernel", "conv_in/W"), ("down_1.attn_0/q/bias", "down_1/attn_0/q/b")):
            np.testing.assert_array_equal(tensors[f"{group}/model/{path}"], arrays[f"model/{name}{suffix}"])
        used |= {k for k in tensors if k.startswith(group + "/")}
    state = {name for name in tensors if name.startswith(("skipped/", "loss_scale/"))}  # of ours, as a run begins
    assert used | {"step"} | state == tensors.keys() and len(used) + 3 == len(arrays)


@pytest.mark.slow
def test_training_goes_on_with_the_releases_learning_rate_and_bias_correction(tmp_path):
    """The step after 12 is Adam's 13th, with the learning rate of step 12, on the imported moments."""
    workdir = str(tmp_path / "w")
    experiment.import_tf1(CHECKPOINT, config(13), workdir)
    experiment.train(config(13), workdir)
    row = json.loads((tmp_path / "w" / "metrics.jsonl").read_text())
    assert row["step"] == 13
    np.testing.assert_allclose(row["learning_rate"], 2e-3 * 12 / 15, rtol=1e-6)
    _, tensors = checkpoints.restore_latest(tmp_path / "w" / "ckpt")
    before, path = read_bundle(CHECKPOINT), "model/conv_in/kernel"
    m, v = tensors[f"optimizer/momentum/{path}"], tensors[f"optimizer/velocity/{path}"]
    gradient = (m - 0.9 * before["model/conv_in/W/Adam"]) / 0.1
    np.testing.assert_allclose(v, 0.999 * before["model/conv_in/W/Adam_1"] + 0.001 * gradient**2, rtol=1e-3, atol=1e-12)
    rate = row["learning_rate"] * np.sqrt(1 - 0.999**13) / (1 - 0.9**13)
    expected = before["model/conv_in/W"] - rate * m / (np.sqrt(v) + 1e-8)
    np.testing.assert_allclose(tensors[f"network/{path}"], expected, atol=1e-6)


@pytest.mark.slow
def test_out_to_tf1_and_back_is_the_uninterrupted_run_bit_for_bit(tmp_path):
    """12 steps, exported, imported, 5 more: 17 steps."""
    whole, first, second = (str(tmp_path / name) for name in ("whole", "first", "second"))
    experiment.train(config(17), whole)
    experiment.train(config(12), first)
    prefix = str(tmp_path / "tf1" / "model.ckpt-12")
    experiment.export_weights(first, "tf1", prefix)
    assert set(read_bundle(prefix)) == set(read_bundle(CHECKPOINT))
    experiment.import_tf1(prefix, config(17), second)
    experiment.train(config(17), second)
    (_, a), (_, b) = (checkpoints.restore_latest(f"{w}/ckpt") for w in (whole, second))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.slow
def test_rmsprops_moments_are_never_taken_for_adams(tmp_path):
    """Its slots are called momentum and velocity as well."""
    settings = config(1)
    settings.optimizer.name = "rmsprop"
    with pytest.raises(InputError, match="holds Adam's moments, but the config has optimizer.name=rmsprop"):
        experiment.import_tf1(CHECKPOINT, settings, str(tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()
    first, second, prefix = (str(tmp_path / name) for name in ("first", "second", "model.ckpt-1"))
    experiment.train(settings, first)
    assert "RMSProp's moments are not" in experiment.export_weights(first, "tf1", prefix)
    state = read_tf1_checkpoint(prefix)
    assert state.m is None and state.v is None and state.step == 1
    assert "no Adam moments" in experiment.import_tf1(prefix, settings, second)
    (_, a), (_, b) = (checkpoints.restore_latest(f"{w}/ckpt") for w in (first, second))
    for name, array in b.items():
        if name.startswith("optimizer/"):  # as at the start of a run
            np.testing.assert_array_equal(array, np.full_like(array, "velocity" in name))
        else:
            np.testing.assert_array_equal(array, a[name], err_msg=name)


def test_writing_and_reading_is_the_identity(tmp_path):
    state = read_tf1_checkpoint(CHECKPOINT)
    save_tf1_checkpoint(tmp_path / "model.ckpt-12", state)
    original, written = read_bundle(CHECKPOINT), read_bundle(tmp_path / "model.ckpt-12")
    assert original.keys() == written.keys()
    for name, array in original.items():
        assert written[name].dtype == array.dtype
        # the release multiplies its beta powers up in float32
        np.testing.assert_allclose(written[name], array, rtol=1e-6 if name.endswith("power") else 0)
    with pytest.raises(InputError, match="nothing is written over"):
        save_tf1_checkpoint(tmp_path / "model.ckpt-12", state)


def test_other_betas_come_back(tmp_path):
    state = read_tf1_checkpoint(CHECKPOINT)
    save_tf1_checkpoint(tmp_path / "a", state, beta_1=0.5)
    with pytest.raises(InputError, match="beta1_power"):
        read_tf1_checkpoint(tmp_path / "a")
    assert read_tf1_checkpoint(tmp_path / "a", beta_1=0.5).step == 12


@pytest.mark.slow
def test_moments_and_step_may_be_absent(tmp_path):
    state = read_tf1_checkpoint(CHECKPOINT)
    save_tf1_checkpoint(tmp_path / "a", state._replace(m=None, v=None, step=None))
    assert read_tf1_checkpoint(tmp_path / "a")[2:] == (None, None, None)
    assert load_tf1_checkpoint(tmp_path / "a", network()).step is None
    report = experiment.import_tf1(str(tmp_path / "a"), config(), str(tmp_path / "w"))
    assert "no Adam moments" in report


def copy(folder):
    shutil.copytree(Path(CHECKPOINT).parent, folder)
    return folder / "model.ckpt-12"


def rewritten(change):
    def damage(prefix):
        arrays = dict(read_bundle(prefix))
        change(arrays)
        write_bundle(prefix, arrays)

    return damage


def cut(suffix, keep):
    def damage(prefix):
        path = Path(f"{prefix}{suffix}")
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return damage


def flip(suffix, position):
    def damage(prefix):
        path = Path(f"{prefix}{suffix}")
        data = bytearray(path.read_bytes())
        data[int(len(data) * position)] ^= 0x40
        path.write_bytes(data)

    return damage


DATA_FILE = ".data-00000-of-00001"
KERNEL = "model/down_0/block_0/conv1/W"
DAMAGES = {
    "data cut in half": (cut(DATA_FILE, 0.5), "its .data files have .* its index promises"),
    "data emptied": (cut(DATA_FILE, 0.0), "its .data files have 0 bytes"),
    "index cut in half": (cut(".index", 0.5), "is damaged"),
    "index emptied": (cut(".index", 0.0), "is damaged"),
    "a flipped byte of data": (flip(DATA_FILE, 0.3), "is damaged"),
    "a flipped byte of the index": (flip(".index", 0.4), "is damaged"),
    "data gone": (lambda p: Path(f"{p}{DATA_FILE}").unlink(), "is damaged|have 0 bytes"),
    "index gone": (lambda p: Path(f"{p}.index").unlink(), "There is no checkpoint"),
    "a weight missing": (rewritten(lambda a: a.pop(KERNEL)), f"{KERNEL} +missing in the file"),
    "an average missing": (rewritten(lambda a: a.pop(f"{KERNEL}/ExponentialMovingAverage")), "Average +missing"),
    "a moment missing": (rewritten(lambda a: a.pop(f"{KERNEL}/Adam")), f"{KERNEL}/Adam +missing"),
    "an extra weight": (rewritten(lambda a: a.update({"model/extra/W": np.zeros(3, np.float32)})), "no such weight here"),
    "a transposed weight": (
        rewritten(lambda a: a.update({"model/temb/dense0/W": a["model/temb/dense0/W"].T.copy()})),
        r"\[128, 32\] in the file, \[32, 128\] here",
    ),
    "another dtype": (
        rewritten(lambda a: a.update({KERNEL: a[KERNEL].astype(np.float64)})), "float64, expected float32",
    ),
    "a negative step": (rewritten(lambda a: a.update(global_step=np.int64(-5))), "global_step is -5"),
    "a step that is no integer": (rewritten(lambda a: a.update(global_step=np.float32(2.7))), "expected an integer"),
    "a NaN": (rewritten(lambda a: a[KERNEL].__setitem__((0, 0, 0, 0), np.nan)), "not finite"),
    "a step that contradicts": (rewritten(lambda a: a.update(global_step=np.int64(3))), "but step 3 makes it"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return builders.build_model(config(), tf.distribute.get_strategy())


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints_are_refused_and_nothing_is_written(tmp_path, name, model, monkeypatch):
    damage, message = DAMAGES[name]
    prefix = copy(tmp_path / "c")
    damage(prefix)
    monkeypatch.setattr(builders, "build_model", lambda config, strategy: model)  # it takes six seconds
    with pytest.raises(InputError, match=message):
        experiment.import_tf1(str(prefix), config(), str(tmp_path / "w"))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_nothing_is_assigned_when_the_network_is_another():
    unet = network(num_res_blocks=2)
    before = unet.get_weights()
    with pytest.raises(InputError, match="missing in the file"):
        load_tf1_checkpoint(CHECKPOINT, unet)
    for a, b in zip(before, unet.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "path", ["", "new/", "new/deep/", ".", "folder", "folder/", "gs://b/c", "c.index", "c.data-00000-of-00001"]
)
def test_a_path_that_would_make_hidden_or_double_named_files_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="is a folder|is an address|has a suffix|is no path"):
        save_tf1_checkpoint(path, TF1State({}, {}, None, None, None))
    assert [p.name for p in tmp_path.rglob("*")] == ["folder"]


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pkl", ".h5", ".keras", ".npy", ".ckpt.pt"])
def test_formats_that_can_run_code_are_refused(tmp_path, suffix):
    with pytest.raises(InputError, match="can run code"):
        read_tf1_checkpoint(tmp_path / f"model{suffix}")


KWARGS = {
    "model_name": "unet2d16b2", "dataset": "cifar10", "optimizer": "adam", "total_bs": 128, "grad_clip": 1.0, "lr": 2e-4,
    "warmup": 5000, "num_diffusion_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "model_mean_type": "eps", "model_var_type": "fixedlarge", "loss_type": "mse", "dropout": 0.1, "randflip": 1,
}  # fmt: skip


def test_the_releases_arguments_are_our_cifar10_config():
    from configs import cifar10
    from ddpm_tf import config as config_lib

    fields = fields_of_kwargs(KWARGS)
    assert len(fields) == 18
    for path, value in fields.items():
        assert config_lib.get(cifar10.get_config(), path) == value, path


@pytest.mark.slow
def test_a_kwargs_file_that_disagrees_is_an_error(tmp_path):
    prefix = copy(tmp_path / "c")
    (tmp_path / "c" / "kwargs.json").write_text(json.dumps({"dropout": 0.1, "lr": 2e-3}))
    with pytest.raises(InputError, match=r"disagree(.|\n)*network.dropout +0.1 +0.0") as e:
        experiment.import_tf1(str(prefix), config(), str(tmp_path / "w"))
    assert "learning_rate" not in str(e.value)
    for text, message in (("{", "cannot be read"), ('{"model_var_type": "huge"}', "the release has")):
        (tmp_path / "c" / "kwargs.json").write_text(text)
        with pytest.raises(InputError, match=message):
            experiment.import_tf1(str(prefix), config(), str(tmp_path / "w"))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_the_releases_saver_reads_what_we_write(tmp_path):
    """tf.compat.v1's Saver restores by these names, as the release does."""
    save_tf1_checkpoint(tmp_path / "model.ckpt-12", read_tf1_checkpoint(CHECKPOINT))
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variable = tf.compat.v1.get_variable("model/conv_in/W", (3, 3, 1, 32))
        tf.compat.v1.train.Saver([variable]).restore(session, str(tmp_path / "model.ckpt-12"))
        np.testing.assert_array_equal(session.run(variable), read_bundle(CHECKPOINT)["model/conv_in/W"])
