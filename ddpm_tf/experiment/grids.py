"""The sample grids of a run, drawn by all of its replicas, and how bright they are beside the data."""

import functools
import os

import numpy as np
import tensorflow as tf
from absl import logging

from ddpm_tf import builders, images
from ddpm_tf.errors import InputError
from ddpm_tf.experiment.sampling import make_picture, sample_in_batches
from ddpm_tf.samplers.replicas import make_replica_sampler
from ddpm_tf.training.ema import make_ema_network

_COMPARED = 1024  # images of the data whose brightness is set beside the samples'


def grid_path(workdir, step, name="ema"):
    return os.path.join(workdir, "samples", f"step_{step:012d}_{name}.png")


def make_grids(config, model, source, workdir, summaries, strategy, cluster):
    """(draw, show): samples of the weights and of their average, from the same seeds, in float32.

    draw(step): this worker's part of them, by all its replicas, without talking to other workers. show(step, drawn): the
    chief writes the grids, and logs mean and deviation of their pixels beside the data's (a colour shift shows there).
    """
    sampler, s = builders.build_sampler(config, model.diffusion), config.sample
    share = -(-s.num_images // cluster.size)
    part = slice(cluster.index * share, (cluster.index + 1) * share)
    is_float32 = model.network.compute_dtype == "float32"
    with strategy.scope():
        networks = {"raw": model.network if is_float32 else make_ema_network(model.network), "ema": model.ema_network}
    draws = dict.fromkeys(networks)
    if strategy.num_replicas_in_sync > cluster.size:
        draws = {name: make_replica_sampler(strategy, n, sampler) for name, n in networks.items()}
    brightness_of_data = functools.cache(lambda: _brightness_of_data(source))

    def draw(step):
        if not is_float32:
            networks["raw"].set_weights(model.network.get_weights())
        tf.config.experimental.enable_tensor_float_32_execution(False)
        try:
            return {name: sample_in_batches(n, sampler, s, part=part, draw=draws[name]) for name, n in networks.items()}
        except (tf.errors.ResourceExhaustedError, MemoryError) as e:
            raise InputError(
                f"Out of memory while the grid of step {step} was drawn, sample.batch_size={s.batch_size} images at once: "
                f"lower it. The checkpoints in {workdir} are kept, and the same command goes on."
            ) from e
        finally:
            tf.config.experimental.enable_tensor_float_32_execution(config.train.tf32)

    def show(step, drawn):
        for name, own in drawn.items():
            everyone = np.zeros((s.num_images, *own.shape[1:]), np.int32)
            everyone[part] = own
            everyone = cluster.all_reduce(everyone).astype(np.uint8)
            if not cluster.is_chief:
                continue
            mean, deviation = everyone.mean(), everyone.std()
            logging.info(
                "step %d  pixels of the samples (%s): mean %.1f, deviation %.1f; of the data: %s",
                step, name, mean, deviation, brightness_of_data(),
            )  # fmt: skip
            summaries.scalar(f"pixel_mean_{name}", mean, step)
            summaries.scalar(f"pixel_deviation_{name}", deviation, step)
            grid = make_picture(everyone)
            summaries.image(f"samples_{name}", grid, step)
            images.save_png(grid_path(workdir, step, name), grid)

    return draw, show


def _brightness_of_data(source):
    """Mean and deviation of the first images, as text; a file that breaks is for training to tell."""
    count = min(source.num_examples, _COMPARED)
    try:
        data = source.read(tf.range(count, dtype=tf.int64))["image"].numpy()
    except tf.errors.OpError:
        return "unknown, an image cannot be read"
    return f"{data.mean():.1f}, {data.std():.1f} ({count} images)"
