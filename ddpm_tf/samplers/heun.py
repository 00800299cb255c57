"""Heun's method of second order, as EDM samples (Karras et al. 2022, Algorithm 2), on the chain that was trained."""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from ddpm_tf import checks
from ddpm_tf.diffusion.gaussian import extract
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.samplers.base import DenoiseFunction, Sampler, StepOutput
from ddpm_tf.samplers.plan import Move, Plan

_MAX_CHURN = np.sqrt(2.0) - 1.0


class HeunSampler(Sampler):
    """An Euler step to the next noise level, then the same step again with the mean of both slopes.

    In sigma = sqrt(1 / abar - 1) and X = x / sqrt(abar), where dX / dsigma = eps:

        X_prev = X + (sigma_prev - sigma) eps                                (Euler; it is DDIM's step with eta 0)
        X_prev = X + (sigma_prev - sigma) (eps + eps at X_prev) / 2          (Heun)

    The last step, to sigma = 0, is Euler's alone: the network is asked 2 S - 1 times. A first step from sigma = infinity is
    Euler's, too: then it is asked 2 S - 2 times. Every time is a move of the plan: one that leads down predicts, one that stays
    on its level corrects.

    With churn > 0, noise is added before every step, until sigma is (1 + min(churn / S, sqrt(2) - 1)) times what it was (EDM's
    S_churn, with S_noise = 1), rounded to the nearest trained timestep.

    Args:
        churn: 0 (deterministic) or above.

    Raises:
        InputError: a negative churn.
    """

    def __init__(self, diffusion: GaussianDiffusion, *, churn: float = 0.0, **denoising: Any) -> None:
        churn = checks.real("churn", churn, low=0, high=1e6)
        kept = diffusion.schedule.timesteps
        churned = _churned(diffusion.schedule.trained.alphas_cumprod, kept, min(churn / len(kept), _MAX_CHURN))
        # The chain of all timesteps at which the network is asked; its levels are those of the plan.
        visited = np.union1d(kept, churned)
        if len(visited) > len(kept):
            trained = dataclasses.replace(diffusion, schedule=diffusion.schedule.trained)
            diffusion = trained.respace(visited)
        super().__init__(diffusion, **denoising)
        self.needs_noise = bool(np.any(churned != kept))
        self._num_steps = len(kept)
        levels, from_levels = (np.searchsorted(visited, t) + 1 for t in (kept, churned))
        ends = np.append(0, levels[:-1])
        has_signal = self.diffusion.schedule.alphas_cumprod[from_levels - 1] > 0
        moves: list[tuple[int, int]] = []
        for k in reversed(range(len(kept))):
            moves.append((levels[k], ends[k]))
            if k > 0 and has_signal[k]:
                moves.append((ends[k], ends[k]))
        self.plan = Plan(*(np.array(column) for column in zip(*moves, strict=True)))
        self._make_tables(levels, from_levels, ends)

    def _make_tables(self, levels: np.ndarray, from_levels: np.ndarray, ends: np.ndarray) -> None:
        """Tables by level: of the level where a prediction starts, or of the level that is corrected."""
        abar = np.append(1.0, self.diffusion.schedule.alphas_cumprod)
        size = len(abar)
        self._from_level, self._scale, self._noise, self._correction = np.zeros(size, int), *np.zeros([3, size])
        self._from_level[levels] = from_levels
        # Churn: X + sqrt(sigma_from^2 - sigma^2) noise, in x
        self._scale[levels] = np.sqrt(abar[from_levels] / np.where(abar[levels] > 0, abar[levels], 1.0))
        self._scale[levels[from_levels == levels]] = 1.0
        self._noise[levels] = np.sqrt(np.maximum(1.0 - self._scale[levels] ** 2, 0.0))
        # sqrt(abar_prev) (sigma_prev - sigma) / 2; a step from sigma = infinity is not corrected
        start, end = abar[from_levels], abar[ends]
        with np.errstate(divide="ignore", invalid="ignore"):
            correction = (np.sqrt(1.0 - end) - np.sqrt(end) * np.sqrt(1.0 / start - 1.0)) / 2.0
        self._correction[ends] = np.where(start > 0, correction, 0.0)
        self._x_0_scale, self._eps_scale = np.sqrt(abar), np.sqrt(1.0 - abar)

    @property
    def num_steps(self) -> int:
        return self._num_steps

    def init_memory(self, x_T: tf.Tensor) -> tf.Tensor:
        """eps where the step began, [B, H, W, C]."""
        return tf.zeros_like(x_T)

    def step(
        self, denoise: DenoiseFunction, x: tf.Tensor, move: Move, noise: tf.Tensor | None, memory: tf.Tensor
    ) -> StepOutput:
        n = len(x.shape)
        is_prediction = tf.reshape(move.end < move.start, [-1] + [1] * (n - 1))
        level = tf.where(
            move.end < move.start, tf.gather(tf.constant(self._from_level, tf.int32), move.start), move.start
        )
        if self.needs_noise:
            churned = extract(self._scale, move.start, n) * x + extract(self._noise, move.start, n) * noise
            x = tf.where(is_prediction, churned, x)
        p = denoise(x, level - 1)
        predicted = extract(self._x_0_scale, move.end, n) * p.x_0 + extract(self._eps_scale, move.end, n) * p.eps
        corrected = x + extract(self._correction, move.end, n) * (p.eps - memory)
        return StepOutput(tf.where(is_prediction, predicted, corrected), p.x_0, p.eps)


def _churned(alphas_cumprod: np.ndarray, kept: np.ndarray, gamma: float) -> np.ndarray:
    """The trained timesteps nearest to (1 + gamma) sigma of those kept."""
    if not gamma:
        return kept
    num_finite = np.count_nonzero(alphas_cumprod > 0)
    sigma = np.sqrt(1 / alphas_cumprod[:num_finite] - 1)
    nearest = np.round(np.interp((1 + gamma) * sigma[kept[kept < num_finite]], sigma, np.arange(num_finite))).astype(
        int
    )
    return np.append(nearest, kept[kept >= num_finite])
