"""Networks whose answers are known in closed form: the best eps for Gaussian data, alone, in mixtures and in classes."""

import numpy as np
import tensorflow as tf


class Analytic:
    """E[eps | x_t] for x_0 ~ N(mean, covariance); called as a network.

    Args:
        schedule: the trained Schedule.
        mean: of an image's values, [D] or a number for D = 1.
        covariance: [D, D] or a number.
    """

    num_classes, variables = None, ()

    def __init__(self, schedule, mean, covariance):
        self.schedule = schedule
        self.mean = np.atleast_1d(np.asarray(mean, np.float64))
        self.covariance = np.atleast_2d(np.asarray(covariance, np.float64))
        size = len(self.mean)
        self.image_shape = (1, size, 1)
        abar = schedule.alphas_cumprod[:, None, None]
        slope = np.sqrt(1 - abar) * np.linalg.inv(abar * self.covariance + (1 - abar) * np.eye(size))  # [T, D, D]
        self.slope = tf.constant(slope, tf.float32)
        self.root = tf.constant(np.sqrt(schedule.alphas_cumprod), tf.float32)

    def shifted(self, x, t, mean):
        """The answer for another mean, [B, D]."""
        centered = x[:, 0, :, 0] - tf.gather(self.root, t)[:, None] * mean
        return tf.einsum("bij,bj->bi", tf.gather(self.slope, t), centered)[:, None, :, None]

    def __call__(self, inputs, training=False):
        return self.shifted(inputs["x_t"], inputs["t"], tf.constant(self.mean, tf.float32)[None])


class AnalyticClasses(Analytic):
    """Class k has the mean means[k], and the null class the mean `mean`; all have the same covariance."""

    def __init__(self, schedule, mean, means, covariance):
        super().__init__(schedule, mean, covariance)
        self.num_classes = len(means)
        self.means = tf.constant(
            np.append(np.asarray(means, np.float64).reshape(len(means), -1), [self.mean], 0), tf.float32
        )

    def __call__(self, inputs, training=False):
        return self.shifted(inputs["x_t"], inputs["t"], tf.gather(self.means, inputs["labels"]))


class Mixture:
    """E[eps | x_t] for single values from sum_k weights[k] N(means[k], deviations[k]^2), computed in float64."""

    image_shape, num_classes = (1, 1, 1), None

    def __init__(self, schedule, weights, means, deviations):
        self.schedule = schedule
        self.weights, self.means, self.deviations = (np.asarray(v, np.float64) for v in (weights, means, deviations))

    def __call__(self, inputs, training=False):
        abar = tf.gather(tf.constant(self.schedule.alphas_cumprod), inputs["t"])[:, None, None, None, None]
        x = tf.cast(inputs["x_t"], tf.float64)[..., None]
        variance, mean = abar * self.deviations**2 + 1 - abar, tf.sqrt(abar) * self.means
        log_p = np.log(self.weights) - 0.5 * (x - mean) ** 2 / variance - 0.5 * tf.math.log(variance)
        score = tf.reduce_sum(-tf.nn.softmax(log_p, axis=-1) * (x - mean) / variance, axis=-1)
        return tf.cast(-tf.sqrt(1 - abar[..., 0]) * score, tf.float32)


class LinearClassifier:
    """log p(0 | x_t) for p(0 | x_0) proportional to exp(kappa x_0), where x_0 ~ N(mean, deviation^2): linear in x_t.

    The second class has nearly all of the probability, so that the gradient of log p(0 | x_t) is that of its logit.
    """

    image_shape, num_classes, variables = (1, 1, 1), 2, ()

    def __init__(self, schedule, deviation, kappa):
        abar = schedule.alphas_cumprod
        slope = kappa * np.sqrt(abar) * deviation**2 / (abar * deviation**2 + 1 - abar)
        self.slope = tf.constant(slope, tf.float32)

    def __call__(self, inputs, training=False):
        logit = tf.gather(self.slope, inputs["t"]) * inputs["x_t"][:, 0, 0, 0]
        return tf.stack([logit, tf.fill(tf.shape(logit), 1e3)], axis=1)
