"""Image to image: sampling that begins from a diffused image (SDEdit, Meng et al. 2022)."""

import math

import numpy as np

from ddpm_tf import checks
from ddpm_tf.samplers.base import Sampler


def from_image(sampler: Sampler, image: np.ndarray, *, strength: float) -> Sampler:
    """A sampler that makes the last ceil(strength S) of its steps, from the image diffused to where they begin.

    Args:
        sampler: from `make_sampler`.
        image: float32 [H, W, C] in [-1, 1].
        strength: above 0, at most 1. At 1 the chain is whole, and begins from the image diffused to x_T.

    Raises:
        InputError: a strength out of range.
    """
    share = checks.real("strength", strength, low=1e-9, high=1) * sampler.num_steps
    steps = max(1, math.ceil(share - 1e-6))  # 0.07 of 100 steps is 7.000000000000001
    return sampler.varied(plan=sampler.plan.last_steps(steps), origin=np.asarray(image, np.float32))
