"""Samplers: a pure step, the one loop that runs every sampler, and drawing, which joins them with a network."""

from typing import Any

from ddpm_tf import checks
from ddpm_tf.choices import Choice, choose
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import TIMESTEP_SPACINGS, space_timesteps
from ddpm_tf.samplers.ancestral import AncestralSampler
from ddpm_tf.samplers.base import Sampler
from ddpm_tf.samplers.ddim import DDIMSampler
from ddpm_tf.samplers.interpolation import interpolate
from ddpm_tf.samplers.sampling import Samples, Trace, sample

__all__ = ["SAMPLERS", "Samples", "Trace", "interpolate", "make_sampler", "sample"]

SAMPLERS = {"ddpm": Choice(AncestralSampler), "ddim": Choice(DDIMSampler, ("eta",))}


def make_sampler(
    name: str,
    diffusion: GaussianDiffusion,
    *,
    num_steps: int | None = None,
    spacing: str = "uniform",
    clip: bool = True,
    **settings: Any,
) -> Sampler:
    """A sampler by name.

    Args:
        name: ddpm (ancestral, Ho et al. Algorithm 2) or ddim (Song et al. 2021).
        diffusion: the GaussianDiffusion the network was trained on.
        num_steps: S, 1 <= S <= T; None: T.
        spacing: which timesteps are visited, see `space_timesteps`.
        clip: clip the predicted x_0 to [-1, 1].
        settings: of the sampler that is named. ddim has eta=0, its noise, 0 (deterministic) to 1.

    Raises:
        InputError: unknown name or spacing, S outside 1..T, eta outside 0..1, a setting of another sampler that is not at
            its default.
    """
    make = choose("sampler", name, SAMPLERS, settings)
    clip = checks.boolean("clip", clip)
    checks.known("timestep spacing", spacing, TIMESTEP_SPACINGS)  # also where all timesteps are visited
    if num_steps is not None:
        diffusion = diffusion.respace(space_timesteps(diffusion.num_timesteps, num_steps, spacing))
    return make(diffusion, clip=clip)
