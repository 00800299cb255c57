"""Interpolation between two images in the space of x_t (section 4.4 and Fig. 8)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from ddpm_tf import rng
from ddpm_tf.errors import InputError
from ddpm_tf.networks.contract import Network
from ddpm_tf.samplers.base import Sampler
from ddpm_tf.samplers.drawing import check_conditions, compiled
from ddpm_tf.samplers.loop import begin


def interpolate(
    network: Network,
    sampler: Sampler,
    x_a: np.ndarray,
    x_b: np.ndarray,
    *,
    t: int,
    lambdas: Sequence[float],
    seed: int = 0,
    fixed_noise: bool = False,
    labels: Any = None,
    guidance: Any = None,
) -> np.ndarray:
    """Diffuse two images to index t, mix them linearly, and denoise the mixtures.

    Args:
        network: a network as `UNet`.
        sampler: from `make_sampler`; its chain is the one that `t` indexes.
        x_a, x_b: float32 [H, W, C] in [-1, 1].
        t: index to which both are diffused, 0 <= t < S; 0 diffuses for one step.
        lambdas: K numbers within 0..1; 0 gives a reconstruction of x_a, 1 of x_b.
        seed: int64, of all noise.
        fixed_noise: draw the noise of both ends and of the way back once for all lambdas (the paper's Fig. 8), else
            anew for each (the release's code).
        labels, guidance: as in `sample`, for the K mixtures.

    Returns:
        float32 [K, H, W, C].

    Raises:
        InputError: t or a lambda out of range, images of another shape, labels or guidance that do not fit the network.
    """
    weights = np.asarray(lambdas, np.float32)
    if weights.ndim != 1 or weights.size == 0 or weights.min() < 0 or weights.max() > 1:
        raise InputError(f"lambdas must be a list of numbers within 0..1, found {weights}.")
    if not 0 <= t < sampler.num_steps:
        raise InputError(f"t must be within 0..{sampler.num_steps - 1}, found {t}.")
    for x in (x_a, x_b):
        if tuple(x.shape) != tuple(network.image_shape):
            raise InputError(f"The images must have shape {list(network.image_shape)}, found {list(x.shape)}.")
    count = len(weights)
    conditions = check_conditions(network, count, labels, guidance)
    seeds = tf.fill([count], tf.constant(seed, tf.int64)) + (0 if fixed_noise else tf.range(count, dtype=tf.int64))
    at_t = tf.fill([count], t)

    def diffused(x: np.ndarray, end: int) -> tf.Tensor:
        eps = rng.normal(seeds, network.image_shape, purpose=rng.Purpose.NOISE, index=end)
        return sampler.diffusion.q_sample(tf.repeat(tf.cast(x, tf.float32)[None], count, 0), at_t, eps)

    weight = weights[:, None, None, None]
    x_t = (1 - weight) * diffused(x_a, 0) + weight * diffused(x_b, 1)
    drawing = compiled(network, sampler, conditions)
    return drawing.advance(begin(sampler, x_t), seeds, conditions, tf.constant(t + 1), tf.constant(0)).x.numpy()
