"""Denoisers: what a sampler asks, as a function of (x_t, i)."""

import tensorflow as tf


def guided_denoiser(conditional, unconditional, weight):
    """Classifier-free guidance (Ho & Salimans 2022): unconditional + weight (conditional - unconditional).

    Args:
        conditional, unconditional: denoise_fns.
        weight: float32 [B]; 0 is unconditional, 1 conditional, above 1 stronger.

    A learned variance is the conditional one's.
    """

    def denoise_fn(x_t, i):
        c, u = conditional(x_t, i), unconditional(x_t, i)
        channels = x_t.shape[-1]
        guided = u + tf.reshape(weight, [-1] + [1] * (len(x_t.shape) - 1)) * (c - u)
        return tf.concat([guided[..., :channels], c[..., channels:]], axis=-1)

    return denoise_fn


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
