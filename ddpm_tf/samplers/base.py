"""What every sampler is: a pure step from one noise level to another, over a (respaced) chain."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

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


class Sampler:
    """A sampler over the chain `diffusion`.

    Args:
        diffusion: GaussianDiffusion, respaced to the S timesteps that are visited.
        clip: whether the predicted x_0 is clipped to [-1, 1]; the denoiser does it.

    Attributes:
        plan: the moves that the sampler makes.
        needs_noise: whether `step` uses its noise. A sampler that does not use it is a function of x_T.
    """

    needs_noise = True

    def __init__(self, diffusion: GaussianDiffusion, *, clip: bool = True) -> None:
        self.diffusion, self.clip = diffusion, clip
        self.plan: Plan = descending(diffusion.num_timesteps)
        self.compiled: weakref.WeakKeyDictionary = (
            weakref.WeakKeyDictionary()
        )  # network -> tf.functions, see drawing.py

    @property
    def num_steps(self) -> int:
        """S, the number of timesteps that are visited."""
        return self.diffusion.num_timesteps

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
