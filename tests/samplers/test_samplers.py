"""Samplers against closed forms: for x_0 ~ N(mu, s^2) the best denoiser is linear, and so is every moment."""

import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import TIMESTEP_SPACINGS, Schedule, make_betas
from ddpm_tf.diffusion.variance import VARIANCES
from ddpm_tf.errors import InputError
from ddpm_tf.experiment import generate
from ddpm_tf.networks import UNet
from ddpm_tf.samplers import SAMPLERS, interpolate, make_sampler, sample
from ddpm_tf.samplers.base import initial_noise
from ddpm_tf.samplers.loop import step_noise
from tests.conftest import drawn_weight, run_chain, tf1_name

MU, S = 0.4, 0.5
SCHEDULE = Schedule(make_betas("linear", 1000))


def analytic_denoiser(sampler):
    """E[eps | x_t] for x_0 ~ N(MU, S^2): eps = sqrt(1 - abar) (x_t - sqrt(abar) MU) / (abar S^2 + 1 - abar)."""
    abar = sampler.diffusion.schedule.alphas_cumprod
    slope = tf.constant(np.sqrt(1 - abar) / (abar * S**2 + 1 - abar), tf.float32)
    root = tf.constant(np.sqrt(abar), tf.float32)

    def denoise_fn(x_t, i):
        i = i[0]
        return slope[i] * (x_t - root[i] * MU)

    return denoise_fn


def affine_response(sampler):
    """x_out = a x_T + sum_i b_i noise_i + c of a linear sampler, measured by running it: (a, sum b^2, c)."""
    S_steps = sampler.num_steps
    # Example k < S_steps sees a unit of noise at step k only; then one with x_T = 1; then one with nothing.
    x_T = tf.one_hot([S_steps], S_steps + 2)[0][:, None, None, None]
    noise_fn = lambda seeds, i, shape: tf.one_hot(i, S_steps + 2)[:, None, None, None]  # noqa: E731
    run = tf.function(lambda x_T: run_chain(sampler, analytic_denoiser(sampler), x_T, None, noise_fn=noise_fn).x)
    x = run(x_T)
    x = x.numpy().ravel().astype(np.float64)
    response = x[:-1] - x[-1]
    return response[-1], (response[:-1] ** 2).sum(), x[-1]


def recursion(schedule, log_variance):
    """The mean and variance that ancestral sampling has, step by step in float64, from x_T ~ N(0, 1)."""
    mean, variance = 0.0, 1.0
    abar = schedule.alphas_cumprod
    for i in reversed(range(schedule.num_timesteps)):
        slope = np.sqrt(1 - abar[i]) / (abar[i] * S**2 + 1 - abar[i])
        # x_0 = (x - sqrt(1-abar) eps) / sqrt(abar), eps = slope (x - sqrt(abar) MU); then the posterior mean
        x_0_scale = (1 - np.sqrt(1 - abar[i]) * slope) / np.sqrt(abar[i])
        x_0_shift = np.sqrt(1 - abar[i]) * slope * MU
        a = schedule.posterior_mean_coef1[i] * x_0_scale + schedule.posterior_mean_coef2[i]
        mean = a * mean + schedule.posterior_mean_coef1[i] * x_0_shift
        variance = a**2 * variance + (np.exp(log_variance[i]) if i > 0 else 0.0)
    return mean, variance


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("num_steps", [1000, 50, 7, 1])
def test_ancestral_moments_follow_the_linear_recursion(variance, num_steps):
    diffusion = GaussianDiffusion(SCHEDULE, variance=variance)
    sampler = make_sampler("ddpm", diffusion, num_steps=num_steps, clip=False)
    a, noise_variance, c = affine_response(sampler)
    schedule = sampler.diffusion.schedule
    mean, total = recursion(
        schedule, VARIANCES[variance].log_variance(schedule, None, np.arange(len(schedule.betas)), 1)
    )
    np.testing.assert_allclose(c, mean, atol=1e-5)
    np.testing.assert_allclose(a**2 + noise_variance, total, atol=1e-5)


def test_ddim_error_falls_as_one_over_S():
    diffusion = GaussianDiffusion(SCHEDULE)
    errors = []
    for num_steps in (25, 50, 100, 200):
        sampler = make_sampler("ddim", diffusion, num_steps=num_steps, spacing="trailing", clip=False)
        x_T = tf.reshape(tf.constant([0.0, 1.0]), [2, 1, 1, 1])
        x = run_chain(sampler, analytic_denoiser(sampler), x_T, None).x
        slope = float(x[1, 0, 0, 0] - x[0, 0, 0, 0])
        abar = SCHEDULE.alphas_cumprod[-1]
        errors.append(abs(slope) * np.sqrt(abar * S**2 + 1 - abar) - S)  # x_T from the exact marginal
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    assert abs(errors[-1]) < 0.02 * S
    np.testing.assert_allclose(ratios, 2, atol=0.25)  # the next order of the error is 1/S of it


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_with_eta_1_is_fixed_small_ancestral_sampling(small_network, clip):
    """Over the whole chain, given the same noise, the same clip setting, and eps from the clipped x_0."""
    diffusion = GaussianDiffusion(Schedule(make_betas("linear", 12, beta_start=1e-3, beta_end=0.7)))
    small = GaussianDiffusion(diffusion.schedule, variance="fixed_small")
    x_T, denoise_fn = initial_noise([1, 2], (8, 8, 1)), lambda x, i: small_network({"x_t": x, "t": i})
    a, b = (
        run_chain(sampler, denoise_fn, x_T, [1, 2]).x.numpy()
        for sampler in (make_sampler("ddim", diffusion, eta=1.0, clip=clip), make_sampler("ddpm", small, clip=clip))
    )
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1, abs(b).max()))


def test_ddim_without_noise_is_a_function_of_the_seed_alone(small_network):
    sampler = make_sampler("ddim", GaussianDiffusion(SCHEDULE), num_steps=5)
    assert not sampler.needs_noise
    refuse = lambda *_: pytest.fail("ddim with eta 0 asked for noise")  # noqa: E731
    x_T = initial_noise([3], (8, 8, 1))
    denoise_fn = lambda x, i: small_network({"x_t": x, "t": i})  # noqa: E731
    first = run_chain(sampler, denoise_fn, x_T, [3], noise_fn=refuse).x
    second = run_chain(sampler, denoise_fn, x_T, [77], noise_fn=refuse).x
    np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_ancestral_chain_matches_the_original(reference):
    """40 steps from the given noise, both fixed variances; the states and x_0 of the recorded steps."""
    network, table = reference.network(), tf.constant(reference["noise_table"])
    T = reference.args["T"]

    def noise_fn(seeds, i, shape):
        return table[T - i]  # the k-th draw is used at timestep T - 1 - k and sits at 1 + k

    for variance in ("fixed_large", "fixed_small"):
        sampler = make_sampler("ddpm", reference.diffusion(variance=variance))
        run = tf.function(
            lambda x, start, stop, sampler=sampler: run_chain(
                sampler,
                lambda x_t, i: network({"x_t": x_t, "t": i}),
                x,
                tf.zeros([x.shape[0]], tf.int64),
                start=start,
                stop=stop,
                noise_fn=noise_fn,
            )[:2]
        )
        name = "sample_" + variance.replace("_", "")
        recorded = sorted(
            (int(k.rpartition("_t")[2]) for k in reference.arrays if k.startswith(f"{name}_t")), reverse=True
        )
        assert recorded[-1] == 0
        x, top = table[0], T
        for t in recorded:
            x, x_0 = run(x, tf.constant(top), tf.constant(t))
            np.testing.assert_allclose(x, reference[f"{name}_t{t}"], atol=1e-4)
            np.testing.assert_allclose(x_0, reference[f"{name}_pred_xstart_t{t}"], atol=1e-4)
            top = t


def test_running_in_chunks_is_running_at_once(small_network):
    sampler = make_sampler("ddpm", GaussianDiffusion(SCHEDULE), num_steps=10)
    whole = sample(small_network, sampler, [5, 6])
    traced = sample(small_network, sampler, [5, 6], trace=4)
    np.testing.assert_array_equal(traced.images, whole.images)
    trace = traced.trace
    np.testing.assert_array_equal(trace.index, [0, 4, 8])
    np.testing.assert_array_equal(trace.x_t[0], whole.images)
    np.testing.assert_array_equal(trace.x_t[-1], initial_noise([5, 6], (8, 8, 1)))
    # The last step adds no noise: its mean is x_0 itself.
    np.testing.assert_allclose(trace.x_0[0], whole.images, atol=1e-6)
    every = sample(small_network, sampler, [5, 6], trace=1).trace
    assert every.x_t.shape == (11, 2, 8, 8, 1) and every.x_0.shape == (10, 2, 8, 8, 1)
    np.testing.assert_array_equal(every.x_t[[0, 4, 8, 10]], trace.x_t)


def image_levels(images):
    return np.clip((np.asarray(images) + 1) * 127.5, 0, 255)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_steps", "count"), [("ddim", 50, 64), ("ddpm", 1000, 16)])
def test_a_seed_is_the_same_image_in_any_batch_and_any_mode(small_network, name, num_steps, count, record_property):
    """Alone, among 7 and among all; as a tf.function, under XLA and, in the short chain, eagerly; to one grey level."""
    sampler = make_sampler(name, GaussianDiffusion(SCHEDULE), num_steps=num_steps)
    seeds = np.arange(100, 100 + count)
    batch = sample(small_network, sampler, seeds).images
    others = {
        "alone": sample(small_network, sampler, seeds[5:6]).images[0],
        "among 7": sample(small_network, sampler, seeds[[9, 1, 5, 3, count - 4, 2, 4]]).images[2],
    }

    def denoise_fn(x_t, i):
        t = tf.gather(tf.constant(sampler.diffusion.schedule.timesteps, tf.int32), i)
        return small_network({"x_t": x_t, "t": t})

    def run(seeds):
        return run_chain(sampler, denoise_fn, initial_noise(seeds, (8, 8, 1)), seeds).x

    few = tf.constant(seeds[4:7])
    if num_steps <= 50:
        others["eager"] = run(few)[1]
    others["graph"] = tf.function(run)(few)[1]
    others["xla"] = tf.function(run, jit_compile=True)(few)[1]
    largest = {k: float(np.abs(np.asarray(v) - batch[5]).max()) for k, v in others.items()}
    record_property("largest float difference", largest)
    print(f"\n{name} {num_steps} steps, largest float difference on images within +-{abs(batch).max():.1f}: {largest}")
    for images in others.values():
        assert np.abs(image_levels(images) - image_levels(batch[5])).max() <= 1
    assert len({image.tobytes() for image in batch}) == count


def test_step_noise_differs_between_steps_and_seeds():
    draws = [step_noise([seed], i, (4, 4, 1)).numpy().tobytes() for seed in (0, 1) for i in (0, 1)]
    assert len({*draws, initial_noise([0], (4, 4, 1)).numpy().tobytes()}) == 5


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("spacing", sorted(TIMESTEP_SPACINGS))
def test_any_number_of_steps_gives_finite_images(name, spacing):
    for num_steps in (1, 2, 13):
        sampler = make_sampler(name, GaussianDiffusion(SCHEDULE), num_steps=num_steps, spacing=spacing)
        assert np.isfinite(run_chain(sampler, analytic_denoiser(sampler), initial_noise([0], (2, 2, 1)), [0]).x).all()


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("dpmpp", {}, "Unknown sampler 'dpmpp'; expected one of .*'ddim', 'ddpm'"),
        ("ddim", {"num_steps": 0}, r"within 1\.\.1000"),
        ("ddim", {"num_steps": 1001}, r"within 1\.\.1000"),
        ("ddim", {"eta": 1.5}, r"within 0\.\.1, found 1.5"),
        ("ddim", {"eta": None}, "eta must be a number, found None"),
        ("ddim", {"eta": "0"}, "eta must be a number, found '0'"),
        ("ddim", {"eta": float("nan")}, "eta must be a finite number"),
        ("ddim", {"eta": [0.5]}, "eta must be a number"),
        ("ddpm", {"eta": np.ones(2)}, "eta is a setting of the sampler ddim"),
        ("ddim", {"num_steps": 5.0}, "num_steps must be an integer"),
        ("ddim", {"clip": "no"}, "clip must be True or False"),
        ("ddim", {"spacing": ["quad"]}, "Unknown timestep spacing"),
        (["ddim"], {}, "Unknown sampler"),
        (
            "ddpm",
            {"eta": 0.5},
            "eta is a setting of the sampler ddim; ddpm has no such setting, and eta=0.5 was given",
        ),
        ("ddim", {"num_steps": 5, "spacing": "log"}, "Unknown timestep spacing"),
    ],
)
def test_settings_that_cannot_be_are_refused(name, kwargs, message):
    with pytest.raises(InputError, match=message):
        make_sampler(name, GaussianDiffusion(SCHEDULE), **kwargs)


@pytest.mark.parametrize(
    ("seeds", "kwargs", "message"),
    [
        ([], {}, "at least one"),
        ([[1]], {}, "shape"),
        ([1], {"labels": [0]}, "unconditional"),
        ([1], {"trace": -1}, "trace"),
        ([1], {"trace": 0.5}, "trace must be an integer"),
        ([1], {"shared_noise_steps": 1.0}, "shared_noise_steps must be an integer"),
        ([0.9], {}, "must be an integer, found 0.9"),
        (np.array([0.9]), {}, "seeds must be integers"),
        ([2**63], {}, "seeds hold 9223372036854775808"),
        ([True], {}, "seeds must be an integer"),
        (7, {}, r"shape \[\]"),
        (range(10**7), {"trace": 1}, "GiB of memory"),
    ],
)
def test_calls_that_cannot_be_are_refused(small_network, seeds, kwargs, message):
    with pytest.raises(InputError, match=message):
        sample(small_network, make_sampler("ddim", GaussianDiffusion(SCHEDULE), num_steps=2), seeds, **kwargs)


def test_shared_noise_steps_share_the_beginning(small_network):
    """Fig. 7: the first k steps are the same for all images; -1 shares nothing, 0 shares x_T alone."""
    sampler = make_sampler("ddpm", GaussianDiffusion(SCHEDULE), num_steps=6)

    def states(k):
        trace = sample(small_network, sampler, [8, 9], trace=1, shared_noise_steps=k).trace
        assert trace.x_t.shape[0] == 7  # S + 1 states
        return trace.x_t[::-1]  # from x_T on

    for k in (0, 2, 6):
        x = states(k)
        np.testing.assert_allclose(x[: k + 1, 0], x[: k + 1, 1], atol=1e-6)
        assert k == 6 or not np.allclose(x[k + 1, 0], x[k + 1, 1])
        np.testing.assert_array_equal(x[:, 0], states(-1)[:, 0])  # the first image is always its own
    assert not np.allclose(*states(-1)[0])
    with pytest.raises(InputError, match=r"within -1\.\.6, found 7"):
        states(7)


def test_progressive_slots_hold_the_x_0_of_every_nth_index(small_network):
    sampler = make_sampler("ddpm", GaussianDiffusion(SCHEDULE), num_steps=10)
    every = sample(small_network, sampler, [4], trace=1).trace
    third = sample(small_network, sampler, [4], trace=3)
    np.testing.assert_array_equal(third.trace.x_0, every.x_0[::3])
    np.testing.assert_allclose(third.trace.x_0[0], third.images, atol=1e-6)


def test_interpolation_ends_are_reconstructions_and_the_noise_is_as_said(small_network):
    sampler = make_sampler("ddpm", GaussianDiffusion(SCHEDULE), num_steps=10)
    x_a, x_b = np.full((8, 8, 1), -0.5, np.float32), np.full((8, 8, 1), 0.5, np.float32)

    def run(lambdas, a=x_a, b=x_b, **kwargs):
        return interpolate(small_network, sampler, a, b, t=4, lambdas=lambdas, seed=1, **kwargs)

    fixed = run([0.0, 0.0, 0.5, 1.0], fixed_noise=True)
    np.testing.assert_allclose(fixed[0], fixed[1], atol=1e-6)
    # The other end plays no part; another batch size rounds differently.
    np.testing.assert_allclose(run([0.0], b=x_a * 0, fixed_noise=True)[0], fixed[0], atol=1e-5)
    np.testing.assert_allclose(run([1.0], a=x_b * 0, fixed_noise=True)[0], fixed[3], atol=1e-5)
    anew = run([0.0, 0.0])
    assert not np.allclose(anew[0], anew[1])
    for kwargs, message in (
        ({"lambdas": [0.5, 1.5]}, r"within 0\.\.1"),
        ({"lambdas": []}, r"within 0\.\.1"),
        ({"lambdas": [np.nan]}, "lambdas must be finite"),
        ({"lambdas": 0.5}, "lambdas have the shape"),
        ({"lambdas": [0.5], "a": (x_a * 127).astype(np.uint8)}, "x_a must be an image of floats"),
        ({"lambdas": [0.5], "b": x_b * np.nan}, "x_b must be finite"),
        ({"lambdas": [0.5], "a": x_a[:4]}, r"x_a have the shape \[4, 8, 1\]; expected \[8, 8, 1\]"),
    ):
        with pytest.raises(InputError, match=message):
            run(**kwargs)
    with pytest.raises(InputError, match=r"t must be within 0\.\.9, found 10"):
        interpolate(small_network, sampler, x_a, x_b, t=10, lambdas=[0.5])


class Zero:
    """Predicts eps = 0: x_0 = x_t / sqrt(abar)."""

    image_shape, num_classes = (8, 8, 1), None

    def __call__(self, inputs, training=False):
        return tf.zeros_like(inputs["x_t"])


def test_interpolating_at_the_first_step_is_mixing_the_images():
    """Diffused for one step of a fine chain, and denoised by the closed form, the mixture comes back."""
    sampler = make_sampler("ddim", GaussianDiffusion(SCHEDULE))
    x_a, x_b = np.full((8, 8, 1), -0.5, np.float32), np.full((8, 8, 1), 0.3, np.float32)

    images = interpolate(Zero(), sampler, x_a, x_b, t=0, lambdas=[0.25])
    assert abs(images.mean() - (-0.3)) < 5 * 0.01 / 8  # the noise has deviation 0.01 at t = 0


class Labelled:
    """A stand-in network: eps = x_t + label; label 3 is the null class."""

    image_shape, num_classes = (2, 2, 1), 3

    def __call__(self, inputs, training=False):
        return inputs["x_t"] + tf.cast(inputs["labels"], tf.float32)[:, None, None, None]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"labels": [0, -1]}, r"labels hold -1; expected 0\.\.3"),
        ({"labels": [0, 4]}, r"labels hold 4; expected 0\.\.3"),
        ({"labels": [0, 2**40 + 7]}, r"labels hold 1099511627783; expected 0\.\.3"),
        ({"labels": [0, 2**64 + 1]}, r"labels hold 18446744073709551617; expected 0\.\.3"),
        ({"labels": -1}, "labels hold -1"),
        ({"labels": 1.0}, "labels must be integers"),
        ({"labels": True}, "labels must be integers"),
        ({"labels": [1]}, r"labels have the shape \[1\]; expected \[2\]"),
        ({"labels": [1, 2, 3]}, r"labels have the shape \[3\]; expected \[2\]"),
        ({"labels": [0, 1], "guidance": float("nan")}, "guidance must be finite"),
        ({"labels": [0, 1], "guidance": [1.0, float("inf")]}, "guidance must be finite"),
        ({"labels": [0, 1], "guidance": "2"}, "guidance must be numbers"),
        ({"labels": [0, 1], "guidance": [1.0]}, r"guidance have the shape \[1\]; expected \[2\]"),
        ({"labels": [0, 1], "guidance": 1e30}, "guidance must be within"),
    ],
)
def test_conditions_are_one_for_each_image_and_never_wrap_round(kwargs, message):
    network = UNet((8, 8, 1), ch=4, num_groups=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_classes=3)
    sampler = make_sampler("ddim", GaussianDiffusion(SCHEDULE), num_steps=2)
    with pytest.raises(InputError, match=message):
        sample(network, sampler, [0, 1], **kwargs)
    with pytest.raises(InputError, match=message):
        generate(network, sampler, num_images=2, **kwargs)


def test_a_plain_label_is_that_of_all_images_and_guidance_belongs_to_its_image():
    network = UNet((8, 8, 1), ch=4, num_groups=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_classes=3)
    for v in network.variables:
        v.assign(drawn_weight(tf1_name(v.path), v.shape, 3))
    sampler = make_sampler("ddim", GaussianDiffusion(SCHEDULE), num_steps=2)
    for plain in (2, np.int64(2), np.array(2)):
        np.testing.assert_array_equal(
            sample(network, sampler, [0, 1], labels=plain).images,
            sample(network, sampler, [0, 1], labels=[2, 2]).images,
        )
    one_by_one = [b.images for b in generate(network, sampler, num_images=3, guidance=[0.0, 1.0, 3.0], batch_size=1)]
    (at_once,) = (b.images for b in generate(network, sampler, num_images=3, guidance=[0.0, 1.0, 3.0], batch_size=3))
    # Rounding to grey levels may differ by one between batch sizes.
    assert np.abs(np.concatenate(one_by_one).astype(int) - at_once).max() <= 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_images": 10**12}, r"num_images must be within 1\.\.100000000"),
        ({"num_images": 2.0}, "num_images must be an integer"),
        ({"num_images": 2, "batch_size": 10**9}, "batch_size must be within"),
        ({"num_images": 2, "batch_size": 0}, "batch_size must be within"),
        ({"num_images": 2, "seed": 2**63 - 1}, "seed must be within"),
        ({"num_images": 2, "seed": 0.9}, "seed must be an integer, found 0.9"),
        ({"num_images": 1, "seed": 2**63}, "seed must be within"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_anything_is_drawn(small_network, kwargs, message):
    with pytest.raises(InputError, match=message):
        generate(small_network, make_sampler("ddim", GaussianDiffusion(SCHEDULE), num_steps=2), **kwargs)


def test_the_last_seeds_of_64_bits_are_drawn_and_the_next_is_refused(small_network):
    sampler = make_sampler("ddim", GaussianDiffusion(SCHEDULE), num_steps=2)
    (batch,) = generate(small_network, sampler, num_images=2, seed=2**63 - 2)
    assert batch.seeds.tolist() == [2**63 - 2, 2**63 - 1]
    x = np.zeros((8, 8, 1), np.float32)
    with pytest.raises(InputError, match="seed must be within"):
        interpolate(small_network, sampler, x, x, t=1, lambdas=[0.0, 1.0], seed=2**63 - 1)
    for t in (-1, 2, 1.0, None):
        with pytest.raises(InputError, match="t must be"):
            interpolate(small_network, sampler, x, x, t=t, lambdas=[0.0])


def test_guidance_goes_from_unconditional_through_conditional_and_beyond():
    network, sampler = Labelled(), make_sampler("ddim", GaussianDiffusion(SCHEDULE), num_steps=3, clip=False)

    def run(labels, **kwargs):
        return sample(network, sampler, [1, 1], labels=labels, **kwargs).images

    np.testing.assert_allclose(run([0, 2], guidance=1.0), run([0, 2]), rtol=1e-5)
    np.testing.assert_allclose(run([0, 2], guidance=0.0), run([3, 3]), rtol=1e-5)
    # Linear in eps: label 0 with weight 2 is 3 + 2 (0 - 3) = -3; label 2 with weight 0.5 is 2.5
    unit = run([1, 1]) - run([0, 0])
    guided = run([0, 2], guidance=[2.0, 0.5]) - run([0, 0])
    np.testing.assert_allclose(guided, np.stack([-3 * unit[0], 2.5 * unit[1]]), rtol=1e-3, atol=1e-3 * abs(unit).max())
    with pytest.raises(InputError, match="Guidance needs labels"):
        sample(Zero(), sampler, [1], guidance=2.0)
