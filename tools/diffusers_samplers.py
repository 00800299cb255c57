"""Values of diffusers' schedulers, for tests/samplers/test_diffusers.py. Needs diffusers and torch.

  python tools/diffusers_samplers.py tests/data/diffusers_samplers.npz

The model is `eps` below. Every scheduler starts from the same x_T, with the linear betas of Ho et al. and no clipping.
"""

import sys

import numpy as np

T = 1000
SHAPE = (2, 4, 4, 1)


def eps(x: np.ndarray, t: int) -> np.ndarray:
    """A stand-in for a network, in float32: not linear in x, and different at every timestep."""
    phase = np.float32(np.sin(t / 150.0))
    return np.tanh(np.float32(0.9) * x + np.float32(0.3) * phase).astype(np.float32) + np.float32(0.1) * x


def run(scheduler, x_T: np.ndarray, scale: float = 1.0, **kwargs) -> np.ndarray:
    """x after the whole chain, as diffusers' own loop would draw it."""
    import torch

    x = torch.from_numpy(x_T) * scale
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(torch.from_numpy(eps(scaled.numpy(), int(t))), t, x, **kwargs).prev_sample
    return x.numpy()


def main(path: str) -> None:
    import diffusers
    import torch

    betas = np.linspace(1e-4, 0.02, T)
    common = {"num_train_timesteps": T, "trained_betas": betas.astype(np.float32)}
    x_T = np.random.Generator(np.random.PCG64(5)).standard_normal(SHAPE).astype(np.float32)
    arrays = {"x_T": x_T}
    ddim = diffusers.DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading")
    ddim.set_timesteps(20)
    arrays["ddim_timesteps"] = ddim.timesteps.numpy()
    arrays["ddim"] = run(ddim, x_T)
    noise = np.random.Generator(np.random.PCG64(6)).standard_normal((20, *SHAPE)).astype(np.float32)
    arrays["noise"] = noise
    x = torch.from_numpy(x_T)
    for t, z in zip(ddim.timesteps, noise, strict=True):
        output = torch.from_numpy(eps(x.numpy(), int(t)))
        x = ddim.step(output, t, x, eta=0.7, variance_noise=torch.from_numpy(z)).prev_sample
    arrays["ddim_eta"] = x.numpy()
    dpm = diffusers.DPMSolverMultistepScheduler(
        **common,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        timestep_spacing="trailing",
    )
    dpm.set_timesteps(20)
    arrays["dpm_solver_timesteps"], arrays["dpm_solver"] = dpm.timesteps.numpy(), run(dpm, x_T)
    heun = diffusers.HeunDiscreteScheduler(**common, timestep_spacing="trailing")
    heun.set_timesteps(20)
    arrays["heun_timesteps"] = np.unique(heun.timesteps.numpy())[::-1]
    # Its x is x / sqrt(abar), from sigma = sqrt(1 / abar - 1) on
    abar = np.cumprod(1 - betas)[int(heun.timesteps[0])]
    arrays["heun"] = run(heun, x_T, float(1 / np.sqrt(abar)))
    arrays["version"] = np.array(diffusers.__version__)
    np.savez(path, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
