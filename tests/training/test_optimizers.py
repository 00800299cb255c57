import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.errors import InputError
from ddpm_tf.networks import UNet
from ddpm_tf.storage import checkpoints
from ddpm_tf.storage.bundles import assign
from ddpm_tf.training.model import DiffusionModel
from ddpm_tf.training.optimizers import OPTIMIZERS, make_optimizer
from tests.conftest import mirrored

# So many steps that of the first mean square 1e-11 is left: small gradients then show where epsilon is added.
RATE, WARMUP, STEPS = 1e-3, 4, 500
SIZES = 10.0 ** np.arange(-6, 4)
GRADIENTS = (np.random.default_rng(0).normal(size=(STEPS, SIZES.size)) * SIZES).astype(np.float32)


def weights_after(name):
    """The weights after each step on GRADIENTS, from 0."""
    variable, optimizer = (
        keras.Variable(tf.zeros(SIZES.size)),
        make_optimizer(name, learning_rate=RATE, warmup_steps=WARMUP),
    )
    optimizer.build([variable])
    weights = []
    for gradient in GRADIENTS:
        optimizer.apply([tf.constant(gradient)], [variable])
        weights.append(variable.numpy())
    return np.array(weights)


def assert_same(found, expected):
    """To 1e-5 of the largest value of each weight: float32 sums of 500 steps."""
    scale = np.abs(expected).max(axis=0)
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=1e-5)


def test_rmsprop_is_the_originals_formula():
    """tf.train.RMSPropOptimizer in float64: the mean square starts at 1, epsilon is under the root."""
    decay, momentum, epsilon = 0.95, 0.9, 1e-8
    w, mean_square, moment, expected = np.zeros(SIZES.size), np.ones(SIZES.size), np.zeros(SIZES.size), []
    for step, gradient in enumerate(GRADIENTS.astype(np.float64)):
        mean_square = decay * mean_square + (1 - decay) * gradient**2
        moment = momentum * moment + RATE * min(step / WARMUP, 1) * gradient / np.sqrt(mean_square + epsilon)
        w = w - moment
        expected.append(w)
    assert_same(weights_after("rmsprop"), expected)


def test_adam_is_its_formula():
    """Kingma & Ba with epsilon added to the root, in float64; the bias correction counts from 1."""
    m, v, w, expected = np.zeros(SIZES.size), np.zeros(SIZES.size), np.zeros(SIZES.size), []
    for step, gradient in enumerate(GRADIENTS.astype(np.float64)):
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        root = np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8 / np.sqrt(1 - 0.999 ** (step + 1))
        w = w - RATE * min(step / WARMUP, 1) * m / (1 - 0.9 ** (step + 1)) / root
        expected.append(w)
    assert_same(weights_after("adam"), expected)


TENSORFLOW_1 = {
    "adam": functools.partial(tf.compat.v1.train.AdamOptimizer, epsilon=1e-8),
    "rmsprop": functools.partial(tf.compat.v1.train.RMSPropOptimizer, decay=0.95, momentum=0.9, epsilon=1e-8),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_tensorflow_1s(name):
    """The original's, in TensorFlow's compatibility module."""
    variable, rate, expected = tf.Variable(tf.zeros(SIZES.size)), tf.Variable(0.0), []
    optimizer = TENSORFLOW_1[name](lambda: rate)
    for step, gradient in enumerate(GRADIENTS):
        rate.assign(RATE * min(step / WARMUP, 1))
        optimizer.apply_gradients([(tf.constant(gradient), variable)])
        expected.append(variable.numpy())
    assert_same(weights_after(name), expected)


def small_model(name, replicas=1):
    strategy = mirrored(replicas)
    with strategy.scope():
        network = UNet((8, 8, 1), ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
        model = DiffusionModel(network, GaussianDiffusion(Schedule(make_betas("linear", 1000))))
        model.compile(make_optimizer(name))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizers_slots_are_saved_and_restored_by_name(tmp_path, name):
    model, twin = small_model(name), small_model(name)
    variables = model.state()
    slots = {f"optimizer/{s}/{v.path}" for s in ("momentum", "velocity") for v in model.network.trainable_variables}
    assert slots == {key for key in variables if key.startswith("optimizer/")}
    for k, key in enumerate(sorted(slots)):
        variables[key].assign(tf.random.stateless_uniform(variables[key].shape, (0, k)))
    tensors = {key: v.numpy() for key, v in variables.items()}
    checkpoints.save(str(tmp_path), 3, tensors, {}, keep=1)
    assign(twin.state(), checkpoints.restore_latest(str(tmp_path))[1], "the checkpoint")
    for ours, theirs in zip(model.optimizer.variables, twin.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), err_msg=ours.path)


@pytest.mark.slow
def test_rmsprops_slots_start_at_one_and_zero_on_every_replica():
    for key, v in small_model("rmsprop", replicas=2).state().items():
        if key.startswith("optimizer/"):
            for copy in v.value.values:
                np.testing.assert_array_equal(copy.numpy(), np.full(v.shape, float("velocity" in key)), err_msg=key)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": ["adam"]}, "Unknown optimizer"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"learning_rate": "2e-4"}, "learning_rate must be a number"),
        ({"learning_rate": 1e38}, "learning_rate must be"),
        ({"warmup_steps": -1}, "warmup_steps must be within"),
        ({"warmup_steps": 1.5}, "warmup_steps must be an integer"),
        ({"beta_1": None}, "beta_1 must be a number"),
        ({"beta_2": 1.0}, "beta_1 and beta_2 must be within"),
        ({"epsilon": [1e-8]}, "epsilon must be a number"),
    ],
)
def test_settings_of_another_type_or_range_are_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        make_optimizer(**kwargs)
