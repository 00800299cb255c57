"""What every sampler is: a pure step over a (respaced) chain."""

import weakref
from typing import Any, NamedTuple

import tensorflow as tf


class StepOutput(NamedTuple):
    """x: the image at the next lower index; x_0: the step's prediction of the clean image; both [B, H, W, C].
    state: whatever the sampler carries from step to step, always of the same structure."""

    x: tf.Tensor
    x_0: tf.Tensor
    state: Any


class Sampler:
    """A sampler over the chain `diffusion`; indices i = S-1 ... 0 are indices of that chain.

    Attributes:
        diffusion: GaussianDiffusion, respaced to the S steps that are visited.
        needs_noise: whether `step` uses its noise. A sampler that does not is a function of x_T.
    """

    needs_noise = True

    def __init__(self, diffusion):
        self.diffusion = diffusion
        self.compiled = weakref.WeakKeyDictionary()  # network -> the loop's tf.functions, see loop.py

    @property
    def num_steps(self):
        """S, the number of steps."""
        return self.diffusion.num_timesteps

    def init_state(self, x_T):
        """The state before the first step; () for samplers without memory."""
        return ()

    def step(self, denoise_fn, x_t, i, noise, state):
        """From index i to i - 1.

        Args:
            denoise_fn: (x_t [B, H, W, C], i int32 [B]) -> the network's output.
            x_t: [B, H, W, C].
            i: int32 [B]; 0 is the last step.
            noise: N(0, I), [B, H, W, C]; None if the sampler needs none.
            state: from `init_state` or the step before.

        Returns:
            StepOutput.
        """
        raise NotImplementedError
