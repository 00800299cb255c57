"""Denoisers: what a sampler asks, as a function of (x_t, i)."""

import tensorflow as tf


def network_denoiser(network, sampler, labels=None):
    """denoise_fn(x_t, i): the network at the trained timestep behind index i.

    Args:
        network: called with {"x_t", "t", ("labels")} and training=False.
        sampler: its chain's `timesteps` translate indices.
        labels: int32 [B], for a class-conditional network.
    """
    timesteps = sampler.diffusion.schedule.timesteps

    def denoise_fn(x_t, i):
        inputs = {"x_t": x_t, "t": tf.gather(tf.constant(timesteps, tf.int32), i)}
        if labels is not None:
            inputs["labels"] = labels
        return network(inputs, training=False)

    return denoise_fn
