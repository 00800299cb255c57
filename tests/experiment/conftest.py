"""Small workdirs with drawn weights, none of which is to be written to."""

import functools
import json

import numpy as np
import pytest

from configs import digits
from ddpm_tf import builders
from ddpm_tf import config as config_lib
from ddpm_tf.experiment import inference
from ddpm_tf.experiment.run import read_run_config
from ddpm_tf.samplers import drawing
from ddpm_tf.storage.workdir import write_workdir
from tests.conftest import drawn_weight, tf1_name

CLASS_NAMES = ["zero", "cat, tabby", "0"]  # one with a comma, and one that is another class's number
STEPS, CHAIN = 4, 20


def make_workdir(path, class_names=(), **fields):
    """A workdir of 8x8 images, DDIM by 4 of 20 steps; fields: {section__name: value}."""
    config = digits.get_config()
    config.network.ch_mult, config.network.attn_resolutions = (1,), ()
    config.diffusion.num_timesteps = CHAIN
    if "diffusion__schedule" not in fields:
        config.diffusion.beta_end = 0.4  # so that such a short chain ends in noise
    config.sample.sampler, config.sample.spacing = "ddim", "uniform"
    config.sample.num_steps, config.sample.num_images = STEPS, 6
    for name, value in fields.items():
        config_lib.put(config, name.replace("__", "."), value)
    network = builders.build_network(config, builders.build_diffusion(config))
    average = {f"ema/{v.path}": drawn_weight(tf1_name(v.path), v.shape, 5) for v in network.variables}
    write_workdir(str(path), config, {"step": np.int64(0), **average})  # all that drawing reads
    if class_names:
        (path / "data.json").write_text(json.dumps({"class_names": class_names}))
    return str(path)


_ZERO_SNR = {"diffusion__schedule": "linear_zero_snr", "diffusion__prediction": "v"}
_CLASSIFIER = {"network__name": "classifier", "network__num_classes": 3, "train__loss": "cross_entropy"}
_WORKDIRS = {
    "plain": {},
    "classes": {"network__num_classes": 3, "class_names": CLASS_NAMES},
    "zero_snr": {**_ZERO_SNR, "network__num_classes": 3},
    "classifier": _CLASSIFIER,
    "classifier_16": {**_CLASSIFIER, "data__image_size": 16},
    "classifier_cosine": {**_CLASSIFIER, "diffusion__schedule": "cosine"},
    "classifier_zero_snr": {**_CLASSIFIER, **_ZERO_SNR},
}


@pytest.fixture(scope="session")
def made_workdirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workdirs")
    return functools.cache(lambda name: make_workdir(folder / name, **_WORKDIRS[name]))


@functools.cache
def loaded(load, workdir, ema, strategy):
    """A network of a workdir, without the settings of a command: it takes a second to build, and every job builds one."""
    return load(read_run_config(workdir), workdir, ema, strategy)


@pytest.fixture(scope="module")
def workdirs(made_workdirs):
    """workdirs(name) -> path. While a module uses them, a network is built once."""
    load = inference._load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "_load", lambda config, *args: loaded(load, *args)._replace(config=config))
        yield made_workdirs


@pytest.fixture
def nothing_is_drawn(monkeypatch):
    """Fail where anything is compiled."""

    def fail(*_, **__):
        raise AssertionError("something was compiled")

    for name in ("first_carry", "advance"):
        monkeypatch.setattr(drawing, name, fail)
