"""Classes in training: dropped labels, and data that a conditional network cannot be trained on."""

import json

import numpy as np
import pytest
import tensorflow as tf

from configs import cifar10_cond, digits_cond
from ddpm_tf import builders, experiment
from ddpm_tf.data.sources import ArraySource
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.errors import InputError
from ddpm_tf.networks import UNet
from ddpm_tf.training.model import DiffusionModel
from ddpm_tf.training.objective import Objective
from ddpm_tf.training.optimizers import make_optimizer
from tests.conftest import assert_the_same_end, state, tiny_config

DIFFUSION = GaussianDiffusion(Schedule(make_betas("linear", 1000)))


def make_network(num_classes=3):
    return UNet(
        (8, 8, 1), ch=8, num_groups=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_classes=num_classes
    )


class Recorder:
    """Keeps the labels that it was asked with."""

    image_shape, num_classes = (2, 2, 1), 3

    def __call__(self, inputs, training=False, dropout_seed=None):
        self.labels = inputs["labels"].numpy()
        return tf.zeros_like(inputs["x_t"])


def test_a_dropped_label_is_the_null_class_at_the_asked_rate_and_a_slice_is_the_whole():
    network = Recorder()
    objective = Objective(network, DIFFUSION, seed=1, label_dropout=0.25)
    count, step = 20_000, tf.constant(7, tf.int64)
    index, labels = tf.range(count), tf.range(count) % 3
    draws = objective.draws(index, step)
    objective(tf.zeros([count, 2, 2, 1]), labels, draws)
    dropped = draws.drops_label.numpy()
    np.testing.assert_array_equal(network.labels, np.where(dropped, 3, labels))
    assert abs(dropped.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / count)
    np.testing.assert_array_equal(objective.draws(index[100:200], step).drops_label, dropped[100:200])
    other_step = objective.draws(index, step + 1).drops_label.numpy()
    assert abs((dropped & other_step).mean() - 0.25**2) < 0.01  # independent from step to step


def test_without_classes_or_dropout_no_label_is_dropped():
    for network, rate in ((make_network(None), 0.1), (make_network(), 0.0)):
        draws = Objective(network, DIFFUSION, label_dropout=rate).draws(tf.range(4), tf.constant(0, tf.int64))
        assert draws.drops_label is None
    with pytest.raises(InputError, match=r"label_dropout must be within \[0, 1\), found 1"):
        Objective(make_network(), DIFFUSION, label_dropout=1)


def test_held_out_losses_keep_every_label():
    network = Recorder()
    objective = Objective(network, DIFFUSION, label_dropout=0.9)
    objective.held_out_losses(tf.zeros([6, 2, 2, 1]), tf.range(6) % 3, tf.range(6), tf.constant(0, tf.int64))
    np.testing.assert_array_equal(network.labels, np.arange(6) % 3)


def test_the_null_class_is_trained_by_dropped_labels_alone():
    images = np.zeros((8, 8, 8, 1), np.float32)
    for rate, is_trained in ((0.0, False), (0.5, True)):
        model = DiffusionModel(make_network(), DIFFUSION, label_dropout=rate)
        model.compile(make_optimizer(learning_rate=1e-3, warmup_steps=0), run_eagerly=True)
        table = next(v for v in model.network.variables if v.path.endswith("labels/embeddings"))
        before = table.numpy()
        model.fit({"image": images, "label": np.arange(8, dtype=np.int32) % 3}, batch_size=8, epochs=3, verbose=0)
        changed = np.any(table.numpy() != before, axis=1)
        assert changed.tolist() == [True, True, True, is_trained]


def test_micro_batches_carry_labels_and_what_is_dropped():
    rows = np.random.Generator(np.random.PCG64(0)).uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32)
    weights = []
    for parts in (1, 4):
        model = DiffusionModel(make_network(), DIFFUSION, label_dropout=0.5, micro_batches=parts, grad_clip=0.0)
        model.compile(make_optimizer(learning_rate=1e-3, warmup_steps=0), run_eagerly=True)
        batch = {"image": rows, "label": np.arange(8, dtype=np.int32) % 3}
        model.fit(tf.data.Dataset.from_tensors(batch).repeat(2), verbose=0, shuffle=False)
        weights.append(np.concatenate([v.numpy().ravel() for v in model.ema_network.variables]))
    np.testing.assert_allclose(*weights, atol=2e-5)


@pytest.mark.parametrize(
    ("labels", "num_classes", "message"),
    [
        (None, 3, "network.num_classes=3 needs labels, and the data have none"),
        ([0, 5], 3, "The data have 6 classes, and network.num_classes is 3: set it to 6"),
    ],
)
def test_data_without_the_labels_are_refused_at_the_start(monkeypatch, labels, num_classes, message):
    source = ArraySource(np.zeros((2, 8, 8, 1), np.uint8), None if labels is None else np.array(labels))
    monkeypatch.setattr(builders, "load_source", lambda *_, **__: source)
    config = tiny_config()
    config.network.num_classes = num_classes
    with pytest.raises(InputError, match=message):
        builders.build_source(config)


def test_a_config_of_classes_makes_a_conditional_network():
    config = digits_cond.get_config()
    builders.check(config)
    builders.check(cifar10_cond.get_config())
    model = builders.build_model(config, tf.distribute.get_strategy(), is_compiled=False)
    assert model.network.num_classes == 10 and model.objective.label_dropout == 0.1


@pytest.mark.slow
def test_classes_are_resumed_bit_exactly_and_are_the_same_in_micro_batches(tmp_path):
    """Four steps at once, in two starts, and in micro-batches."""

    def train(name, num_steps, *, micro_batches=1):
        config = tiny_config(num_steps)
        config.network.num_classes, config.train.label_dropout = 10, 0.5
        config.train.micro_batches = micro_batches
        config.sample.labels, config.sample.guidance, config.sample.sampler = "3,7", 2.0, "dpm_solver"
        experiment.train(config, str(tmp_path / name))

    train("whole", 4)
    train("parts", 2)
    train("parts", 4)
    assert_the_same_end(tmp_path / "parts", tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "data.json").read_text())["class_names"] == [str(k) for k in range(10)]
    train("split", 4, micro_batches=2)
    (_, whole), (_, split) = state(tmp_path / "whole"), state(tmp_path / "split")
    for name, value in whole.items():
        np.testing.assert_allclose(split[name], value, atol=1e-5, err_msg=name)
