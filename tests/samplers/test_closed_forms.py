"""Solvers, guidance and RePaint against closed forms."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.optimize import brentq
from scipy.stats import norm

from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.samplers import guided_by, make_sampler, sample
from ddpm_tf.samplers.base import initial_noise
from ddpm_tf.samplers.denoiser import make_denoiser
from ddpm_tf.samplers.guidance import classifier_free_output
from ddpm_tf.samplers.loop import begin, run_loop
from tests.samplers.analytic import Analytic, AnalyticClasses, LinearClassifier, Mixture

FINE = Schedule(make_betas("linear_scaled", 20_000))  # rounding to trained timesteps plays no part
SCHEDULE = Schedule(make_betas("linear", 1000))
DIFFUSION = GaussianDiffusion(SCHEDULE)
X_T = np.linspace(-1.5, 1.5, 7)
GAUSSIAN = ([1.0], [0.4], [0.5])
MIXTURE = ([0.3, 0.7], [-0.6, 0.5], [0.25, 0.15])


def exact(x_T, data, abar_from, abar_to):
    """The end of the ODE that begins at x_T: a flow on a line keeps the quantiles."""
    weights, means, deviations = map(np.array, data)

    def cdf(x, abar):
        return weights @ norm.cdf((x - np.sqrt(abar) * means) / np.sqrt(abar * deviations**2 + 1 - abar))

    return np.array([brentq(lambda y, x=x: cdf(y, abar_to) - cdf(x, abar_from), -9, 9, xtol=1e-13) for x in x_T])


@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize(
    ("name", "spacing", "order"), [("ddim", "logsnr", 1), ("dpm_solver", "logsnr", 2), ("heun", "karras", 2)]
)
def test_the_error_of_a_solver_falls_with_its_order(name, spacing, order, data):
    """Up to the last step, which goes from the smallest noise of the chain to none and is the same for all."""
    network, errors, steps = Mixture(FINE, *data), [], (16, 32, 64, 128)
    for num_steps in steps:
        sampler = make_sampler(name, GaussianDiffusion(FINE), num_steps=num_steps, spacing=spacing, clip=False)
        denoise = make_denoiser(network, sampler.diffusion, sampler.denoising)
        x_T = tf.constant(X_T[:, None, None, None], tf.float32)
        run = tf.function(lambda x: run_loop(sampler, denoise, begin(sampler, x), tf.zeros([7], tf.int64), stop=1).x)  # noqa: B023
        abar = sampler.diffusion.schedule.alphas_cumprod
        errors.append(np.sqrt(np.mean((run(x_T).numpy().ravel() - exact(X_T, data, abar[-1], abar[0])) ** 2)))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.25, errors


def test_ddim_with_sigma_hat_is_ancestral_sampling_with_fixed_large_on_the_short_chain():
    network, seeds = Analytic(SCHEDULE, [0.4, -0.2], [[0.3, 0.1], [0.1, 0.2]]), [1, 2, 3]
    for num_steps in (1, 7, 1000):
        hat = make_sampler("ddim", DIFFUSION, num_steps=num_steps, sigma_hat=True)
        large = make_sampler("ddpm", DIFFUSION, num_steps=num_steps)
        np.testing.assert_allclose(sample(network, hat, seeds).images, sample(network, large, seeds).images, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "settings"), [("ddim", {}), ("dpm_solver", {}), ("heun", {}), ("heun", {"churn": 20.0})]
)
def test_guidance_tilts_a_gaussian_to_the_closed_forms_mean(name, settings):
    """p_null^(1 - w) p_class^w of two normals of one variance is a normal of that variance, with the mixed mean."""
    null, means, deviation = -0.1, [0.3, 0.6], 0.2
    network = AnalyticClasses(SCHEDULE, null, means, deviation**2)
    sampler = make_sampler(name, DIFFUSION, num_steps=100, spacing="karras", clip=False, **settings)
    labels, weights = np.repeat([0, 1, 0, 1, 1], 500), np.repeat([0.0, 1.0, 2.5, 2.5, -1.0], 500)
    drawn = sample(network, sampler, range(2500), labels=labels, guidance=weights).images.reshape(5, 500)
    expected = [null + w * (means[k] - null) for k, w in ((0, 0.0), (1, 1.0), (0, 2.5), (1, 2.5), (1, -1.0))]
    np.testing.assert_allclose(drawn.mean(1), expected, atol=5 * deviation / np.sqrt(500))
    np.testing.assert_allclose(drawn.std(1), deviation, rtol=0.15)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver", "heun"])
def test_a_classifier_tilts_a_gaussian_to_the_closed_forms_mean(name):
    """N(mean, s^2) exp(scale kappa x) is N(mean + scale kappa s^2, s^2); the null class and scale 0 tilt nothing."""
    mean, deviation, kappa = 0.1, 0.3, 2.0
    network = guided_by(Analytic(SCHEDULE, mean, deviation**2), LinearClassifier(SCHEDULE, deviation, kappa))
    sampler = make_sampler(name, DIFFUSION, num_steps=100, spacing="karras", clip=False)
    labels, scales = np.repeat([0, 0, 0, 2], 500), np.repeat([0.0, 1.0, 3.0, 3.0], 500)
    drawn = sample(network, sampler, range(2000), labels=labels, classifier_scale=scales).images.reshape(4, 500)
    expected = mean + np.array([0.0, 1.0, 3.0, 0.0]) * kappa * deviation**2
    np.testing.assert_allclose(drawn.mean(1), expected, atol=5 * deviation / np.sqrt(500))


def test_guidance_holds_in_its_interval_alone():
    """Of 10 steps, those from 3 to 5: by hand, step by step, with weight 3 inside and 1 outside."""
    network = AnalyticClasses(SCHEDULE, -0.5, [0.5], 0.1)
    parts = {w: make_sampler("ddim", DIFFUSION, num_steps=10, clip=False) for w in (1.0, 3.0)}
    sampler = make_sampler("ddim", DIFFUSION, num_steps=10, clip=False, guidance_first=3, guidance_last=5)
    drawn = sample(network, sampler, [1, 2], labels=0, guidance=3.0).images
    carry = begin(parts[1.0], initial_noise([1, 2], (1, 1, 1)))
    for step in range(1, 11):
        one = parts[3.0 if 3 <= step <= 5 else 1.0]
        weight = 3.0 if 3 <= step <= 5 else 1.0
        denoise = make_denoiser(
            network, one.diffusion, one.denoising, labels=tf.constant([0, 0]), guidance=tf.fill([2], weight)
        )
        carry = run_loop(one, denoise, carry, tf.constant([1, 2], tf.int64), start=11 - step, stop=10 - step)
    np.testing.assert_allclose(drawn, carry.x, atol=1e-5)
    everywhere = sample(network, parts[3.0], [1, 2], labels=0, guidance=3.0).images
    assert abs(drawn - everywhere).max() > 0.1


def test_repaint_fills_in_a_correlated_gaussian_with_its_conditional_moments():
    """One of two values is known; the other is then N(rho known, (1 - rho^2) variance).

    RePaint only approaches that: it needs short jumps and many of them. Here 3 % of the mean are left.
    """
    rho, deviation, known = 0.8, 0.4, 0.5
    network = Analytic(SCHEDULE, [0.0, 0.0], deviation**2 * np.array([[1, rho], [rho, 1]]))

    def draw(num_resamples):
        sampler = make_sampler(
            "repaint", DIFFUSION, num_steps=100, clip=False, jump_length=1, num_resamples=num_resamples
        )
        sampler = sampler.with_known(np.array([known, 9.0])[None, :, None], np.array([[True, False]]))
        assert sampler.num_evaluations == 100 + 99 * (num_resamples - 1)
        drawn = sample(network, sampler, range(2000)).images[:, 0, :, 0]
        np.testing.assert_allclose(drawn[:, 0], known, atol=1e-6)
        return drawn[:, 1]

    filled_in = draw(40)
    assert abs(filled_in.mean() - rho * known) < 0.025
    np.testing.assert_allclose(filled_in.std(), deviation * np.sqrt(1 - rho**2), rtol=0.05)
    assert abs(draw(1).mean() - rho * known) > 0.05  # without jumps the known value is heard too late


def test_rescaled_guidance_has_the_conditional_deviation():
    """Lin et al. 2023, Eqs. 15 and 16; a learned variance is the conditional one's."""

    class Network:
        num_classes = 2

        def __call__(self, inputs, training=False):
            scale = tf.constant([1.0, 2.0, 5.0])
            of_label = tf.gather(scale, inputs["labels"])[:, None, None, None]
            return tf.concat([of_label * inputs["x_t"], of_label * tf.ones_like(inputs["x_t"])], axis=-1)

    x = tf.constant(np.random.Generator(np.random.PCG64(0)).standard_normal((2, 4, 4, 1)), tf.float32)
    inputs = {"x_t": x, "labels": tf.constant([0, 1])}
    weight = tf.constant([3.0, 0.5])
    plain, half, full = (classifier_free_output(Network(), inputs, weight, rescale=r).numpy() for r in (0.0, 0.5, 1.0))
    np.testing.assert_allclose(full[..., 0].std((1, 2)), [1, 2] * x.numpy()[..., 0].std((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(half, (plain + full) / 2, atol=1e-5)
    np.testing.assert_allclose(
        plain[..., :1], (5 + weight * ([1, 2] - np.float32(5)))[:, None, None, None] * x, atol=1e-4
    )
    for output in (plain, half, full):
        np.testing.assert_array_equal(
            output[..., 1:], np.broadcast_to(np.float32([1, 2])[:, None, None, None], x.shape)
        )
    at_0 = classifier_free_output(Network(), inputs, tf.zeros([2])).numpy()
    np.testing.assert_allclose(at_0, np.concatenate([5 * x, np.full_like(x, 5)], -1))  # all of it is the null class's
