"""Ancestral sampling, Algorithm 2 of Ho et al. 2020."""

from typing import Any

import tensorflow as tf

from ddpm_tf.samplers.base import DenoiseFunction, Sampler, StepOutput
from ddpm_tf.samplers.plan import Move


class AncestralSampler(Sampler):
    """x_{t-1} = mean + exp(log_variance / 2) noise; the last step adds no noise."""

    def step(
        self, denoise: DenoiseFunction, x: tf.Tensor, move: Move, noise: tf.Tensor | None, memory: Any
    ) -> StepOutput:
        p = denoise(x, move.start - 1)
        keep = tf.cast(tf.reshape(move.end, [-1] + [1] * (len(x.shape) - 1)) > 0, x.dtype)
        return StepOutput(p.mean + keep * tf.exp(0.5 * p.log_variance) * noise, p.x_0, memory)
