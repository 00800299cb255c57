"""The denoiser: what a sampler asks about an image. It owns network, labels, guidance and clipping.

The order inside: the network's raw outputs; classifier-free guidance mixes them, before any clipping; x_0 and eps; x_0 is
clipped; then mean and variance.
"""

from collections.abc import Callable

import tensorflow as tf

from ddpm_tf.diffusion.process import GaussianDiffusion, PMeanVariance
from ddpm_tf.networks.contract import Inputs, Network
from ddpm_tf.samplers.guidance import classifier_free_output

# (x [B, H, W, C], i int32 [B], the last predicted x_0 or None) -> ...
OutputFunction = Callable[..., tf.Tensor]
Denoiser = Callable[..., PMeanVariance]


def make_output_fn(
    network: Network,
    diffusion: GaussianDiffusion,
    *,
    labels: tf.Tensor | None = None,
    guidance: tf.Tensor | None = None,
) -> OutputFunction:
    """output(x, i, x_0=None): the network's raw output at the trained timestep behind index i of a chain.

    Args:
        diffusion: its schedule's `timesteps` translate indices to trained timesteps.
        labels: int32 [B], for a class-conditional network; network.num_classes is the null class.
        guidance: float32 [B], weight of classifier-free guidance; None: conditional, at half the cost of weight 1.
    """
    timesteps = diffusion.schedule.timesteps

    def output(x: tf.Tensor, i: tf.Tensor, x_0: tf.Tensor | None = None) -> tf.Tensor:
        inputs: Inputs = {"x_t": x, "t": tf.gather(tf.constant(timesteps, tf.int32), i)}
        if getattr(network, "self_condition", False):
            inputs["x_0"] = tf.zeros_like(x) if x_0 is None else x_0
        if labels is not None:
            inputs["labels"] = labels
        if guidance is not None:
            return classifier_free_output(network, inputs, guidance)
        return network(inputs, training=False)

    return output


def make_denoiser(
    network: Network,
    diffusion: GaussianDiffusion,
    *,
    clip: bool = True,
    labels: tf.Tensor | None = None,
    guidance: tf.Tensor | None = None,
) -> Denoiser:
    """denoise(x, i, x_0=None) -> PMeanVariance.

    Args:
        x_0, of the denoiser: the clean image that the step before predicted. Only a network with self-conditioning sees it.
        diffusion: GaussianDiffusion, over the chain that i indexes.
        clip: clip the predicted x_0 to [-1, 1].
        labels, guidance: see `make_output_fn`.
    """
    output = make_output_fn(network, diffusion, labels=labels, guidance=guidance)

    def denoise(x: tf.Tensor, i: tf.Tensor, x_0: tf.Tensor | None = None) -> PMeanVariance:
        return diffusion.p_mean_variance(output(x, i, x_0), x, i, clip=clip)

    return denoise
