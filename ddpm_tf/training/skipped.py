"""Counts of the steps that were skipped because their loss or gradient was not finite."""

import tensorflow as tf

_REMEMBERED = 32  # the last skipped steps whose numbers are kept


def counter(value: int | list[int]) -> tf.Variable:
    """An int64 variable that replicas share."""
    return tf.Variable(value, dtype=tf.int64, trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)


class SkippedCounts:
    """The counts, as part of a run's state.

    total: int64; in_a_row: int64, since the last step that was not skipped; steps: int64 [32], the numbers of the last ones,
    -1 before there were any.
    """

    def __init__(self) -> None:
        self.total, self.in_a_row, self.steps = counter(0), counter(0), counter([-1] * _REMEMBERED)

    def state(self) -> dict[str, tf.Variable]:
        return {"skipped/total": self.total, "skipped/in_a_row": self.in_a_row, "skipped/steps": self.steps}

    def update(self, is_skipped: tf.Tensor, is_curable: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        """Count a step; returns the total. is_curable: a smaller loss scale may help, so it does not count as in a row."""
        in_a_row = self.in_a_row + tf.cast(~is_curable, tf.int64)
        self.in_a_row.assign(tf.where(is_skipped, in_a_row, 0))
        moved = tf.concat([self.steps[1:], [tf.cast(step, tf.int64)]], axis=0)
        self.steps.assign(tf.where(is_skipped, moved, self.steps))
        return self.total.assign_add(tf.cast(is_skipped, tf.int64))
