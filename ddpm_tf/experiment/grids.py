"""The sample grids of a run, drawn by all of its replicas, and how bright they are beside the data."""

import functools
import os

import numpy as np
import tensorflow as tf
from absl import logging
from ml_collections import ConfigDict

from ddpm_tf import builders, files, images
from ddpm_tf.callbacks.metrics import Summaries
from ddpm_tf.data.contract import Source
from ddpm_tf.errors import InputError
from ddpm_tf.experiment.conditions import make_conditions
from ddpm_tf.experiment.generating import generate
from ddpm_tf.experiment.run import Run
from ddpm_tf.storage import workdir as workdir_lib
from ddpm_tf.training.ema import make_ema_network
from ddpm_tf.training.model import DiffusionModel

_COMPARED = 1024  # images of the data whose brightness is set beside the samples'


def grid_path(workdir: str, step: int, name: str = "ema") -> str:
    return os.path.join(workdir_lib.samples_folder(workdir), f"step_{step:012d}_{name}.png")


def has_pictures(config: ConfigDict, workdir: str, step: int) -> bool:
    """Whether the pictures of a step are there, as far as the run draws any: a classifier draws none."""
    return builders.is_classifier(config) or os.path.exists(grid_path(workdir, step))


class Grids:
    """Samples of the weights ("raw") and of their average ("ema"), from the same seeds, in float32."""

    def __init__(self, run: Run, model: DiffusionModel, summaries: Summaries | None) -> None:
        self.run, self.model, self.summaries = run, model, summaries
        self.sampler = builders.build_sampler(run.config, model.diffusion)
        self.is_float32 = model.network.compute_dtype == "float32"
        with run.strategy.scope():
            raw = model.network if self.is_float32 else make_ema_network(model.network)
        self.networks = {"raw": raw, "ema": model.ema_network}
        self.conditions = make_conditions(
            run.config, model.network, run.source.details.class_names, run.config.sample.num_images
        )
        share = -(-run.config.sample.num_images // run.cluster.size)
        self.part = slice(run.cluster.index * share, (run.cluster.index + 1) * share)
        self._brightness_of_data = functools.cache(lambda: _brightness(run.source))

    def is_drawn(self, step: int) -> bool:
        return has_pictures(self.run.config, self.run.workdir, step)

    def draw(self, step: int) -> dict[str, np.ndarray]:
        """{network: uint8 [N, H, W, C]}: this worker's part of the images. It does not talk to other workers."""
        s = self.run.config.sample
        logging.info(
            "Drawing two grids of %d images, %s with %d steps (%d network evaluations); this takes a while.",
            s.num_images,
            s.sampler,
            self.sampler.num_steps,
            self.sampler.num_evaluations,
        )
        if not self.is_float32:
            self.networks["raw"].set_weights(self.model.network.get_weights())
        tf.config.experimental.enable_tensor_float_32_execution(False)
        try:
            return {name: self._images(network) for name, network in self.networks.items()}
        except (tf.errors.ResourceExhaustedError, MemoryError) as e:
            raise InputError(
                f"Out of memory while the grid of step {step} was drawn, sample.batch_size={s.batch_size} images at once: "
                f"lower it. The checkpoints in {self.run.workdir} are kept, and the same command resumes the run."
            ) from e
        finally:
            tf.config.experimental.enable_tensor_float_32_execution(self.run.config.train.tf32)

    def _images(self, network: tf.keras.Model) -> np.ndarray:
        s = self.run.config.sample
        batches = generate(
            network,
            self.sampler,
            num_images=s.num_images,
            seed=s.seed,
            **self.conditions.keywords(),
            part=self.part,
            batch_size=s.batch_size,
            strategy=self.run.strategy,
        )
        parts = [batch.images for batch in batches]
        return np.concatenate([np.zeros((0, *network.image_shape), np.uint8), *parts])

    def show(self, step: int, drawn: dict[str, np.ndarray]) -> None:
        """Put the workers' parts together. The chief writes the grids, and logs mean and deviation of their pixels beside
        the data's, where a colour shift shows."""
        for name, own_part in drawn.items():
            all_images = np.zeros((self.run.config.sample.num_images, *own_part.shape[1:]), np.int32)
            all_images[self.part] = own_part
            all_images = self.run.cluster.all_reduce(all_images).astype(np.uint8)
            if self.summaries is None:  # not the chief
                continue
            mean, deviation = all_images.mean(), all_images.std()
            logging.info(
                "step %d  pixels of the samples (%s): mean %.1f, deviation %.1f; of the data: %s",
                step,
                name,
                mean,
                deviation,
                self._brightness_of_data(),
            )
            self.summaries.scalar(f"pixel_mean_{name}", mean, step)
            self.summaries.scalar(f"pixel_deviation_{name}", deviation, step)
            grid = images.picture(all_images, columns=self.conditions.columns)
            self.summaries.image(f"samples_{name}", grid, step)
            with files.atomic_file(grid_path(self.run.workdir, step, name), "wb", sync=False) as f:
                f.write(images.png_bytes(grid))


def _brightness(source: Source) -> str:
    """Mean and deviation of the first images, as text. A file that breaks is no error here: training reports it."""
    count = min(source.num_examples, _COMPARED)
    try:
        data = source.read(tf.range(count, dtype=tf.int64))["image"].numpy()
    except tf.errors.OpError:
        return "unknown, an image cannot be read"
    return f"{data.mean():.1f}, {data.std():.1f} ({count} images)"
