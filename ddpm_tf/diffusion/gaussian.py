"""Gaussians in TensorFlow, and the one place where a float64 table becomes float32."""

import math

import numpy as np
import tensorflow as tf


def extract(table: np.ndarray, t: tf.Tensor, ndim: int) -> tf.Tensor:
    """The entries of a table at timesteps t, shaped to broadcast against a batch of `ndim` dimensions.

    Args:
        table: float64 numpy [T].
        t: int32 [B], 0 <= t < T.
        ndim: rank of the batch, B included.

    Returns:
        float32 [B, 1, ..., 1]. Rounding to float32 happens here and nowhere else: 1 - alphas_cumprod
        computed in float32 is wrong by 1.7e-4, relative, at t = 0.
    """
    values = tf.gather(tf.constant(table, tf.float32), t)
    return tf.reshape(values, [-1] + [1] * (ndim - 1))


def mean_flat(x: tf.Tensor) -> tf.Tensor:
    """Mean over every dimension but the first: [B, ...] -> [B]."""
    return tf.reduce_mean(x, axis=list(range(1, len(x.shape))))


def normal_kl(
    mean_1: tf.Tensor, log_variance_1: tf.Tensor, mean_2: tf.Tensor | float, log_variance_2: tf.Tensor | float
) -> tf.Tensor:
    """KL(N(mean_1, exp(log_variance_1)) || N(mean_2, exp(log_variance_2))), elementwise, nats."""
    return 0.5 * (
        -1.0
        + log_variance_2
        - log_variance_1
        + tf.exp(log_variance_1 - log_variance_2)
        + (mean_1 - mean_2) ** 2 * tf.exp(-log_variance_2)
    )


def approx_standard_normal_cdf(x: tf.Tensor) -> tf.Tensor:
    """Phi(x) by the tanh approximation of the release; wrong by at most 3e-4."""
    return 0.5 * (1.0 + tf.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: tf.Tensor, *, mean: tf.Tensor, log_scale: tf.Tensor) -> tf.Tensor:
    """log of the mass that N(mean, exp(log_scale)^2) gives to the 1/255-wide half-open bin around x (Eq. 13), nats.

    Args:
        x: [...], the 256 grey levels in [-1, 1]; the bins at -1 and 1 reach to infinity.
        mean, log_scale: broadcast against x; log_scale is the log of a standard deviation.
    """
    centered, inverse = x - mean, tf.exp(-log_scale)
    cdf_above = approx_standard_normal_cdf(inverse * (centered + 1.0 / 255.0))
    cdf_below = approx_standard_normal_cdf(inverse * (centered - 1.0 / 255.0))

    def safe_log(p: tf.Tensor) -> tf.Tensor:
        return tf.math.log(tf.maximum(p, 1e-12))

    return tf.where(
        x < -0.999,
        safe_log(cdf_above),
        tf.where(x > 0.999, safe_log(1.0 - cdf_below), safe_log(cdf_above - cdf_below)),
    )
