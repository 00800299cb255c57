"""A workdir with drawn weights, and its export; both are not to be written to."""

import numpy as np
import pytest
import tensorflow as tf

from configs import digits
from ddpm_tf import builders, experiment
from ddpm_tf.experiment.workdir import write_workdir
from ddpm_tf.samplers import make_sampler
from ddpm_tf.serving.export import save_model
from ddpm_tf.training import checkpoints
from tests.conftest import drawn_weight, tf1_name

MAX_BATCH = 16


def make_workdir(path, **sample):
    """A workdir of 8x8 digits whose moving average is drawn, so that images depend on every weight."""
    config = digits.get_config()
    config.diffusion.num_timesteps = 100
    config.sample.num_steps = 4
    config.sample.update(sample)
    model = builders.build_model(config, tf.distribute.get_strategy())
    for v in model.ema_network.variables:
        v.assign(drawn_weight(tf1_name(v.path), v.shape, 5))
    write_workdir(str(path), config, {k: v.numpy() for k, v in checkpoints.variables_by_name(model).items()})
    return path


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """DDIM, 4 steps of 100."""
    return make_workdir(tmp_path_factory.mktemp("serving") / "workdir")


@pytest.fixture(scope="session")
def inference(workdir):
    return experiment.load_for_inference(str(workdir))


@pytest.fixture(scope="session")
def samplers(inference):
    """By name, of 4 steps: ddim is a function of x_T, ddpm and noisy_ddim are not."""
    settings = {"ddim": {}, "ddpm": {}, "noisy_ddim": {"eta": 0.5}}
    return {
        name: make_sampler(name.removeprefix("noisy_"), inference.diffusion, num_steps=4, **kwargs)
        for name, kwargs in settings.items()
    }


@pytest.fixture(scope="session")
def saved_models(inference, samplers, tmp_path_factory):
    """{sampler's name: folder of its SavedModel}"""
    folder = tmp_path_factory.mktemp("saved_models")
    for name, sampler in samplers.items():
        save_model(str(folder / name), inference.network, sampler, sampler.diffusion, max_batch=MAX_BATCH)
    return {name: str(folder / name) for name in samplers}


def grey_levels(a, b):
    """The largest difference of two arrays of uint8."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return np.abs(a.astype(int) - b).max()
