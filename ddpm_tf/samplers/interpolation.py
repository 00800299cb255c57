"""Interpolation between two images in the space of x_t (section 4.4 and Fig. 8)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from ddpm_tf import checks, rng
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
    classifier_scale: Any = None,
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
        labels, guidance, classifier_scale: as in `sample`, for the K mixtures.

    Returns:
        float32 [K, H, W, C].

    Raises:
        InputError: t or a lambda out of range, images of another shape, labels or guidance that do not fit the network.
    """
    weights = checks.reals("lambdas", lambdas, low=0, high=1).astype(np.float32)
    if not weights.size:
        raise InputError("lambdas must be at least one number within 0..1, found none.")
    t = checks.integer("t", t, low=0, high=sampler.num_steps - 1)
    x_a, x_b = (_checked_image(name, x, network) for name, x in (("x_a", x_a), ("x_b", x_b)))
    count = len(weights)
    most = 2**63 - (1 if checks.boolean("fixed_noise", fixed_noise) else count)  # the last seed is an int64, too
    seed = checks.integer("seed", seed, low=-(2**63), high=most)
    conditions = check_conditions(network, count, labels, guidance, classifier_scale)
    seeds = tf.fill([count], tf.constant(seed, tf.int64)) + (0 if fixed_noise else tf.range(count, dtype=tf.int64))
    plan = sampler.plan.last_steps(t + 1)
    at_t = tf.fill([count], int(plan.start[0]) - 1)  # other than t where a sampler visits more timesteps, or jumps

    def diffused(x: np.ndarray, end: int) -> tf.Tensor:
        eps = rng.normal(seeds, network.image_shape, purpose=rng.Purpose.NOISE, index=end)
        return sampler.diffusion.q_sample(tf.repeat(tf.cast(x, tf.float32)[None], count, 0), at_t, eps)

    weight = weights[:, None, None, None]
    x_t = (1 - weight) * diffused(x_a, 0) + weight * diffused(x_b, 1)
    drawing = compiled(network, sampler, conditions)
    moves = tf.constant(plan.num_moves)
    return drawing.advance(begin(sampler, x_t), seeds, conditions, moves, tf.constant(0)).x.numpy()


def _checked_image(name: str, x: Any, network: Network) -> np.ndarray:
    """float32 [H, W, C]. Values somewhat outside [-1, 1] are let through, since samples have them."""
    if np.asarray(x).dtype.kind != "f":
        raise InputError(
            f"{name} must be an image of floats in [-1, 1], found {np.asarray(x).dtype}: scale by x / 127.5 - 1."
        )
    return checks.reals(name, x, low=-10, high=10, shape=network.image_shape).astype(np.float32)


def interpolate_latents(
    network: Network,
    sampler: Sampler,
    seeds: Sequence[int],
    *,
    lambdas: Sequence[float],
    labels: Any = None,
    guidance: Any = None,
    classifier_scale: Any = None,
) -> np.ndarray:
    """Images between those of two seeds, by spherical interpolation of their x_T (DDIM section 5.3, Eq. 67):

        x_T = sin((1 - lambda) theta) / sin(theta) x_T^a + sin(lambda theta) / sin(theta) x_T^b,  theta = angle(x_T^a, x_T^b)

    Args:
        sampler: one that draws no noise after x_T (ddim with eta 0, dpm_solver, heun with churn 0).
        seeds: two integers of 64 bits.
        lambdas: K numbers within 0..1; 0 gives the image of the first seed, 1 of the second.
        labels, guidance, classifier_scale: as in `sample`, for the K images.

    Returns:
        float32 [K, H, W, C].

    Raises:
        InputError: a sampler that draws noise, other than two seeds, a lambda out of range, conditions that do not fit.
    """
    if sampler.needs_noise:
        raise InputError(
            "Latents are interpolated with a sampler that draws no noise after x_T, such as ddim with eta 0."
        )
    weights = checks.reals("lambdas", lambdas, low=0, high=1)
    if not weights.size:
        raise InputError("lambdas must be at least one number within 0..1, found none.")
    ends = checks.integers("seeds", seeds, **checks.INT64, shape=[2])
    conditions = check_conditions(network, len(weights), labels, guidance, classifier_scale)
    a, b = sampler.initial_state(tf.constant(ends), tuple(network.image_shape)).numpy().astype(np.float64)
    cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    theta = np.arccos(np.clip(cosine, -1, 1))
    weights = weights[:, None, None, None]
    if np.sin(theta) < 1e-6:  # twice the same latent
        x_T = np.repeat(a[None], len(weights), axis=0)
    else:
        x_T = (np.sin((1 - weights) * theta) * a + np.sin(weights * theta) * b) / np.sin(theta)
    drawing, moves = compiled(network, sampler, conditions), tf.constant(sampler.plan.num_moves)
    seeds_of_all = tf.zeros([len(weights)], tf.int64)
    carry = begin(sampler, tf.constant(x_T, tf.float32))
    return drawing.advance(carry, seeds_of_all, conditions, moves, tf.constant(0)).x.numpy()
