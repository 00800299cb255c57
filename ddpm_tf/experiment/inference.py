"""A trained workdir, loaded to draw from."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging
from ml_collections import ConfigDict

from ddpm_tf import builders
from ddpm_tf import config as config_lib
from ddpm_tf.cluster.strategy import configure_devices
from ddpm_tf.diffusion.process import GaussianDiffusion
from ddpm_tf.errors import InputError
from ddpm_tf.experiment.run import read_drawing_config, read_run_config
from ddpm_tf.networks import Classifier
from ddpm_tf.networks.contract import Network
from ddpm_tf.samplers.base import Sampler
from ddpm_tf.samplers.guidance import check_guided_chain, guided_by
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
        InputError: no such workdir, a classifier's, no checkpoint in it yet, or one that does not fit its config.
    """
    return _load(read_drawing_config(workdir), workdir, ema, strategy)


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
        InputError: as `load_for_inference` and `with_sampling`; a classifier that does not fit.
    """
    config = with_sampling(read_drawing_config(workdir), settings or {})
    inference = _load(config, workdir, ema, strategy)
    if classifier:
        guide = load_classifier(classifier, inference, strategy=strategy)
        inference = inference._replace(network=guided_by(inference.network, guide))
    s = config.sample
    sampler = builders.build_sampler(config, inference.diffusion)
    check_guided_chain(inference.network, sampler.diffusion.schedule)
    if sampler.num_steps != (s.num_steps or sampler.num_steps):
        logging.info("Spacing %s drops repeated timesteps: %d steps are left.", s.spacing, sampler.num_steps)
    if ema:
        _warn_of_young_average(inference, "train longer, or sample with the weights themselves (--noema)")
    return inference, sampler


def load_classifier(
    workdir: str, inference: Inference, *, strategy: tf.distribute.Strategy | None = None
) -> Classifier:
    """The classifier that guides the images of `inference`: the moving average of a workdir's newest checkpoint.

    Args:
        workdir: --classifier, as written by `train` with network.name=classifier.
        inference: the network that draws.
        strategy: as in `load_for_inference`.

    Raises:
        InputError: no such workdir, no classifier in it, or one of another chain, other images or other classes; no
            checkpoint in it yet.
    """
    config, drawing = read_run_config(workdir, flag="--classifier"), inference.config
    origin = f"--classifier={workdir}"
    if not builders.is_classifier(config):
        raise InputError(
            f"{origin} holds no classifier (network.name={config.network.name}). Train one: python run_train.py "
            "--config=configs/digits_classifier.py --workdir=..."
        )
    betas, own = (builders.build_diffusion(c).schedule.betas for c in (config, drawing))
    if betas.shape != own.shape or not np.allclose(betas, own, rtol=1e-6, atol=0):
        raise InputError(
            f"{origin} was trained on another chain ({_chain(config)}) than the network that draws ({_chain(drawing)}): its t "
            "means another amount of noise. Use a classifier of the same chain."
        )
    shape, own_shape = builders.image_shape(config), builders.image_shape(drawing)
    if shape != own_shape:
        raise InputError(
            f"{origin} was trained on images of {list(shape)}, and the network draws {list(own_shape)}. Use a classifier of "
            "the same images."
        )
    num_classes = getattr(inference.network, "num_classes", None)
    if num_classes not in (None, config.network.num_classes):
        raise InputError(
            f"{origin} knows {config.network.num_classes} classes, and the network that draws {num_classes}. Use a classifier "
            "of the same classes."
        )
    loaded = _load(config, workdir, True, strategy)
    assert isinstance(loaded.network, Classifier)
    _warn_of_young_average(loaded, f"train the classifier in {workdir} longer")
    return loaded.network


def _chain(config: ConfigDict) -> str:
    return f"{config.diffusion.schedule}, {config.diffusion.num_timesteps} timesteps"


def _warn_of_young_average(inference: Inference, advice: str) -> None:
    initial = inference.config.train.ema_decay**inference.step
    if inference.step and initial > 0.05:
        logging.warning(
            "The moving average still holds %.0f %% of the initial weights after %d steps: %s.",
            100 * initial,
            inference.step,
            advice,
        )


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
