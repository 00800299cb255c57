import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf.diffusion import losses
from ddpm_tf.diffusion.gaussian import discretized_gaussian_log_likelihood, normal_kl
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.errors import InputError
from tests.conftest import Reference

PREDICTIONS = {"eps": "eps", "x_0": "xstart", "x_prev": "xprev"}
VARIANCES = {"fixed_large": "fixedlarge", "fixed_small": "fixedsmall", "learned": "learned"}
SCHEDULE = Schedule(make_betas("linear", 1000))


# The likelihood at t = 0 takes the mass of a bin as a difference of two float32 numbers near 1: in the tails a change
# of the network's output by 1e-7 moves it by 5e-5, relative, here and in the original (shown below).
LIKELIHOOD_RTOL = 1e-4


def assert_matches(value, expected, t):
    value, at_0 = value.numpy(), t == 0
    np.testing.assert_allclose(value[~at_0], expected[~at_0], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(value[at_0], expected[at_0], rtol=LIKELIHOOD_RTOL)


def at_q_sample(reference, variance):
    """The arguments of a loss, at x_t = q_sample(x_0, t, eps)."""
    channels = 2 * reference.args["C"] if variance == "learned" else None
    x_t = reference["q_sample"]
    return reference.output("q_sample", channels), {"x_0": reference["x0"], "x_t": x_t, "t": reference["t"]}


@pytest.mark.parametrize("variance", sorted(VARIANCES))
@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
def test_losses_match_the_original(reference, prediction, variance):
    diffusion = reference.diffusion(prediction=prediction, variance=variance)
    output, args = at_q_sample(reference, variance)
    name = f"{PREDICTIONS[prediction]}_{VARIANCES[variance]}"
    bound = losses.vb_terms_bpd(diffusion, output, clip=True, **args)
    assert_matches(bound, reference[f"vb_{name}"], reference["t"])
    args["eps"] = reference["eps"]
    assert_matches(losses.vlb(diffusion, output, **args), reference[f"loss_{name}_kl"], reference["t"])
    if variance != "learned":
        mse = losses.simple(diffusion, output, **args)
        np.testing.assert_allclose(mse, reference[f"loss_{name}_mse"], atol=2e-5, rtol=1e-5)


def test_the_likelihood_in_the_tails_is_as_sensitive_as_its_tolerance_says():
    """Rounding noise of 1e-7 on the output alone moves the term at t = 0 by more than 1e-5 of it."""
    reference = Reference("ho2020_b")
    diffusion = reference.diffusion(prediction="x_0")
    output, args = at_q_sample(reference, "fixed_large")
    noise = np.random.Generator(np.random.PCG64(0)).standard_normal((8, *output.shape)).astype(np.float32) * 1e-7
    terms = np.array([losses.vb_terms_bpd(diffusion, output + n, clip=True, **args)[0] for n in noise])
    assert 1e-5 < np.ptp(terms) / terms.mean() < LIKELIHOOD_RTOL


def test_prior_and_likelihood_match_the_original(reference):
    np.testing.assert_allclose(
        losses.prior_bpd(reference.diffusion(), reference["x0"]), reference["prior_bpd"], rtol=1e-5
    )
    likelihood = discretized_gaussian_log_likelihood(
        reference["dg_x"], mean=reference["dg_mean"], log_scale=reference["dg_log_scale"]
    )
    # Far from the mean a mass of 1e-9 is a difference of two numbers near 1, known to 6e-8.
    np.testing.assert_allclose(likelihood, reference["dg_loglik"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_the_bound_is_eq_12(t):
    """In nats: KL = constant + beta^2 / (2 sigma^2 alpha (1 - abar)) |eps - eps_theta|^2, fixed variance."""
    rng = np.random.Generator(np.random.PCG64(0))
    x_0, eps, error = (rng.standard_normal((1, 4, 4, 1)) for _ in range(3))
    s = SCHEDULE
    abar, alpha, beta = s.alphas_cumprod[t], s.alphas[t], s.betas[t]
    x_t = np.sqrt(abar) * x_0 + np.sqrt(1 - abar) * eps
    true_mean = s.posterior_mean_coef1[t] * x_0 + s.posterior_mean_coef2[t] * x_t
    guess = (x_t - np.sqrt(1 - abar) * (eps + error)) / np.sqrt(abar)
    mean = s.posterior_mean_coef1[t] * guess + s.posterior_mean_coef2[t] * x_t
    sigma_squared, true_variance = beta, s.posterior_variance[t]
    kl = 0.5 * (-1 + np.log(sigma_squared / true_variance) + true_variance / sigma_squared)
    kl = kl + 0.5 * (true_mean - mean) ** 2 / sigma_squared
    constant = 0.5 * (-1 + np.log(sigma_squared / true_variance) + true_variance / sigma_squared)
    eq_12 = constant + beta**2 / (2 * sigma_squared * alpha * (1 - abar)) * error**2
    np.testing.assert_allclose(kl, eq_12, rtol=1e-9)
    ours = losses.vb_terms_bpd(
        GaussianDiffusion(s),
        tf.constant(eps + error, tf.float32),
        x_0=tf.constant(x_0, tf.float32),
        x_t=tf.constant(x_t, tf.float32),
        t=tf.constant([t]),
        clip=False,
    )
    # float32: at t = 999 x_0 is eps times 1 / sqrt(abar) = 158
    np.testing.assert_allclose(ours * np.log(2), [eq_12.mean()], rtol=2e-3)


def test_kl_is_not_negative_and_zero_for_equals():
    rng = np.random.Generator(np.random.PCG64(0))
    m1, v1, m2, v2 = rng.standard_normal((4, 1000))
    kl = normal_kl(tf.constant(m1), tf.constant(v1), tf.constant(m2), tf.constant(v2)).numpy()
    assert (kl >= 0).all()
    np.testing.assert_allclose(normal_kl(m1, tf.constant(v1), m1, tf.constant(v1)), 0, atol=1e-12)
    # against the integral
    x = np.linspace(-60, 60, 200_001)
    for k in range(3):
        log_p, log_q = (
            -0.5 * ((x - m) ** 2 / np.exp(v) + v + np.log(2 * np.pi)) for m, v in ((m1[k], v1[k]), (m2[k], v2[k]))
        )
        np.testing.assert_allclose(kl[k], np.trapezoid(np.exp(log_p) * (log_p - log_q), x), rtol=1e-6)


@pytest.mark.parametrize("log_scale", [-6.0, -3.0, 0.0])
@pytest.mark.parametrize("mean", [-1.3, 0.1, 0.7])
def test_the_256_bins_sum_to_one(mean, log_scale):
    x = tf.constant(np.arange(256) / 127.5 - 1, tf.float64)
    total = np.exp(
        discretized_gaussian_log_likelihood(x, mean=mean, log_scale=tf.constant(log_scale, tf.float64))
    ).sum()
    np.testing.assert_allclose(total, 1, atol=1e-6)  # each empty bin counts as 1e-12


def random_batch(channels):
    rng = np.random.Generator(np.random.PCG64(1))
    x_0, eps, output = (tf.constant(rng.standard_normal((3, 4, 4, c)), tf.float32) for c in (2, 2, channels))
    t = tf.constant([0, 20, 999])
    return output, {"x_0": x_0, "x_t": GaussianDiffusion(SCHEDULE).q_sample(x_0, t, eps), "t": t, "eps": eps}


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_the_bound_of_the_hybrid_does_not_reach_the_mean(variance):
    diffusion = GaussianDiffusion(SCHEDULE, variance=variance)
    output, args = random_batch(4)
    gradients = []
    for loss in (losses.hybrid, losses.simple):
        with tf.GradientTape() as tape:
            tape.watch(output)
            total = tf.reduce_sum(loss(diffusion, output, **args))
        gradients.append(tape.gradient(total, output))
    hybrid, simple = gradients
    np.testing.assert_array_equal(hybrid[..., :2], simple[..., :2])
    assert np.all(hybrid[1:, ..., 2:] != 0) and not np.any(simple[..., 2:])
    bound = losses.vlb(diffusion, output, **args)
    expected = losses.simple(diffusion, output, **args) + 0.001 * 1000 * bound
    np.testing.assert_allclose(losses.hybrid(diffusion, output, **args), expected, rtol=1e-6)


def test_loss_weights_are_the_published_ones():
    snr = SCHEDULE.alphas_cumprod / (1 - SCHEDULE.alphas_cumprod)
    expected = {
        ("snr", "eps"): np.ones(1000),
        ("snr", "x_0"): snr,
        ("snr", "v"): snr / (snr + 1),
        ("min_snr", "eps"): np.minimum(snr, 5) / snr,
        ("min_snr", "x_0"): np.minimum(snr, 5),
        ("min_snr", "v"): np.minimum(snr, 5) / (snr + 1),
        ("p2", "eps"): 1 / (1 + snr),
        ("none", "v"): np.ones(1000),
        ("none", "x_prev"): np.ones(1000),
    }
    for (name, prediction), weights in expected.items():
        diffusion = GaussianDiffusion(SCHEDULE, prediction=prediction)
        np.testing.assert_allclose(losses.loss_weights(diffusion, name), weights, rtol=1e-12)
    # where no signal is left
    for name in ("snr", "min_snr", "p2"):
        diffusion = GaussianDiffusion(Schedule(make_betas("jsd", 100)), prediction="v")
        assert np.isfinite(losses.loss_weights(diffusion, name)).all()


def test_snr_weights_make_every_prediction_the_error_of_eps():
    """The same wrong x_0 costs the same, whatever the network predicts."""
    _, args = random_batch(2)
    wrong_x_0 = args["x_0"] + 0.1
    costs = []
    for prediction in ("eps", "x_0", "v"):
        diffusion = GaussianDiffusion(SCHEDULE, prediction=prediction)
        s, t = SCHEDULE, args["t"]
        abar = tf.constant(s.alphas_cumprod, tf.float32)
        abar = tf.gather(abar, t)[:, None, None, None]
        eps = (args["x_t"] - abar**0.5 * wrong_x_0) / (1 - abar) ** 0.5
        output = {"eps": eps, "x_0": wrong_x_0, "v": abar**0.5 * eps - (1 - abar) ** 0.5 * wrong_x_0}[prediction]
        costs.append(losses.make_loss("simple", diffusion, weight="snr")(diffusion, output, **args))
    np.testing.assert_allclose(costs[1], costs[0], rtol=2e-3)  # 1 - abar = 1e-4 at t = 0, in float32
    np.testing.assert_allclose(costs[2], costs[0], rtol=2e-3)


@pytest.mark.parametrize(
    ("loss", "weight", "variance", "prediction", "message"),
    [
        ("l2", "none", "fixed_large", "eps", "Unknown loss 'l2'"),
        ("simple", "snrr", "fixed_large", "eps", "Unknown loss weight 'snrr'"),
        ("simple", "none", "learned", "eps", "gives a learned variance no gradient; use 'hybrid'"),
        ("simple", "none", "learned_range", "eps", "gives a learned variance no gradient"),
        ("hybrid", "none", "fixed_small", "eps", "trains only a learned variance"),
        ("vlb", "min_snr", "fixed_small", "eps", "applies to loss 'simple', not to 'vlb'"),
        ("simple", "min_snr", "fixed_small", "x_prev", "not for 'x_prev'"),
    ],
)
def test_combinations_that_make_no_sense_are_refused_with_the_reason(loss, weight, variance, prediction, message):
    diffusion = GaussianDiffusion(SCHEDULE, variance=variance, prediction=prediction)
    with pytest.raises(InputError, match=message):
        losses.make_loss(loss, diffusion, weight=weight)
