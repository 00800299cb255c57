import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.errors import InputError
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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": [1]}, r"seeds have the shape \[1\]; expected \[2\]"),
        ({"seeds": 1}, "seeds have the shape"),
        ({"seeds": [0.5, 1.0]}, "must be an integer, found 0.5"),
        ({"seeds": [1, 2**63]}, "seeds hold 9223372036854775808"),
        ({"x_0": np.zeros((2, 4, 4, 1), np.uint8)}, "x_0 must be float32 .* found uint8"),
        ({"x_0": np.zeros((4, 4, 1), np.float32)}, "x_0 must be float32"),
        ({"x_0": np.full((2, 4, 4, 1), 255, np.float32)}, "The values of x_0 must be within -1..1; they hold 255"),
        ({"x_0": np.full((2, 4, 4, 1), np.nan, np.float32)}, "The values of x_0 must be finite"),
    ],
)
def test_a_bound_is_that_of_grey_levels_with_one_seed_each(changed, message):
    diffusion = GaussianDiffusion(Schedule(make_betas("linear", 10)))
    arguments = {"x_0": np.zeros((2, 4, 4, 1), np.float32), "seeds": [1, 2]}
    assert np.isfinite(bits_per_dim(diffusion, lambda x_t, t: x_t, **arguments).total).all()
    with pytest.raises(InputError, match=message):
        bits_per_dim(diffusion, lambda x_t, t: x_t, **arguments | changed)


def test_a_bound_in_a_graph_refuses_seeds_of_another_type_or_number():
    diffusion = GaussianDiffusion(Schedule(make_betas("linear", 10)))
    for seeds in (tf.constant([0.5, 1.0]), tf.constant([1, 2, 3])):
        run = tf.function(lambda x_0, seeds: bits_per_dim(diffusion, lambda x_t, t: x_t, x_0, seeds), autograph=False)
        with pytest.raises(InputError, match="seeds must be one integer per image"):
            run(tf.zeros((2, 4, 4, 1)), seeds)
