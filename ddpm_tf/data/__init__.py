"""Data sources, and batches addressed by training step."""

from ddpm_tf.data.manifest import manifest
from ddpm_tf.data.pipeline import make_dataset
from ddpm_tf.data.sources import load_source

__all__ = ["load_source", "make_dataset", "manifest"]
