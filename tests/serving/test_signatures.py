"""What each signature answers, through the C API."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from ddpm_tf import rng
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.errors import InputError
from ddpm_tf.evaluation.likelihood import bits_per_dim
from ddpm_tf.images import from_uint8, to_uint8
from ddpm_tf.networks import UNet
from ddpm_tf.samplers import make_sampler, sample
from ddpm_tf.samplers.denoiser import make_output_fn
from ddpm_tf.serving.signatures import make_portable, make_signatures
from tests.serving.conftest import grey_levels

pytestmark = pytest.mark.slow
SEEDS = np.array([7, 0, -1, 2**63 - 1, -(2**63), 12345, 3, 2, 1])
SEED = {"seed": (np.int64, (None,))}
IMAGES = {"images": (np.uint8, (None, 8, 8, 1))}


def floats(*names):
    return {name: (np.float32, (None, 8, 8, 1)) for name in names}


def test_signatures_are_what_the_sampler_allows(served):
    sampler, session = served
    memory = {
        f"memory_{k}": (np.float32, (None, *part.shape[1:]))
        for k, part in enumerate(tf.nest.flatten(sampler.init_memory(tf.zeros([1, 8, 8, 1]))))
    }
    expected = {
        "sample": (SEED, IMAGES),
        "serving_default": (SEED, IMAGES),
        "sample_png": (SEED, {"image_bytes": (object, (None,))}),
        "initial_noise": (SEED, floats("x_T")),
        "denoise_step": (
            SEED | floats("x_t") | {"step": (np.int32, (None,))} | memory,
            floats("x_prev", "x_0") | memory,
        ),
        "bits_per_dim": (SEED | IMAGES, {"total_bpd": (np.float32, (None,))}),
    }
    if not sampler.needs_noise:
        expected["sample_from_noise"] = (floats("noise"), IMAGES)
    found = {
        name: tuple({key: (dtype, shape) for key, (_, dtype, shape) in tensors.items()} for tensors in signature)
        for name, signature in session.signatures.items()
    }
    assert found == expected


def no_memory(sampler, count):
    """What the first step is sent as its memory."""
    parts = tf.nest.flatten(sampler.init_memory(tf.zeros([count, 8, 8, 1])))
    return {f"memory_{k}": part.numpy() for k, part in enumerate(parts)}


def test_a_sampler_that_fills_in_a_picture_is_not_exported(inference):
    sampler = make_sampler("repaint", inference.diffusion, num_steps=2)
    with pytest.raises(InputError, match="repaint cannot be exported"):
        make_signatures(inference.network, sampler, sampler.diffusion, max_batch=4)


def test_samples_are_those_of_python_and_pngs_are_the_samples(served, inference):
    sampler, session = served
    expected = to_uint8(sample(inference.network, sampler, SEEDS).images)
    images = session.run("sample", {"seed": SEEDS})["images"]
    assert grey_levels(images, expected) <= 1
    pngs = session.run("sample_png", {"seed": SEEDS})["image_bytes"]
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in pngs])[..., None]
    assert grey_levels(decoded, images) <= 1


def test_a_client_that_calls_every_step_gets_the_sample(served, inference):
    sampler, session = served
    x = session.run("initial_noise", {"seed": SEEDS})["x_T"]
    memory = no_memory(sampler, 9)
    for i in reversed(range(sampler.plan.num_moves)):
        out = session.run("denoise_step", {"x_t": x, "step": np.full(9, i, np.int32), "seed": SEEDS, **memory})
        x, memory = out["x_prev"], {name: out[name] for name in memory}
    np.testing.assert_allclose(x, sample(inference.network, sampler, SEEDS).images, rtol=0, atol=1e-4)
    np.testing.assert_allclose(x, out["x_0"], rtol=0, atol=1e-4)  # the last step ends at its x_0
    assert grey_levels(to_uint8(x), session.run("sample", {"seed": SEEDS})["images"]) <= 1


def test_the_steps_of_one_request_are_each_images_own(served):
    sampler, session = served
    x = session.run("initial_noise", {"seed": SEEDS[:4]})["x_T"]
    steps = np.arange(4, dtype=np.int32)
    together = session.run("denoise_step", {"x_t": x, "step": steps, "seed": SEEDS[:4], **no_memory(sampler, 4)})[
        "x_prev"
    ]
    for k in range(4):
        one = {"x_t": x[k : k + 1], "step": steps[k : k + 1], "seed": SEEDS[k : k + 1], **no_memory(sampler, 1)}
        np.testing.assert_allclose(session.run("denoise_step", one)["x_prev"][0], together[k], rtol=0, atol=1e-5)
    assert np.abs(together[0] - together[3]).max() > 0.1


def test_noise_of_a_seed_gives_the_sample_of_the_seed(served):
    sampler, session = served
    if sampler.needs_noise:
        pytest.skip("the sampler draws noise after x_T, and sample_from_noise is not exported")
    x_T = session.run("initial_noise", {"seed": SEEDS})["x_T"]
    np.testing.assert_allclose(x_T, rng.normal(SEEDS, (8, 8, 1), purpose=rng.Purpose.PRIOR), rtol=0, atol=1e-6)
    images = session.run("sample_from_noise", {"noise": x_T})["images"]
    assert grey_levels(images, session.run("sample", {"seed": SEEDS})["images"]) <= 1


def test_bits_per_dim_is_the_bound_over_the_visited_timesteps(served, inference):
    sampler, session = served
    grey = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (9, 8, 8, 1), np.uint8)
    found = session.run("bits_per_dim", {"images": grey, "seed": SEEDS})["total_bpd"]
    denoise_fn = make_output_fn(inference.network, sampler.diffusion)
    x_0 = from_uint8(tf.cast(grey, tf.float32))
    expected = bits_per_dim(sampler.diffusion, denoise_fn, x_0, tf.constant(SEEDS))
    assert expected.terms.shape == (9, 4)
    np.testing.assert_allclose(found, expected.total, rtol=1e-4)


def test_class_conditional_networks_get_no_portable_files(samplers):
    network = UNet((8, 8, 1), ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_classes=3)
    with pytest.raises(InputError, match="can be exported as a SavedModel only"):
        make_portable(network, samplers["ddim"])


def test_damaged_weights_are_an_error_and_not_black_images():
    network = UNet((8, 8, 1), ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
    network.variables[0].assign(tf.fill(network.variables[0].shape, float("nan")))
    diffusion = GaussianDiffusion(Schedule(make_betas("linear", 10)))
    sampler = make_sampler("ddim", diffusion, num_steps=2)
    functions = make_signatures(network, sampler, diffusion, max_batch=4)
    for name in ("sample", "sample_png"):
        with pytest.raises(tf.errors.InvalidArgumentError, match="weights are damaged"):
            functions[name](tf.constant([1, 2], tf.int64))
