"""The way down: what UNet and Classifier share, from x_t and t to the middle of the network."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from ddpm_tf import checks
from ddpm_tf.errors import InputError
from ddpm_tf.networks.contract import Inputs
from ddpm_tf.networks.layers import AttnBlock, Downsample, ResBlock, TimeEmbedding, initializer

SIZE: dict[str, Any] = {"low": 1, "high": 2**31 - 1}
_MAX_LEVELS, _MAX_BLOCKS = 20, 1000  # the largest published networks have 7 levels and 8 blocks on one


class Encoder(keras.Model):
    """A network that begins with the way down. Its layers are the network's own, so no variable's path names this class.

    Args: see `UNet`.

    Raises:
        InputError: what the network's `check` refuses.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        ch: int,
        ch_mult: tuple[int, ...],
        num_res_blocks: int,
        attn_resolutions: tuple[int, ...],
        dropout: float,
        resamp_with_conv: bool,
        num_classes: int | None,
        block_size: int,
        theta: float,
        num_groups: int,
        remat: bool,
        seed: int,
        dtype: Any,
        name: str,
        trainable: bool,
    ) -> None:
        super().__init__(name=name, dtype=dtype, trainable=trainable)
        self.image_shape = _sizes(image_shape)
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

    def _make_way_down(self, num_classes: int | None) -> None:
        """`temb`, `conv_in`, and the steps of `down` and `mid`, in the order of the original.

        Args:
            num_classes: of the labels that the time embedding takes; None: it takes none.
        """
        self._num_blocks = 0
        self.temb = TimeEmbedding(self.ch, num_classes=num_classes, theta=self.theta, **self._common())
        self.conv_in = self._conv("conv_in", self.ch)
        self.down = []
        h, levels = self.ch, len(self.ch_mult)
        for i in range(levels):
            ch = self.ch * self.ch_mult[i]
            for j in range(self.num_res_blocks):
                self.down.append(self._res(f"down_{i}.block_{j}", h, ch))
                if self._has_attn(i):
                    self.down.append(self._attn(f"down_{i}.attn_{j}", ch))
                h = ch
            if i < levels - 1:
                name = f"down_{i}.downsample"
                self.down.append(Downsample(ch, with_conv=self.resamp_with_conv, name=name, **self._common()))
        self.mid = [self._res("mid.block_1", h, h), self._attn("mid.attn_1", h), self._res("mid.block_2", h, h)]

    def _common(self) -> dict[str, Any]:
        return {"seed": self.seed, "dtype": self.dtype_policy}

    def _res(self, name: str, in_ch: int, ch: int) -> ResBlock:
        self._num_blocks += 1
        common = {**self._common(), "num_groups": self.num_groups}
        return ResBlock(in_ch, ch, dropout=self.dropout, index=self._num_blocks, name=name, **common)

    def _attn(self, name: str, ch: int) -> AttnBlock:
        return AttnBlock(ch, name=name, num_groups=self.num_groups, **self._common())

    def _has_attn(self, level: int) -> bool:
        return self.image_shape[0] // self.block_size >> level in self.attn_resolutions

    def _conv(self, name: str, ch: int, scale: float = 1.0) -> keras.layers.Conv2D:
        return keras.layers.Conv2D(
            ch,
            3,
            padding="same",
            name=name,
            dtype=self.dtype_policy,
            kernel_initializer=initializer(self.seed, name, scale),
        )

    def _norm_out(self) -> keras.layers.GroupNormalization:
        return keras.layers.GroupNormalization(self.num_groups, epsilon=1e-6, name="norm_out", dtype=self.dtype_policy)

    def _runner(self, inputs: Inputs, training: bool, dropout_seed: tf.Tensor | None) -> Callable[..., tf.Tensor]:
        """run(layer, *h): a layer's output on h, with the embedding of t and the dropout that a residual block takes."""
        if training and self.dropout and dropout_seed is None:
            raise InputError("Training with dropout needs dropout_seed, int32 [B, 2].")
        seed = dropout_seed if training else None
        recomputed = tf.recompute_grad if training and self.remat else lambda f: f
        temb = self.temb(inputs["t"], inputs.get("labels"))  # [B, 4 ch]

        def run(layer: keras.layers.Layer, *h: tf.Tensor) -> tf.Tensor:
            if isinstance(layer, ResBlock):
                # Joined inside the block, so that with remat the joined tensor is not kept either.
                return recomputed(lambda temb, *h: layer(keras.ops.concatenate(h, axis=-1), temb, seed))(temb, *h)
            return recomputed(layer)(*h) if isinstance(layer, AttnBlock) else layer(*h)

        return run

    def _go_down(self, x_t: tf.Tensor, run: Callable[..., tf.Tensor]) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """(h after the middle, the skips in the order in which they were made)."""
        h = self.conv_in(x_t if self.block_size == 1 else tf.nn.space_to_depth(x_t, self.block_size))
        # A skip is kept after conv_in, after every residual block with its attention, and after downsampling.
        skips = [h]
        for layer, following in zip(self.down, [*self.down[1:], None], strict=True):
            h = run(layer, h)
            if not isinstance(following, AttnBlock):
                skips.append(h)
        for layer in self.mid:
            h = run(layer, h)
        return h, skips

    def get_config(self) -> dict[str, Any]:
        return {
            "image_shape": self.image_shape,
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


def check_sizes(
    image_shape: tuple[int, int, int],
    *,
    ch: int,
    ch_mult: tuple[int, ...],
    num_res_blocks: int,
    attn_resolutions: tuple[int, ...],
    dropout: float,
    block_size: int,
    theta: float,
    num_groups: int,
    resamp_with_conv: bool,
    remat: bool,
    num_classes: int | None = None,
    is_unet: bool,
) -> None:
    """Refuse sizes that do not fit each other or this machine; make nothing.

    Args:
        num_classes: of the labels that the time embedding takes; None: it takes none.
        is_unet: the network also has a way up.

    Raises:
        InputError
    """
    height, width, _ = _sizes(image_shape)
    ch_mult, attn_resolutions = _tuple("ch_mult", ch_mult), _tuple("attn_resolutions", attn_resolutions)
    if not 1 <= len(ch_mult) <= _MAX_LEVELS:
        raise InputError(f"ch_mult must have 1 to {_MAX_LEVELS} entries, one per level, found {len(ch_mult)}.")
    checks.integers("ch_mult", ch_mult, **SIZE)
    for name, value in (("ch", ch), ("block_size", block_size), ("num_groups", num_groups)):
        checks.integer(name, value, **SIZE)
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
    parameters = least_parameters(ch, ch_mult, num_res_blocks, num_classes, is_unet=is_unet)
    checks.memory(f"{described}, {parameters:,} parameters or more,", 4 * parameters, "Choose a smaller network.")
    first = 4 * ch * (height // block_size) * (width // block_size)
    checks.memory(f"{described}: one image of {height}x{width}", first, "Choose smaller images or a smaller network.")


def _sizes(image_shape: Any) -> tuple[int, int, int]:
    height, width, channels = checks.integers(
        "The sizes in image_shape, (H, W, C),", image_shape, **SIZE, shape=[3]
    ).tolist()
    return height, width, channels


def _tuple(name: str, values: Any) -> tuple[int, ...]:
    """Integers as a tuple of Python's; whether they are in range is checked elsewhere."""
    return tuple(checks.integers(name, values, **checks.INT64).tolist())


def least_parameters(
    ch: int, ch_mult: tuple[int, ...], num_res_blocks: int, num_classes: int | None, *, is_unet: bool
) -> int:
    """A number that the network's parameters are not below, by arithmetic alone: the second convolution of each block and
    the embeddings."""
    blocks = 2 * num_res_blocks + 1 if is_unet else num_res_blocks
    convolutions = sum(blocks * 9 * (ch * m) ** 2 for m in ch_mult)
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
