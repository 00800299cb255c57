"""Guidance: what makes a class-conditional network's answer stronger."""

import tensorflow as tf

from ddpm_tf.networks.contract import Inputs, Network


def classifier_free_output(network: Network, inputs: Inputs, weight: tf.Tensor) -> tf.Tensor:
    """unconditional + weight (conditional - unconditional), Ho & Salimans 2022, from one batch of 2B.

    Args:
        inputs: the network's inputs with `labels`, a batch of B.
        weight: float32 [B]; 0 is unconditional, 1 conditional, above 1 stronger.

    Returns:
        The network's output, [B, H, W, out_channels]. A learned variance (the channels after the image's) is the
        conditional one's: guidance changes the mean alone.
    """
    labels = inputs["labels"]
    both = {name: tf.concat([value, value], axis=0) for name, value in inputs.items()}
    both["labels"] = tf.concat([labels, tf.fill(tf.shape(labels), network.num_classes)], axis=0)
    output, batch = network(both, training=False), tf.shape(labels)[0]
    conditional, unconditional = output[:batch], output[batch:]
    guided = unconditional + tf.reshape(weight, [-1, 1, 1, 1]) * (conditional - unconditional)
    channels = inputs["x_t"].shape[-1]
    return tf.concat([guided[..., :channels], conditional[..., channels:]], axis=-1)
