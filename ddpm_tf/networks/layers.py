"""The parts of the U-Net of Ho et al. 2020, to the digit of the authors' code."""

import math
import zlib
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from ddpm_tf import rng

# Original: an init scale of 0 means 1e-10; Keras refuses 0.
ZERO_SCALE = 1e-10


def timestep_embedding(t: tf.Tensor, width: int, theta: float = 10000.0) -> tf.Tensor:
    """Sinusoids of t: [sin(t f_k) | cos(t f_k)], f_k = theta^(-k / (width/2 - 1)).

    Args:
        t: int32 [B].
        width: number of columns; an odd width gets a last column of zeros.
        theta: base of the frequencies, above 1.

    Returns:
        float32 [B, width].
    """
    half = width // 2
    # Original: the frequencies are a float32 exp; computed in float64 they differ by 2e-4 at t = 1000.
    exponents = np.arange(half, dtype=np.float32) * np.float32(-math.log(theta) / (half - 1))
    angles = ops.cast(t, "float32")[:, None] * ops.exp(ops.convert_to_tensor(exponents))[None]  # [B, half]
    embedding = ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=1)
    return ops.pad(embedding, [[0, 0], [0, width % 2]])


def initializer(seed: int, name: str, scale: float = 1.0) -> keras.initializers.Initializer:
    """Variance scaling, fan_avg, uniform, drawn from (seed, name): the same weights on every machine."""
    return keras.initializers.VarianceScaling(
        scale=scale, mode="fan_avg", distribution="uniform", seed=weight_seed(seed, name)
    )


def weight_seed(seed: int, name: str) -> int:
    """The seed of one weight's initial value."""
    return zlib.crc32(name.encode()) ^ seed


def swish(x: tf.Tensor) -> tf.Tensor:
    return x * ops.sigmoid(x)


class Block(keras.layers.Layer):
    """A layer whose sublayers are made with names and seeds of their own.

    Args:
        seed: seed of the initial weights.
        name: unique in the network; sublayer `conv1` of block `down_0.block_0` is drawn from
            (seed, "down_0.block_0/conv1").
        dtype: Keras dtype or policy.
        num_groups: of the block's group normalisations.
    """

    def __init__(self, *, seed: int, name: str, dtype: Any, num_groups: int = 32) -> None:
        super().__init__(name=name, dtype=dtype)
        self.seed, self.num_groups = seed, num_groups

    def _init(self, sublayer: str, scale: float = 1.0) -> keras.initializers.Initializer:
        return initializer(self.seed, f"{self.name}/{sublayer}", scale)

    def conv(self, name: str, ch: int, *, stride: int = 1, scale: float = 1.0) -> keras.layers.Conv2D:
        return keras.layers.Conv2D(
            ch,
            3,
            strides=stride,
            padding="same",
            name=name,
            dtype=self.dtype_policy,
            kernel_initializer=self._init(name, scale),
        )

    def dense(self, name: str, ch: int, *, scale: float = 1.0) -> keras.layers.Dense:
        return keras.layers.Dense(ch, name=name, dtype=self.dtype_policy, kernel_initializer=self._init(name, scale))

    def norm(self, name: str) -> keras.layers.GroupNormalization:
        return keras.layers.GroupNormalization(self.num_groups, epsilon=1e-6, name=name, dtype=self.dtype_policy)


class TimeEmbedding(Block):
    """temb = dense1(swish(dense0(sinusoids of t))), [B, 4 ch]; with classes, a label's vector is added.

    Label `num_classes` is the null class: no condition.
    """

    def __init__(
        self, ch: int, *, num_classes: int | None = None, theta: float, seed: int, dtype: Any, name: str = "temb"
    ) -> None:
        super().__init__(seed=seed, name=name, dtype=dtype)
        self.ch, self.theta = ch, theta
        self.dense0 = self.dense("dense0", 4 * ch)
        self.dense1 = self.dense("dense1", 4 * ch)
        self.labels = None
        if num_classes is not None:
            self.labels = keras.layers.Embedding(
                num_classes + 1, 4 * ch, name="labels", dtype=dtype, embeddings_initializer=self._init("labels")
            )

    def call(self, t: tf.Tensor, labels: tf.Tensor | None = None) -> tf.Tensor:
        temb = self.dense1(swish(self.dense0(timestep_embedding(t, self.ch, self.theta))))  # [B, 4 ch]
        return temb if self.labels is None else temb + self.labels(labels)


class ResBlock(Block):
    """norm1, swish, conv1, + temb, norm2, swish, dropout, conv2 (zero init), + shortcut.

    Args:
        in_ch, ch: channels of input and output; a 1x1 shortcut is made when they differ.
        dropout: rate; the mask is drawn statelessly from `dropout_seed` and `index`.
        index: position of this block in the network, so that no two masks are the same.
        num_groups: must be below `ch`. norm2 subtracts the mean over each group, pixels included. In a group of one
            channel, that mean holds all of what temb added, since temb adds the same number to every pixel.
    """

    def __init__(
        self, in_ch: int, ch: int, *, dropout: float, index: int, seed: int, name: str, dtype: Any, num_groups: int
    ) -> None:
        super().__init__(seed=seed, name=name, dtype=dtype, num_groups=num_groups)
        self.ch, self.dropout, self.index = ch, dropout, index
        self.norm1, self.conv1 = self.norm("norm1"), self.conv("conv1", ch)
        self.temb_proj = self.dense("temb_proj", ch)
        self.norm2, self.conv2 = self.norm("norm2"), self.conv("conv2", ch, scale=ZERO_SCALE)
        self.nin_shortcut = self.dense("nin_shortcut", ch) if in_ch != ch else None

    def call(self, x: tf.Tensor, temb: tf.Tensor, dropout_seed: tf.Tensor | None = None) -> tf.Tensor:
        h = self.conv1(swish(self.norm1(x)))
        h = h + self.temb_proj(swish(temb))[:, None, None, :]
        h = swish(self.norm2(h))
        if dropout_seed is not None and self.dropout:
            h = stateless_dropout(h, self.dropout, dropout_seed, self.index)
        h = self.conv2(h)
        shortcut = x if self.nin_shortcut is None else self.nin_shortcut(x)
        return shortcut + h  # [B, H, W, ch]


class AttnBlock(Block):
    """Self-attention over the H W positions, one head, with a residual connection (proj_out: zero init)."""

    def __init__(self, ch: int, *, seed: int, name: str, dtype: Any, num_groups: int) -> None:
        super().__init__(seed=seed, name=name, dtype=dtype, num_groups=num_groups)
        self.ch = ch
        self.norm_in = self.norm("norm")
        self.q, self.k, self.v = (self.dense(n, ch) for n in "qkv")
        self.proj_out = self.dense("proj_out", ch, scale=ZERO_SCALE)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        h = self.norm_in(x)
        _, height, width, ch = x.shape
        q, k, v = (ops.reshape(f(h), (-1, height * width, ch)) for f in (self.q, self.k, self.v))
        scale = ch**-0.5
        if self.compute_dtype == "float16":  # the unscaled product may exceed its 65,504
            q, scale = q * scale, 1.0
        scores = ops.cast(ops.einsum("bqc,bkc->bqk", q, k), "float32") * scale
        weights = ops.cast(ops.softmax(scores, axis=-1), v.dtype)
        h = ops.reshape(ops.einsum("bqk,bkc->bqc", weights, v), (-1, height, width, ch))
        return x + self.proj_out(h)


class Downsample(Block):
    """Half the height and width: 3x3 convolution of stride 2 (SAME pads bottom and right), or 2x2 average."""

    def __init__(self, ch: int, *, with_conv: bool, seed: int, name: str, dtype: Any) -> None:
        super().__init__(seed=seed, name=name, dtype=dtype)
        self.op = self.conv("conv", ch, stride=2) if with_conv else keras.layers.AveragePooling2D(2, dtype=dtype)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.op(x)


class Upsample(Block):
    """Twice the height and width: nearest neighbour, then a 3x3 convolution unless `with_conv` is False."""

    def __init__(self, ch: int, *, with_conv: bool, seed: int, name: str, dtype: Any) -> None:
        super().__init__(seed=seed, name=name, dtype=dtype)
        self.op = self.conv("conv", ch) if with_conv else None

    def call(self, x: tf.Tensor) -> tf.Tensor:
        x = ops.repeat(ops.repeat(x, 2, axis=1), 2, axis=2)
        return x if self.op is None else self.op(x)


def stateless_dropout(x: tf.Tensor, rate: float, dropout_seed: tf.Tensor, index: int) -> tf.Tensor:
    """Inverted dropout whose mask is a function of the example's seed and the layer's index.

    Args:
        x: [B, H, W, C]. rate: probability of a zero. dropout_seed: int32 [B, 2]. index: Python int.
    """
    words = tf.bitcast(dropout_seed, tf.int64)  # [B]
    dropped = rng.bernoulli(words, rate, tuple(x.shape[1:]), purpose=rng.Purpose.DROPOUT + index)
    return tf.where(dropped, tf.zeros((), x.dtype), x * tf.cast(1.0 / (1.0 - rate), x.dtype))
