"""Samplers: a pure step, the one loop that runs every sampler, and drawing, which joins them with a network."""

from typing import Any

from ddpm_tf import checks
from ddpm_tf.choices import Choice, choose
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import TIMESTEP_SPACINGS, Schedule, space_timesteps
from ddpm_tf.errors import InputError
from ddpm_tf.samplers.ancestral import AncestralSampler
from ddpm_tf.samplers.base import Denoising, Sampler
from ddpm_tf.samplers.ddim import DDIMSampler
from ddpm_tf.samplers.dpm_solver import DPMSolver
from ddpm_tf.samplers.guidance import guided_by
from ddpm_tf.samplers.heun import HeunSampler
from ddpm_tf.samplers.image_to_image import from_image
from ddpm_tf.samplers.interpolation import interpolate
from ddpm_tf.samplers.repaint import RePaintSampler
from ddpm_tf.samplers.sampling import Samples, Trace, sample

__all__ = ["SAMPLERS", "Samples", "Trace", "from_image", "guided_by", "interpolate", "make_sampler", "sample"]

SAMPLERS = {
    "ddpm": Choice(AncestralSampler),
    "ddim": Choice(DDIMSampler, ("eta", "sigma_hat")),
    "dpm_solver": Choice(DPMSolver),
    "heun": Choice(HeunSampler, ("churn",)),
    "repaint": Choice(RePaintSampler, ("jump_length", "num_resamples")),
}


def make_sampler(
    name: str,
    diffusion: GaussianDiffusion,
    *,
    num_steps: int | None = None,
    spacing: str = "uniform",
    clip: bool = True,
    dynamic_threshold: float = 0.0,
    guidance_first: int = 1,
    guidance_last: int = 0,
    guidance_rescale: float = 0.0,
    **settings: Any,
) -> Sampler:
    """A sampler by name.

    Args:
        name: ddpm (ancestral, Ho et al. Algorithm 2), ddim (Song et al. 2021), dpm_solver (DPM-Solver++ 2M, Lu et al. 2022),
            heun (EDM, Karras et al. 2022) or repaint (Lugmayr et al. 2022).
        diffusion: the GaussianDiffusion the network was trained on.
        num_steps: S, 1 <= S <= T; None: T.
        spacing: which timesteps are visited, see `space_timesteps`.
        clip: clip the predicted x_0 to [-1, 1].
        dynamic_threshold: with clip, a quantile of |x_0|, at most 1, for dynamic thresholding (Imagen: 0.995); 0: off.
        guidance_first, guidance_last: the sampling steps, 1..S, between which there is guidance; a last step of 0 means S.
            heun's corrections count by their noise level.
        guidance_rescale: 0..1, see `classifier_free_output`.
        settings: of the sampler that is named. ddim has eta=0, its noise, 0 (deterministic) to 1, and sigma_hat=False; heun has
            churn=0; repaint has jump_length=10 and num_resamples=10.

    Raises:
        InputError: unknown name or spacing, S outside 1..T, settings out of range, a setting of another sampler that is not at
            its default.
    """
    make = choose("sampler", name, SAMPLERS, settings)
    clip = checks.boolean("clip", clip)
    threshold = checks.real("dynamic_threshold", dynamic_threshold, low=0, high=1)
    if threshold and not clip:
        raise InputError(
            f"dynamic_threshold={threshold} is a way to clip x_0, and clip is off. Leave dynamic_threshold at 0, or set clip."
        )
    rescale = checks.real("guidance_rescale", guidance_rescale, low=0, high=1)
    checks.known("timestep spacing", spacing, TIMESTEP_SPACINGS)  # also where all timesteps are visited
    if num_steps is not None:
        abar = diffusion.schedule.alphas_cumprod
        kept = space_timesteps(diffusion.num_timesteps, num_steps, spacing, alphas_cumprod=abar)
        diffusion = diffusion.respace(kept)
    interval = _interval(diffusion.schedule, guidance_first, guidance_last)
    return make(diffusion, denoising=Denoising(clip, threshold, interval, rescale))


def _interval(schedule: Schedule, first: int, last: int) -> tuple[int, int] | None:
    """The trained timesteps of the steps first..last, of which step 1 is the noisiest; None for all of them."""
    steps = schedule.num_timesteps
    first = checks.integer("guidance_first", first, low=1, high=checks.MAX_TIMESTEPS)
    last = checks.integer("guidance_last", last, low=0, high=checks.MAX_TIMESTEPS) or steps
    if not first <= last <= steps:
        raise InputError(
            f"guidance_first={first} and guidance_last={last} must lie within the sampler's steps 1..{steps}, in this order."
        )
    if (first, last) == (1, steps):
        return None
    # Up to the step before, for heun's churn begins a step at a noisier timestep.
    highest = schedule.trained.num_timesteps - 1 if first == 1 else int(schedule.timesteps[steps - first + 1]) - 1
    return int(schedule.timesteps[steps - last]), highest
