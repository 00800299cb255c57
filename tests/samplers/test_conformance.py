"""Every sampler of the table keeps the promises of `samplers/base.py`, with a conditional model that costs nothing."""

import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import TIMESTEP_SPACINGS, Schedule, make_betas
from ddpm_tf.errors import InputError
from ddpm_tf.samplers import SAMPLERS, guided_by, make_sampler, sample
from ddpm_tf.samplers.base import initial_noise
from ddpm_tf.samplers.denoiser import make_denoiser
from ddpm_tf.samplers.drawing import advance, first_carry
from ddpm_tf.samplers.loop import begin, make_move, run_loop
from ddpm_tf.serving.export import check_ops
from tests.conftest import run_chain

T = 60
DIFFUSION = GaussianDiffusion(Schedule(make_betas("linear_scaled", T)))
SHAPE = (4, 4, 2)
# Every sampler at its defaults, and with each of its settings at another value.
VARIANTS = [(name, {}) for name in SAMPLERS] + [
    ("ddim", {"eta": 0.7}),
    ("ddim", {"sigma_hat": True}),
    ("heun", {"churn": 3.0}),
    ("repaint", {"jump_length": 2, "num_resamples": 3}),
]


class Conditional:
    """eps = 0.8 x_t + 0.1 label."""

    image_shape, out_channels, num_classes, variables = SHAPE, 2, 3, ()

    def __call__(self, inputs, training=False):
        return 0.8 * inputs["x_t"] + 0.1 * tf.cast(inputs["labels"], tf.float32)[:, None, None, None]


class Classifier:
    """Likes bright images for label 0, and dark ones for 1."""

    image_shape, num_classes, variables = SHAPE, 3, ()

    def __call__(self, inputs, training=False):
        mean = tf.reduce_mean(inputs["x_t"], axis=[1, 2, 3])
        return tf.stack([mean, -mean, 0.1 * mean**2], axis=1)


class SelfConditioned:
    """eps = 0.5 x_t + 0.3 x_0; remembers the x_0 it was given."""

    image_shape, out_channels, num_classes, self_condition = SHAPE, 2, None, True

    def __call__(self, inputs, training=False):
        return 0.5 * inputs["x_t"] + 0.3 * inputs["x_0"]


def test_every_setting_of_every_sampler_is_varied_here():
    assert {(name, s) for name, c in SAMPLERS.items() for s in c.settings} == {(n, s) for n, v in VARIANTS for s in v}


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request):
    name, settings = request.param
    return lambda **kwargs: make_sampler(name, DIFFUSION, **settings, **kwargs)


@pytest.mark.parametrize("spacing", sorted(TIMESTEP_SPACINGS))
def test_its_plan_leads_from_x_T_to_the_clean_image(variant, spacing):
    for num_steps in (1, 2, 7, T):
        sampler = variant(num_steps=num_steps, spacing=spacing)
        plan = sampler.plan
        assert plan.start[0] == plan.start.max() and plan.end[-1] == 0
        np.testing.assert_array_equal(plan.end[:-1], plan.start[1:])  # every move begins where the last one ended
        x = run_chain(sampler, lambda x, i: 0.8 * x, initial_noise([0], SHAPE), [0]).x
        assert np.isfinite(x).all()


def test_a_step_keeps_shape_dtype_and_structure(variant):
    sampler = variant(num_steps=5)
    x_T = initial_noise([1, 2, 3], SHAPE)
    carry = begin(sampler, x_T)
    denoise = make_denoiser(Conditional(), sampler.diffusion, labels=tf.constant([0, 1, 2]))
    for position in (4, 0):
        moved = make_move(sampler, denoise, carry, tf.fill([3], position), tf.ones_like(x_T))
        tf.nest.assert_same_structure(moved, carry)
        for before, after in zip(tf.nest.flatten(carry), tf.nest.flatten(moved), strict=True):
            assert before.shape == after.shape and before.dtype == after.dtype


def test_it_needs_noise_exactly_where_noise_changes_its_images(variant):
    sampler = variant(num_steps=5)
    x_T = initial_noise([1, 2], SHAPE)
    zero, one = (
        run_chain(sampler, lambda x, i: 0.8 * x, x_T, [1, 2], noise_fn=lambda *_, v=v: tf.fill(x_T.shape, v)).x
        for v in (0.0, 1.0)
    )
    assert sampler.needs_noise == (not np.allclose(zero, one))


def test_an_image_is_its_seeds_and_labels_in_any_batch_and_any_mode(variant):
    sampler, network = variant(num_steps=6), Conditional()
    seeds, labels, guidance = np.arange(10, 17), np.arange(7) % 4, np.linspace(0, 3, 7)
    batch = sample(network, sampler, seeds, labels=labels, guidance=guidance).images
    assert batch.dtype == np.float32 and batch.shape == (7, *SHAPE) and len({image.tobytes() for image in batch}) == 7
    alone = sample(network, sampler, seeds[3:4], labels=labels[3:4], guidance=guidance[3:4]).images
    np.testing.assert_allclose(alone[0], batch[3], atol=1e-5)

    def draw(seeds, labels, guidance):
        conditions = {"labels": labels, "guidance": guidance}
        return advance(network, sampler, first_carry(network, sampler, seeds), seeds, conditions).x

    args = tf.constant(seeds), tf.constant(labels, tf.int32), tf.constant(guidance, tf.float32)
    for run in (draw, tf.function(draw), tf.function(draw, jit_compile=True)):
        np.testing.assert_allclose(run(*args), batch, atol=1e-5)


def test_an_export_draws_the_same_images_with_allowed_ops_alone(variant, tmp_path):
    """Also guided by a classifier, whose gradient is in the export."""
    sampler = variant(num_steps=4)
    network = guided_by(Conditional(), Classifier())
    conditions = {
        "labels": tf.TensorSpec([None], tf.int32),
        "guidance": tf.TensorSpec([None]),
        "classifier_scale": tf.TensorSpec([None]),
    }

    def draw(seeds, conditions):
        return {"x": advance(network, sampler, first_carry(network, sampler, seeds), seeds, conditions).x}

    module = tf.Module()
    module.draw = tf.function(draw, input_signature=[tf.TensorSpec([None], tf.int64), conditions], autograph=False)
    tf.saved_model.save(module, str(tmp_path), options=tf.saved_model.SaveOptions(experimental_custom_gradients=False))
    check_ops(str(tmp_path))
    given = {"labels": [0, 1, 3], "guidance": [0.0, 1.0, 2.5], "classifier_scale": [0.0, 1.0, 2.0]}
    tensors = {name: tf.constant(value, conditions[name].dtype) for name, value in given.items()}
    loaded = tf.saved_model.load(str(tmp_path)).draw(tf.constant([7, 8, 9], tf.int64), tensors)["x"]
    np.testing.assert_allclose(loaded, sample(network, sampler, [7, 8, 9], **given).images, atol=1e-5)


@pytest.mark.parametrize("prediction", ["v", pytest.param("x_0", marks=pytest.mark.slow)])
def test_it_draws_from_a_chain_that_ends_without_signal(prediction):
    """Data at one point: v and x_0 are known, and every sampler ends there."""
    schedule = Schedule(make_betas("linear_zero_snr", T))
    diffusion = GaussianDiffusion(schedule, prediction=prediction)
    assert schedule.alphas_cumprod[-1] == 0
    root, noise = (tf.constant(np.sqrt(v), tf.float32) for v in (schedule.alphas_cumprod, 1 - schedule.alphas_cumprod))

    class Point:
        image_shape, out_channels, num_classes, variables = SHAPE, 2, None, ()

        def __call__(self, inputs, training=False):
            if prediction == "x_0":
                return tf.fill(tf.shape(inputs["x_t"]), 0.3)
            a, s = (tf.gather(v, inputs["t"])[:, None, None, None] for v in (root, noise))
            eps = (inputs["x_t"] - a * 0.3) / s
            return a * eps - s * 0.3

    for name, settings in VARIANTS:
        for spacing in ("trailing", "karras") if prediction == "v" else ("logsnr",):
            sampler = make_sampler(name, diffusion, num_steps=5, spacing=spacing, **settings)
            if name == "heun":  # neither the first step, from sigma = infinity, nor the last one is corrected
                assert sampler.num_evaluations == 2 * sampler.num_steps - 2
            np.testing.assert_allclose(
                sample(Point(), sampler, [1, 2]).images, 0.3, atol=1e-4, err_msg=f"{name} {spacing}"
            )
    with pytest.raises(InputError, match="prediction 'eps' cannot recover x_0 there"):
        GaussianDiffusion(schedule)
    with pytest.raises(InputError, match="A classifier cannot guide a chain that ends at alphas_cumprod = 0"):
        make_denoiser(guided_by(Point(), Classifier()), diffusion)


def test_pieces_are_the_whole_and_hand_x_0_on(variant):
    """Also for a network with self-conditioning, which is asked with the x_0 of the step before."""
    sampler, network, seeds = variant(num_steps=6), SelfConditioned(), tf.constant([5, 6], tf.int64)
    whole = sample(network, sampler, seeds)
    traced = sample(network, sampler, seeds, trace=1)
    np.testing.assert_allclose(traced.images, whole.images, atol=1e-6)
    # By hand: the carry's x_0 is 0 at first, then the last prediction.
    denoise, x_0s = make_denoiser(network, sampler.diffusion), []

    def watched(x, i, x_0=None):
        x_0s.append(x_0.numpy())
        return denoise(x, i, x_0)

    carry = first_carry(network, sampler, seeds)
    for position in reversed(range(sampler.plan.num_moves)):
        carry = run_loop(sampler, watched, carry, seeds, start=position + 1, stop=position)
    np.testing.assert_allclose(carry.x, whole.images, atol=1e-5)
    np.testing.assert_array_equal(x_0s[0], 0)
    asking = np.flatnonzero((sampler.plan.end <= sampler.plan.start)[::-1])[::-1]  # positions; a move up asks nothing
    assert len(x_0s) == len(asking) == sampler.num_evaluations
    np.testing.assert_allclose(np.stack(x_0s[1:]), traced.trace.x_0[asking[1:] + 1], atol=1e-5)
    blind = sample(SelfConditioned(), sampler, seeds, trace=5)  # in two pieces
    np.testing.assert_allclose(blind.images, whole.images, atol=1e-6)
