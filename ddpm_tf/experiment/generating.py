"""Generating: a stream of batches of images, of which only one is in memory."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from ddpm_tf import images
from ddpm_tf.errors import InputError, NumericsError
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
    num_classes = getattr(network, "num_classes", None)
    return None if num_classes is None else np.arange(num_images, dtype=np.int32) % num_classes


def generate(
    network: Network,
    sampler: Sampler,
    *,
    num_images: int,
    seed: int = 0,
    labels: Any = None,
    guidance: float | None = None,
    batch_size: int = 64,
    part: slice = slice(None),
    strategy: tf.distribute.Strategy | None = None,
) -> Iterator[Batch]:
    """Images from the seeds seed, seed + 1, ..., batch by batch.

    Args:
        labels: one integer or num_images of them; None: the classes in turn, if the network has classes.
        guidance: weight of classifier-free guidance; None: conditional.
        batch_size: images at once, on all replicas together.
        part: which of the images are wanted.
        strategy: the strategy under which the network's variables were made; all its replicas draw. None: one device.

    Raises:
        NumericsError: an image is not finite; the message names its seed and the first timestep at fault.
        InputError: numbers out of range, labels or guidance that do not fit the network; before anything is drawn.
    """
    if num_images < 1 or batch_size < 1 or not -(2**63) <= seed <= 2**63 - num_images:
        raise InputError(
            "num_images and batch_size must be at least 1, and all seeds within 64 bits, found "
            f"{num_images}, {batch_size} and seed {seed}."
        )
    labels = labels_in_turn(network, num_images) if labels is None else labels
    check_conditions(network, num_images, labels, guidance)
    seeds = seed + np.arange(num_images, dtype=np.int64)[part]
    labels = None if labels is None else np.broadcast_to(labels, (num_images,))[part]
    draw = make_draw(network, sampler, strategy)
    return _batches(draw, network, sampler, seeds, labels, guidance, batch_size)


def _batches(
    draw: Callable[..., np.ndarray],
    network: Network,
    sampler: Sampler,
    seeds: np.ndarray,
    labels: np.ndarray | None,
    guidance: float | None,
    batch_size: int,
) -> Iterator[Batch]:
    for first in range(0, len(seeds), batch_size):
        rows = slice(first, first + batch_size)
        some_labels = None if labels is None else labels[rows]
        drawn = draw(seeds[rows], some_labels, guidance)
        is_bad = ~np.isfinite(drawn).reshape(len(drawn), -1).all(axis=1)
        if is_bad.any():
            k = first + int(np.argmax(is_bad))
            label = None if labels is None else labels[k : k + 1]
            raise NumericsError(_explain_not_finite(network, sampler, int(seeds[k]), label, guidance))
        yield Batch(seeds[rows], some_labels, images.to_uint8(drawn))


def _explain_not_finite(network: Network, sampler: Sampler, seed: int, labels: Any, guidance: float | None) -> str:
    """Draw the image once more, step by step, to find the first step at fault."""
    trace = sample(network, sampler, [seed], labels=labels, guidance=guidance, trace=1).trace
    assert trace is not None
    is_bad = ~np.isfinite(trace.x_t[:-1]).reshape(len(trace.index), -1).all(axis=1)
    t = sampler.diffusion.schedule.timesteps[trace.index[is_bad].max()]
    return f"The sample of seed {seed} is not finite from timestep t = {t} on: the weights are damaged."
