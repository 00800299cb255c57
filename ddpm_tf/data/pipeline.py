"""Batches addressed by training step: which images step k sees depends on (seed, k) alone."""

import tensorflow as tf

from ddpm_tf import checks, rng
from ddpm_tf.data.contract import Source
from ddpm_tf.errors import InputError
from ddpm_tf.images import from_uint8


def batch_indices(step: tf.Tensor, *, num_examples: int, batch_size: int, seed: int) -> tf.Tensor:
    """The numbers of the examples of one global batch.

    Image j has the position p = step * batch_size + j. It is the image at place p % num_examples of the order of epoch
    p // num_examples. An epoch's order is a permutation of all numbers, drawn from (seed, epoch).

    Original: repeat, then shuffle(50000), which mixes epochs; here every epoch is a permutation, because then any step can
    be computed without the steps before it.

    Args:
        step: int scalar.

    Returns:
        int64 [batch_size].
    """
    positions = tf.cast(step, tf.int64) * batch_size + tf.range(batch_size, dtype=tf.int64)
    epoch, index = positions // num_examples, positions % num_examples
    seeds = tf.stack([tf.fill([batch_size], tf.constant(seed, tf.int64)), epoch, tf.zeros_like(epoch)], axis=1)
    # The op behind tf.random.experimental.index_shuffle, which takes one seed per call; a batch may span two epochs.
    return tf.raw_ops.RandomIndexShuffle(index=index, seed=seeds, max_index=num_examples - 1)


def make_dataset(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    random_flip: bool = False,
    replicas: tuple[int, int, int] = (0, 1, 1),
) -> tf.data.Dataset:
    """An endless dataset of batches, beginning with the batch of `start_step`.

    Args:
        source: where the images come from.
        batch_size: global batch size, of all replicas together.
        seed: of the order and of the flips.
        start_step: the first training step.
        random_flip: mirror each image with probability 1/2, drawn from (seed, step, position in the batch).
        replicas: (first, count, total). The global batch is cut into `total` equal parts, one per replica. The dataset
            gives the parts first, ..., first + count - 1 of each step, one after the other. (0, 1, 1): whole batches.

    Returns:
        elements {"image": float32 [B / total, H, W, C] in [-1, 1], ("label": int32 [B / total])}.

    Raises:
        InputError: a batch larger than the data set.
    """
    batch_size = checks.integer("batch_size", batch_size, low=1, high=2**31 - 1)
    seed = checks.integer("seed", seed, **checks.INT64)
    start_step = checks.integer("start_step", start_step, low=0, high=2**63 - 1)
    first, count, total = checks.integers("replicas", replicas, low=0, high=batch_size, shape=[3]).tolist()
    if not (1 <= count <= total - first and batch_size % total == 0):
        raise InputError(
            f"replicas must be (first, count, total) with first + count of at most total, and batch_size={batch_size} a "
            f"multiple of total; found {(first, count, total)}."
        )
    random_flip = checks.boolean("random_flip", random_flip)
    if batch_size > source.num_examples:
        raise InputError(
            f"batch_size={batch_size} is larger than the data set, which has {source.num_examples} images. Choose a batch_size "
            f"of at most {source.num_examples}, or use more images."
        )

    size = batch_size // total

    def load(k: tf.Tensor) -> dict[str, tf.Tensor]:
        step, begin = start_step + k // count, (first + tf.cast(k % count, tf.int32)) * size
        indices = batch_indices(step, num_examples=source.num_examples, batch_size=batch_size, seed=seed)
        batch = source.read(indices[begin : begin + size])
        images = tf.ensure_shape(batch["image"], [size, *source.image_shape])
        if random_flip:
            index = begin + tf.range(size)
            flip = rng.bernoulli(seed, 0.5, (1, 1, 1), purpose=rng.Purpose.FLIP, index=index, step=step)
            images = tf.where(flip, images[:, :, ::-1], images)
        return {**batch, "image": from_uint8(tf.cast(images, tf.float32))}

    numbers = tf.data.Dataset.range(tf.int64.max)
    return numbers.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(2)
