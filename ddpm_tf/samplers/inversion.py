"""DDIM inversion: from a clean image to the x_T that DDIM turns into it (DDIM section 4.3 and Table 2)."""

from typing import Any

import numpy as np
import tensorflow as tf

from ddpm_tf.diffusion.gaussian import extract
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.samplers.base import DenoiseFunction, Sampler, StepOutput
from ddpm_tf.samplers.plan import Move, ascending


class DDIMInversion(Sampler):
    """x_next = sqrt(abar_next) x_0 + sqrt(1 - abar_next) eps, the ODE of DDIM (its Eq. 14) solved upwards by Euler's method.

    x_0 and eps are those that the network says at x; at the clean image it is asked at the first timestep of the chain.
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
