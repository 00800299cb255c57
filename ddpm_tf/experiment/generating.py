"""Generating: a stream of batches of images, of which only one is in memory."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from ddpm_tf import checks, images
from ddpm_tf.errors import NumericsError
from ddpm_tf.networks.contract import Network
from ddpm_tf.samplers import sample
from ddpm_tf.samplers.base import Sampler
from ddpm_tf.samplers.drawing import check_conditions, make_draw


class Batch(NamedTuple):
    """seeds int64 [n]; labels int32 [n], None for an unconditional network; images uint8 [n, H, W, C]."""

    seeds: np.ndarray
    labels: np.ndarray | None
    images: np.ndarray


def labels_in_turn(network: Network, num_images: int) -> np.ndarray | None:
    """The classes 0, 1, ..., num_classes - 1, 0, ..., int32 [num_images]; None for an unconditional network."""
    num_images = checks.integer("num_images", num_images, low=1, high=checks.MAX_IMAGES)
    num_classes = getattr(network, "num_classes", None)
    return None if num_classes is None else np.arange(num_images, dtype=np.int32) % num_classes


def generate(
    network: Network,
    sampler: Sampler,
    *,
    num_images: int,
    seed: int = 0,
    labels: Any = None,
    guidance: Any = None,
    classifier_scale: Any = None,
    batch_size: int = 64,
    part: slice = slice(None),
    strategy: tf.distribute.Strategy | None = None,
) -> Iterator[Batch]:
    """Images from the seeds seed, seed + 1, ..., batch by batch.

    Args:
        labels: num_images integers, or a plain one for all; None: the classes in turn, if the network has classes.
        guidance: weights of classifier-free guidance, num_images of them, or a plain number for all; None: conditional.
        classifier_scale: as guidance, of a network `guided_by` a classifier.
        batch_size: images at once, on all replicas together.
        part: which of the images are wanted.
        strategy: the strategy under which the network's variables were made; all its replicas draw. None: one device.

    Raises:
        NumericsError: an image is not finite; the message names its seed and the first timestep at fault.
        InputError: numbers out of range, labels or guidance that do not fit the network; before anything is drawn.
    """
    num_images = checks.integer("num_images", num_images, low=1, high=checks.MAX_IMAGES)
    batch_size = checks.integer("batch_size", batch_size, low=1, high=checks.MAX_BATCH)
    seed = checks.integer("seed", seed, low=-(2**63), high=2**63 - num_images)  # of the first image
    checks.memory(
        f"A batch of {min(batch_size, num_images):,} images of {list(network.image_shape)}",
        4 * min(batch_size, num_images) * math.prod(network.image_shape),
        "Choose a smaller batch_size.",
    )
    labels = labels_in_turn(network, num_images) if labels is None else labels
    conditions = check_conditions(network, num_images, labels, guidance, classifier_scale)
    seeds = seed + np.arange(num_images, dtype=np.int64)[part]
    conditions = {name: tensor.numpy()[part] for name, tensor in conditions.items()}
    return _batches(make_draw(network, sampler, strategy), network, sampler, seeds, conditions, batch_size)


def _batches(
    draw: Callable[..., np.ndarray],
    network: Network,
    sampler: Sampler,
    seeds: np.ndarray,
    conditions: dict[str, np.ndarray],
    batch_size: int,
) -> Iterator[Batch]:
    for first in range(0, len(seeds), batch_size):
        rows = slice(first, first + batch_size)
        drawn = draw(seeds[rows], **{name: values[rows] for name, values in conditions.items()})
        is_bad = ~np.isfinite(drawn).reshape(len(drawn), -1).all(axis=1)
        if is_bad.any():
            k = first + int(np.argmax(is_bad))
            only_k = {name: values[k : k + 1] for name, values in conditions.items()}
            raise NumericsError(_explain_not_finite(network, sampler, int(seeds[k]), only_k))
        labels = conditions.get("labels")
        yield Batch(seeds[rows], None if labels is None else labels[rows], images.to_uint8(drawn))


def _explain_not_finite(network: Network, sampler: Sampler, seed: int, conditions: dict[str, np.ndarray]) -> str:
    """Draw the image once more, step by step, to find the first step at fault."""
    trace = sample(network, sampler, [seed], trace=1, **conditions).trace  # type: ignore[arg-type]
    assert trace is not None
    is_bad = ~np.isfinite(trace.x_t[:-1]).reshape(len(trace.index), -1).all(axis=1)
    is_guided = conditions.keys() & {"guidance", "classifier_scale"}
    cause = "the guidance is too strong, or the weights are damaged" if is_guided else "the weights are damaged"
    t = sampler.diffusion.schedule.timesteps[sampler.plan.start[-1 - trace.index[is_bad].max()] - 1]
    return f"The sample of seed {seed} is not finite from timestep t = {t} on: {cause}."
