"""Sampling from a workdir into a folder."""

import os
import sys
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from absl import logging
from tqdm import tqdm

from ddpm_tf import __version__, builders
from ddpm_tf import config as config_lib
from ddpm_tf.cluster.strategy import configure_devices, make_strategy
from ddpm_tf.errors import InputError
from ddpm_tf.experiment.conditions import make_conditions
from ddpm_tf.experiment.editing import Edit
from ddpm_tf.experiment.generating import generate
from ddpm_tf.experiment.inference import Inference, check_classifier_scale, load_sampler
from ddpm_tf.samplers.base import Sampler
from ddpm_tf.serving.model_card import weights_digest
from ddpm_tf.storage import workdir as workdir_lib
from ddpm_tf.storage.sample_folder import check_out, is_finished, open_folder, read_settings


def sample_images(
    workdir: str,
    *,
    out: str | None = None,
    ema: bool = True,
    png: bool = True,
    settings: Mapping[str, Any] | None = None,
    classifier: str = "",
    classifier_scale: float | None = None,
    edit: Edit = Edit(),  # noqa: B008 - immutable
) -> str:
    """Draw images of a workdir into a folder: images/, grid.png and samples.npz.

    Started again with the same settings, a run that was stopped goes on, and ends with the same files, byte for byte.

    Args:
        workdir: as written by `train`.
        out: a new or empty folder, or one that an earlier start left unfinished; None: one under the workdir's samples/,
            named after the settings.
        ema: sample with the moving average of the weights, else with the weights themselves.
        png: write images/, one PNG per image.
        settings: {field: value} of the config's `sample` section, instead of the workdir's.
        classifier: the workdir of a classifier that guides; "": none.
        classifier_scale: weight of its gradient; None: 1.
        edit: an image to begin from or to fill in.

    Returns:
        The folder.

    Raises:
        NumericsError: a sample that is not finite.
        InputError: settings that cannot be used, a workdir that cannot be read, a folder of something else.
        WorkdirError: a folder that cannot be written to, or that another process writes to.
    """
    if out:
        check_out(out)
    check_classifier_scale(classifier, classifier_scale)
    settings = edit.settings(dict(settings or {}))
    configure_devices()  # before the strategy is made, which takes the devices as they are
    num_gpus = len(tf.config.list_physical_devices("GPU"))
    strategy, _ = make_strategy("mirrored" if num_gpus > 1 else "default")
    inference, sampler = load_sampler(workdir, ema=ema, settings=settings, strategy=strategy, classifier=classifier)
    s, network = inference.config.sample, inference.network
    conditions = make_conditions(
        inference.config, network, inference.class_names, s.num_images, classifier_scale=classifier_scale
    )
    sampler = edit.apply(sampler, network.image_shape)
    record = {
        **_record(inference, sampler, ema, png, strategy.num_replicas_in_sync),
        **({"classifier_scale": 1.0 if classifier_scale is None else classifier_scale} if classifier else {}),
        **edit.record(),
    }
    out = out or _new_folder(workdir, inference, sampler, ema, record)
    log_sampler(s.sampler, sampler, s.num_images)
    with open_folder(out, record, network.image_shape) as folder:
        if folder.num_done:
            logging.info("%d of the %d images are in %s already.", folder.num_done, s.num_images, out)
        batches = generate(
            network,
            sampler,
            num_images=s.num_images,
            seed=s.seed,
            **conditions.keywords(),
            batch_size=s.batch_size,
            part=slice(folder.num_done, None),
            strategy=strategy,
        )
        try:
            with tqdm(total=s.num_images, initial=folder.num_done, unit=" images", desc="sampling") as bar:
                for batch in batches:
                    folder.add(batch.seeds, batch.images)
                    bar.update(len(batch.seeds))
        except (tf.errors.ResourceExhaustedError, MemoryError) as e:
            raise InputError(
                f"Out of memory while --batch_size={s.batch_size} images were drawn at once: lower it. --out={out} keeps what "
                "was drawn, which depends on the size of a batch, so choose another --out, too."
            ) from e
        folder.finish(conditions.labels, columns=conditions.columns)
    return out


def log_sampler(name: str, sampler: Sampler, num_images: int) -> None:
    """Log what is drawn, and at what cost."""
    logging.info(
        "Sampling %d images with %s, %d steps, %d network evaluations (NFE) for each image.",
        num_images,
        name,
        sampler.num_steps,
        sampler.num_evaluations,
    )


def _record(inference: Inference, sampler: Sampler, ema: bool, png: bool, replicas: int) -> dict[str, Any]:
    """All that the folder's files depend on, as JSON can hold it."""
    return {
        "ddpm_tf": __version__,
        "config_sha256": config_lib.digest(inference.config, unused=builders.unused_settings(inference.config)),
        "training_step": inference.step,
        "weights": "moving average" if ema else "weights",
        "weights_sha256": weights_digest(inference.network),
        **inference.config.sample.to_dict(),
        "num_steps": sampler.num_steps,
        "png": png,
        "replicas": replicas,
    }


def _new_folder(workdir: str, inference: Inference, sampler: Sampler, ema: bool, record: dict[str, Any]) -> str:
    """A path under the workdir's samples/ that does not exist yet, or that the same settings left unfinished."""
    s = inference.config.sample
    name = f"step_{inference.step:012d}_{s.sampler}{sampler.num_steps}_seed{s.seed}" + ("" if ema else "_raw")
    base = os.path.join(workdir_lib.samples_folder(workdir), name)
    candidates = (base if k == 1 else f"{base}_{k}" for k in range(1, sys.maxsize))
    return next(p for p in candidates if not os.path.exists(p) or (not is_finished(p) and read_settings(p) == record))
