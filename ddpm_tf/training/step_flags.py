"""What the replicas tell each other about a step, beside its numbers: named flags in one vector, reduced once."""

from typing import NamedTuple

import tensorflow as tf


class StepFlags(NamedTuple):
    """Flags of one replica or, after an all-reduce, of all.

    not_finite: float32 [replicas], 1 in the place of a replica whose own loss or gradient is not finite.
    stop: float32, 1 where the replica's process wishes to stop after this step; after the all-reduce, how many wish it.
    """

    not_finite: tf.Tensor
    stop: tf.Tensor

    def pack(self) -> tf.Tensor:
        """float32 [replicas + 1]."""
        return tf.concat([self.not_finite, [self.stop]], axis=0)

    @classmethod
    def unpack(cls, vector: tf.Tensor) -> "StepFlags":
        return cls(vector[:-1], vector[-1])
