"""A workdir with drawn weights and its exports, none of which is to be written to."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from configs import digits
from ddpm_tf import builders, experiment
from ddpm_tf.samplers import make_sampler
from ddpm_tf.serving.export import save_model
from ddpm_tf.storage.workdir import write_workdir
from tests.conftest import drawn_weight, tf1_name
from tests.serving.c_api import CSession

ROOT = Path(__file__).parent.parent.parent
MAX_BATCH = 16
SAMPLERS = {
    "ddim": ("ddim", {}),
    "ddpm": ("ddpm", {}),
    "noisy_ddim": ("ddim", {"eta": 0.5}),
    "dpm_solver": ("dpm_solver", {}),
    "heun": ("heun", {}),
}


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """Of 8x8 digits, DDIM by 4 steps of 100; the moving average is drawn, so that images depend on every weight."""
    config = digits.get_config()
    config.diffusion.num_timesteps = 100
    config.sample.sampler, config.sample.spacing, config.sample.num_steps = "ddim", "uniform", 4
    model = builders.build_model(config, tf.distribute.get_strategy())
    for v in model.ema_network.variables:
        v.assign(drawn_weight(tf1_name(v.path), v.shape, 5))
    path = tmp_path_factory.mktemp("serving") / "workdir"
    write_workdir(str(path), config, {k: v.numpy() for k, v in model.state().items()})
    return path


@pytest.fixture(scope="session")
def inference(workdir):
    return experiment.load_for_inference(str(workdir))


@pytest.fixture(scope="session")
def samplers(inference):
    """By name, of 4 steps: ddpm and noisy_ddim draw noise after x_T, and dpm_solver and heun have a memory."""
    return {
        name: make_sampler(kind, inference.diffusion, num_steps=4, **settings)
        for name, (kind, settings) in SAMPLERS.items()
    }


@pytest.fixture(scope="session")
def exported(workdir, tmp_path_factory):
    """models/digits with version 1, as run_export.py writes it: DDIM, 4 steps."""
    out = tmp_path_factory.mktemp("models") / "digits"
    experiment.export(str(workdir), str(out), max_batch=MAX_BATCH, bpd_steps=3)
    return out


@pytest.fixture(scope="session", params=SAMPLERS)
def served(request, inference, samplers, tmp_path_factory):
    """(sampler, CSession of its SavedModel), for every sampler."""
    sampler, folder = samplers[request.param], str(tmp_path_factory.mktemp("saved_model"))
    save_model(folder, inference.network, sampler, sampler.diffusion, max_batch=MAX_BATCH)
    return sampler, CSession(folder)


def run_python(*args, cwd, **env):
    """Run Python in a process of its own; what it printed."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TF_CPP_MIN_LOG_LEVEL": "2", **env}
    command = [sys.executable, *map(str, args)]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def grey_levels(a, b):
    """The largest difference of two arrays of uint8."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return np.abs(a.astype(int) - b).max()
