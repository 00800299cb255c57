"""Two logical CPUs, small networks and chains, and the values of the original code."""

import functools
import gc
import json
import os
import zlib

import numpy as np
import pytest
import tensorflow as tf

from configs import digits
from ddpm_tf import experiment
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.diffusion.schedules import Schedule, make_betas
from ddpm_tf.networks import UNet
from ddpm_tf.samplers.loop import begin, run_loop
from ddpm_tf.storage import checkpoints
from ddpm_tf.training.objective import Draws

DATA = os.path.join(os.path.dirname(__file__), "data")
REFERENCES = ("ho2020_a", "ho2020_b", "ho2020_f")
LEAVES = {"kernel": "W", "bias": "b"}


def pytest_configure():
    gc.freeze()  # as ddpm_tf/app.py
    cpus = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)


@pytest.fixture(scope="module", autouse=True)
def free_models():
    """Models are cycles of references: without this the process grows to 8 GB before Python looks for them."""
    yield
    gc.collect()


class Reference:
    """Values of the original code: arrays by key, the chain, and networks with the weights they were computed with."""

    def __init__(self, name):
        with np.load(os.path.join(DATA, f"{name}.npz"), allow_pickle=False) as arrays:
            self.arrays = {key: arrays[key] for key in arrays.files}
        with open(os.path.join(DATA, f"{name}.json")) as f:
            self.args = json.load(f)
        self._outputs = {}

    def __getitem__(self, key):
        return self.arrays[key]

    def diffusion(self, **kwargs):
        a = self.args
        betas = make_betas(a["schedule"], a["T"], beta_start=a["beta_start"], beta_end=a["beta_end"])
        return GaussianDiffusion(Schedule(betas), **kwargs)

    def network(self, out_channels=None, **kwargs):
        a = self.args
        network = UNet(
            (a["S"], a["S"], a["C"]),
            ch=a["ch"],
            ch_mult=a["ch_mult"],
            num_res_blocks=a["nrb"],
            attn_resolutions=a["attn"],
            out_channels=out_channels,
            **kwargs,
        )
        for v in network.variables:
            v.assign(drawn_weight(tf1_name(v.path), v.shape, a["seed"]))
        return network

    def output(self, x_t="x_t", out_channels=None):
        """The network's output on (x_t, t); x_t names an array: x_t, or q_sample, at which the losses are."""
        if (x_t, out_channels) not in self._outputs:
            network = self.network(out_channels)
            self._outputs[x_t, out_channels] = network({"x_t": self[x_t], "t": self["t"]})
        return self._outputs[x_t, out_channels]


def tf1_name(path):
    """The original's name of a variable."""
    scope, _, leaf = path.replace(".", "/").rpartition("/")
    return f"{scope}/{LEAVES.get(leaf, leaf)}"


def drawn_weight(name, shape, seed):
    """The weight that the reference values were computed with (reference/README.md)."""
    r = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + seed))
    leaf = name.rsplit("/")[-1]
    if leaf == "gamma":
        return (1 + 0.1 * r.standard_normal(shape)).astype(np.float32)
    if leaf in ("beta", "b"):
        return (0.1 * r.standard_normal(shape)).astype(np.float32)
    return (0.8 * r.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)


_references = {}


@pytest.fixture(params=REFERENCES)
def reference(request):
    if request.param not in _references:
        _references[request.param] = Reference(request.param)
    return _references[request.param]


@pytest.fixture(scope="session")
def reference_f():
    return Reference("ho2020_f")


@pytest.fixture(scope="session")
def small_network():
    """A network of 8x8x1 images with drawn weights, so that its output is far from 0 and depends on everything."""
    network = UNet((8, 8, 1), ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))
    for v in network.variables:
        v.assign(drawn_weight(tf1_name(v.path), v.shape, 3))
    return network


@functools.cache
def mirrored(replicas):
    """One strategy per process: the collectives of a second one would have the first one's numbers, and be taken for them."""
    if replicas == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy([f"CPU:{k}" for k in range(replicas)])


def run_chain(sampler, output_fn, x, seeds, **kwargs):
    """The Carry after running a sampler on a function (x_t, i) -> network output, from the state x; see `run_loop`."""

    def denoise(x, i, x_0=None):
        return sampler.diffusion.p_mean_variance(output_fn(x, i), x, i, clip=sampler.denoising.clip)

    return run_loop(sampler, denoise, begin(sampler, x), seeds, **kwargs)


def draw_from_tables(model, reference):
    """Let a model train on the timesteps and the noise that the original code drew."""

    def draws(index, step):
        t, eps = (tf.gather(tf.constant(reference[k]), step) for k in ("train_t", "train_eps"))
        return Draws(t, eps, tf.zeros([t.shape[0], 2], tf.int32))

    model.objective.draws = draws


def tiny_config(num_steps=4):
    """Digits with dropout and flips, so that every kind of draw takes part."""
    config = digits.get_config()
    config.data.batch_size = 8
    config.data.random_flip = True
    config.network.ch_mult = (1,)
    config.network.attn_resolutions = ()
    config.network.dropout = 0.1
    config.train.num_steps = num_steps
    config.train.log_every = 1
    config.train.checkpoint_every = 2
    config.train.sample_every = 0
    config.train.jit_compile = "off"
    config.sample.sampler, config.sample.spacing = "ddim", "uniform"
    config.sample.num_steps = 2
    config.sample.num_images = 5
    return config


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A finished run of 4 steps; not to be written to."""
    workdir = tmp_path_factory.mktemp("run") / "workdir"
    experiment.train(tiny_config(), str(workdir))
    return workdir


def state(workdir):
    return checkpoints.restore_latest(workdir / "ckpt")


def rows(workdir):
    """Of metrics.jsonl, without the timing; a row that is being written while this reads is not yet one."""
    timing = ("seconds", "images_per_s")
    lines = (workdir / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


def assert_the_same_end(workdir, uninterrupted):
    """The newest checkpoints hold the same step and the same bits, and the logs the same rows."""
    (step, tensors), (last, expected) = state(workdir), state(uninterrupted)
    assert step == last and tensors.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(tensors[name], expected[name], err_msg=name)
    assert rows(workdir) == rows(uninterrupted)
