"""The exponential moving average of the weights, kept in a second network."""

from typing import Any

import tensorflow as tf

from ddpm_tf.networks.contract import Network


def make_ema_network(network: Network) -> Network:
    """A non-trainable twin of `network` with the same weights, in float32 whatever the network computes in."""
    config = network.get_config()
    if "dtype" in config:
        config["dtype"] = "float32"
    network_class: Any = type(network)
    twin = network_class.from_config(config)
    twin.trainable = False
    twin.set_weights(network.get_weights())
    return twin


def update_ema(ema_variables: list, variables: list, decay: float) -> None:
    """ema <- ema - (1 - decay) (ema - value), from the first step, without debiasing; inside a replica context.

    Averages are written on every replica from that replica's own (equal) weights.
    """

    def update(strategy: tf.distribute.StrategyExtended, averages: list, values: list) -> None:
        for average, value in zip(averages, values, strict=True):
            strategy.extended.update(average, step, args=(value,))

    def step(average: tf.Variable, value: tf.Tensor) -> None:
        # a - (1 - decay) (a - v), in one kernel less than by assign_sub
        tf.raw_ops.ResourceApplyGradientDescent(var=average.handle, alpha=1.0 - decay, delta=average - value)

    values = [v.value for v in variables]
    averages = [v.value for v in ema_variables]
    tf.distribute.get_replica_context().merge_call(update, args=(averages, values))
