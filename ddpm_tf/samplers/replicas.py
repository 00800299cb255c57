"""Sampling on all replicas of a tf.distribute strategy."""

import numpy as np
import tensorflow as tf

from ddpm_tf.samplers.denoisers import network_denoiser
from ddpm_tf.samplers.loop import initial_noise, run_loop


def make_replica_sampler(strategy, network, sampler):
    """draw(seeds) -> float32 [N, H, W, C]: the images of `sample` for an unconditional network, the seeds shared among
    this process's replicas. The images are those of one replica up to rounding, since each is a function of its seed.

    Args:
        strategy: the one under which the network's variables were made.
        sampler: from `make_sampler`.
    """
    image_shape = tuple(network.image_shape)
    local = len(strategy.extended.worker_devices)

    def on_replica(seeds):
        # The loop keeps the batch dimension open; a replica's part would bring its number along.
        seeds = tf.compat.v1.placeholder_with_default(seeds, [None])
        x_T = tf.ensure_shape(initial_noise(seeds, image_shape), [None, *image_shape])
        return run_loop(sampler, network_denoiser(network, sampler, None), x_T, seeds, sampler.init_state(x_T))[0]

    @tf.function(autograph=False, reduce_retracing=True)
    def on_all(seeds):
        return strategy.run(on_replica, (seeds,))

    def draw(seeds):
        seeds = np.asarray(seeds, np.int64)
        padded = np.resize(seeds, -(-len(seeds) // local) * local)  # every replica gets as many
        parts = iter(np.split(padded, local))
        shared = strategy.experimental_distribute_values_from_function(lambda _: tf.constant(next(parts)))
        images = strategy.experimental_local_results(on_all(shared))
        return np.concatenate([part.numpy() for part in images])[: len(seeds)]

    return draw
