import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.evaluation.likelihood import bits_per_dim


@pytest.mark.slow
def test_the_bound_matches_the_original(reference):
    network, table = reference.network(), tf.constant(reference["noise_table"])

    @tf.function
    def run(x_0):
        return bits_per_dim(
            reference.diffusion(),
            lambda x_t, t: network({"x_t": x_t, "t": t}),
            x_0,
            None,
            noise_fn=lambda seeds, t, shape: table[1 + t],
        )

    bound = run(tf.constant(reference["x0"]))
    np.testing.assert_allclose(bound.terms[:, 1:], reference["bpd_terms"][:, 1:], rtol=1e-5, atol=2e-5)
    # the likelihood at t = 0 is float32 noise beyond this, see test_losses
    np.testing.assert_allclose(bound.terms[:, 0], reference["bpd_terms"][:, 0], rtol=1e-4)
    np.testing.assert_allclose(bound.mse, reference["bpd_mse"], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(bound.prior, reference["bpd_prior"], rtol=1e-5)
    rest, expected = bound.total - bound.terms[:, 0], reference["bpd_total"] - reference["bpd_terms"][:, 0]
    np.testing.assert_allclose(rest, expected, rtol=1e-5)
    np.testing.assert_allclose(bound.total, reference["bpd_total"], rtol=5e-5)  # 44 % of it is the term at t = 0


def test_an_image_has_the_same_bound_in_any_batch(reference_f):
    diffusion = reference_f.diffusion()
    x_0 = tf.constant(reference_f["x0"])
    run = tf.function(lambda x_0, seeds: bits_per_dim(diffusion, lambda x_t, t: 0.1 * x_t, x_0, seeds))
    whole, part = run(x_0, tf.constant([1, 2, 3, 4])), run(x_0[2:3], tf.constant([3]))
    np.testing.assert_allclose(whole.total[2], part.total[0], rtol=1e-6)
    assert whole.terms.shape == (4, 40) and len(set(whole.total.numpy())) == 4


def test_a_bound_that_is_not_finite_names_timestep_and_image():
    diffusion = GaussianDiffusion(Schedule(make_betas("linear", 10)))

    def damaged(x_t, t):
        return tf.where(tf.reshape((t == 7) & (tf.range(3) == 1), [-1, 1, 1, 1]), float("nan"), 0.0) + x_t

    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"(?s)not finite at timestep.*7.*by image:.*\[\S+ -?nan \S+\]"
    ):
        bits_per_dim(diffusion, damaged, tf.zeros((3, 4, 4, 1)), tf.range(3, dtype=tf.int64))
