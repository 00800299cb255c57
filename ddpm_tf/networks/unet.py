"""The U-Net of Ho et al. 2020 (appendix B): 35.7 M parameters for CIFAR-10, 114 M for 256x256."""

from typing import Any

import keras
import tensorflow as tf

from ddpm_tf import checks
from ddpm_tf.errors import InputError
from ddpm_tf.networks.contract import Inputs
from ddpm_tf.networks.encoder import SIZE, Encoder, check_sizes
from ddpm_tf.networks.layers import ZERO_SCALE, ResBlock, Upsample, swish


@keras.saving.register_keras_serializable(package="ddpm_tf")
class UNet(Encoder):
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
        super().__init__(
            image_shape,
            ch=ch,
            ch_mult=ch_mult,
            num_res_blocks=num_res_blocks,
            attn_resolutions=attn_resolutions,
            dropout=dropout,
            resamp_with_conv=resamp_with_conv,
            num_classes=num_classes,
            block_size=block_size,
            theta=theta,
            num_groups=num_groups,
            remat=remat,
            seed=seed,
            dtype=dtype,
            name=name,
            trainable=trainable,
        )
        channels = self.image_shape[-1]
        self.out_channels = channels if out_channels is None else checks.integer("out_channels", out_channels, **SIZE)
        self._make_layers()
        # Variables are made by one symbolic call, so that their paths carry the names of all parents.
        inputs = {
            "x_t": keras.KerasTensor((None, *self.image_shape)),
            "t": keras.KerasTensor((None,), "int32"),
        }
        if self.num_classes is not None:
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
        check_sizes(
            image_shape,
            ch=ch,
            ch_mult=ch_mult,
            num_res_blocks=num_res_blocks,
            attn_resolutions=attn_resolutions,
            dropout=dropout,
            block_size=block_size,
            theta=theta,
            num_groups=num_groups,
            resamp_with_conv=resamp_with_conv,
            remat=remat,
            num_classes=num_classes,
            is_unet=True,
        )

    def _make_layers(self) -> None:
        """The way down, and the steps of `up`, in the order of the original."""
        self._make_way_down(self.num_classes)
        self.up = []
        levels = len(self.ch_mult)
        skips = [self.ch]
        for i in range(levels):
            ch = self.ch * self.ch_mult[i]
            skips += [ch] * (self.num_res_blocks + (i < levels - 1))
        h = skips[-1]
        for i in reversed(range(levels)):
            ch = self.ch * self.ch_mult[i]
            for j in range(self.num_res_blocks + 1):
                self.up.append(self._res(f"up_{i}.block_{j}", h + skips.pop(), ch))
                if self._has_attn(i):
                    self.up.append(self._attn(f"up_{i}.attn_{j}", ch))
                h = ch
            if i > 0:
                name = f"up_{i}.upsample"
                self.up.append(Upsample(ch, with_conv=self.resamp_with_conv, name=name, **self._common()))
        assert not skips
        self.norm_out = self._norm_out()
        self.conv_out = self._conv("conv_out", self.out_channels * self.block_size**2, ZERO_SCALE)

    def call(self, inputs: Inputs, training: bool = False, dropout_seed: tf.Tensor | None = None) -> tf.Tensor:
        run = self._runner(inputs, training, dropout_seed)
        h, skips = self._go_down(inputs["x_t"], run)
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
        return {**super().get_config(), "out_channels": self.out_channels}
