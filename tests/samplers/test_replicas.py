import numpy as np
import pytest

from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.images import to_uint8
from ddpm_tf.networks import UNet
from ddpm_tf.samplers import make_sampler, sample
from ddpm_tf.samplers.drawing import make_draw
from tests.conftest import drawn_weight, mirrored, tf1_name


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 5])
def test_images_of_several_replicas_are_those_of_one(count):
    """Also of a number of images that the replicas do not divide."""
    strategy = mirrored(2)
    with strategy.scope():
        network = UNet((8, 8, 1), ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
        for v in network.variables:
            v.assign(drawn_weight(tf1_name(v.path), v.shape, 3))
    sampler = make_sampler("ddpm", GaussianDiffusion(Schedule(make_betas("linear", 20))), num_steps=4)
    seeds = np.arange(100, 100 + count)
    expected, got = sample(network, sampler, seeds).images, make_draw(network, sampler, strategy)(seeds)
    assert got.shape == expected.shape and expected.std() > 0.1
    assert np.abs(to_uint8(got).astype(int) - to_uint8(expected)).max() <= 1
