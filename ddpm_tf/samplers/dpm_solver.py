"""DPM-Solver++ (2M), Lu et al. 2022 (arXiv 2211.01095)."""

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from ddpm_tf.diffusion.gaussian import extract
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.errors import InputError
from ddpm_tf.samplers.base import DenoiseFunction, Sampler, StepOutput
from ddpm_tf.samplers.plan import Move


class Memory(NamedTuple):
    """x_0: what the step before predicted, [B, H, W, C]; is_known: float32 [B], 0 before the first step, then 1."""

    x_0: tf.Tensor
    is_known: tf.Tensor


class DPMSolver(Sampler):
    """The multistep solver of second order in its midpoint form, with data prediction (Algorithm 2 of DPM-Solver++).

    With alpha = sqrt(abar), sigma = sqrt(1 - abar), lambda = log(alpha / sigma), h = lambda_prev - lambda, and h_before the
    step before's h:

        D = x_0 + h / (2 h_before) (x_0 - x_0 of the step before)
        x_prev = sigma_prev / sigma x - alpha_prev (exp(-h) - 1) D

    The first step, and the last one to abar = 1 (where h is infinite), are of first order: D = x_0. Order 1 is DDIM with eta 0.
    diffusers' DPMSolverMultistepScheduler does the same with final_sigmas_type="zero".

    Raises:
        InputError: a chain in which several timesteps have no signal.
    """

    needs_noise = False

    def __init__(self, diffusion: GaussianDiffusion, **denoising: Any) -> None:
        super().__init__(diffusion, **denoising)
        abar = np.append(1.0, diffusion.schedule.alphas_cumprod)  # by level
        if np.count_nonzero(abar == 0) > 1:
            raise InputError(
                "dpm_solver needs a signal at all timesteps but the last, and several have alphas_cumprod = 0. Visit fewer of "
                "them, or use another sampler."
            )
        with np.errstate(divide="ignore"):  # lambda is infinite at level 0, and -infinite where no signal is left
            half_logsnr = 0.5 * (np.log(abar) - np.log(1.0 - abar))
        h = half_logsnr[:-1] - half_logsnr[1:]  # by index: of the step from level i + 1 to level i
        self._x_scale = np.sqrt((1.0 - abar[:-1]) / (1.0 - abar[1:]))
        self._x_0_scale = -np.sqrt(abar[:-1]) * np.expm1(-h)
        self._extrapolation = np.zeros(len(h))
        self._extrapolation[1:-1] = h[1:-1] / (2.0 * h[2:])

    def init_memory(self, x_T: tf.Tensor) -> Memory:
        return Memory(tf.zeros_like(x_T), tf.zeros_like(x_T[:, 0, 0, 0]))

    def step(
        self, denoise: DenoiseFunction, x: tf.Tensor, move: Move, noise: tf.Tensor | None, memory: Memory
    ) -> StepOutput:
        i, n = move.start - 1, len(x.shape)
        p = denoise(x, i)
        extrapolation = extract(self._extrapolation, i, n) * memory.is_known[:, None, None, None]
        D = p.x_0 + extrapolation * (p.x_0 - memory.x_0)
        x = extract(self._x_scale, i, n) * x + extract(self._x_0_scale, i, n) * D
        return StepOutput(x, p.x_0, Memory(p.x_0, tf.ones_like(memory.is_known)))
