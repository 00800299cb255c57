"""Ancestral sampling, Algorithm 2 of Ho et al. 2020."""

import tensorflow as tf

from ddpm_tf.samplers.base import Sampler, StepOutput


class AncestralSampler(Sampler):
    """x_{t-1} = mean + exp(log_variance / 2) noise; the last step adds no noise."""

    def step(self, denoise_fn, x_t, i, noise, state):
        p = self.diffusion.p_mean_variance(denoise_fn(x_t, i), x_t, i)
        keep = tf.cast(tf.reshape(i, [-1] + [1] * (len(x_t.shape) - 1)) > 0, x_t.dtype)
        return StepOutput(p.mean + keep * tf.exp(0.5 * p.log_variance) * noise, p.x_0, state)
