"""DDIM, Song et al. 2021."""

from typing import Any

import numpy as np
import tensorflow as tf

from ddpm_tf import checks
from ddpm_tf.diffusion.gaussian import extract
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.errors import InputError
from ddpm_tf.samplers.base import DenoiseFunction, Sampler, StepOutput
from ddpm_tf.samplers.plan import Move


class DDIMSampler(Sampler):
    """x_prev = sqrt(abar_prev) x_0 + sqrt(1 - abar_prev - sigma^2) eps + sigma noise (DDIM Eq. 12).

    sigma = eta sqrt((1 - abar_prev) / (1 - abar)) sqrt(1 - abar / abar_prev) (DDIM Eq. 16), which is
    eta times the posterior's standard deviation: eta 1 over the whole chain is ancestral sampling with
    variance fixed_small. eps is the one that belongs to the (clipped) x_0.

    Args:
        eta: 0 (deterministic) to 1.
        sigma_hat: the mean of eta = 1 with the larger noise sqrt(1 - abar / abar_prev), the row "sigma-hat" of DDIM's Table 1.
            It is ancestral sampling with variance fixed_large on the shorter chain; the last step adds no noise.

    Raises:
        InputError: eta outside 0..1; sigma_hat with an eta between.
    """

    def __init__(
        self, diffusion: GaussianDiffusion, *, eta: float = 0.0, sigma_hat: bool = False, **denoising: Any
    ) -> None:
        super().__init__(diffusion, **denoising)
        self.eta = eta = checks.real("eta", eta, low=0, high=1)
        if checks.boolean("sigma_hat", sigma_hat) and eta not in (0, 1):
            raise InputError(f"sigma_hat replaces eta, and eta={eta} was given. Leave one of them out.")
        self.needs_noise = eta > 0 or sigma_hat
        schedule = diffusion.schedule
        variance = (1.0 if sigma_hat else eta**2) * schedule.posterior_variance
        self._sigma = np.sqrt(np.append(0.0, schedule.betas[1:]) if sigma_hat else variance)
        # The difference is 0 at index 0 and could round below it.
        self._eps_scale = np.sqrt(np.maximum(1.0 - schedule.alphas_cumprod_prev - variance, 0.0))
        self._x_0_scale = np.sqrt(schedule.alphas_cumprod_prev)

    def step(
        self, denoise: DenoiseFunction, x: tf.Tensor, move: Move, noise: tf.Tensor | None, memory: Any
    ) -> StepOutput:
        i, n = move.start - 1, len(x.shape)
        p = denoise(x, i)
        x = extract(self._x_0_scale, i, n) * p.x_0 + extract(self._eps_scale, i, n) * p.eps
        if self.needs_noise:
            x = x + extract(self._sigma, i, n) * noise
        return StepOutput(x, p.x_0, memory)
