"""What every sampler is: a pure step from one noise level to another, over a (respaced) chain."""

import copy
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from ddpm_tf import rng
from ddpm_tf.diffusion.process import GaussianDiffusion, PMeanVariance
from ddpm_tf.samplers.plan import Move, Plan, descending

# denoise(x [B, H, W, C], i int32 [B]) -> PMeanVariance, where i is an index of the sampler's chain
DenoiseFunction = Callable[[tf.Tensor, tf.Tensor], PMeanVariance]


class StepOutput(NamedTuple):
    """What a step returns.

    x: the image at the level where the move ends, [B, H, W, C].
    x_0: the clean image that the step predicted, [B, H, W, C].
    memory: what the sampler carries to the next step, always of the same structure.
    """

    x: tf.Tensor
    x_0: tf.Tensor
    memory: Any


class Denoising(NamedTuple):
    """What the denoiser does to the network's answer, the same for all images.

    clip: clip the predicted x_0 to [-1, 1].
    dynamic_threshold: with clip, a quantile within (0, 1] for Imagen's dynamic thresholding instead; 0: static.
    guidance_interval: the smallest and the largest trained timestep with guidance (Kynkaanniemi et al. 2024); the others are
        conditional. None: all have guidance.
    guidance_rescale: how far the guided output gets back the deviation of the conditional one, 0..1 (Lin et al. 2023, Eq. 16).
    """

    clip: bool = True
    dynamic_threshold: float = 0.0
    guidance_interval: tuple[int, int] | None = None
    guidance_rescale: float = 0.0


def initial_noise(seeds: tf.Tensor, image_shape: tuple[int, ...]) -> tf.Tensor:
    """x_T ~ N(0, I), float32 [N, H, W, C], a function of each image's int64 seed."""
    return rng.normal(seeds, image_shape, purpose=rng.Purpose.PRIOR)


class Sampler:
    """A sampler over the chain `diffusion`.

    Args:
        diffusion: GaussianDiffusion, respaced to the S timesteps that are visited.
        denoising: what the denoiser does.

    Attributes:
        origin: float32 [H, W, C], an image that is diffused to where the plan begins; None: x_T ~ N(0, I).
        plan: the moves that the sampler makes. Each asks the network once, but for those that only add noise.
        needs_noise: whether `step` uses its noise. A sampler that does not use it is a function of x_T.
        moves_together: whether all images of a batch must make the same move.
    """

    needs_noise = True
    moves_together = False

    def __init__(self, diffusion: GaussianDiffusion, *, denoising: Denoising = Denoising()) -> None:  # noqa: B008 - immutable
        self.diffusion, self.denoising = diffusion, denoising
        self.plan: Plan = descending(diffusion.num_timesteps)
        self.origin: np.ndarray | None = None
        self.compiled: weakref.WeakKeyDictionary = (
            weakref.WeakKeyDictionary()
        )  # network -> tf.functions, see drawing.py

    @property
    def num_steps(self) -> int:
        """S, the number of timesteps that are visited."""
        return self.diffusion.num_timesteps

    @property
    def num_evaluations(self) -> int:
        """NFE: how often the network is asked for an image. With guidance it is asked for two images at once each time."""
        return self.plan.num_moves

    def initial_state(self, seeds: tf.Tensor, image_shape: tuple[int, ...]) -> tf.Tensor:
        """What the first move begins from, float32 [N, H, W, C], a function of each image's int64 seed."""
        noise = initial_noise(seeds, image_shape)
        if self.origin is None:
            return noise
        index = tf.fill([tf.shape(noise)[0]], int(self.plan.start[0]) - 1)
        return self.diffusion.q_sample(tf.constant(self.origin)[None], index, noise)

    def varied(self, **attributes: Any) -> "Sampler":
        """A copy with other attributes."""
        sampler = copy.copy(self)
        sampler.compiled = weakref.WeakKeyDictionary()
        for name, value in attributes.items():
            setattr(sampler, name, value)
        return sampler

    def init_memory(self, x_T: tf.Tensor) -> Any:
        """The memory before the first step; () for samplers without memory."""
        return ()

    def step(
        self, denoise: DenoiseFunction, x: tf.Tensor, move: Move, noise: tf.Tensor | None, memory: Any
    ) -> StepOutput:
        """Make one move.

        Args:
            denoise: what the model says of x: mean, log-variance, x_0 and eps at an index of the chain.
            x: [B, H, W, C], at level `move.start`.
            noise: N(0, I), [B, H, W, C]; None if the sampler needs none.
            memory: from `init_memory` or from the step before.
        """
        raise NotImplementedError
