"""Our samplers against diffusers' schedulers: the same function for the network, x_T, betas and timesteps.

The committed values come from tools/diffusers_samplers.py. Where diffusers is installed (marker peers), they are made anew.
"""

import os
import subprocess

import numpy as np
import pytest
import tensorflow as tf

from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.samplers import SAMPLERS
from ddpm_tf.samplers.base import Denoising
from tests.conftest import DATA, run_chain
from tools.diffusers_samplers import T, eps

PATH = os.path.join(DATA, "diffusers_samplers.npz")
CASES = {
    "ddim": ("ddim", {}),
    "ddim_eta": ("ddim", {"eta": 0.7}),
    "dpm_solver": ("dpm_solver", {}),
    "heun": ("heun", {}),
}


def check(arrays, case):
    name, settings = CASES[case]
    kept = np.sort(arrays[f"{name}_timesteps"]).astype(int)
    diffusion = GaussianDiffusion(Schedule(make_betas("linear", T))).respace(kept)
    sampler = SAMPLERS[name].build(diffusion, denoising=Denoising(clip=False), **settings)
    timesteps = sampler.diffusion.schedule.timesteps
    noise = tf.constant(arrays["noise"][::-1].copy())  # position k is the k-th draw from the end
    x = run_chain(
        sampler,
        lambda x, i: tf.constant(eps(x.numpy(), int(timesteps[int(i[0])]))),
        tf.constant(arrays["x_T"]),
        tf.zeros([2], tf.int64),
        noise_fn=lambda seeds, position, shape: noise[int(position)],
    ).x
    np.testing.assert_allclose(x, arrays[case], atol=1e-5 * max(1, np.abs(arrays[case]).max()))


@pytest.mark.parametrize("case", CASES)
def test_a_sampler_draws_what_diffusers_scheduler_draws(case):
    with np.load(PATH, allow_pickle=False) as arrays:
        check(arrays, case)


@pytest.mark.peers
@pytest.mark.parametrize("case", CASES)
def test_the_installed_diffusers_still_draws_the_committed_values(case, tmp_path):
    """DDPM_TF_PEERS names the Python of an environment with diffusers and torch."""
    python = os.environ.get("DDPM_TF_PEERS")
    if not python:
        pytest.skip("DDPM_TF_PEERS is not set")
    made = tmp_path / "made.npz"
    subprocess.run([python, "tools/diffusers_samplers.py", str(made)], check=True, cwd=os.path.dirname(DATA) + "/..")
    with np.load(made, allow_pickle=False) as arrays:
        check(arrays, case)
