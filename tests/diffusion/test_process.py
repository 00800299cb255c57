import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf.diffusion.prediction import PREDICTIONS
from ddpm_tf.diffusion.process import GaussianDiffusion, dynamically_thresholded
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.diffusion.variance import VARIANCES
from ddpm_tf.errors import InputError

ORIGINAL_NAMES = {"eps": "eps", "x_0": "xstart", "x_prev": "xprev"}
FIXED = {"fixed_large": "fixedlarge", "fixed_small": "fixedsmall"}
FLOAT32 = 2e-5


def test_q_sample_and_posterior_match_the_original(reference):
    diffusion, t = reference.diffusion(), reference["t"]
    np.testing.assert_allclose(
        diffusion.q_sample(reference["x0"], t, reference["eps"]), reference["q_sample"], atol=FLOAT32
    )
    mean, log_variance = diffusion.q_posterior(reference["x0"], reference["x_t"], t)
    np.testing.assert_allclose(mean, reference["q_posterior_mean"], atol=FLOAT32)
    np.testing.assert_allclose(log_variance, reference["q_posterior_log_variance"], atol=FLOAT32)
    variance = diffusion.schedule.posterior_variance[t]
    np.testing.assert_allclose(variance, reference["q_posterior_variance"].ravel(), atol=FLOAT32)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", sorted(FIXED))
@pytest.mark.parametrize("prediction", sorted(ORIGINAL_NAMES))
def test_p_mean_variance_matches_the_original(reference, prediction, variance, clip):
    diffusion = reference.diffusion(prediction=prediction, variance=variance)
    p = diffusion.p_mean_variance(reference["unet_out"], reference["x_t"], reference["t"], clip=clip)
    prefix = f"p_{ORIGINAL_NAMES[prediction]}_{FIXED[variance]}_clip{int(clip)}"
    np.testing.assert_allclose(p.mean, reference[f"{prefix}_mean"], atol=FLOAT32)
    np.testing.assert_allclose(p.x_0, reference[f"{prefix}_pred_xstart"], atol=FLOAT32)
    log_variance = np.broadcast_to(p.log_variance, p.mean.shape)
    np.testing.assert_allclose(log_variance, reference[f"{prefix}_log_variance"], atol=FLOAT32)
    # At t = 0 the original's variance is the table's own, not exp(log_variance).
    schedule = diffusion.schedule
    table = {"fixed_large": schedule.betas, "fixed_small": schedule.posterior_variance}[variance]
    np.testing.assert_allclose(table[reference["t"]], reference[f"{prefix}_variance"][:, 0, 0, 0], atol=FLOAT32)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", sorted(ORIGINAL_NAMES))
def test_learned_variance_matches_the_original(reference, prediction, clip):
    diffusion = reference.diffusion(prediction=prediction, variance="learned")
    channels = reference.args["C"]
    output = reference.output(out_channels=2 * channels)
    p = diffusion.p_mean_variance(output, reference["x_t"], reference["t"], clip=clip)
    prefix = f"p_{ORIGINAL_NAMES[prediction]}_learned_clip{int(clip)}"
    # Here the network runs too. It agrees to 3e-6, which the way to x_0 multiplies: by up to 9 from eps, 30 from x_prev.
    schedule = diffusion.schedule
    factor = {"eps": schedule.sqrt_recipm1_alphas_cumprod.max(), "x_prev": 1 / schedule.posterior_mean_coef1.min()}
    tolerance = max(FLOAT32, 3e-6 * factor.get(prediction, 1))
    np.testing.assert_allclose(p.mean, reference[f"{prefix}_mean"], atol=FLOAT32)
    np.testing.assert_allclose(p.x_0, reference[f"{prefix}_pred_xstart"], atol=tolerance)
    np.testing.assert_allclose(p.log_variance, reference[f"{prefix}_log_variance"], atol=FLOAT32)
    np.testing.assert_allclose(np.exp(p.log_variance), reference[f"{prefix}_variance"], atol=FLOAT32, rtol=1e-5)


def test_the_older_class_of_the_release_matches_the_original(reference):
    diffusion = reference.diffusion(variance="fixed_small_floored")
    p = diffusion.p_mean_variance(reference["unet_out"], reference["x_t"], reference["t"])
    np.testing.assert_allclose(p.mean, reference["d1_p_mean"], atol=FLOAT32)
    np.testing.assert_allclose(p.log_variance, reference["d1_p_logvar"], atol=FLOAT32)
    variance = diffusion.schedule.posterior_variance[reference["t"]]
    np.testing.assert_allclose(variance, reference["d1_p_var"].ravel(), atol=FLOAT32)
    assert float(p.log_variance[0, 0, 0, 0]) == np.float32(np.log(1e-20))  # the first example has t = 0


def test_learned_range_spans_posterior_variance_to_beta():
    """Improved DDPM Eq. 15: raw -1 gives the posterior's log-variance, 1 gives log(beta), 0 the middle."""
    schedule = Schedule(make_betas("linear", 1000))
    diffusion = GaussianDiffusion(schedule, variance="learned_range")
    x_t, t = tf.zeros([3, 1, 1, 1]), tf.constant([0, 10, 999])
    for raw, of_beta in ((-1.0, 0.0), (1.0, 1.0), (0.0, 0.5)):
        output = tf.concat([x_t, tf.fill([3, 1, 1, 1], raw)], axis=-1)
        low, high = schedule.posterior_log_variance_clipped[t], np.log(schedule.betas[t])
        log_variance = diffusion.p_mean_variance(output, x_t, t).log_variance
        np.testing.assert_allclose(log_variance[:, 0, 0, 0], of_beta * high + (1 - of_beta) * low, rtol=1e-6)


def test_learned_variance_says_nothing_about_a_shorter_chain():
    schedule = Schedule(make_betas("linear", 1000))
    with pytest.raises(InputError, match="train with 'learned_range'"):
        GaussianDiffusion(schedule, variance="learned").respace(range(0, 1000, 10))
    assert GaussianDiffusion(schedule, variance="learned_range").respace(range(0, 1000, 10)).num_timesteps == 100


@pytest.mark.parametrize("variance", ["fixed_large", "learned"])
def test_an_output_of_other_channels_is_refused(variance):
    diffusion = GaussianDiffusion(Schedule(make_betas("linear", 1000)), variance=variance)
    with pytest.raises(InputError, match="output channels for images of 2, found 3"):
        diffusion.p_mean_variance(tf.zeros([1, 4, 4, 3]), tf.zeros([1, 4, 4, 2]), tf.constant([0]))


def test_q_posterior_matches_bayes_rule():
    """q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add, means are weighted by them."""
    s = Schedule(make_betas("linear", 1000))
    prior_mean_of_x_0, prior_variance = np.sqrt(s.alphas_cumprod_prev[1:]), 1 - s.alphas_cumprod_prev[1:]
    precision = s.alphas[1:] / s.betas[1:] + 1 / prior_variance
    np.testing.assert_allclose(s.posterior_variance[1:], 1 / precision, rtol=1e-9)
    np.testing.assert_allclose(s.posterior_mean_coef1[1:], prior_mean_of_x_0 / prior_variance / precision, rtol=1e-9)
    np.testing.assert_allclose(s.posterior_mean_coef2[1:], np.sqrt(s.alphas[1:]) / s.betas[1:] / precision, rtol=1e-9)


def test_the_mean_of_eq_11_is_the_posterior_mean():
    """(x_t - beta / sqrt(1 - abar) eps) / sqrt(alpha) = coef1 x_0(eps) + coef2 x_t, for all x_t and eps."""
    s = Schedule(make_betas("linear", 1000))
    of_x_t = s.posterior_mean_coef1 * s.sqrt_recip_alphas_cumprod + s.posterior_mean_coef2
    of_eps = -s.posterior_mean_coef1 * s.sqrt_recipm1_alphas_cumprod
    np.testing.assert_allclose(of_x_t, 1 / np.sqrt(s.alphas), rtol=1e-10)
    np.testing.assert_allclose(of_eps, -s.betas / np.sqrt(1 - s.alphas_cumprod) / np.sqrt(s.alphas), rtol=1e-9)


@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
def test_a_perfect_output_gives_back_x_0_and_eps(prediction, steps):
    trained = GaussianDiffusion(Schedule(make_betas("linear", 1000)), prediction=prediction)
    rng = np.random.Generator(np.random.PCG64(0))
    x_0 = tf.constant(rng.uniform(-1, 1, (4, 4, 4, 3)), tf.float32)
    eps = tf.constant(rng.standard_normal((4, 4, 4, 3)), tf.float32)
    diffusion = trained.respace(np.arange(0, 1000, 1000 // steps))
    i = tf.constant([0, 1, steps // 4, steps // 2])
    t = tf.gather(diffusion.schedule.timesteps.astype(np.int32), i)
    x_t = trained.q_sample(x_0, t, eps)
    output = PREDICTIONS[prediction].target(trained, x_0, x_t, t, eps)
    p = diffusion.p_mean_variance(output, x_t, i)
    # x_prev divides by posterior_mean_coef1, which is small: 1e-4 * 250 float32 roundings
    np.testing.assert_allclose(p.x_0, x_0, atol=2e-3 if prediction == "x_prev" else 2e-5)
    np.testing.assert_allclose(p.eps, eps, atol=2e-3)  # 1 / sqrt(1 - abar) = 100 at t = 0
    np.testing.assert_allclose(p.mean, diffusion.q_posterior(x_0, x_t, i)[0], atol=2e-4)


def test_v_is_a_rotation_of_x_0_and_eps():
    diffusion = GaussianDiffusion(Schedule(make_betas("linear", 1000)), prediction="v")
    x_0, eps, t = np.full((1, 1, 1, 1), 0.3, np.float32), np.full((1, 1, 1, 1), -0.7, np.float32), [400]
    abar = diffusion.schedule.alphas_cumprod[400]
    v = PREDICTIONS["v"].target(diffusion, tf.constant(x_0), None, tf.constant(t), tf.constant(eps))
    np.testing.assert_allclose(v, np.sqrt(abar) * eps - np.sqrt(1 - abar) * x_0, rtol=1e-6)


def test_clipping_is_the_default_and_can_be_left_out():
    x_t, output, t = tf.fill([1, 2, 2, 1], 3.0), tf.zeros([1, 2, 2, 1]), tf.constant([500])
    diffusion = GaussianDiffusion(Schedule(make_betas("linear", 1000)))
    largest = [float(tf.reduce_max(diffusion.p_mean_variance(output, x_t, t, **c).x_0)) for c in ({}, {"clip": False})]
    assert largest[0] == 1 < largest[1]


def test_fixed_large_and_small_bracket_the_optimum():
    schedule = Schedule(make_betas("linear", 1000))
    t = np.arange(1000)
    large, small = (VARIANCES[v].log_variance(schedule, None, t, 1).numpy() for v in ("fixed_large", "fixed_small"))
    np.testing.assert_allclose(large[1:], np.log(schedule.betas[1:]), rtol=1e-6)
    assert (large[1:] > small[1:]).all() and large[0] == small[0]


@pytest.mark.parametrize("kwargs", [{"prediction": "score"}, {"variance": "fixed"}])
def test_unknown_names_list_the_known_ones(kwargs):
    name = next(iter(kwargs))
    with pytest.raises(InputError, match=f"Unknown {name} .*expected one of"):
        GaussianDiffusion(Schedule(make_betas("linear", 1000)), **kwargs)


def test_eps_is_refused_where_float32_holds_no_way_back_to_x_0():
    for betas in (make_betas("linear_scaled", 20), np.full(200, 0.6), np.full(1000, 0.999)):
        with pytest.raises(InputError, match="This chain ends at alphas_cumprod = .*Use prediction 'x_0' or 'v'") as e:
            GaussianDiffusion(Schedule(betas))
        assert "jsd" not in str(e.value)  # which is another schedule
        GaussianDiffusion(Schedule(betas), prediction="v")
    GaussianDiffusion(Schedule(np.full(200, 0.5)))  # 1e-60: its inverse root is 1e30


def test_eps_is_refused_where_no_signal_is_left():
    schedule = Schedule(make_betas("jsd", 100))
    with pytest.raises(InputError, match="Use prediction 'x_0' or 'v'"):
        GaussianDiffusion(schedule)
    p = GaussianDiffusion(schedule, prediction="v").p_mean_variance(tf.ones([1, 1, 1, 1]), tf.ones([1, 1, 1, 1]), [99])
    assert all(np.isfinite(v).all() for v in p)


@pytest.mark.parametrize("quantile", [0.3, 0.9, 0.995, 1.0])
def test_dynamic_thresholding_is_imagens(quantile):
    """Clipped to the quantile of each image's absolute values, if that is above 1, and divided by it."""
    x_0 = np.random.Generator(np.random.PCG64(0)).normal(0, [[[[0.3]]], [[[1.5]]], [[[40.0]]]], (3, 5, 4, 3))
    limit = np.maximum(np.quantile(np.abs(x_0).reshape(3, -1), quantile, axis=1), 1)[:, None, None, None]
    expected = np.clip(x_0, -limit, limit) / limit
    np.testing.assert_allclose(dynamically_thresholded(tf.constant(x_0, tf.float32), quantile), expected, atol=1e-5)
    one = tf.constant([[[[3.0]]], [[[-0.5]]]])
    np.testing.assert_allclose(dynamically_thresholded(one, quantile), [[[[1.0]]], [[[-0.5]]]])


def test_a_shift_of_eps_moves_x_0_before_it_is_clipped():
    diffusion = GaussianDiffusion(Schedule(make_betas("linear", 100)))
    r = np.random.Generator(np.random.PCG64(1))
    x_t, output, shift = (tf.constant(r.standard_normal((2, 3, 3, 1)), tf.float32) for _ in range(3))
    t = tf.constant([3, 90])
    for clip in (True, False):
        shifted = diffusion.p_mean_variance(output, x_t, t, clip, eps_shift=shift)
        plain = diffusion.p_mean_variance(output + shift, x_t, t, clip)
        for a, b in zip(shifted, plain, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_kept", [100, 10])
def test_a_shift_of_0_changes_nothing_and_a_shift_moves_the_mean_by_the_posteriors_coefficient(num_kept):
    """Also where the mean is predicted directly: x_prev, over the whole chain."""
    diffusion = GaussianDiffusion(Schedule(make_betas("linear", 100)), prediction="x_prev")
    diffusion = diffusion.respace(np.arange(0, 100, 100 // num_kept))
    r = np.random.Generator(np.random.PCG64(1))
    x_t, output, shift = (tf.constant(r.standard_normal((2, 3, 3, 1)), tf.float32) for _ in range(3))
    t = tf.constant([2, 7])
    plain, zero, shifted = (
        diffusion.p_mean_variance(output, x_t, t, False, eps_shift=s) for s in (None, tf.zeros_like(shift), shift)
    )
    for a, b in zip(plain, zero, strict=True):
        np.testing.assert_array_equal(a, b)
    coef = diffusion.schedule.posterior_mean_coef1[t.numpy()][:, None, None, None]
    moved = (shifted.x_0 - plain.x_0).numpy()
    assert np.abs(moved).max() > 1e-3
    np.testing.assert_allclose(shifted.mean - plain.mean, coef * moved, atol=1e-4 * np.abs(moved).max())
