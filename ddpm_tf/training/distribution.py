"""Devices: what is set before any of them is used, and the strategy that training runs under."""

import tensorflow as tf


def configure_devices():
    """Grow GPU memory as needed, and compute in true float32 (TF32 off), as the original's figures were."""
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.experimental.enable_tensor_float_32_execution(False)


def make_strategy():
    """MirroredStrategy over all GPUs, or the default strategy where there is none."""
    if tf.config.list_physical_devices("GPU"):
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()
