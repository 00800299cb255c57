"""Workdirs to and from diffusers and the TensorFlow 1 release: what stands beside the weights is neither lost nor overruled."""

import json
import os
import shutil
import stat
import textwrap
import types

import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import load_file

from ddpm_tf import builders, experiment, files
from ddpm_tf import config as config_lib
from ddpm_tf.errors import InputError, StorageError, WorkdirError
from ddpm_tf.experiment import conversion
from ddpm_tf.storage.workdir import read_config, write_workdir
from tests.conftest import DATA, drawn_weight

WEIGHTS = "diffusion_pytorch_model.safetensors"
EXPRESSIBLE = [
    {},
    {"diffusion.schedule": "cosine", "diffusion.prediction": "v", "diffusion.num_timesteps": 50, "sample.clip": False},
    {"diffusion.schedule": "quad", "diffusion.prediction": "x_0", "diffusion.beta_start": 0.00085,
     "diffusion.beta_end": 0.012, "diffusion.variance": "fixed_small", "sample.spacing": "trailing"},
    {"diffusion.schedule": "linear_scaled", "diffusion.num_timesteps": 50, "diffusion.variance": "fixed_small_floored",
     "sample.spacing": "linspace"},
    {"diffusion.schedule": "warmup10", "diffusion.beta_end": 0.03},
    {"diffusion.schedule": "sigmoid"},
    {"diffusion.schedule": "jsd", "diffusion.prediction": "x_0"},
    {"diffusion.variance": "fixed_large", "diffusion.schedule": "const", "diffusion.beta_end": 0.01},
]  # fmt: skip


def small_config(**fields):
    config = config_lib.default()
    small = {
        "data.image_size": 8, "data.channels": 1, "data.batch_size": 4, "network.ch": 16, "network.ch_mult": (1,),
        "network.num_res_blocks": 1, "network.attn_resolutions": (), "network.num_groups": 4, "train.jit_compile": "off",
    }  # fmt: skip
    for field, value in {**small, **fields}.items():
        config_lib.put(config, field, value)
    return config


def make_workdir(path, config):
    model = builders.build_model(config, tf.distribute.get_strategy())
    for v in model.network.variables:
        v.assign(drawn_weight(v.path, v.shape, 0))
    model.ema_network.set_weights(model.network.get_weights())
    write_workdir(str(path), config, {name: v.numpy() for name, v in model.state().items()})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "w"
    make_workdir(path, small_config())
    return str(path)


@pytest.fixture(scope="module")
def once_exported(workdir, tmp_path_factory):
    """A folder for diffusers, not to be changed, and its network."""
    path = tmp_path_factory.mktemp("exported") / "hf"
    experiment.export_weights(workdir, "diffusers", str(path))
    return path, conversion.load_diffusers(path)


@pytest.fixture
def exported(once_exported, tmp_path):
    """A folder for diffusers, and a function that changes its scheduler_config.json (None as a value deletes the key)."""
    shutil.copytree(once_exported[0], tmp_path / "hf")

    def write(**values):
        path = tmp_path / "hf" / "scheduler_config.json"
        content = {k: v for k, v in {**json.loads(path.read_text()), **values}.items() if v is not None}
        path.write_text(json.dumps(content))

    return tmp_path / "hf", write


@pytest.fixture
def imported(once_exported, monkeypatch):
    """import_diffusers without the seconds in which Keras makes three networks: (report, the config of the workdir)."""
    network, configs = types.SimpleNamespace(set_weights=lambda _: None), []
    model = types.SimpleNamespace(network=network, ema_network=network, state=lambda: {})
    monkeypatch.setattr(builders, "build_model", lambda *_: model)
    monkeypatch.setattr(conversion, "load_diffusers", lambda _: once_exported[1])
    monkeypatch.setattr(conversion, "write_workdir", lambda _, config, __: configs.append(config))

    def run(path, config=None):
        report = experiment.import_diffusers(str(path), f"{path}-new", config=config)
        return report, configs[-1]

    return run


def fields_of(config, sections=("diffusion", "network")):
    names = [f.path for section in sections for f in config_lib.section(section)]
    return {name: config_lib.get(config, name) for name in [*names, "sample.clip", "sample.spacing", "train.loss"]}


@pytest.mark.parametrize("fields", EXPRESSIBLE)
def test_out_to_diffusers_and_back_is_the_identity(exported, imported, fields):
    folder, _ = exported
    config = small_config(**fields)
    (folder / "scheduler_config.json").write_text(json.dumps(conversion._describe_scheduler(config)))
    report, back = imported(folder)
    assert fields_of(back) == fields_of(config)
    assert f"scheduler_config.json says diffusion.schedule={config.diffusion.schedule}" in report
    imported(folder, config)  # no contradiction


@pytest.mark.slow
def test_out_and_back_keeps_the_weights_and_the_networks_settings(tmp_path):
    fields = {
        "diffusion.variance": "learned_range",
        "train.loss": "hybrid",
        "network.num_groups": 8,
        "network.dropout": 0.1,
        "network.num_classes": 3,
    }
    config = small_config(**fields)
    make_workdir(tmp_path / "w", config)
    experiment.export_weights(str(tmp_path / "w"), "diffusers", str(tmp_path / "hf"))
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert [written[key] for key in ("norm_num_groups", "num_class_embeds", "class_embed_type")] == [8, 4, None]
    experiment.import_diffusers(str(tmp_path / "hf"), str(tmp_path / "back"))
    assert fields_of(read_config(str(tmp_path / "back"))) == fields_of(config)
    inference, original = (experiment.load_for_inference(str(tmp_path / name)) for name in ("back", "w"))
    for a, b in zip(inference.network.get_weights(), original.network.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    config.network.num_groups = 4
    with pytest.raises(InputError, match="(?s)disagree.*network.num_groups +8 +4"):
        experiment.import_diffusers(str(tmp_path / "hf"), str(tmp_path / "third"), config=config)


def test_an_exported_folder_has_ordinary_file_modes(once_exported, tmp_path):
    (tmp_path / "plain").write_text("")
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in once_exported[0].iterdir()} == dict.fromkeys(
        (WEIGHTS, "config.json", "scheduler_config.json"), expected
    )


def test_what_an_export_cannot_say_is_named(workdir, tmp_path, monkeypatch):
    fields = {"sample.sampler": "ddim", "sample.spacing": "quad", "sample.num_steps": 20}
    config = small_config(**fields, **{"diffusion.schedule": "sigmoid", "diffusion.sigmoid_tau": 0.7})
    monkeypatch.setattr(conversion, "read_drawing_config", lambda _: config)
    report = experiment.export_weights(workdir, "diffusers", str(tmp_path / "hf"))
    assert "no place for sample.sampler=ddim, sample.spacing=quad: not written" in report
    assert "its betas are in trained_betas" in report and "num_inference_steps=20" in report


def test_trained_betas_of_no_default_schedule_need_a_config_with_the_same_betas(exported, imported):
    folder, _ = exported
    config = small_config(**{"diffusion.schedule": "sigmoid", "diffusion.sigmoid_tau": 0.7})
    (folder / "scheduler_config.json").write_text(json.dumps(conversion._describe_scheduler(config)))
    with pytest.raises(InputError, match="trained_betas are those of no schedule"):
        imported(folder)
    assert fields_of(imported(folder, config)[1]) == fields_of(config)
    config.diffusion.sigmoid_tau = 0.8
    with pytest.raises(InputError, match="(?s)disagree.*trained_betas of the file.*'sigmoid'"):
        imported(folder, config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"diffusion.prediction": "x_prev"}, "diffusion.prediction=x_prev cannot be written"),
     ({"diffusion.variance": "learned", "train.loss": "vlb"}, "diffusion.variance=learned cannot be written")],
)  # fmt: skip
def test_what_no_ddpm_scheduler_can_say_is_refused_with_the_fields_name(
    workdir, tmp_path, monkeypatch, fields, message
):
    monkeypatch.setattr(conversion, "read_drawing_config", lambda _: small_config(**fields))
    with pytest.raises(InputError, match=message):
        experiment.export_weights(workdir, "diffusers", str(tmp_path / "hf"))
    assert not list(tmp_path.iterdir())


def test_a_pipelines_folder_its_unet_and_a_file_are_read_with_its_scheduler(exported, imported, tmp_path):
    folder, write = exported
    write(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", num_train_timesteps=50)
    pipeline = tmp_path / "pipe"
    (pipeline / "scheduler").mkdir(parents=True)
    folder.rename(pipeline / "unet")
    (pipeline / "unet" / "scheduler_config.json").rename(pipeline / "scheduler" / "scheduler_config.json")
    (pipeline / "model_index.json").write_text("{}")
    for path in (pipeline, pipeline / "unet", pipeline / "unet" / WEIGHTS):
        report, config = imported(path)
        assert (config.diffusion.schedule, config.diffusion.prediction) == ("cosine", "v")
        assert config.diffusion.num_timesteps == 50 and str(pipeline / "scheduler") in report


def test_two_scheduler_files_must_agree(exported, imported, tmp_path):
    folder, write = exported
    (tmp_path / "scheduler").mkdir()
    other = tmp_path / "scheduler" / "scheduler_config.json"
    other.write_text((folder / "scheduler_config.json").read_text())
    imported(folder)
    write(prediction_type="sample")
    with pytest.raises(InputError, match="say different things"):
        imported(folder)


def test_without_a_scheduler_file_the_report_names_what_is_assumed(exported, imported):
    folder, _ = exported
    (folder / "scheduler_config.json").unlink()
    report, config = imported(folder)
    assert "There is no scheduler_config.json" in report and "diffusion.prediction=eps" in report
    assert fields_of(config, ("diffusion",)) == fields_of(config_lib.default(), ("diffusion",))


def test_the_files_chain_and_target_must_be_the_configs(exported, imported):
    folder, write = exported
    write(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", num_train_timesteps=50)
    with pytest.raises(InputError, match="(?s)disagree.*prediction +'v' +'eps'") as e:
        imported(folder, small_config())
    assert "diffusion.schedule" in str(e.value) and "diffusion.num_timesteps" in str(e.value)


def test_the_same_betas_by_another_name_are_no_contradiction(exported, imported):
    folder, _ = exported
    config = small_config(**{"diffusion.schedule": "linear_scaled"})  # of 1000 steps, hence linear
    assert imported(folder, config)[1].diffusion.schedule == "linear_scaled"


def test_a_fixed_variance_is_the_files_without_a_config_and_the_configs_with_one(exported, imported):
    folder, write = exported
    write(variance_type="fixed_small", clip_sample=False)
    report, config = imported(folder)
    assert (
        config.diffusion.variance == "fixed_small" and not config.sample.clip and "need variance fixed_large" in report
    )
    report, config = imported(folder, small_config())
    assert config.diffusion.variance == "fixed_large" and config.sample.clip
    assert "--config decides how to draw: diffusion.variance=fixed_large, sample.clip=True" in report


def test_a_ddim_scheduler_is_the_sampler_ddim(exported, imported):
    folder, write = exported
    write(_class_name="DDIMScheduler", variance_type=None, skip_prk_steps=True)
    report, config = imported(folder)
    assert config.sample.sampler == "ddim" and config.diffusion.variance == "fixed_large"
    assert "Not read" in report and "skip_prk_steps" in report


@pytest.mark.parametrize(
    ("values", "message"),
    [({"_class_name": "PNDMScheduler"}, "_class_name is 'PNDMScheduler', expected one of .*from_config"),
     ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'.*another curve"),
     ({"beta_schedule": "laplace"}, "beta_schedule is 'laplace'"),
     ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
     ({"prediction_type": "flow"}, "prediction_type is 'flow'"),
     ({"variance_type": "learned"}, "variance_type is 'learned'.*logarithm"),
     ({"variance_type": "fixed"}, "variance_type is 'fixed'"),
     ({"thresholding": True}, "thresholding=True, here False.*Give a --config"),
     ({"clip_sample_range": 3.0}, r"clip_sample_range=3.0, here 1.0"),
     ({"steps_offset": 1}, "steps_offset=1, here 0"),
     ({"set_alpha_to_one": False}, "set_alpha_to_one=False"),
     ({"timestep_spacing": "karras"}, "timestep_spacing is 'karras'"),
     ({"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000, expected"),
     ({"num_train_timesteps": 50.0}, "num_train_timesteps is 50.0, expected an integer"),
     ({"beta_end": "0.02"}, "beta_end is '0.02'"),
     ({"clip_sample": "yes"}, "clip_sample is 'yes'"),
     ({"num_train_timesteps": 3, "trained_betas": [0.1, 0.2]}, "trained_betas is .*num_train_timesteps=3 numbers"),
     ({"num_train_timesteps": 3, "trained_betas": [0.1, 0.5, 0.2]}, "those of no schedule"),
     ({"variance_type": "learned_range"}, "1 output channels .* does not fit variance 'learned_range'")],
)  # fmt: skip
def test_what_a_scheduler_says_and_this_program_cannot_is_refused_with_the_key(exported, imported, values, message):
    folder, write = exported
    write(**values)
    with pytest.raises(InputError, match=f"(?s){message}"):
        imported(folder)


def test_a_config_overrules_choices_that_this_program_cannot_follow(exported, imported):
    folder, write = exported
    write(thresholding=True)
    report, _ = imported(folder, small_config())
    assert "--config decides how to draw: not thresholding=True" in report


@pytest.mark.parametrize("out", ["folder", "folder/", "new/", "model.index", "model.data-00000-of-00001", "there"])
def test_a_path_that_is_no_tf1_prefix_is_refused_before_work(workdir, tmp_path, out):
    (tmp_path / "folder").mkdir()
    (tmp_path / "there.index").write_text("")
    with pytest.raises(InputError, match=f"--out={tmp_path}/{out}"):
        experiment.export_weights(workdir, "tf1", f"{tmp_path}/{out}")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder", "there.index"]


def test_tf1_has_no_place_for_another_number_of_groups(workdir, tmp_path):
    with pytest.raises(InputError, match="network.num_groups=32; the config has 4"):
        experiment.export_weights(workdir, "tf1", str(tmp_path / "model.ckpt-0"))
    with pytest.raises(InputError, match="network.num_groups=32; the config has 4"):
        experiment.import_tf1(str(tmp_path / "model.ckpt-0"), small_config(), str(tmp_path / "w"))
    assert not list(tmp_path.iterdir())


def test_tf1_has_no_place_for_classes(workdir, tmp_path, monkeypatch):
    config = small_config(**{"network.ch": 64, "network.num_groups": 32, "network.num_classes": 10})
    message = "network.num_classes=10, expected 0: the original release has no classes"
    monkeypatch.setattr(conversion, "read_drawing_config", lambda _: config)
    with pytest.raises(InputError, match=message):
        experiment.export_weights(workdir, "tf1", str(tmp_path / "model.ckpt-0"))
    with pytest.raises(InputError, match=message):
        experiment.import_tf1(str(tmp_path / "model.ckpt-0"), config, str(tmp_path / "w"))
    assert not list(tmp_path.iterdir())


COND = f"{DATA}/diffusers_cond"


@pytest.fixture(scope="module")
def conditional():
    return conversion.load_diffusers(COND)


@pytest.fixture
def imported_classes(imported, conditional, monkeypatch, tmp_path):
    """`imported`, of tests/data/diffusers_cond, with a reference that the real network answers."""
    monkeypatch.setattr(conversion, "load_diffusers", lambda _: conditional)

    def run(config=None, *, reference=None):
        workdir = str(tmp_path / "w")
        return experiment.import_diffusers(COND, workdir, config=config, reference=reference)

    return run


def conditional_config(num_classes):
    size = {"data.channels": 3, "network.ch_mult": (1, 1), "network.attn_resolutions": (4,)}
    return small_config(**size, **{"network.num_classes": num_classes})


def test_an_import_says_which_row_became_the_null_class(imported_classes):
    for config in (None, conditional_config(4)):
        report = imported_classes(config, reference=f"{COND}/output.npz")
        assert "num_class_embeds=5 was read as 4 classes and a null class: the last row of the table, label 4" in report
        assert "draw with any label within 0..4, but without guidance" in report
        assert float(report.partition("reference output: ")[2].split("\n")[0].rstrip(".")) < 1e-4


def test_the_files_classes_must_be_the_configs(imported_classes, imported, exported, once_exported, monkeypatch):
    with pytest.raises(InputError, match=r"(?s)disagree.*network.num_classes +4 +5.*--config.network.num_classes=4: "):
        imported_classes(conditional_config(5))
    monkeypatch.setattr(conversion, "load_diffusers", lambda _: once_exported[1])
    with pytest.raises(InputError, match=r"(?s)disagree.*network.num_classes +0 +10.*--config.network.num_classes=0: "):
        imported(exported[0], small_config(**{"network.num_classes": 10}))


@pytest.mark.parametrize(
    ("labels", "message"),
    [(None, "has no labels, and the network has 4 classes. Add labels"),
     (np.array([0, 1, 2, 3, 5]), r"its labels hold 5; expected 0\.\.4"),
     (np.array([0, 1, 2, 3, -1]), r"its labels hold -1; expected 0\.\.4"),
     (np.array([0, 1]), r"cannot be read \(.*labels is int64 \[2\]\); expected .* labels \(integers \[B\]\)"),
     (np.zeros(5), r"labels is float64 \[5\]"),
     (np.array([{}] * 5, object), "cannot be read")],
)  # fmt: skip
def test_a_reference_of_a_conditional_network_needs_labels(imported_classes, tmp_path, labels, message):
    with np.load(f"{COND}/output.npz") as arrays:
        changed = {**arrays, "labels": labels}
    path = tmp_path / "r.npz"
    np.savez(path, **{key: array for key, array in changed.items() if array is not None})
    with pytest.raises(InputError, match=f"--reference={path}.*{message}"):
        imported_classes(reference=str(path))


def test_a_reference_with_labels_is_of_another_network_than_one_without_classes(exported, imported, tmp_path):
    x_t, path = np.zeros((1, 8, 8, 1)), tmp_path / "r.npz"
    np.savez(path, x_t=x_t, t=np.zeros(1, int), labels=np.zeros(1, int), output=x_t)
    with pytest.raises(InputError, match=f"--reference={path} has labels, but the network has no classes"):
        experiment.import_diffusers(str(exported[0]), str(tmp_path / "w"), reference=str(path))


def test_an_export_with_classes_says_how_to_give_labels(tmp_path):
    make_workdir(tmp_path / "w", small_config(**{"network.num_classes": 3}))
    report = experiment.export_weights(str(tmp_path / "w"), "diffusers", str(tmp_path / "hf"))
    assert "class_labels are 0..2; 3 is the null class" in report and "DDPMPipeline passes no labels" in report
    compile(textwrap.dedent(report.partition("without it:\n")[2]), "report", "exec")
    assert load_file(tmp_path / "hf" / WEIGHTS)["class_embedding.weight"].shape == (4, 64)
    with pytest.raises(InputError, match="num_classes=3"):
        experiment.export_weights(str(tmp_path / "w"), "tf1", str(tmp_path / "model.ckpt-0"))
    assert {p.name for p in tmp_path.iterdir()} == {"w", "hf"}


@pytest.fixture(scope="module")
def release_workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / "w"
    make_workdir(path, small_config(**{"network.ch": 64, "network.num_groups": 32}))
    return str(path)


def test_a_tf1_checkpoint_appears_whole_or_not_at_all(release_workdir, tmp_path, monkeypatch):
    save = conversion.save_tf1_checkpoint

    def interrupted(prefix, *args, **kwargs):
        save(prefix, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "save_tf1_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        experiment.export_weights(release_workdir, "tf1", str(tmp_path / "a" / "model.ckpt-0"))
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "a").mkdir()
    left = tmp_path / "a" / f"{files.TEMPORARY}model.ckpt-0-{'0' * 32}"  # as a kill leaves it
    left.mkdir()
    (tmp_path / "a" / f"{files.TEMPORARY}mine").mkdir()
    experiment.export_weights(release_workdir, "tf1", str(tmp_path / "a" / "model.ckpt-0"))
    names = {"model.ckpt-0.index", "model.ckpt-0.data-00000-of-00001", f"{files.TEMPORARY}mine"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == names


@pytest.mark.parametrize(("number", "error"), [(28, StorageError), (30, WorkdirError)])
@pytest.mark.parametrize("to", ["tf1", "diffusers"])
def test_a_write_that_fails_says_what_to_do_and_leaves_nothing(
    release_workdir, tmp_path, monkeypatch, number, error, to
):
    def fails(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "fsync", fails)
    with pytest.raises(error, match="--out=.* cannot be written: .*(start again with the same command|Choose another)"):
        experiment.export_weights(release_workdir, to, str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def damaged_reference(tmp_path, name):
    path = tmp_path / "r.npz"
    if name == "text":
        path.write_text("not an npz")
    elif name == "one array":
        with open(path, "wb") as f:
            np.save(f, np.zeros(3))
    elif name == "other names":
        np.savez(path, a=np.zeros(3))
    elif name == "floats for t":
        np.savez(path, x_t=np.zeros((1, 8, 8, 1)), t=np.zeros(1), output=np.zeros((1, 8, 8, 1)))
    elif name == "objects":
        np.savez(path, x_t=np.array([{}], object), t=np.zeros(1), output=np.zeros(1))
    elif name == "cut":
        np.savez(path, x_t=np.zeros((1, 8, 8, 1)), t=np.zeros(1, int), output=np.zeros((1, 8, 8, 1)))
        path.write_bytes(path.read_bytes()[:100])
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "another size":
        np.savez(path, x_t=np.zeros((1, 9, 9, 1)), t=np.zeros(1, int), output=np.zeros((1, 9, 9, 1)))
    return path


@pytest.mark.parametrize(
    "name", ["absent", "text", "one array", "other names", "floats for t", "objects", "cut", "empty", "another size"]
)
def test_a_reference_that_cannot_be_used_is_refused_before_anything_is_written(exported, tmp_path, name):
    folder, _ = exported
    path = damaged_reference(tmp_path, name)
    with pytest.raises(InputError, match=f"--reference={path}") as e:
        experiment.import_diffusers(str(folder), str(tmp_path / "w"), reference=str(path))
    assert "allow_pickle" not in str(e.value) and not (tmp_path / "w").exists()


@pytest.mark.slow
def test_weights_are_those_of_the_moving_average_or_the_raw_ones(tmp_path):
    config = small_config()
    model = builders.build_model(config, tf.distribute.get_strategy())
    for network, seed in ((model.network, 0), (model.ema_network, 1)):
        for v in network.variables:
            v.assign(drawn_weight(v.path, v.shape, seed))
    write_workdir(str(tmp_path / "w"), config, {name: v.numpy() for name, v in model.state().items()})
    for ema, network in ((True, model.ema_network), (False, model.network)):
        experiment.export_weights(str(tmp_path / "w"), "diffusers", str(tmp_path / str(ema)), ema=ema)
        arrays = load_file(tmp_path / str(ema) / WEIGHTS)
        np.testing.assert_array_equal(arrays["conv_out.bias"], network.get_layer("conv_out").get_weights()[1])
