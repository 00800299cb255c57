"""Samplers: a pure step, and the one loop that runs every sampler."""

from ddpm_tf.diffusion.schedules import space_timesteps
from ddpm_tf.errors import InputError, unknown_name
from ddpm_tf.samplers.ancestral import AncestralSampler
from ddpm_tf.samplers.ddim import DDIMSampler
from ddpm_tf.samplers.interpolation import interpolate
from ddpm_tf.samplers.loop import Samples, Trace, sample

__all__ = ["SAMPLERS", "Samples", "Trace", "interpolate", "make_sampler", "sample"]

SAMPLERS = {"ddpm": AncestralSampler, "ddim": DDIMSampler}


def make_sampler(name, diffusion, *, num_steps=None, spacing="uniform", eta=0.0):
    """A sampler by name.

    Args:
        name: ddpm (ancestral, Ho et al. Algorithm 2) or ddim (Song et al. 2021).
        diffusion: the GaussianDiffusion the network was trained on; its `clip` is the sampler's.
        num_steps: S, 1 <= S <= T; None: T.
        spacing: which timesteps are visited, see `space_timesteps`.
        eta: DDIM's noise, 0 (deterministic) to 1; refused for ddpm, which has no such setting.

    Raises:
        InputError: unknown name or spacing, S outside 1..T, eta outside 0..1.
    """
    if name not in SAMPLERS:
        raise unknown_name("sampler", name, SAMPLERS)
    if num_steps is not None:
        kept = space_timesteps(diffusion.num_timesteps, num_steps, spacing)
        diffusion = diffusion.respace(kept)
    if name == "ddim":
        return DDIMSampler(diffusion, eta=eta)
    if eta:
        raise InputError(f"eta is a setting of the ddim sampler; {name} was asked for with eta={eta}.")
    return SAMPLERS[name](diffusion)
