"""RePaint: ancestral sampling that fills in an image (Lugmayr et al. 2022)."""

from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from ddpm_tf import checks
from ddpm_tf.diffusion.gaussian import extract
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.errors import InputError
from ddpm_tf.samplers.ancestral import AncestralSampler
from ddpm_tf.samplers.base import DenoiseFunction, Sampler, StepOutput
from ddpm_tf.samplers.plan import Move, Plan


class RePaintSampler(AncestralSampler):
    """Ancestral steps after which the known pixels are replaced by the given image, diffused to the same level.

    The chain goes down, and again and again up by `jump_length` levels and down, so that the filled in pixels come to agree
    with the known ones (Algorithm 1 and section 4.2). A move up diffuses: x_k = sqrt(abar_k / abar_j) x_j + noise. The result
    approaches p(unknown | known) as jumps get shorter and resamples more; it is not exact.

    Args:
        jump_length: levels of a jump up, at least 1. They start at the levels 1, 1 + jump_length, ..., as in the authors' code.
        num_resamples: how often each stretch of jump_length levels is walked down; 1: no jumps.

    Raises:
        InputError: numbers out of range.
    """

    moves_together = True

    def __init__(
        self, diffusion: GaussianDiffusion, *, jump_length: int = 10, num_resamples: int = 10, **denoising: Any
    ) -> None:
        super().__init__(diffusion, **denoising)
        jump_length = checks.integer("jump_length", jump_length, low=1, high=checks.MAX_TIMESTEPS)
        num_resamples = checks.integer("num_resamples", num_resamples, low=1, high=10_000)
        self.plan = _jumping(diffusion.num_timesteps, jump_length, num_resamples)
        if num_resamples > 1 and jump_length >= diffusion.num_timesteps:
            logging.warning(
                "No jump of jump_length=%d levels fits into %d sampling steps: nothing is resampled, and what is filled in "
                "agrees less with the rest. Lower jump_length, or raise num_steps.",
                jump_length,
                diffusion.num_timesteps,
            )
        abar = np.append(1.0, diffusion.schedule.alphas_cumprod)
        self._x_0_scale, self._eps_scale = np.sqrt(abar), np.sqrt(1.0 - abar)  # by level
        self._up_ratio = np.append(abar[jump_length:], np.zeros(min(jump_length, len(abar)))) / np.where(
            abar > 0, abar, 1.0
        )
        self.known: np.ndarray | None = None
        self.mask: np.ndarray | None = None

    @property
    def num_evaluations(self) -> int:
        return int(np.count_nonzero(self.plan.end < self.plan.start))  # a move up asks nothing

    def with_known(self, known: np.ndarray, mask: np.ndarray) -> Sampler:
        """This sampler for one image.

        Args:
            known: float32 [H, W, C] in [-1, 1].
            mask: bool [H, W], True where the image is known.

        Raises:
            InputError: a mask of another shape or type.
        """
        known, mask = np.asarray(known, np.float32), np.asarray(mask)
        if mask.shape != known.shape[:2] or mask.dtype != bool:
            raise InputError(
                f"The mask must be bool {list(known.shape[:2])}, as the image is; found {mask.dtype} {list(mask.shape)}."
            )
        return self.varied(known=known, mask=mask[..., None])

    def step(
        self, denoise: DenoiseFunction, x: tf.Tensor, move: Move, noise: tf.Tensor | None, memory: Any
    ) -> StepOutput:
        n = len(x.shape)
        x, x_0 = tf.cond(
            move.end[0] < move.start[0],
            lambda: super(RePaintSampler, self).step(denoise, x, move, noise, ())[:2],
            lambda: (self._up(x, move, noise), memory),
        )
        if self.known is not None:
            at_end = extract(self._x_0_scale, move.end, n) * self.known + extract(self._eps_scale, move.end, n) * noise
            x = tf.where(self.mask, at_end, x)
        return StepOutput(x, x_0, x_0)

    def init_memory(self, x_T: tf.Tensor) -> tf.Tensor:
        """The last predicted x_0, which a move up hands on."""
        return tf.zeros_like(x_T)

    def _up(self, x: tf.Tensor, move: Move, noise: tf.Tensor) -> tf.Tensor:
        """q(x_end | x_start) for end > start, Eq. 2 for several steps at once."""
        n = len(x.shape)
        scale, deviation = np.sqrt(self._up_ratio), np.sqrt(1.0 - self._up_ratio)
        return extract(scale, move.start, n) * x + extract(deviation, move.start, n) * noise


def _jumping(num_steps: int, jump_length: int, num_resamples: int) -> Plan:
    """Down from S to 0. At the levels 1, 1 + j, ... it goes up by j again, num_resamples - 1 times each."""
    left = {level: num_resamples - 1 for level in range(1, num_steps - jump_length + 1, jump_length)}
    levels = [num_steps]
    while levels[-1] > 0:
        level = levels[-1] - 1
        levels.append(level)
        if left.get(level, 0) > 0:
            left[level] -= 1
            levels.append(level + jump_length)
    return Plan(np.array(levels[:-1]), np.array(levels[1:]))
