"""DDIM inversion: from a clean image to the x_T that DDIM turns into it (DDIM section 4.3 and Table 2)."""

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from ddpm_tf import checks
from ddpm_tf.diffusion.gaussian import extract
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.errors import InputError
from ddpm_tf.networks.contract import Network
from ddpm_tf.samplers.base import DenoiseFunction, Sampler, StepOutput
from ddpm_tf.samplers.ddim import DDIMSampler
from ddpm_tf.samplers.drawing import check_conditions, compiled
from ddpm_tf.samplers.loop import begin
from ddpm_tf.samplers.plan import Move, ascending


class DDIMInversion(Sampler):
    """x_next = sqrt(abar_next) x_0 + sqrt(1 - abar_next) eps, the ODE of DDIM (its Eq. 14) solved upwards by Euler's method.

    x_0 and eps are those that the network says at x. The clean image has no timestep of its own: there the network is asked at
    the first timestep of the chain.
    """

    needs_noise = False

    def __init__(self, diffusion: GaussianDiffusion, **denoising: Any) -> None:
        super().__init__(diffusion, **denoising)
        self.plan = ascending(diffusion.num_timesteps)
        self._x_0_scale = np.sqrt(diffusion.schedule.alphas_cumprod)
        self._eps_scale = np.sqrt(1.0 - diffusion.schedule.alphas_cumprod)

    def step(
        self, denoise: DenoiseFunction, x: tf.Tensor, move: Move, noise: tf.Tensor | None, memory: Any
    ) -> StepOutput:
        i, n = move.end - 1, len(x.shape)
        p = denoise(x, tf.maximum(move.start - 1, 0))
        x = extract(self._x_0_scale, i, n) * p.x_0 + extract(self._eps_scale, i, n) * p.eps
        return StepOutput(x, p.x_0, memory)


class Encoded(NamedTuple):
    """x_T: the latents, and images: what they are decoded to; float32 [N, H, W, C]."""

    x_T: np.ndarray
    images: np.ndarray


def encode(
    network: Network,
    sampler: Sampler,
    images: np.ndarray,
    *,
    labels: Any = None,
    guidance: Any = None,
    classifier_scale: Any = None,
    batch_size: int = 64,
) -> Encoded:
    """Images to their latents by `DDIMInversion`, and back by the sampler. Both ask the network S times.

    Args:
        sampler: ddim with eta 0, from `make_sampler`. Clipping is off both ways, since a clipped x_0 cannot be found back.
        images: float32 [N, H, W, C] in [-1, 1].
        labels, guidance, classifier_scale: as in `sample`.
        batch_size: images at once.

    Raises:
        InputError: another sampler, or images of another shape or range.
    """
    if not isinstance(sampler, DDIMSampler) or sampler.needs_noise:
        raise InputError(
            "Images are encoded by the sampler ddim with eta 0: the others are not the solution of an ODE by DDIM. Give "
            "--sampler=ddim, without --eta and --sigma_hat."
        )
    batch_size = checks.integer("batch_size", batch_size, low=1, high=checks.MAX_BATCH)
    images = np.asarray(images)
    x = checks.reals("The images", images, low=-1, high=1, shape=[len(images), *network.image_shape]).astype(np.float32)
    conditions = check_conditions(network, len(x), labels, guidance, classifier_scale)
    denoising = sampler.denoising._replace(clip=False, dynamic_threshold=0.0)
    states = []
    for one in (DDIMInversion(sampler.diffusion, denoising=denoising), sampler.varied(denoising=denoising)):
        drawing, moves = compiled(network, one, conditions), tf.constant(one.plan.num_moves)
        parts = []
        for first in range(0, len(x), batch_size):
            rows = slice(first, first + batch_size)
            seeds = tf.zeros([len(x[rows])], tf.int64)  # no noise is drawn
            given = {name: values[rows] for name, values in conditions.items()}
            carry = begin(one, tf.constant(x[rows]))
            parts.append(drawing.advance(carry, seeds, given, moves, tf.constant(0)).x.numpy())
        x = np.concatenate(parts)
        states.append(x)
    return Encoded(*states)
