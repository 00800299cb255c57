"""A classifier's run: trained as any other, draws nothing, and is loaded to guide."""

import json
import shutil

import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf import builders, experiment
from ddpm_tf import config as config_lib
from ddpm_tf.data.sources import ArraySource
from ddpm_tf.errors import InputError, NumericsError
from ddpm_tf.experiment.inference import Inference
from ddpm_tf.storage import checkpoints
from ddpm_tf.training.classifier_objective import ClassifierObjective
from tests.conftest import assert_the_same_end, rows, state, tiny_config


def classifier_config(num_steps=4):
    config = tiny_config(num_steps)
    config.network.name, config.network.num_classes, config.train.loss = "classifier", 10, "cross_entropy"
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(a finished classifier's workdir, which is not to be written to; what its training reported)."""
    workdir = tmp_path_factory.mktemp("classifier") / "w"
    return workdir, experiment.train(classifier_config(), str(workdir))


def test_a_run_draws_nothing_and_says_how_the_classifier_is_used(run, caplog):
    workdir, report = run
    assert not list((workdir / "samples").iterdir())
    assert report.endswith(f"\npython run_sample.py --workdir=... --classifier={workdir} --classifier_scale=1")
    assert rows(workdir)[-1]["step"] == 4 and {"accuracy_q1", "loss_q4"} < rows(workdir)[-1].keys()
    assert "bound_q1" not in rows(workdir)[-1]
    with caplog.at_level("INFO", logger="absl"):
        assert experiment.train(classifier_config(), str(workdir)) == report
    assert "Step 4 of 4: nothing to do" in caplog.text


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "w")
    shutil.rmtree(checkpoints.step_folder(str(tmp_path / "w" / "ckpt"), 4))
    experiment.train(classifier_config(), str(tmp_path / "w"))
    assert_the_same_end(tmp_path / "w", run[0])


def test_a_dry_run_says_what_comes_out(tmp_path):
    report = experiment.dry_run(classifier_config())
    assert "x_t [8, 8, 8, 1] float32, t [8] int32 -> [8, 10] float32" in report and "memory, estimated" in report


@pytest.mark.slow
def test_too_many_skipped_steps_leave_a_dump_with_the_labels(tmp_path, monkeypatch):
    computed = ClassifierObjective._computed

    def broken(self, x_0, labels, t, eps, **dropout):
        return computed(self, x_0 * np.nan, labels, t, eps, **dropout)

    monkeypatch.setattr(ClassifierObjective, "_computed", broken)
    config = classifier_config()
    config.train.max_skipped_steps = 2
    with pytest.raises(NumericsError):
        experiment.train(config, str(tmp_path))
    (dump,) = (tmp_path / "nan_dump").rglob("*.npz")
    with np.load(dump, allow_pickle=False) as arrays:
        assert {"image", "label", "t", "eps", "dropout_seed"} <= set(arrays.files)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"network.num_classes": 0}, "network: A classifier needs at least two classes, found num_classes=0"),
        ({"network.num_classes": 1}, "network: A classifier needs at least two classes, found num_classes=1"),
        ({"train.loss": "simple"}, "train.loss: A classifier is trained by loss 'cross_entropy' alone, found 'simple'"),
        ({"train.loss_weight": "min_snr"}, "train.loss: Loss 'cross_entropy' has no loss weight, found 'min_snr'"),
        ({"network.name": "unet"}, "train.loss: Loss 'cross_entropy' trains a classifier, and this network predicts"),
    ],
)
def test_a_config_that_makes_no_classifier_is_refused(fields, message):
    config = classifier_config()
    for path, value in fields.items():
        config_lib.put(config, path, value)
    with pytest.raises(InputError, match=message) as e:
        builders.check(config)
    assert e.value.exit_code == 2


def test_data_without_labels_are_refused_without_advice_that_does_not_hold(monkeypatch):
    monkeypatch.setattr(builders, "load_source", lambda *_, **__: ArraySource(np.zeros((2, 8, 8, 1), np.uint8)))
    with pytest.raises(InputError, match="network.num_classes=10 needs labels, and the data have none") as e:
        builders.build_source(classifier_config())
    assert "num_classes=0" not in str(e.value)


def test_what_draws_refuses_a_classifiers_workdir_by_one_message(run, tmp_path):
    workdir = str(run[0])
    for job in (
        lambda: experiment.sample_images(workdir, out=str(tmp_path / "a")),
        lambda: experiment.export(workdir, str(tmp_path / "m" / "digits")),
        lambda: experiment.export_weights(workdir, "tf1", str(tmp_path / "model.ckpt-4")),
        lambda: experiment.export_weights(workdir, "diffusers", str(tmp_path / "d")),
        lambda: experiment.load_for_inference(workdir),
    ):
        with pytest.raises(
            InputError, match=f"^--workdir={workdir} holds a classifier, .* --classifier={workdir}"
        ) as e:
            job()
        assert e.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_other_programs_networks_are_not_read_into_a_classifier(tmp_path):
    for read in (
        experiment.import_tf1,
        lambda path, config, out: experiment.import_diffusers(path, out, config=config),
    ):
        with pytest.raises(InputError, match="--config is of a classifier"):
            read(str(tmp_path / "model.ckpt-4"), classifier_config(), str(tmp_path / "w"))
    assert not list(tmp_path.iterdir())


def drawing(**fields):
    """A network that draws, untrained."""
    config = tiny_config()
    for path, value in fields.items():
        config_lib.put(config, path.replace("__", "."), value)
    diffusion = builders.build_diffusion(config)
    return Inference(config, builders.build_network(config, diffusion), diffusion, 0)


def test_the_average_of_a_classifier_is_loaded_for_a_network_of_the_same_chain(run):
    # Prediction and variance are how a network draws, and of no concern to a classifier.
    inference = drawing(diffusion__prediction="v", diffusion__variance="learned_range", network__num_classes=10)
    classifier = experiment.load_classifier(str(run[0]), inference)
    _, tensors = state(run[0])
    for v in classifier.variables:
        np.testing.assert_array_equal(v.numpy(), tensors[f"ema/{v.path}"], err_msg=v.path)
    logits = classifier({"x_t": tf.zeros((2, 8, 8, 1)), "t": tf.constant([0, 999])})
    assert logits.shape == (2, 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"diffusion__schedule": "cosine"}, r"another chain \(linear, 1000 .* draws \(cosine, 1000 timesteps\)"),
        ({"diffusion__beta_end": 0.03}, "another chain"),
        ({"diffusion__num_timesteps": 100}, r"draws \(linear, 100 timesteps\)"),
        ({"data__image_size": 16}, r"trained on images of \[8, 8, 1\], and the network draws \[16, 16, 1\]"),
        ({"network__num_classes": 3}, "knows 10 classes, and the network that draws 3"),
    ],
)
def test_a_classifier_that_does_not_fit_is_refused(run, fields, message):
    with pytest.raises(InputError, match=f"^--classifier={run[0]} .*{message}") as e:
        experiment.load_classifier(str(run[0]), drawing(**fields))
    assert e.value.exit_code == 2


def test_a_workdir_without_a_classifier_is_refused(run, tmp_path):
    with pytest.raises(InputError, match=f"--classifier={tmp_path} holds no config.json"):
        experiment.load_classifier(str(tmp_path), drawing())
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    with pytest.raises(InputError, match=rf"--classifier={tmp_path} holds no classifier \(network.name=unet\)"):
        experiment.load_classifier(str(tmp_path), drawing())
