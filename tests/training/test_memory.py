"""The estimate of a step's memory, against a graph counted by hand and against what TensorFlow's allocator counts."""

import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf.data import make_dataset
from ddpm_tf.data.sources import ArraySource
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.networks import UNet
from ddpm_tf.training import memory
from ddpm_tf.training.model import DiffusionModel
from ddpm_tf.training.optimizers import make_optimizer


def test_a_tensor_lives_from_the_op_that_makes_it_to_the_last_that_reads_it():
    n = 1000

    def f(x):
        kept = tf.tanh(x)  # x, kept
        y = tf.reshape(tf.exp(kept), [10, n // 10])  # kept, y; x is not read again; a reshape takes nothing
        z = tf.sqrt(y)  # kept, y, z
        half = tf.cast(tf.reshape(z, [n]), tf.float16)  # kept, z, half
        return tf.reduce_sum(kept * tf.cast(half, tf.float32))

    graph = tf.function(f, autograph=False).get_concrete_function(tf.TensorSpec([n])).graph
    assert memory._most_alive(graph) == pytest.approx(3 * 4 * n, abs=16)  # and a few scalars


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [{}, {"remat": True}, {"dtype": "mixed_bfloat16"}], ids=str)
def test_the_estimate_is_near_what_the_allocator_counts(kwargs):
    network = UNet((64, 64, 3), ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(16,), **kwargs)
    model = DiffusionModel(network, GaussianDiffusion(Schedule(make_betas("linear", 1000))))
    estimate = memory.estimate_step_memory(model, 4)
    model.compile(make_optimizer())
    model.make_train_function()
    iterator = iter(make_dataset(ArraySource(np.zeros((8, 64, 64, 3), np.uint8)), batch_size=4, seed=0))
    model.train_function(iterator)
    try:
        tf.config.experimental.reset_memory_stats("CPU:0")
        before = tf.config.experimental.get_memory_info("CPU:0")["current"]
    except ValueError:
        pytest.skip("this TensorFlow does not count the memory of a CPU")
    model.train_function(iterator)
    peak = tf.config.experimental.get_memory_info("CPU:0")["peak"] - before
    print(f"{kwargs}: estimated {(estimate.peak - estimate.kept) / 2**20:.0f} MiB, counted {peak / 2**20:.0f} MiB")
    assert estimate.peak - estimate.kept == pytest.approx(peak, rel=0.25)


def test_what_is_kept_is_weights_average_and_two_slots():
    network = UNet((8, 8, 1), ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
    model = DiffusionModel(network, GaussianDiffusion(Schedule(make_betas("linear", 10))))
    one, eight = (memory.estimate_step_memory(model, n) for n in (1, 8))
    assert one.kept == eight.kept == 16 * network.count_params()
    assert 0 < one.peak - one.kept < eight.peak - eight.kept
