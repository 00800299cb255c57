import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf import rng
from ddpm_tf.errors import InputError


@pytest.mark.parametrize("seed", [0, 5, -1, 2**40 + 7, -(2**63)])
def test_bits_are_those_of_tensorflows_philox(seed):
    index, step, purpose = [7, 8], 9, 5
    ours = rng.bits(seed, 10, purpose=purpose, index=index, step=step).numpy()
    key = tf.bitcast(tf.constant([seed], tf.int64), tf.uint64)
    for row, i in zip(ours, index, strict=True):
        counter = tf.constant([purpose << 32, i | step << 32], tf.uint64)
        theirs = tf.raw_ops.StatelessRandomUniformFullIntV2(
            shape=[12], key=key, counter=counter, alg=1, dtype=tf.uint32
        )
        np.testing.assert_array_equal(row, theirs[:10])


def test_draws_agree_eagerly_in_a_graph_and_under_xla():
    def draw(seeds):
        args = {"purpose": rng.Purpose.NOISE, "step": 3}
        return (
            rng.bits(seeds, 6, **args),
            rng.normal(seeds, (5, 3), **args),
            rng.integers(seeds, 1000, **args),
            rng.bernoulli(seeds, 0.3, (7,), **args),
        )

    seeds = tf.constant([1, -2, 3**30], tf.int64)
    for bits, normal, integers, mask in (
        tf.function(draw)(seeds),
        tf.function(draw, jit_compile=True)(seeds),
    ):
        expected = draw(seeds)
        np.testing.assert_array_equal(bits, expected[0])
        np.testing.assert_allclose(normal, expected[1], atol=5e-7)  # log, sin and cos differ in the last bit
        np.testing.assert_array_equal(integers, expected[2])
        np.testing.assert_array_equal(mask, expected[3])


def test_a_slice_of_the_batch_draws_its_slice():
    whole = rng.normal(4, (8, 8, 1), purpose=1, index=tf.range(16), step=2)
    part = rng.normal(4, (8, 8, 1), purpose=1, index=tf.range(4, 9), step=2)
    np.testing.assert_array_equal(whole[4:9], part)


def test_seed_purpose_index_and_step_each_change_the_draw():
    base = {"purpose": 1, "index": 0, "step": 0}
    draws = [rng.bits(0, 4, **base), rng.bits(1, 4, **base)]
    draws += [rng.bits(0, 4, **{**base, name: 2}) for name in base]
    assert len({tuple(d.numpy()[0]) for d in draws}) == len(draws)


def test_normals_have_normal_moments_and_are_finite():
    z = rng.normal(tf.range(4096, dtype=tf.int64), (64,), purpose=1).numpy().astype(np.float64)
    n = z.size
    assert np.isfinite(z).all() and abs(z).max() < 5.9
    # five standard errors of the first four moments
    for power, moment, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs((z**power).mean() - moment) < 5 * deviation / n**0.5
    assert abs((z[:, :32] * z[:, 32:]).mean()) < 5 / (n / 2) ** 0.5  # the two halves of Box-Muller


def test_integers_and_bernoulli_are_uniform():
    t = rng.integers(tf.range(50_000, dtype=tf.int64), 10, purpose=1).numpy()
    assert t.min() == 0 and t.max() == 9
    assert (abs(np.bincount(t) - 5000) < 5 * 4500**0.5).all()
    mask = rng.bernoulli(tf.range(100, dtype=tf.int64), 0.1, (1000,), purpose=1).numpy()
    assert abs(mask.mean() - 0.1) < 5 * (0.09 / mask.size) ** 0.5


@pytest.mark.parametrize(
    "seeds", [0.9, [0.9], np.array([1.0]), tf.constant([1.0]), True, None, "1", 2**63, [-(2**63) - 1]]
)
def test_a_seed_is_an_integer_of_64_bits_and_is_not_rounded(seeds):
    with pytest.raises(InputError, match="seeds"):
        rng.bits(seeds, 4, purpose=1)


def test_a_seed_of_any_integer_type_is_the_same_seed():
    expected = rng.bits(7, 4, purpose=1).numpy()
    for seeds in (
        np.int8(7),
        np.array(7, np.uint64),
        [7],
        range(7, 8),
        tf.constant([7], tf.int32),
        tf.constant(7, tf.int64),
    ):
        np.testing.assert_array_equal(rng.bits(seeds, 4, purpose=1), expected)


@pytest.mark.parametrize("place", ["index", "step"])
def test_a_place_in_the_counter_is_a_word_of_32_bits(place):
    rng.bits(0, 4, purpose=1, **{place: 2**32 - 1})
    for value in (-1, 2**32, 0.5, [0, -1], tf.constant(0.5)):
        with pytest.raises(InputError, match=place):
            rng.bits(0, 4, purpose=1, **{place: value})


def test_bounds_and_probabilities_out_of_range_are_refused():
    for bound in (0, 2**31, 2.0):
        with pytest.raises(InputError, match="bound must be"):
            rng.integers(0, bound, purpose=1)
    for probability in (-0.1, 1.1, float("nan"), None):
        with pytest.raises(InputError, match="probability must be"):
            rng.bernoulli(0, probability, (4,), purpose=1)
