"""The exponential moving average of the weights, kept in a second network."""

import tensorflow as tf


def make_ema_network(network):
    """A non-trainable twin of `network` with the same weights, in float32 whatever the network computes in."""
    config = network.get_config()
    if "dtype" in config:
        config["dtype"] = "float32"
    twin = type(network).from_config(config)
    twin.trainable = False
    twin.set_weights(network.get_weights())
    return twin


def update_ema(ema_variables, variables, decay):
    """ema <- ema - (1 - decay) (ema - value), from the first step, without debiasing; inside a replica context.

    Averages are written on every replica from that replica's own (equal) weights.
    """

    def update(strategy, averages, values):
        for average, value in zip(averages, values, strict=True):
            strategy.extended.update(average, step, args=(value,))

    def step(average, value):  # a - (1 - decay) (a - v), in one kernel less than by assign_sub
        tf.raw_ops.ResourceApplyGradientDescent(var=average.handle, alpha=1.0 - decay, delta=average - value)

    values = [v.value for v in variables]
    averages = [v.value for v in ema_variables]
    tf.distribute.get_replica_context().merge_call(update, args=(averages, values))
