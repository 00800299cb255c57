"""Batches addressed by training step: which images step k sees depends on (seed, k) alone."""

import tensorflow as tf

from ddpm_tf import rng
from ddpm_tf.errors import InputError
from ddpm_tf.images import from_uint8


def batch_indices(step, *, num_examples, batch_size, seed):
    """The examples of one global batch: position = step * batch_size + j; one permutation per (seed, epoch).

    Original: repeat, then shuffle(50000), which mixes epochs; here every epoch is a permutation, so that any
    step can be computed without the steps before it.

    Args:
        step: int64 scalar tensor.

    Returns:
        int64 [batch_size].
    """
    positions = tf.cast(step, tf.int64) * batch_size + tf.range(batch_size, dtype=tf.int64)
    epoch, index = positions // num_examples, positions % num_examples
    seeds = tf.stack([tf.fill([batch_size], tf.constant(seed, tf.int64)), epoch, tf.zeros_like(epoch)], axis=1)
    # The op behind tf.random.experimental.index_shuffle, which takes one seed per call only.
    return tf.raw_ops.RandomIndexShuffle(index=index, seed=seeds, max_index=num_examples - 1)


def make_dataset(source, *, batch_size, seed, start_step=0, random_flip=False, replicas=(0, 1, 1)):
    """An endless tf.data.Dataset of global batches, beginning with the batch of `start_step`.

    Args:
        source: a data source, see `sources`.
        batch_size: global batch size.
        seed: int.
        start_step: the first training step.
        random_flip: mirror each image with probability 1/2, drawn from (seed, step, position).
        replicas: (first, count, of): the batches of the replicas first, ..., first + count - 1 of `of`, one after the other,
            each B / of images, contiguous in the global batch.

    Returns:
        batches {"image": float32 [B, H, W, C] in [-1, 1], ("label": int32 [B])}.

    Raises:
        InputError: a batch larger than the data set.
    """
    if batch_size > source.num_examples:
        raise InputError(
            f"data.batch_size={batch_size} is larger than the data set, which has {source.num_examples} images."
        )

    first, count, of = replicas
    size = batch_size // of

    def load(k):
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
