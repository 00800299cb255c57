"""Keras networks; they know images, timesteps and labels, and nothing of diffusion."""

from ddpm_tf.choices import Choice
from ddpm_tf.networks.classifier import Classifier
from ddpm_tf.networks.unet import UNet

__all__ = ["NETWORKS", "Classifier", "UNet"]

_WAY_DOWN = (
    "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "dropout", "resamp_with_conv", "block_size", "remat", "theta",
    "num_groups",
)  # fmt: skip
NETWORKS = {"unet": Choice(UNet, _WAY_DOWN), "classifier": Choice(Classifier, _WAY_DOWN)}
