"""Reduced precision, loss scaling, micro-batches and diagnostics."""

import math

import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf import builders
from ddpm_tf import config as config_lib
from ddpm_tf.data import make_dataset
from ddpm_tf.data.sources import ArraySource
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.errors import InputError
from ddpm_tf.networks import UNet
from ddpm_tf.training import diagnostics, loss_scale
from ddpm_tf.training.loss_scale import LossScale
from ddpm_tf.training.model import DiffusionModel
from ddpm_tf.training.optimizers import make_optimizer
from tests.conftest import mirrored, tiny_config

DIFFUSION = GaussianDiffusion(Schedule(make_betas("linear", 100)))


def make(*, dtype="float32", replicas=1, optimizer=None, cls=DiffusionModel, size=8, ch=64, **kwargs):
    strategy = mirrored(replicas)
    with strategy.scope():
        network = UNet(
            (size, size, 1), ch=ch, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), dropout=0.1, dtype=dtype
        )
        model = cls(network, DIFFUSION, seed=3, ema_decay=0.9, grad_clip=0.5, **kwargs)
        model.compile(optimizer or make_optimizer(learning_rate=1e-3, warmup_steps=2))
    return model


def fit(model, steps, batch_size=8):
    images = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (64, *model.network.image_shape), np.uint8)
    dataset = make_dataset(ArraySource(images), batch_size=batch_size, seed=0, random_flip=True)
    with model.distribute_strategy.scope():
        return model.fit(dataset, steps_per_epoch=steps, verbose=0, shuffle=False).history


@pytest.mark.slow
@pytest.mark.parametrize(("micro_batches", "replicas"), [(2, 1), (4, 1), (2, 2)])
def test_micro_batches_are_the_whole_batch(micro_batches, replicas):
    whole, parts = make(), make(micro_batches=micro_batches, replicas=replicas)
    log, log_parts = fit(whole, 10), fit(parts, 10)
    assert log.keys() == log_parts.keys()
    for name in log:
        np.testing.assert_allclose(log[name], log_parts[name], rtol=1e-5, err_msg=name)
    for a, b in zip(whole.network.variables, parts.network.variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-5, err_msg=a.path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_weights_average_and_moments_stay_float32(precision):
    model = make(dtype=f"mixed_{precision}")
    assert model.network.compute_dtype == precision and model.ema_network.compute_dtype == "float32"
    x_t, t = tf.random.stateless_normal((2, 8, 8, 1), (0, 0)), tf.constant([3, 70])
    for network in (model.network, model.ema_network):
        assert network({"x_t": x_t, "t": t}).dtype == tf.float32
    exact = make()
    losses = fit(model, 4)["loss"], fit(exact, 4)["loss"]
    assert losses[0] != losses[1]  # it really computes in less
    np.testing.assert_allclose(*losses, rtol=0.05)
    for v in (*model.network.variables, *model.ema_network.variables, *model.optimizer.variables[1:]):
        assert v.dtype == "float32", v.path


def test_the_loss_scale_halves_and_doubles_within_its_bounds():
    scale = LossScale(True)
    scale.update(tf.constant(False))
    assert (scale.scale.numpy(), scale.finite_steps.numpy()) == (2.0**14, 0)
    for _ in range(200):
        scale.update(tf.constant(False))
    assert scale.scale.numpy() == 1 and bool(scale.is_lowest())
    scale.finite_steps.assign(loss_scale.GROW_EVERY - 2)
    values = []
    for finite in (True, True, True):
        scale.update(tf.constant(finite))
        values.append((scale.scale.numpy(), scale.finite_steps.numpy()))
    assert values == [(1, loss_scale.GROW_EVERY - 1), (2, 0), (2, 1)]
    scale.scale.assign(2.0**24)
    scale.finite_steps.assign(loss_scale.GROW_EVERY - 1)
    scale.update(tf.constant(True))
    assert scale.scale.numpy() == 2.0**24


class Overflowing(DiffusionModel):
    """A gradient of 1e10 times itself, which float16 does not hold, in the first `bad_steps` steps."""

    bad_steps = 0

    def loss_and_gradient(self, images, labels, index, step, scale):
        huge = tf.where(tf.cast(step, tf.int32) < self.bad_steps, 1e30, 1.0)
        return super().loss_and_gradient(images, labels, index, step, scale * huge)


class NaNForward(DiffusionModel):
    """A loss that no smaller scale can cure."""

    def loss_and_gradient(self, images, labels, index, step, scale):
        loss, *others = super().loss_and_gradient(images, labels, index, step, scale)
        return loss * math.nan, *others


@pytest.mark.slow
def test_a_loss_that_is_not_finite_counts_whatever_the_scale():
    model = make(dtype="mixed_float16", cls=NaNForward, max_skipped_steps=2, size=4, ch=32)
    fit(model, 3, batch_size=2)
    assert (model.skipped.total.numpy(), model.skipped.in_a_row.numpy()) == (2, 2)
    assert model.loss_scale.scale.numpy() > 1


@pytest.mark.slow
def test_two_hundred_overflows_leave_the_scale_at_its_floor_and_the_weights_finite():
    model = make(dtype="mixed_float16", cls=Overflowing, max_skipped_steps=1000, size=4, ch=32)  # float16 is slow here
    model.bad_steps = 200
    before = [v.numpy() for v in model.network.variables]
    fit(model, 200, batch_size=2)
    assert model.loss_scale.scale.numpy() == 1.0 and model.skipped.total.numpy() == 200
    assert model.skipped.in_a_row.numpy() == 200 - 15  # 2^15 halvings were cures, not failures
    for v, old in zip(model.network.variables, before, strict=True):
        np.testing.assert_array_equal(v.numpy(), old)
    model.bad_steps = 0
    model.compile(make_optimizer(learning_rate=1e-3, warmup_steps=0))
    model.make_train_function(force=True)
    fit(model, 3, batch_size=2)
    assert model.skipped.in_a_row.numpy() == 0
    assert all(np.isfinite(v.numpy()).all() for v in (*model.network.variables, *model.ema_network.variables))
    assert any((v.numpy() != old).any() for v, old in zip(model.network.variables, before, strict=True))


def test_settings_that_cannot_be_are_refused():
    config = tiny_config()
    config.train.precision = "float8"
    with pytest.raises(InputError, match="train.precision must be one of .*found 'float8'"):
        config_lib.validate(config)
    config = tiny_config()
    config.train.micro_batches = 3
    with pytest.raises(InputError, match="not divisible by the 1 replicas times train.micro_batches=3; use 6 or 9"):
        builders.build_model(config, tf.distribute.get_strategy())


def test_quarters_are_means_over_their_timesteps():
    t = tf.constant([0, 24, 25, 99, 98])
    loss = tf.constant([1.0, 3.0, 5.0, 7.0, 9.0])
    x = tf.random.stateless_normal((5, 4, 4, 1), (1, 2))
    sums = diagnostics.quarter_sums(DIFFUSION, x, loss, x_0=tf.clip_by_value(x, -1, 1), x_t=x, t=t)
    logs = diagnostics.quarter_logs(sums)
    np.testing.assert_allclose([logs[f"loss_q{k}"] for k in (1, 2, 4)], [2, 5, 8])
    assert np.isnan(logs["loss_q3"]) and np.isnan(logs["bound_q3"])
    from ddpm_tf.diffusion.losses import vb_terms_bpd

    bound = vb_terms_bpd(DIFFUSION, x, x_0=tf.clip_by_value(x, -1, 1), x_t=x, t=t, clip=True).numpy()
    np.testing.assert_allclose([logs[f"bound_q{k}"] for k in (1, 2, 4)], [bound[:2].mean(), bound[2], bound[3:].mean()])


def test_the_age_of_the_average_is_the_mean_age_of_what_it_holds():
    decay, n = 0.9, 7
    ages, average = np.arange(n + 1)[::-1], np.eye(n + 1)[0]  # which step's weights the average holds, by share
    for k in range(1, n + 1):
        average = decay * average + (1 - decay) * np.eye(n + 1)[k]
    np.testing.assert_allclose(diagnostics.ema_age(n, decay), average @ ages, rtol=1e-6)


def test_the_norm_of_the_weights_is_their_root_mean_square():
    variables = UNet((8, 8, 1), ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=()).variables
    flat = np.concatenate([v.numpy().ravel() for v in variables])
    np.testing.assert_allclose(
        diagnostics.weight_rms(variables), np.sqrt((flat.astype(np.float64) ** 2).mean()), rtol=1e-5
    )
