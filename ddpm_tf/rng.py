"""Random numbers as a function of (seed, step, index, purpose); nothing random is ever stored.

The bits are those of Philox4x32-10 (Salmon et al. 2011), the generator behind `tf.random`'s `alg="philox"`. Philox turns a
key and a counter into 128 random bits. Here every example has a key, its 64-bit seed, and a counter of four 32-bit words:
(block, purpose, index, step). So a replica's draw is a slice of the global draw, and an image is the same in any batch.

Philox is written here in ordinary integer ops, so that eager, graph, XLA and SavedModel give the same integers. `tf.random`
is not used: its kernels take one key per call, and XLA and the ordinary kernels turn the same seed into different floats.
"""

import enum
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import tensorflow as tf

from ddpm_tf import checks
from ddpm_tf.errors import InputError


class Purpose(enum.IntEnum):
    """What a draw is for: the counter's second word, so that two purposes never share a counter.

    Dropout layer k has DROPOUT + k.
    """

    TIMESTEP = 0
    NOISE = 1
    FLIP = 2
    DROPOUT_SEED = 3
    PRIOR = 4
    STEP = 5
    HELD_OUT_TIMESTEP = 6
    HELD_OUT_NOISE = 7
    LABEL_DROPOUT = 8
    DROPOUT = 1 << 16


Integers: TypeAlias = "int | Sequence[int] | np.ndarray | tf.Tensor"  # one for all examples, or one for each

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def bits(seeds: Integers, n: int, *, purpose: int, index: Integers = 0, step: Integers = 0) -> tf.Tensor:
    """Uniform 32-bit integers, n for each example.

    Args:
        seeds: int64 scalar or [B], any value: Philox' key.
        n: how many integers per example.
        purpose: a `Purpose`, or another int below 2^32.
        index: int scalar or [B], position of the example in the global batch; 0 <= index < 2^32.
        step: int scalar or [B], training step or sampling index; 0 <= step < 2^32.

    Returns:
        uint32 [B, n].

    Raises:
        InputError: what is no integer or out of range. The values of tensors are not looked at, since that would wait for
            them; their type is.
    """
    u64 = tf.uint64
    mask = tf.constant(_MASK, u64)

    def column(name: str, value: Integers) -> tf.Tensor:  # [B or 1, 1], a 32-bit word in a uint64
        return tf.reshape(tf.cast(_as_tensor(name, value, 0, _MASK), u64), [-1, 1]) & mask

    seeds = tf.cast(_as_tensor("seeds", seeds, **checks.INT64), tf.int64)
    key = tf.reshape(tf.bitcast(seeds, u64), [-1, 1])
    k0, k1 = key & mask, _shift_right(key, 32)
    index, step = column("index", index), column("step", step)
    batch = tf.zeros_like(key + index + step)  # [B, 1]; adding it gives every word the same B
    blocks = tf.range(-(-n // 4), dtype=tf.int64)
    c0 = tf.cast(blocks[None], u64) + batch  # [B, blocks]
    c1, c2, c3 = batch + tf.constant(int(purpose), u64), batch + index, batch + step
    for i in range(_ROUNDS):
        p0 = c0 * tf.constant(_MULTIPLIERS[0], u64)
        p1 = c2 * tf.constant(_MULTIPLIERS[1], u64)
        r0 = (k0 + tf.constant(i * _WEYL[0] & _MASK, u64)) & mask
        r1 = (k1 + tf.constant(i * _WEYL[1] & _MASK, u64)) & mask
        c0, c2 = _shift_right(p1, 32) ^ c1 ^ r0, _shift_right(p0, 32) ^ c3 ^ r1
        c1, c3 = p1 & mask, p0 & mask
    words = tf.stack([c0, c1, c2, c3], axis=-1)  # [B, blocks, 4]
    words = tf.reshape(words, [-1, 4 * (-(-n // 4))])
    return tf.cast(words[:, :n], tf.uint32)


def normal(
    seeds: Integers, shape: Sequence[int], *, purpose: int, index: Integers = 0, step: Integers = 0
) -> tf.Tensor:
    """Standard normals by the Box-Muller transform of `bits`, whose arguments these are.

    The bits agree everywhere. The normals of two devices or compilers agree to 5e-7, because log, sin and cos may differ in
    the last bit.

    Args:
        shape: the shape of one example.

    Returns:
        float32 [B, *shape], |value| < 5.9.
    """
    size = math.prod(shape)
    pairs = -(-size // 2)
    words = bits(seeds, 2 * pairs, purpose=purpose, index=index, step=step)
    u = _open_uniform(words)
    radius = tf.sqrt(-2.0 * tf.math.log(u[:, :pairs]))
    angle = (2.0 * np.pi) * u[:, pairs:]
    z = tf.concat([radius * tf.cos(angle), radius * tf.sin(angle)], axis=1)
    return tf.reshape(z[:, :size], [-1, *shape])


def integers(seeds: Integers, bound: int, *, purpose: int, index: Integers = 0, step: Integers = 0) -> tf.Tensor:
    """Uniform int32 [B] in [0, bound), 1 <= bound < 2^31, from `bits`; the bias is below bound / 2^32."""
    checks.integer("bound", bound, low=1, high=2**31 - 1)
    words = tf.cast(bits(seeds, 1, purpose=purpose, index=index, step=step)[:, 0], tf.uint64)
    return tf.cast(_shift_right(words * tf.constant(bound, tf.uint64), 32), tf.int32)


def bernoulli(
    seeds: Integers,
    probability: float,
    shape: Sequence[int],
    *,
    purpose: int,
    index: Integers = 0,
    step: Integers = 0,
) -> tf.Tensor:
    """Bool [B, *shape], True with `probability`, which is rounded to a multiple of 2^-16.

    Each 32-bit word of `bits` decides two elements. A word for each would make dropout masks, which are as large as the
    activations, noticeably slower.
    """
    checks.real("probability", probability, low=0, high=1)
    size = math.prod(shape)
    words = bits(seeds, -(-size // 2), purpose=purpose, index=index, step=step)
    halves = tf.concat([words & tf.constant(0xFFFF, tf.uint32), _shift_right(words, 16)], axis=1)
    threshold = tf.constant(round(probability * 65536), tf.uint32)
    return tf.reshape(halves[:, :size] < threshold, [-1, *shape])


def _as_tensor(name: str, values: Integers, low: int, high: int) -> tf.Tensor:
    """One integer or several of them, [B], as a tensor; floats are not rounded, and nothing wraps round."""
    if tf.is_tensor(values):
        tensor = tf.convert_to_tensor(values)
        if not tensor.dtype.is_integer:
            raise InputError(f"{name} must be integers, found a tensor of {tensor.dtype.name}.")
        return tensor
    if np.ndim(values):
        return tf.constant(checks.integers(name, values, low=low, high=high))
    return tf.constant(checks.integer(name, values, low=low, high=high), tf.int64)


def _open_uniform(words: tf.Tensor) -> tf.Tensor:
    """uint32 -> float32 in (0, 1], (its upper 24 bits + 1/2) / 2^24: never 0, so that the logarithm is finite."""
    return (tf.cast(_shift_right(words, 8), tf.float32) + 0.5) * np.float32(2.0**-24)


def _shift_right(words: tf.Tensor, places: int) -> tf.Tensor:
    return tf.bitwise.right_shift(words, tf.constant(places, words.dtype))
