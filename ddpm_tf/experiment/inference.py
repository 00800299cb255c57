"""A trained workdir, loaded to draw from."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from absl import logging
from ml_collections import ConfigDict

from ddpm_tf import builders
from ddpm_tf import config as config_lib
from ddpm_tf.cluster.strategy import configure_devices
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.errors import InputError
from ddpm_tf.experiment.run import read_run_config
from ddpm_tf.networks.contract import Network
from ddpm_tf.samplers.base import Sampler
from ddpm_tf.samplers.guidance import guided_by
from ddpm_tf.storage.bundles import assign
from ddpm_tf.storage.workdir import read_class_names, read_newest


class Inference(NamedTuple):
    """What a workdir holds for sampling: its config, the network with its weights, the diffusion, and the step.

    class_names: the name of class k at place k; empty where the data had no names.
    """

    config: ConfigDict
    network: Network
    diffusion: GaussianDiffusion
    step: int
    class_names: Sequence[str] = ()


def load_for_inference(workdir: str, *, ema: bool = True, strategy: tf.distribute.Strategy | None = None) -> Inference:
    """The network of a workdir's newest checkpoint, in float32 with TF32 off.

    Args:
        workdir: as written by `train`.
        ema: the moving average of the weights, else the weights themselves.
        strategy: where the network's variables are made; None: on one device.

    Raises:
        InputError: no such workdir, no checkpoint in it yet, or one that does not fit its config.
    """
    return _load(read_run_config(workdir), workdir, ema, strategy)


def _load(config: ConfigDict, workdir: str, ema: bool, strategy: tf.distribute.Strategy | None) -> Inference:
    configure_devices()
    step, tensors = read_newest(workdir)
    diffusion = builders.build_diffusion(config)
    with (strategy or tf.distribute.get_strategy()).scope():
        network = builders.build_network(config, diffusion)
    group = "ema/" if ema else "network/"
    wanted = {name: tensor for name, tensor in tensors.items() if name.startswith(group)}
    assign({group + v.path: v for v in network.variables}, wanted, f"The checkpoint of step {step}")
    return Inference(config, network, diffusion, step, read_class_names(workdir))


def with_sampling(config: ConfigDict, settings: Mapping[str, Any]) -> ConfigDict:
    """A workdir's config, with some fields of its `sample` section changed.

    Args:
        settings: {field: value}. With another sampler, the settings that only the workdir's sampler has go back to their
            defaults.

    Raises:
        InputError: values that cannot be used.
    """
    if settings.get("num_steps") == 0:
        raise InputError("num_steps must be within 1..T, the trained chain; found 0.")
    problems = (config_lib.type_problem("sample", name, value) for name, value in settings.items())
    config_lib.refuse([problem for problem in problems if problem], "The request to draw")
    if settings.get("sampler", config.sample.sampler) != config.sample.sampler:
        config.sample.sampler = settings["sampler"]
        if config.sample.sampler in builders.TABLES["sample.sampler"]:
            config = builders.without_foreign_settings(config, "The workdir's config.json")
    for name, value in settings.items():
        config.sample[name] = value
    config_lib.validate(config)
    for field, path in builders.foreign_settings(config):
        name, value = field.path.partition(".")[2], config_lib.get(config, field.path)
        raise InputError(
            f"--{name}={value} was given, but the sampler {config_lib.get(config, path)} has no such setting. Leave it out."
        )
    return config


def load_sampler(
    workdir: str,
    *,
    ema: bool = True,
    settings: Mapping[str, Any] | None = None,
    strategy: tf.distribute.Strategy | None = None,
    classifier: str = "",
) -> tuple[Inference, Sampler]:
    """A workdir to draw from, and its sampler.

    Args:
        classifier: the workdir of a classifier by which the network is to be guided; "": none.
        ema, strategy: see `load_for_inference`.
        settings: {field: value} of the config's `sample` section, instead of the workdir's.

    Raises:
        InputError: as `load_for_inference` and `with_sampling`.
    """
    config = with_sampling(read_run_config(workdir), settings or {})
    inference = _load(config, workdir, ema, strategy)
    if classifier:
        guide = load_classifier(classifier, inference, strategy=strategy)
        inference = inference._replace(network=guided_by(inference.network, guide))
    s = config.sample
    sampler = builders.build_sampler(config, inference.diffusion)
    if sampler.num_steps != (s.num_steps or sampler.num_steps):
        logging.info("Spacing %s drops repeated timesteps: %d steps are left.", s.spacing, sampler.num_steps)
    initial = config.train.ema_decay**inference.step
    if ema and inference.step and initial > 0.05:
        logging.warning(
            "The moving average still holds %.0f %% of the initial weights after %d steps: train longer, or sample with the "
            "weights themselves (--noema).",
            100 * initial,
            inference.step,
        )
    return inference, sampler


def check_classifier_scale(classifier: str, scale: float | None) -> None:
    """Refuse a scale that cannot be, or that has no classifier.

    Raises:
        InputError
    """
    if scale is None:
        return
    if not classifier:
        raise InputError(
            f"--classifier_scale={scale:g} was given without a classifier. Add --classifier=WORKDIR of a run of "
            "configs/digits_classifier.py, or leave it out."
        )
    if not -1e6 <= scale <= 1e6:  # NaN, too
        raise InputError(f"--classifier_scale must be within -1e6..1e6, found {scale}.")
