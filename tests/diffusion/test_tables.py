"""Every entry of the tables of `diffusion/` keeps its table's promises."""

import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf.diffusion.losses import LOSS_WEIGHTS, LOSSES, loss_weights, make_loss
from ddpm_tf.diffusion.prediction import PREDICTIONS
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import BETA_SCHEDULES, TIMESTEP_SPACINGS, Schedule, make_betas, space_timesteps
from ddpm_tf.diffusion.variance import VARIANCES
from ddpm_tf.errors import InputError

SCHEDULE = Schedule(make_betas("linear", 1000))
RNG = np.random.Generator(np.random.PCG64(0))
X_0, EPS = (tf.constant(RNG.uniform(-1, 1, (4, 2, 2, 1)), tf.float32) for _ in range(2))
T = tf.constant([1, 300, 600, 999])


@pytest.mark.parametrize("name", sorted(BETA_SCHEDULES))
@pytest.mark.parametrize("num_timesteps", [40, 1000])
def test_a_schedule_gives_betas_of_a_chain(name, num_timesteps):
    betas = make_betas(name, num_timesteps)
    assert betas.dtype == np.float64 and betas.shape == (num_timesteps,) and (betas > 0).all() and (betas <= 1).all()
    assert np.all(np.diff(Schedule(betas).alphas_cumprod) < 0)
    for setting, default in BETA_SCHEDULES[name].defaults().items():
        changed = make_betas(name, num_timesteps, **{setting: default * 0.5 if setting != "tau" else 2.0})
        assert not np.array_equal(changed, betas), setting


@pytest.mark.parametrize("spacing", sorted(TIMESTEP_SPACINGS))
def test_a_spacing_visits_ascending_timesteps(spacing):
    for num_timesteps in (1, 2, 10, 1000):
        for num_steps in {1, 2, 3, 7, 250, 333, num_timesteps - 1, num_timesteps} & set(range(1, num_timesteps + 1)):
            abar = Schedule(make_betas("linear", num_timesteps)).alphas_cumprod
            kept = space_timesteps(num_timesteps, num_steps, spacing, alphas_cumprod=abar)
            assert 0 <= kept[0] and kept[-1] < num_timesteps and (np.diff(kept) > 0).all() and len(kept) <= num_steps
            assert spacing in ("quad", "logsnr", "karras") or len(kept) == num_steps
        assert space_timesteps(num_timesteps, 1, spacing).tolist() == [num_timesteps - 1]


def test_guide_is_the_integer_part_of_linspace_and_trailing_where_S_divides_T():
    for num_steps in (10, 30, 250, 999):
        exact = [int(-1 + k * 1000 / num_steps + 1e-9) for k in range(1, num_steps + 1)]
        assert space_timesteps(1000, num_steps, "guide").tolist() == exact
    for num_steps in (10, 250, 1000):
        guide, trailing = (space_timesteps(1000, num_steps, s) for s in ("guide", "trailing"))
        np.testing.assert_array_equal(guide, trailing)
    assert space_timesteps(1000, 30, "guide").tolist() != space_timesteps(1000, 30, "trailing").tolist()


@pytest.mark.parametrize("name", sorted(PREDICTIONS))
def test_a_prediction_leads_back_from_its_target_to_x_0(name):
    diffusion = GaussianDiffusion(SCHEDULE, prediction=name)
    x_t = diffusion.q_sample(X_0, T, EPS)
    target = PREDICTIONS[name].target(diffusion, X_0, x_t, T, EPS)
    np.testing.assert_allclose(PREDICTIONS[name].to_x_0(SCHEDULE, x_t, T, target), X_0, atol=2e-3)


@pytest.mark.parametrize("name", sorted(VARIANCES))
def test_a_variance_broadcasts_and_is_finite(name):
    raw = tf.zeros_like(X_0) if VARIANCES[name].learned else None
    log_variance = VARIANCES[name].log_variance(SCHEDULE, raw, T, 4)
    assert tf.broadcast_static_shape(log_variance.shape, X_0.shape) == X_0.shape
    assert np.isfinite(log_variance).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_a_loss_is_one_number_per_example_or_refused(name, variance):
    diffusion = GaussianDiffusion(SCHEDULE, variance=variance)
    if diffusion.has_learned_variance not in LOSSES[name].variances:
        with pytest.raises(InputError, match="makes no sense with variance"):
            make_loss(name, diffusion)
        return
    x_t = diffusion.q_sample(X_0, T, EPS)
    output = tf.concat([EPS + 0.1] + [EPS] * diffusion.has_learned_variance, axis=-1)
    losses = make_loss(name, diffusion)(diffusion, output, x_0=X_0, x_t=x_t, t=T, eps=EPS)
    assert losses.shape == (4,) and (losses.numpy() > 0).all()


@pytest.mark.parametrize("name", sorted(LOSS_WEIGHTS))
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_a_loss_weight_is_positive_and_moves_with_its_settings(name, prediction):
    diffusion = GaussianDiffusion(SCHEDULE, prediction=prediction)
    weights = loss_weights(diffusion, name)
    assert weights.shape == (1000,) and np.isfinite(weights).all() and (weights > 0).all()
    for setting, default in LOSS_WEIGHTS[name].defaults().items():
        assert not np.array_equal(loss_weights(diffusion, name, **{setting: 2 * default}), weights), setting


def test_the_weights_are_those_of_their_papers():
    diffusion = GaussianDiffusion(SCHEDULE)
    snr = SCHEDULE.alphas_cumprod / (1 - SCHEDULE.alphas_cumprod)
    np.testing.assert_allclose(loss_weights(diffusion, "min_snr", gamma=2.0), np.minimum(snr, 2) / snr)
    np.testing.assert_allclose(loss_weights(diffusion, "p2", k=3.0, gamma=0.5), (3 + snr) ** -0.5)
