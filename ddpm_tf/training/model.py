"""`DiffusionModel` under the name that callers import it by."""

from ddpm_tf.training.trainer import DiffusionModel

__all__ = ["DiffusionModel"]
