"""Guidance: what makes the answer to a label stronger, by the network itself or by a classifier."""

from typing import Any

import numpy as np
import tensorflow as tf

from ddpm_tf.diffusion.gaussian import extract
from ddpm_tf.diffusion.process import LEAST_ALPHAS_CUMPROD
from ddpm_tf.diffusion.schedules import Schedule
from ddpm_tf.errors import InputError
from ddpm_tf.networks.contract import Inputs, Network


def classifier_free_output(network: Network, inputs: Inputs, weight: tf.Tensor, *, rescale: float = 0.0) -> tf.Tensor:
    """unconditional + weight (conditional - unconditional), Ho & Salimans 2022, from one batch of 2B.

    Args:
        inputs: the network's inputs with `labels`, a batch of B.
        weight: float32 [B]; 0 is unconditional, 1 conditional, above 1 stronger. Ho & Salimans' own w is this weight - 1.
        rescale: how far each image's output gets back the standard deviation of the conditional one, 0..1 (Lin et al. 2023,
            Eqs. 15 and 16).

    Returns:
        The network's output, [B, H, W, out_channels]. A learned variance (the channels after the image's) is the
        conditional one's, since guidance changes the mean alone; at weight 0 it is the unconditional one's.
    """
    labels = inputs["labels"]
    both = {name: tf.concat([value, value], axis=0) for name, value in inputs.items()}
    both["labels"] = tf.concat([labels, tf.fill(tf.shape(labels), network.num_classes)], axis=0)
    output, batch, channels = network(both, training=False), tf.shape(labels)[0], inputs["x_t"].shape[-1]
    with_label, without = output[:batch], output[batch:]
    conditional, unconditional = with_label[..., :channels], without[..., :channels]
    weight = tf.reshape(weight, [-1, 1, 1, 1])
    guided = unconditional + weight * (conditional - unconditional)
    if rescale:
        rescaled = guided * (_deviation(conditional) / tf.maximum(_deviation(guided), 1e-12))
        guided = rescale * rescaled + (1.0 - rescale) * guided
    variance = tf.where(weight == 0, without[..., channels:], with_label[..., channels:])
    return tf.concat([guided, variance], axis=-1)


def _deviation(x: tf.Tensor) -> tf.Tensor:
    """The standard deviation of each image, [B, 1, 1, 1]."""
    mean = tf.reduce_mean(x, axis=[1, 2, 3], keepdims=True)
    return tf.sqrt(tf.reduce_mean((x - mean) ** 2, axis=[1, 2, 3], keepdims=True))


def weight_at(weight: tf.Tensor, t: tf.Tensor, interval: tuple[int, int] | None, outside: float) -> tf.Tensor:
    """The weight at trained timesteps t, int32 [B], within the interval of guidance; `outside` elsewhere; float32 [B]."""
    if interval is None:
        return weight
    return tf.where((t >= interval[0]) & (t <= interval[1]), weight, outside)


class ClassifierGuided:
    """A network beside a classifier that guides it (Dhariwal & Nichol 2021); made by `guided_by`.

    It has the attributes of the network. `num_classes` is the classifier's, and `variables` are those of both.
    """

    def __init__(self, network: Network, classifier: Any) -> None:
        self.network, self.classifier = network, classifier
        self.num_classes = classifier.num_classes
        self.variables = [*network.variables, *classifier.variables]

    def __call__(self, *args: Any, **kwargs: Any) -> tf.Tensor:
        return self.network(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "network":  # not set yet, in a copy
            raise AttributeError(name)
        return getattr(self.network, name)


def guided_by(network: Network, classifier: Any) -> Any:
    """A network that is guided by a classifier, for `sample`, `generate` and the export.

    Args:
        classifier: classifier({"x_t": [B, H, W, C], "t": int32 [B]}, training=False) -> logits [B, num_classes], with
            `num_classes`, `image_shape` and `variables`, trained on noisy images of the same chain.

    Raises:
        InputError: another image shape or number of classes.
    """
    if tuple(network.image_shape) != tuple(classifier.image_shape):
        raise InputError(
            f"The classifier takes images of {list(classifier.image_shape)}, and the network draws {list(network.image_shape)}."
        )
    num_classes = getattr(network, "num_classes", None)
    if num_classes not in (None, classifier.num_classes):
        raise InputError(f"The classifier has {classifier.num_classes} classes, and the network has {num_classes}.")
    return ClassifierGuided(network, classifier)


def check_guided_chain(network: Network, schedule: Schedule) -> None:
    """Refuse a classifier on a chain that ends without any signal.

    Raises:
        InputError
    """
    last = schedule.alphas_cumprod[-1]
    if isinstance(network, ClassifierGuided) and last < LEAST_ALPHAS_CUMPROD:
        raise InputError(
            f"A classifier cannot guide a chain that ends at alphas_cumprod = {last:.3g}: its gradient is divided by that. "
            "Leave --classifier out and use classifier-free guidance, or train on another schedule."
        )


def is_conditional(network: Network) -> bool:
    """Whether the network itself takes labels."""
    inner = network.network if isinstance(network, ClassifierGuided) else network
    return getattr(inner, "num_classes", None) is not None


def eps_shift(
    classifier: Any,
    schedule: Schedule,
    x: tf.Tensor,
    i: tf.Tensor,
    labels: tf.Tensor,
    scale: tf.Tensor,
    interval: tuple[int, int] | None = None,
) -> tf.Tensor:
    """-scale sqrt(1 - abar) grad_x log p(label | x), which is added to eps (Dhariwal & Nichol 2021, Algorithm 2).

    Args:
        x: float32 [B, H, W, C], at the timesteps behind i, int32 [B].
        labels: int32 [B]; the null class, num_classes, has no gradient.
        scale: float32 [B].
        interval: see `Denoising`; outside of it the shift is 0.
    """
    t = tf.gather(tf.constant(schedule.timesteps, tf.int32), i)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(x)
        log_p = tf.nn.log_softmax(classifier({"x_t": x, "t": t}, training=False))
        of_label = tf.reduce_sum(log_p * tf.one_hot(labels, log_p.shape[-1]))
    gradient = tape.gradient(of_label, x)
    scale = weight_at(scale, t, interval, 0.0)
    return -tf.reshape(scale, [-1, 1, 1, 1]) * extract(np.sqrt(1.0 - schedule.alphas_cumprod), i, 4) * gradient
