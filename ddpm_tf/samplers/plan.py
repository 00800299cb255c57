"""Plans: the moves between noise levels that a sampler makes."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf


class Move(NamedTuple):
    """One move for every image of a batch: the noise levels it leads from and to, int32 [B].

    Level 0 is the clean image, level S is x_T. The image at level k > 0 is x_t at index i = k - 1 of the sampler's chain.
    """

    start: tf.Tensor
    end: tf.Tensor


class Plan(NamedTuple):
    """The moves in the order in which they are made: start and end levels, int [M]."""

    start: np.ndarray
    end: np.ndarray

    @property
    def num_moves(self) -> int:
        return len(self.start)

    def last_steps(self, num_steps: int) -> "Plan":
        """The end of the plan, from the num_steps-th last move that leads down. Its noise is that of the whole plan."""
        first = np.flatnonzero(self.end < self.start)[-num_steps]
        return Plan(self.start[first:], self.end[first:])

    def move(self, position: tf.Tensor) -> Move:
        """The moves at `position`, int32 [B], counted from the end of the plan: 0 is the last move."""
        return Move(*(tf.gather(tf.constant(levels[::-1], tf.int32), position) for levels in self))


def descending(num_steps: int) -> Plan:
    """From x_T to the clean image, one level at a time: S -> S-1 -> ... -> 0."""
    levels = np.arange(num_steps, -1, -1)
    return Plan(levels[:-1], levels[1:])


def ascending(num_steps: int) -> Plan:
    """From the clean image to x_T, one level at a time: 0 -> 1 -> ... -> S."""
    levels = np.arange(num_steps + 1)
    return Plan(levels[:-1], levels[1:])
