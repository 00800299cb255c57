"""The denoiser: what a sampler asks about an image. It owns network, labels, guidance and clipping.

The order inside: the network's raw outputs; classifier-free guidance mixes them, before any clipping; x_0 and eps; a
classifier's gradient shifts eps; x_0 is clipped or thresholded; then mean and variance.
"""

from collections.abc import Callable

import tensorflow as tf

from ddpm_tf.diffusion.process import GaussianDiffusion, PMeanVariance
from ddpm_tf.networks.contract import Inputs, Network
from ddpm_tf.samplers.base import Denoising
from ddpm_tf.samplers.guidance import (
    ClassifierGuided,
    check_guided_chain,
    classifier_free_output,
    eps_shift,
    is_conditional,
    weight_at,
)

# (x [B, H, W, C], i int32 [B], the last predicted x_0 or None) -> ...
OutputFunction = Callable[..., tf.Tensor]
Denoiser = Callable[..., PMeanVariance]


def make_output_fn(
    network: Network,
    diffusion: GaussianDiffusion,
    denoising: Denoising = Denoising(),  # noqa: B008 - immutable
    *,
    labels: tf.Tensor | None = None,
    guidance: tf.Tensor | None = None,
) -> OutputFunction:
    """output(x, i, x_0=None): the network's raw output at the trained timestep behind index i of a chain.

    Args:
        diffusion: its schedule's `timesteps` translate indices to trained timesteps.
        denoising: at which steps there is guidance.
        labels: int32 [B], for a class-conditional network; network.num_classes is the null class.
        guidance: float32 [B], weight of classifier-free guidance; None: conditional, at half the cost of weight 1.
    """
    timesteps = diffusion.schedule.timesteps

    def output(x: tf.Tensor, i: tf.Tensor, x_0: tf.Tensor | None = None) -> tf.Tensor:
        t = tf.gather(tf.constant(timesteps, tf.int32), i)
        inputs: Inputs = {"x_t": x, "t": t}
        if getattr(network, "self_condition", False):
            inputs["x_0"] = tf.zeros_like(x) if x_0 is None else x_0
        if labels is not None and is_conditional(network):
            inputs["labels"] = labels
        if guidance is not None:
            weight = weight_at(guidance, t, denoising.guidance_interval, 1.0)
            return classifier_free_output(network, inputs, weight, rescale=denoising.guidance_rescale)
        return network(inputs, training=False)

    return output


def make_denoiser(
    network: Network,
    diffusion: GaussianDiffusion,
    denoising: Denoising = Denoising(),  # noqa: B008 - immutable
    *,
    labels: tf.Tensor | None = None,
    guidance: tf.Tensor | None = None,
    classifier_scale: tf.Tensor | None = None,
) -> Denoiser:
    """denoise(x, i, x_0=None) -> PMeanVariance.

    Args:
        x_0, of the denoiser: the clean image that the step before predicted. Only a network with self-conditioning sees it.
        diffusion: GaussianDiffusion, over the chain that i indexes.
        denoising: clipping, and where there is guidance.
        labels, guidance: see `make_output_fn`.
        classifier_scale: float32 [B], weight of the classifier's gradient, for a network `guided_by` one.

    Raises:
        InputError: a classifier on a chain that ends without any signal.
    """
    output = make_output_fn(network, diffusion, denoising, labels=labels, guidance=guidance)
    schedule = diffusion.schedule
    check_guided_chain(network, schedule)

    def denoise(x: tf.Tensor, i: tf.Tensor, x_0: tf.Tensor | None = None) -> PMeanVariance:
        shift = None
        if isinstance(network, ClassifierGuided) and labels is not None and classifier_scale is not None:
            interval = denoising.guidance_interval
            shift = eps_shift(network.classifier, schedule, x, i, labels, classifier_scale, interval)
        return diffusion.p_mean_variance(
            output(x, i, x_0), x, i, denoising.clip, dynamic_threshold=denoising.dynamic_threshold, eps_shift=shift
        )

    return denoise
