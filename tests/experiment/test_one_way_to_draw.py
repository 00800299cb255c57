"""A class-conditional network with guidance draws the same image wherever it draws."""

import types

import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf import builders, images
from ddpm_tf.cluster.cluster import Cluster
from ddpm_tf.data.sources import ArraySource
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.errors import InputError
from ddpm_tf.experiment import StartOptions, generate
from ddpm_tf.experiment.grids import Grids
from ddpm_tf.experiment.run import Run
from ddpm_tf.networks import UNet
from ddpm_tf.samplers import interpolate, make_sampler, sample
from ddpm_tf.serving.export import save_model
from ddpm_tf.training.model import DiffusionModel
from tests.conftest import drawn_weight, mirrored, tf1_name, tiny_config

DIFFUSION = GaussianDiffusion(Schedule(make_betas("linear", 100)))
SEEDS, GUIDANCE = np.arange(20, 27), 2.5


def make_network():
    # 64 channels: with 32, every normalisation group is one channel, and the network does not see its labels.
    network = UNet((8, 8, 1), ch=64, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_classes=3)
    for v in network.variables:
        v.assign(drawn_weight(tf1_name(v.path), v.shape, 3))
    return network


def grey(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


@pytest.fixture(scope="module")
def network():
    return make_network()


@pytest.fixture(scope="module", params=["ddpm", "ddim"])
def sampler(request):
    return make_sampler(request.param, DIFFUSION, num_steps=5)


@pytest.fixture(scope="module")
def expected(network, sampler):
    """The images of sample(), with the classes in turn."""
    return images.to_uint8(sample(network, sampler, SEEDS, labels=np.arange(7) % 3, guidance=GUIDANCE).images)


def test_guidance_and_labels_play_a_part(network, sampler, expected):
    for kwargs in ({"labels": np.arange(7) % 3}, {"labels": 1, "guidance": GUIDANCE}):
        assert grey(images.to_uint8(sample(network, sampler, SEEDS, **kwargs).images), expected) > 10


def test_generate_draws_them_in_batches_with_the_classes_in_turn(network, sampler, expected):
    batches = list(generate(network, sampler, num_images=7, seed=20, guidance=GUIDANCE, batch_size=3))
    assert [len(batch.seeds) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([batch.labels for batch in batches]), np.arange(7) % 3)
    np.testing.assert_array_equal(np.concatenate([batch.seeds for batch in batches]), SEEDS)
    assert grey(np.concatenate([batch.images for batch in batches]), expected) <= 1
    part = list(generate(network, sampler, num_images=7, seed=20, guidance=GUIDANCE, part=slice(4, None)))
    assert grey(part[0].images, expected[4:]) <= 1


def test_two_replicas_draw_them(sampler, expected):
    strategy = mirrored(2)
    with strategy.scope():
        network = make_network()
    batches = generate(network, sampler, num_images=7, seed=20, guidance=GUIDANCE, batch_size=7, strategy=strategy)
    assert grey(next(batches).images, expected) <= 1


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_grid_draws_them_without_guidance(replicas, tmp_path):
    """The config has no field for guidance; the classes go in turn."""
    config, strategy = tiny_config(), mirrored(replicas)
    config.diffusion.num_timesteps, config.sample.num_steps, config.sample.seed = 100, 5, 20
    config.sample.num_images = 7
    with strategy.scope():
        model = DiffusionModel(make_network(), DIFFUSION)
    source = ArraySource(np.zeros((8, 8, 8, 1), np.uint8))
    run = Run(
        config=config,
        workdir=str(tmp_path),
        options=StartOptions(),
        strategy=strategy,
        cluster=Cluster(),
        source=source,
        data={},
        fingerprint={},
    )
    drawn = Grids(run, model, types.SimpleNamespace()).draw(0)
    sampler = builders.build_sampler(config, DIFFUSION)
    expected = images.to_uint8(sample(model.ema_network, sampler, SEEDS, labels=np.arange(7) % 3).images)
    assert drawn.keys() == {"raw", "ema"} and all(grey(d, expected) <= 1 for d in drawn.values())


@pytest.mark.slow
def test_the_saved_model_draws_them_from_labels_and_guidance_scale(network, sampler, expected, tmp_path):
    save_model(str(tmp_path), network, sampler, sampler.diffusion, max_batch=16)
    signatures = tf.saved_model.load(str(tmp_path)).signatures
    conditions = {
        "label": tf.constant(np.arange(7) % 3, tf.int32),
        "guidance_scale": tf.fill([7], GUIDANCE),
    }
    seed = tf.constant(SEEDS)
    drawn = signatures["sample"](seed=seed, **conditions)["images"].numpy()
    assert grey(drawn, expected) <= 1
    pngs = signatures["sample_png"](seed=seed, **conditions)["image_bytes"].numpy()
    assert grey(np.stack([tf.io.decode_png(png) for png in pngs]), drawn) == 0
    x = signatures["initial_noise"](seed=seed)["x_T"]
    if not sampler.needs_noise:
        from_noise = signatures["sample_from_noise"](noise=x, **conditions)["images"].numpy()
        assert grey(from_noise, drawn) <= 1
    for step in reversed(range(5)):
        out = signatures["denoise_step"](x_t=x, step=tf.fill([7], step), seed=seed, **conditions)
        x = out["x_prev"]
    assert grey(images.to_uint8(x.numpy()), drawn) <= 1
    grey_levels, label = tf.constant(drawn), conditions["label"]
    bounds = [
        signatures["bits_per_dim"](images=grey_levels, seed=seed, label=v)["total_bpd"] for v in (label, 2 - label)
    ]
    assert np.isfinite(bounds).all() and not np.allclose(*bounds)
    for bad, message in (
        ({"label": tf.fill([7], 4)}, "label must be within 0..3"),
        ({"guidance_scale": tf.fill([7], float("nan"))}, "guidance_scale must be finite"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            signatures["sample"](seed=seed, **conditions | bad)


def test_interpolation_takes_labels_and_guidance(network, sampler):
    x = np.full((8, 8, 1), 0.2, np.float32)

    def mix(**kwargs):
        return interpolate(network, sampler, x, -x, t=3, lambdas=[0.0, 0.5, 1.0], fixed_noise=True, **kwargs)

    one, other, strong = mix(labels=1), mix(labels=[1, 2, 1]), mix(labels=1, guidance=3.0)
    np.testing.assert_allclose(one[[0, 2]], other[[0, 2]], atol=1e-5)
    assert not np.allclose(one[1], other[1], atol=1e-3) and not np.allclose(one, strong, atol=1e-3)
    np.testing.assert_allclose(mix(labels=1, guidance=1.0), one, atol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "needs labels"),
        ({"labels": 4}, r"labels hold 4; expected 0\.\.3"),
        ({"labels": -1}, r"labels hold -1; expected 0\.\.3"),
        ({"labels": [0, 1]}, r"labels have the shape \[2\]; expected \[7\]"),
        ({"labels": 1.5}, "labels must be integers"),
        ({"labels": 1, "guidance": float("nan")}, "guidance must be finite"),
        ({"labels": 1, "guidance": [1.0, 2.0]}, r"guidance have the shape \[2\]; expected \[7\]"),
    ],
)
def test_conditions_that_cannot_be_are_refused(network, sampler, kwargs, message):
    with pytest.raises(InputError, match=message):
        sample(network, sampler, SEEDS, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_images": 0}, "num_images must be within 1"),
        ({"batch_size": 0}, "batch_size must be within 1"),
        ({"seed": 2**63 - 1}, "seed must be within .*, found 9223372036854775807"),
        ({"labels": [0, 1]}, r"labels have the shape \[2\]; expected \[3\]"),
        ({"labels": [0, 1, 9]}, r"labels hold 9; expected 0\.\.3"),
    ],
)
def test_generate_refuses_before_it_draws(network, sampler, kwargs, message):
    with pytest.raises(InputError, match=message):
        generate(network, sampler, **{"num_images": 3, "batch_size": 2} | kwargs)


def test_generate_takes_one_label_for_all(network, sampler):
    (batch,) = generate(network, sampler, num_images=3, labels=1)
    assert batch.labels.tolist() == [1, 1, 1]
