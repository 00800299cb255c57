"""What every network promises, so that trainer, samplers, conversion and export need not know which network it is."""

from typing import Any, Protocol

import tensorflow as tf

Inputs = dict[str, tf.Tensor]


class Network(Protocol):
    """A registered, serialisable `keras.Model` with these promises. `NETWORKS` lists the networks that keep them.

    Construction: Network(image_shape, *, out_channels=None, seed=0, dtype=None, SETTING=...). All variables are made by the
    constructor. The initial weights are a function of (seed, a weight's name). The initial output is nearly 0, since the
    release scales the initial weights of the last layer by 1e-10.
    `get_config` and `from_config` are a round trip. Variables are float32, and the parts of a variable's path are stable,
    since checkpoints and converters rely on them.

    image_shape: (H, W, C) of x_t.
    out_channels: channels of the output; C, or 2C with a learned variance.
    num_classes: number of labels of a class-conditional network, or None. Label num_classes is the null class: no condition.
    classifies: whether the network is a classifier p(y | x_t, t) and not a predictor of images. A network without the
        attribute is none. A classifier takes neither labels nor out_channels. It has at least two classes and no null class,
        and its output is their logits.
    self_condition: whether the network takes `x_0`, the clean image that the step before predicted. A network without the
        attribute does not take it.
    """

    image_shape: tuple[int, int, int]
    out_channels: int
    num_classes: int | None

    @staticmethod
    def check(image_shape: tuple[int, int, int], **settings: Any) -> None:
        """Refuse settings that do not fit each other or the images; make nothing.

        Raises:
            InputError: naming the setting, with what was found and expected.
        """

    def __call__(self, inputs: Inputs, training: bool = False, dropout_seed: tf.Tensor | None = None) -> tf.Tensor:
        """The prediction.

        Args:
            inputs: x_t [B, H, W, C]; t int32 [B], 0-based; labels int32 [B] with classes; x_0 [B, H, W, C] with
                self-conditioning.
            training: with dropout.
            dropout_seed: int32 [B, 2], one per example; needed when training with dropout. Masks are a function of it.

        Returns:
            float32 [B, H, W, out_channels], of a classifier [B, num_classes], whatever the network computes in.
        """

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""

    def __getattr__(self, name: str) -> Any:
        """What every `keras.Model` has: variables, trainable_variables, get_weights, set_weights, count_params, ..."""
