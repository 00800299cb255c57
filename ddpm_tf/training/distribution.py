"""Devices: what is set before any of them is used, and the strategy that training runs under."""

import tensorflow as tf
from absl import logging


def configure_devices(*, deterministic=False, tf32=False):
    """Grow GPU memory as needed, and compute in true float32 unless `tf32`, as the original's figures were.

    deterministic: only kernels that give the same bits every time, which on a GPU are slower; for the whole process.
    """
    for gpu in tf.config.list_physical_devices("GPU"):
        try:
            tf.config.experimental.set_memory_growth(gpu, True)
        except RuntimeError as e:  # in a notebook that has used the GPU already
            logging.warning("The memory growth of %s cannot be changed any more: %s", gpu, e)
    tf.config.experimental.enable_tensor_float_32_execution(tf32)
    if deterministic:
        tf.config.experimental.enable_op_determinism()


def make_strategy():
    """MirroredStrategy over all GPUs, or the default strategy where there is none."""
    if tf.config.list_physical_devices("GPU"):
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()
