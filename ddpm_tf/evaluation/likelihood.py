"""The variational bound in bits/dim, term by term (Eq. 5; Table 1's NLL)."""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from ddpm_tf import rng
from ddpm_tf.diffusion import losses
from ddpm_tf.diffusion.gaussian import mean_flat
from ddpm_tf.diffusion.process import GaussianDiffusion


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
    seeds: tf.Tensor,
    *,
    noise_fn: Callable[..., tf.Tensor] = bound_noise,
) -> BitsPerDim:
    """An upper bound on -log2 p(x_0) per pixel and channel, with one draw of x_t for each of the T timesteps.

    Args:
        diffusion: GaussianDiffusion, over the whole chain.
        denoise_fn: (x_t [B, H, W, C], t int32 [B]) -> network output.
        x_0: float32 [B, H, W, C], the 256 grey levels in [-1, 1].
        seeds: int64 [B], one per image.
        noise_fn: (seeds, t, image_shape) -> N(0, I), [B, H, W, C].

    Returns:
        BitsPerDim; x_0 is clipped in every term, as in the original.

    Raises:
        tf.errors.InvalidArgumentError: a term that is not finite, with its timestep and the terms of the batch's images.
    """
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
