"""A classifier of noisy images, p(y | x_t, t), for classifier guidance (Dhariwal & Nichol 2021, section 4)."""

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from ddpm_tf import checks
from ddpm_tf.errors import InputError
from ddpm_tf.networks.contract import Inputs
from ddpm_tf.networks.encoder import Encoder, check_sizes
from ddpm_tf.networks.layers import ZERO_SCALE, Block, swish, weight_seed

_HEAD_CH = 64  # channels of an attention head, or more where 64 does not divide them, as Dhariwal & Nichol's


@keras.saving.register_keras_serializable(package="ddpm_tf")
class Classifier(Encoder):
    """The way down of a U-Net, then attention pooling to one logit per class; its logits are nearly 0 at the start.

    Args:
        image_shape: (H, W, C), as of `UNet`.
        num_classes: K, at least 2: the labels are 0 .. K - 1. There is no null class.
        others: as of `UNet`.

    Calling it: network({"x_t": [B, H, W, C], "t": int32 [B]}, training=False, dropout_seed=None) -> float32 logits
    [B, num_classes]. `dropout_seed` is int32 [B, 2], one per example, needed only when training with dropout > 0.

    Original: its residual blocks scale by the time embedding too, resample by themselves, and attend at 32, 16 and 8; here
    the blocks are those of `UNet`, and attn_resolutions chooses.

    Raises:
        InputError: as `UNet`; fewer than two classes.
    """

    classifies = True

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        num_classes: int,
        ch: int = 128,
        ch_mult: tuple[int, ...] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attn_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
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
        self._make_way_down(num_classes=None)
        self.norm_out = self._norm_out()
        self.pool = AttentionPool(self.ch * self.ch_mult[-1], num_classes, name="pool", **self._common())
        # Variables are made by one symbolic call, so that their paths carry the names of all parents.
        self({"x_t": keras.KerasTensor((None, *self.image_shape)), "t": keras.KerasTensor((None,), "int32")})

    @staticmethod
    def check(
        image_shape: tuple[int, int, int],
        *,
        num_classes: int | None,
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
    ) -> None:
        """Refuse fewer than two classes, and sizes that do not fit each other or this machine; make nothing.

        Raises:
            InputError
        """
        if num_classes is None or checks.integer("num_classes", num_classes, low=1, high=2**31 - 2) < 2:
            raise InputError(
                f"A classifier needs at least two classes, found num_classes={num_classes or 0}. Set num_classes to the "
                "number of classes of the data."
            )
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
            is_unet=False,
        )
        pool = 4 * ch * ch_mult[-1] * num_classes
        checks.memory(f"A classifier of {num_classes:,} classes", pool, "Choose fewer classes.")

    def call(self, inputs: Inputs, training: bool = False, dropout_seed: tf.Tensor | None = None) -> tf.Tensor:
        h, _ = self._go_down(inputs["x_t"], self._runner(inputs, training, dropout_seed))
        return tf.cast(self.pool(swish(self.norm_out(h))), tf.float32)  # [B, num_classes]

    def __call__(self, inputs: Inputs, *args: Any, **kwargs: Any) -> tf.Tensor:
        """`call`, after a check that stands here, because Keras adds lines of its own to what `call` raises."""
        if not isinstance(inputs, dict) or inputs.keys() != {"x_t", "t"}:
            raise InputError(
                'A classifier is called with {"x_t": [B, H, W, C], "t": int32 [B]}. It takes no labels, since they are what '
                "it finds."
            )
        return super().__call__(inputs, *args, **kwargs)


class AttentionPool(Block):
    """An image's features to one vector by attention (Radford et al. 2021, CLIP).

    The mean over all positions is put before the positions as one more token, and a learned vector is added to every token.
    Then the mean token asks all tokens, itself included, with several heads. A linear layer follows (zero init).

    Args:
        ch: channels of the input. The heads are as many as leave each of them 64 channels, or a few more.
        out_ch: length of the vector.
    """

    def __init__(self, ch: int, out_ch: int, *, seed: int, name: str, dtype: Any) -> None:
        super().__init__(seed=seed, name=name, dtype=dtype)
        self.num_heads = next(n for n in range(max(1, ch // _HEAD_CH), 0, -1) if ch % n == 0)
        self.q, self.k, self.v = (self.dense(n, ch) for n in "qkv")
        self.proj_out = self.dense("proj_out", out_ch, scale=ZERO_SCALE)

    def build(self, shape: tuple[int | None, int, int, int]) -> None:
        _, height, width, ch = shape
        seed = weight_seed(self.seed, f"{self.name}/positions")
        # Original: these deviations too, so that the vectors' lengths are about 1.
        initial = keras.initializers.RandomNormal(stddev=ch**-0.5, seed=seed)
        self.positions = self.add_weight(name="positions", shape=(height * width + 1, ch), initializer=initial)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        _, height, width, ch = x.shape
        h = ops.reshape(x, (-1, height * width, ch))
        mean = ops.cast(ops.mean(ops.cast(h, "float32"), axis=1, keepdims=True), h.dtype)
        h = ops.add(ops.concatenate([mean, h], axis=1), self.positions)  # [B, 1 + H W, C]
        of_head = ch // self.num_heads
        q = ops.reshape(self.q(h[:, 0]), (-1, self.num_heads, of_head))  # [B, heads, C / heads]
        k, v = (ops.reshape(f(h), (-1, height * width + 1, self.num_heads, of_head)) for f in (self.k, self.v))
        # The query is scaled before the product, which may exceed float16's 65,504.
        scores = ops.cast(ops.einsum("bhc,bkhc->bhk", q * of_head**-0.5, k), "float32")
        weights = ops.cast(ops.softmax(scores, axis=-1), v.dtype)
        return self.proj_out(ops.reshape(ops.einsum("bhk,bkhc->bhc", weights, v), (-1, ch)))  # [B, out_ch]
