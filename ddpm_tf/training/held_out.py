"""The mean loss over held-out images, batch by batch; not part of a run's state."""

import tensorflow as tf

from ddpm_tf.training.skipped import counter


class HeldOut:
    """A running mean.

    batches, images: int64, how many of each since the last reset. loss: float64, the sum over these images.
    """

    def __init__(self) -> None:
        self.batches, self.images = counter(0), counter(0)
        self.loss = tf.Variable(
            0.0, dtype=tf.float64, trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA
        )

    def reset(self) -> None:
        for variable in (self.batches, self.images, self.loss):
            variable.assign(tf.zeros_like(variable))

    def add(self, loss: tf.Tensor, count: tf.Tensor) -> None:
        """Add a batch's sum and number of images."""
        self.batches.assign_add(1)
        self.images.assign_add(tf.cast(count, tf.int64))
        self.loss.assign_add(tf.cast(loss, tf.float64))

    def mean(self) -> tf.Tensor:
        """Over all images since the last reset, float32; NaN if there were none."""
        return tf.cast(self.loss / tf.cast(self.images, tf.float64), tf.float32)
