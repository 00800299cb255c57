"""The U-Net of Ho et al. 2020 (appendix B): 35.7 M parameters for CIFAR-10, 114 M for 256x256."""

import functools
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from ddpm_tf import checks
from ddpm_tf.errors import InputError
from ddpm_tf.networks.contract import Inputs
from ddpm_tf.networks.layers import (
    ZERO_SCALE,
    AttnBlock,
    Downsample,
    ResBlock,
    TimeEmbedding,
    Upsample,
    initializer,
    swish,
)

_SIZE: dict[str, Any] = {"low": 1, "high": 2**31 - 1}
_MAX_LEVELS, _MAX_BLOCKS = 20, 1000  # the largest published networks have 7 levels and 8 blocks on one


@keras.saving.register_keras_serializable(package="ddpm_tf")
class UNet(keras.Model):
    """A U-Net with residual blocks, self-attention and a timestep embedding; its output is 0 at the start.

    Args:
        image_shape: (H, W, C); C >= 1, H and W divisible by 2^(levels - 1), not necessarily equal.
        out_channels: channels of the output; None: C.
        ch: channels of the first level, a multiple of `num_groups`.
        ch_mult: factor of `ch` per level.
        num_res_blocks: residual blocks per level on the way down (one more on the way up).
        attn_resolutions: heights at which every residual block is followed by self-attention.
        dropout: rate inside the residual blocks.
        resamp_with_conv: resample with a convolution (else average pooling and nearest neighbour alone).
        block_size: each block_size x block_size block of pixels becomes one pixel with more channels before the first
            convolution, and back after the last; the heights of the levels are counted after it. Saves memory.
        num_classes: number of labels 0 .. num_classes - 1 of a class-conditional network, which also takes the null
            label num_classes; None: unconditional.
        theta: base of the time embedding's frequencies, above 1; the paper's is 10000.
        num_groups: groups of every group normalisation; the paper's is 32. Choose it so that every level has at least two
            channels per group. A block whose groups have one channel each does not see t or the label: its normalisation
            subtracts what they added. Such a network is made, with a warning, so that older weights can still be read.
        remat: gradient checkpointing: the activations inside residual and attention blocks are not kept for the gradient
            but computed again. Less memory, more time; the same loss and gradients but for rounding.
        seed: of the initial weights.
        dtype: a Keras dtype or policy; normalisation statistics and softmax stay float32.

    Calling it: network({"x_t": [B, H, W, C], "t": int32 [B], ("labels": int32 [B])}, training=False,
    dropout_seed=None) -> float32 [B, H, W, out_channels]. `dropout_seed` is int32 [B, 2], one per example,
    needed only when training with dropout > 0.

    Raises:
        InputError: sizes that the levels do not divide, channels that the groups do not divide, attention at
            a height that no level has, a dropout rate outside [0, 1), theta of 1 or less.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        out_channels: int | None = None,
        ch: int = 128,
        ch_mult: tuple[int, ...] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attn_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        num_classes: int | None = None,
        block_size: int = 1,
        theta: float = 10000.0,
        num_groups: int = 32,
        remat: bool = False,
        seed: int = 0,
        dtype: Any = None,
        name: str = "model",
        trainable: bool = True,
    ) -> None:
        super().__init__(name=name, dtype=dtype, trainable=trainable)
        height, width, channels = _sizes(image_shape)
        self.image_shape = (height, width, channels)
        self.out_channels = channels if out_channels is None else checks.integer("out_channels", out_channels, **_SIZE)
        checks.integer("seed", seed, **checks.INT64)
        if num_classes is not None:
            num_classes = checks.integer("num_classes", num_classes, low=1, high=2**31 - 2)
        self.ch, self.ch_mult, self.num_res_blocks = ch, _tuple("ch_mult", ch_mult), num_res_blocks
        self.attn_resolutions, self.dropout = _tuple("attn_resolutions", attn_resolutions), dropout
        self.resamp_with_conv, self.num_classes = resamp_with_conv, num_classes
        self.block_size, self.theta, self.num_groups = block_size, theta, num_groups
        self.remat, self.seed = remat, seed
        self.check(
            self.image_shape,
            ch=ch,
            ch_mult=self.ch_mult,
            num_res_blocks=num_res_blocks,
            attn_resolutions=self.attn_resolutions,
            dropout=dropout,
            block_size=block_size,
            theta=theta,
            num_groups=num_groups,
            resamp_with_conv=resamp_with_conv,
            remat=remat,
            num_classes=num_classes,
        )
        warn_of_single_channels(ch * min(self.ch_mult), num_groups)
        self._make_layers()
        # Variables are made by one symbolic call, so that their paths carry the names of all parents.
        inputs = {
            "x_t": keras.KerasTensor((None, *self.image_shape)),
            "t": keras.KerasTensor((None,), "int32"),
        }
        if num_classes is not None:
            inputs["labels"] = keras.KerasTensor((None,), "int32")
        self(inputs)

    @staticmethod
    def check(
        image_shape: tuple[int, int, int],
        *,
        ch: int,
        ch_mult: tuple[int, ...],
        num_res_blocks: int,
        attn_resolutions: tuple[int, ...],
        dropout: float,
        block_size: int,
        theta: float = 10000.0,
        num_groups: int = 32,
        resamp_with_conv: bool = True,
        remat: bool = False,
        num_classes: int | None = None,
    ) -> None:
        """Refuse sizes that do not fit each other or this machine; make nothing.

        Raises:
            InputError
        """
        height, width, channels = _sizes(image_shape)
        ch_mult, attn_resolutions = _tuple("ch_mult", ch_mult), _tuple("attn_resolutions", attn_resolutions)
        if not 1 <= len(ch_mult) <= _MAX_LEVELS:
            raise InputError(f"ch_mult must have 1 to {_MAX_LEVELS} entries, one per level, found {len(ch_mult)}.")
        checks.integers("ch_mult", ch_mult, **_SIZE)
        for name, value in (("ch", ch), ("block_size", block_size), ("num_groups", num_groups)):
            checks.integer(name, value, **_SIZE)
        checks.integer("num_res_blocks", num_res_blocks, low=1, high=_MAX_BLOCKS)
        for name, value in (("resamp_with_conv", resamp_with_conv), ("remat", remat)):
            checks.boolean(name, value)
        if checks.real("theta", theta) <= 1:
            raise InputError(f"theta must be above 1, found {theta}.")
        factor = block_size * 2 ** (len(ch_mult) - 1)
        if height % factor or width % factor:
            blocks = f"cut into {block_size}x{block_size} blocks and " if block_size > 1 else ""
            raise InputError(
                f"An image of {height}x{width} cannot be {blocks}halved {len(ch_mult) - 1} times: height and "
                f"width must be multiples of {factor}. Change the image size, ch_mult (it has {len(ch_mult)} levels)"
                f"{' or block_size' if block_size > 1 else ''}."
            )
        if ch % num_groups:
            raise InputError(
                f"num_groups={num_groups} normalisation groups do not divide ch={ch} channels; use a multiple of "
                f"{num_groups} for ch, or fewer groups."
            )
        if ch < 4:
            raise InputError(f"ch must be at least 4, since the time embedding has ch/2 frequencies; found {ch}.")
        heights = [height // block_size >> level for level in range(len(ch_mult))]
        missing = [r for r in attn_resolutions if r not in heights]
        if missing:
            raise InputError(f"attn_resolutions names height {missing[0]}, but the levels have heights {heights}.")
        if not 0 <= checks.real("dropout", dropout) < 1:
            raise InputError(f"dropout must be within [0, 1), found {dropout}.")
        described = f"A network of ch={ch}, ch_mult={ch_mult} and num_res_blocks={num_res_blocks}"
        parameters = _least_parameters(ch, ch_mult, num_res_blocks, num_classes)
        checks.memory(f"{described}, {parameters:,} parameters or more,", 4 * parameters, "Choose a smaller network.")
        first = 4 * ch * (height // block_size) * (width // block_size)
        checks.memory(
            f"{described}: one image of {height}x{width}", first, "Choose smaller images or a smaller network."
        )

    def _make_layers(self) -> None:
        """One list of steps per path: ("res" | "attn" | "resample", layer), in the order of the original."""
        common = {"seed": self.seed, "dtype": self.dtype_policy}
        grouped = {**common, "num_groups": self.num_groups}
        levels = len(self.ch_mult)
        self._num_blocks = 0

        def res(name: str, in_ch: int, ch: int) -> ResBlock:
            self._num_blocks += 1
            return ResBlock(in_ch, ch, dropout=self.dropout, index=self._num_blocks, name=name, **grouped)

        def attn(name: str, ch: int) -> AttnBlock:
            return AttnBlock(ch, name=name, **grouped)

        def has_attn(level: int) -> bool:
            return self.image_shape[0] // self.block_size >> level in self.attn_resolutions

        self.temb = TimeEmbedding(self.ch, num_classes=self.num_classes, theta=self.theta, **common)
        self.conv_in = self._conv("conv_in", self.ch)
        self.down, self.up = [], []
        h, skips = self.ch, [self.ch]
        for i in range(levels):
            ch = self.ch * self.ch_mult[i]
            for j in range(self.num_res_blocks):
                self.down.append(res(f"down_{i}.block_{j}", h, ch))
                if has_attn(i):
                    self.down.append(attn(f"down_{i}.attn_{j}", ch))
                h = ch
                skips.append(h)
            if i < levels - 1:
                self.down.append(Downsample(ch, with_conv=self.resamp_with_conv, name=f"down_{i}.downsample", **common))
                skips.append(h)
        self.mid = [res("mid.block_1", h, h), attn("mid.attn_1", h), res("mid.block_2", h, h)]
        for i in reversed(range(levels)):
            ch = self.ch * self.ch_mult[i]
            for j in range(self.num_res_blocks + 1):
                self.up.append(res(f"up_{i}.block_{j}", h + skips.pop(), ch))
                if has_attn(i):
                    self.up.append(attn(f"up_{i}.attn_{j}", ch))
                h = ch
            if i > 0:
                self.up.append(Upsample(ch, with_conv=self.resamp_with_conv, name=f"up_{i}.upsample", **common))
        assert not skips
        self.norm_out = keras.layers.GroupNormalization(
            self.num_groups, epsilon=1e-6, name="norm_out", dtype=self.dtype_policy
        )
        self.conv_out = self._conv("conv_out", self.out_channels * self.block_size**2, ZERO_SCALE)

    def _conv(self, name: str, ch: int, scale: float = 1.0) -> keras.layers.Conv2D:
        return keras.layers.Conv2D(
            ch,
            3,
            padding="same",
            name=name,
            dtype=self.dtype_policy,
            kernel_initializer=initializer(self.seed, name, scale),
        )

    def call(self, inputs: Inputs, training: bool = False, dropout_seed: tf.Tensor | None = None) -> tf.Tensor:
        if training and self.dropout and dropout_seed is None:
            raise InputError("Training with dropout needs dropout_seed, int32 [B, 2].")
        seed = dropout_seed if training else None
        recomputed = tf.recompute_grad if training and self.remat else lambda f: f
        temb = self.temb(inputs["t"], inputs.get("labels"))  # [B, 4 ch]
        x_t = inputs["x_t"]
        h = self.conv_in(x_t if self.block_size == 1 else tf.nn.space_to_depth(x_t, self.block_size))

        def run(layer: keras.layers.Layer, *h: tf.Tensor) -> tf.Tensor:
            if isinstance(layer, ResBlock):
                # Joined inside the block, so that with remat the joined tensor is not kept either.
                return recomputed(lambda temb, *h: layer(keras.ops.concatenate(h, axis=-1), temb, seed))(temb, *h)
            return recomputed(layer)(*h) if isinstance(layer, AttnBlock) else layer(*h)

        # A skip is kept after conv_in, after every residual block with its attention, and after downsampling.
        skips = [h]
        for layer, following in zip(self.down, [*self.down[1:], None], strict=True):
            h = run(layer, h)
            if not isinstance(following, AttnBlock):
                skips.append(h)
        for layer in self.mid:
            h = run(layer, h)
        for layer in self.up:
            h = run(layer, h, skips.pop()) if isinstance(layer, ResBlock) else run(layer, h)
        assert not skips
        h = tf.cast(self.conv_out(swish(self.norm_out(h))), tf.float32)
        return h if self.block_size == 1 else tf.nn.depth_to_space(h, self.block_size)

    def __call__(self, inputs: Inputs, *args: Any, **kwargs: Any) -> tf.Tensor:
        """`call`, after checks of what Keras would not see: it takes a label of -1 for the last one.

        They stand here, because Keras adds lines of its own to what `call` raises. Labels are compared with num_classes only
        outside of graphs. Inside, those who build the graph check them.
        """
        if not isinstance(inputs, dict) or not {"x_t", "t"} <= inputs.keys():
            raise InputError('A network is called with {"x_t": [B, H, W, C], "t": int32 [B], ("labels": int32 [B])}.')
        labels = inputs.get("labels")
        if (labels is None) != (self.num_classes is None):
            raise InputError(
                "A class-conditional network needs labels."
                if labels is None
                else "Labels were given, but the network is unconditional (num_classes=None)."
            )
        if (
            labels is not None
            and self.num_classes is not None
            and tf.executing_eagerly()
            and not isinstance(labels, keras.KerasTensor)
        ):
            checks.integers("labels", labels, low=0, high=self.num_classes, shape=tuple(inputs["x_t"].shape[:1]))
        return super().__call__(inputs, *args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        return {
            "image_shape": self.image_shape,
            "out_channels": self.out_channels,
            "ch": self.ch,
            "ch_mult": self.ch_mult,
            "num_res_blocks": self.num_res_blocks,
            "attn_resolutions": self.attn_resolutions,
            "dropout": self.dropout,
            "resamp_with_conv": self.resamp_with_conv,
            "num_classes": self.num_classes,
            "block_size": self.block_size,
            "theta": self.theta,
            "num_groups": self.num_groups,
            "remat": self.remat,
            "seed": self.seed,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
            "name": self.name,
            "trainable": self.trainable,
        }


def _sizes(image_shape: Any) -> tuple[int, int, int]:
    height, width, channels = checks.integers(
        "The sizes in image_shape, (H, W, C),", image_shape, **_SIZE, shape=[3]
    ).tolist()
    return height, width, channels


def _tuple(name: str, values: Any) -> tuple[int, ...]:
    """Integers as a tuple of Python's; whether they are in range is checked elsewhere."""
    return tuple(checks.integers(name, values, **checks.INT64).tolist())


def _least_parameters(ch: int, ch_mult: tuple[int, ...], num_res_blocks: int, num_classes: int | None) -> int:
    """A number that the network's parameters are not below, by arithmetic alone: the second convolution of each block and
    the embeddings."""
    convolutions = sum((2 * num_res_blocks + 1) * 9 * (ch * m) ** 2 for m in ch_mult)
    return convolutions + 20 * ch**2 + 4 * ch * ((num_classes or -1) + 1)


@functools.cache  # said once, though a trainer makes two networks
def warn_of_single_channels(ch: int, num_groups: int) -> None:
    """Log that blocks of `ch` channels do not see t, if their groups have one channel each."""
    if ch == num_groups:
        logging.warning(
            "Blocks of %d channels with num_groups=%d do not see the timestep or the label: a normalisation group of one "
            "channel subtracts what they added. For a new network choose num_groups=%d or fewer.",
            ch,
            num_groups,
            max(1, ch // 4),
        )
