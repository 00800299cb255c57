"""The variational bound in bits/dim, term by term (Eq. 5; Table 1's NLL)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from ddpm_tf import checks, rng
from ddpm_tf.diffusion import losses
from ddpm_tf.diffusion.gaussian import mean_flat
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.errors import InputError


class BitsPerDim(NamedTuple):
    """total [B] = prior [B] + the sum of terms [B, T], all bits/dim; mse [B, T]: squared error of the predicted x_0,
    on [-1, 1]. terms[:, 0] is the distortion, the rest is the rate."""

    total: tf.Tensor
    terms: tf.Tensor
    prior: tf.Tensor
    mse: tf.Tensor


def bound_noise(seeds: tf.Tensor, t: tf.Tensor, image_shape: tuple[int, ...]) -> tf.Tensor:
    """The noise of timestep t, float32 [B, H, W, C], a function of (seed, t)."""
    return rng.normal(seeds, image_shape, purpose=rng.Purpose.NOISE, step=t)


def bits_per_dim(
    diffusion: GaussianDiffusion,
    denoise_fn: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    x_0: tf.Tensor,
    seeds: Any,
    *,
    noise_fn: Callable[..., tf.Tensor] = bound_noise,
) -> BitsPerDim:
    """An upper bound on -log2 p(x_0) per pixel and channel, with one draw of x_t for each of the T timesteps.

    Args:
        diffusion: GaussianDiffusion, over the whole chain.
        denoise_fn: (x_t [B, H, W, C], t int32 [B]) -> network output.
        x_0: float32 [B, H, W, C], the 256 grey levels in [-1, 1].
        seeds: integers of 64 bits, [B], one per image; None if `noise_fn` needs none.
        noise_fn: (seeds, t, image_shape) -> N(0, I), [B, H, W, C].

    Returns:
        BitsPerDim; x_0 is clipped in every term, as in the original.

    Raises:
        InputError: images of another type or range, or seeds that are not one integer per image.
        tf.errors.InvalidArgumentError: a term that is not finite, with its timestep and the terms of the batch's images.
    """
    x_0, seeds = _checked(x_0, seeds, needs_seeds=noise_fn is bound_noise)
    T, batch, image_shape = diffusion.num_timesteps, tf.shape(x_0)[0], tuple(x_0.shape[1:])

    def body(t: tf.Tensor, terms: tf.TensorArray, mse: tf.TensorArray) -> tuple:
        t = t - 1
        at_t = tf.fill([batch], t)
        x_t = diffusion.q_sample(x_0, at_t, noise_fn(seeds, t, image_shape))
        output = denoise_fn(x_t, at_t)
        term = losses.vb_terms_bpd(diffusion, output, x_0=x_0, x_t=x_t, t=at_t, clip=True)
        # A plain Assert: tf.debugging.Assert brings ops along that an export does not allow.
        message = ["The bound is not finite at timestep", t, "; its terms, by image:", term]
        is_finite = tf.reduce_all(tf.math.is_finite(term))
        with tf.control_dependencies([tf.raw_ops.Assert(condition=is_finite, data=message, summarize=64)]):
            term = tf.identity(term)
        error = mean_flat((diffusion.p_mean_variance(output, x_t, at_t, clip=True).x_0 - x_0) ** 2)
        return t, terms.write(t, term), mse.write(t, error)

    arrays = (tf.TensorArray(tf.float32, T, element_shape=[None]) for _ in range(2))
    _, terms, mse = tf.while_loop(lambda t, *_: t > 0, body, (tf.constant(T), *arrays), parallel_iterations=1)
    terms, mse = (tf.transpose(a.stack()) for a in (terms, mse))  # [B, T]
    prior = losses.prior_bpd(diffusion, x_0)
    return BitsPerDim(tf.reduce_sum(terms, axis=1) + prior, terms, prior, mse)


def _checked(x_0: Any, seeds: Any, *, needs_seeds: bool) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Images and seeds as tensors. Inside a graph only types and known shapes are looked at: no values exist yet."""
    is_graph = tf.is_tensor(x_0) and not tf.executing_eagerly()
    if not is_graph:
        x_0 = np.asarray(x_0)
        if x_0.dtype != np.float32 or x_0.ndim != 4:
            raise InputError(f"x_0 must be float32 [B, H, W, C] in [-1, 1], found {x_0.dtype} {list(x_0.shape)}.")
        checks.reals("The values of x_0", x_0, low=-1, high=1, shape=x_0.shape)
        x_0 = tf.constant(x_0)
    if seeds is None and not needs_seeds:
        return x_0, None
    if not is_graph:
        return x_0, tf.constant(checks.integers("seeds", seeds, **checks.INT64, shape=x_0.shape[:1]))
    if not tf.is_tensor(seeds):
        seeds = tf.constant(checks.integers("seeds", seeds, **checks.INT64))
    if not seeds.dtype.is_integer or not seeds.shape.is_compatible_with(x_0.shape[:1]):
        raise InputError(
            f"seeds must be one integer per image, found {seeds.dtype.name} {seeds.shape} for {x_0.shape}."
        )
    return x_0, seeds
